"""What every token mixer takes and gives, and the steps that several of them share."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.convolution import causal_conv1d
from kernels.documents import Documents
from models.parameters import Drawing, Groups, Init, Module, Placement


@dataclass(frozen=True)
class SequenceInfo:
    """What a layer needs to know of a micro-batch beside its activations.

    Attributes:
        cos: Rotary cosines, one row per token; None where the layer does not rotate.
        sin: Rotary sines.
        documents: Those packed into the row; None where every row is one sequence.
        lower_bound: Bound of the layer's decays from below, float32 [D] in (0, 1); None for 0.
        group: Ranks that hold consecutive parts of the sequence; None where this one has the whole. documents are
            then those of the whole, the rest belongs to this rank's tokens.
        token_keys: What tells tokens apart, for the noise of routers, int64 [T, B] as the residual stream is cut; None
            without noise.
    """

    cos: Tensor | None = None
    sin: Tensor | None = None
    documents: Documents | None = None
    lower_bound: Tensor | None = None
    group: dist.ProcessGroup | None = None
    token_keys: Tensor | None = None


@dataclass
class LayerCache:
    """What one layer carries from token to token in generation; each mixer keeps its own entries.

    Attributes:
        tensors: The entries of a mixer.
        branches: The caches of the mixers that run side by side.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    branches: dict[int, "LayerCache"] = field(default_factory=dict)

    def keep(self, name: str, state: Tensor | None) -> None:
        """Remember what a kernel returned as its final state."""
        assert state is not None, "kernels return a final state when they are asked for one"
        self.tensors[name] = state


class Mixer(Module):
    """A token mixer: `forward(x [T, B, D], info, cache=None) -> [T, B, D]`, causal, documents kept apart.

    With a cache, x continues the sequences whose state the cache holds, and the cache is brought up to date.

    Attributes:
        rotary: (head size, base) of the rotary embedding whose cosines and sines `info` shall hold; None for none.
        head_counts: The attributes that count heads, of which a tensor-parallel rank has its share.
    """

    head_counts: ClassVar[tuple[str, ...]] = ()
    in_region: ClassVar = True
    rotary: tuple[int, float] | None = None

    def set_groups(self, groups: Groups) -> None:
        """Keep the number of this rank's heads."""
        super().set_groups(groups)
        if groups.tensor is not None:
            for name in self.head_counts:
                setattr(self, name, getattr(self, name) // dist.get_world_size(groups.tensor))


def split_heads(x_TBD: Tensor, num_heads: int) -> Tensor:
    """[T, B, H*K] as the [B, T, H, K] view that the kernels take."""
    return x_TBD.unflatten(-1, (num_heads, -1)).transpose(0, 1)


def merge_heads(x_BTHK: Tensor) -> Tensor:
    """[B, T, H, K] as [T, B, H*K], for the projection back into the residual stream."""
    return x_BTHK.transpose(0, 1).flatten(-2)


def run_recurrence(
    kernel: Callable[..., tuple[Tensor, Tensor | None]],
    *inputs: Tensor,
    info: SequenceInfo,
    cache: LayerCache | None,
) -> Tensor:
    """The output of a linear-attention kernel whose state, if there is a cache, comes from it and goes back to it."""
    o, state = kernel(
        *inputs,
        initial_state=None if cache is None else cache.tensors.get("state"),
        output_final_state=cache is not None,
        documents=info.documents,
        group=info.group,
    )
    if cache is not None:
        cache.keep("state", state)
    return o


def run_convolution(x_TBD: Tensor, weight: Tensor, name: str, info: SequenceInfo, cache: LayerCache | None) -> Tensor:
    """Pass x [T, B, D] through a short convolution with SiLU; the cache keeps its last inputs as `name`."""
    y, state = causal_conv1d(
        x_TBD.transpose(0, 1),
        weight,
        initial_state=None if cache is None else cache.tensors.get(name),
        output_final_state=cache is not None,
        documents=info.documents,
        group=info.group,
    )
    if cache is not None:
        cache.keep(name, state)
    return y.transpose(0, 1)


def draw_dt_bias(size: int, generator: torch.Generator) -> Tensor:
    """Inverse softplus of steps dt, log-uniform in [1e-3, 1e-1]: float32 [size] (Mamba's start, arXiv 2312.00752)."""
    low, high = math.log(1e-3), math.log(1e-1)
    dt = torch.empty(size).uniform_(low, high, generator=generator).exp_().clamp_(min=1e-4)
    return dt + torch.log(-torch.expm1(-dt))


def decay_placements(draw: Callable[[Drawing], tuple[Tensor, Tensor]]) -> dict[str, Placement]:
    """Of A_log and dt_bias, both sharded with the heads; `draw` gives both, for they come from one stream."""

    def part(number: int) -> Init:
        def copy(block: Tensor, drawing: Drawing) -> None:
            block.copy_(draw(drawing)[number])

        return copy

    placement = partial(Placement, shard_axis=0, float32=True, decayed=False, stream="decay")
    return {"A_log": placement(part(0)), "dt_bias": placement(part(1))}
