"""What every token mixer takes and gives."""

from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass(frozen=True)
class SequenceInfo:
    """What the mixers need to know of a micro-batch beside its activations.

    Attributes:
        cos: Rotary cosines, one row per token; None where no layer rotates.
        sin: Rotary sines.
        cu_seqlens: Borders of the packed documents, int32 [N+1]; None where every row is one sequence.
    """

    cos: Tensor | None = None
    sin: Tensor | None = None
    cu_seqlens: Tensor | None = None


@dataclass
class LayerCache:
    """What one layer carries from token to token in generation; each mixer keeps its own entries."""

    tensors: dict[str, Tensor] = field(default_factory=dict)

    def keep(self, name: str, state: Tensor | None) -> None:
        """Remember what a kernel returned as its final state."""
        assert state is not None, "kernels return a final state when they are asked for one"
        self.tensors[name] = state


class Mixer(nn.Module):
    """A token mixer: `forward(x [T, B, D], info, cache=None) -> [T, B, D]`, causal, documents kept apart.

    With a cache, x continues the sequences whose state the cache holds, and the cache is brought up to date.
    """


def split_heads(x_TBD: Tensor, num_heads: int) -> Tensor:
    """[T, B, H*K] as the [B, T, H, K] view that the kernels take."""
    return x_TBD.unflatten(-1, (num_heads, -1)).transpose(0, 1)


def merge_heads(x_BTHK: Tensor) -> Tensor:
    """[B, T, H, K] as [T, B, H*K], for the projection back into the residual stream."""
    return x_BTHK.transpose(0, 1).flatten(-2)
