"""Interface of the token mixers, and the steps that several of them share."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.attention import KeysValues
from kernels.autograd import derive, label
from kernels.convolution import causal_conv1d
from kernels.documents import Documents
from models.compression import TokenRows
from models.config import Rotary
from models.parameters import Drawing, Groups, Init, Module, Placement
from models.sinks import SinkKeys


@dataclass(frozen=True)
class SequenceInfo:
    """Per-micro-batch information that layers need besides activations.

    Attributes:
        cos: Rotary cosines, one row per token; None if the layer has no rotary embedding.
        sin: Rotary sines.
        documents: Documents packed into the row; None if every row is one sequence.
        lower_bound: Lower bound of the layer's decays, float32 [D] in (0, 1); None for 0.
        group: Context-parallel ranks, which hold consecutive shards of the sequence; None if this rank has all of it.
            documents then cover the whole sequence, while all other fields cover this rank's tokens.
        token_keys: Unique keys of the tokens for the routers' noise, int64 [T, B], sharded like the residual stream;
            None without noise.
        rows: The tokens' numbers in the batch of the step, for the noise of compression.
        sinks: The layer's sink tokens; None if the model has none.
        are_sinks: Whether the tokens are the sinks, whose keys and values go into `sinks`. They count neither for
            statistics nor for auxiliary losses: how often they are computed depends on the layout.
        experts: Recorded choice of the layer's router, int16 [T, B, k], sharded like the residual stream; None if it
            chooses itself.
    """

    cos: Tensor | None = None
    sin: Tensor | None = None
    documents: Documents | None = None
    lower_bound: Tensor | None = None
    group: dist.ProcessGroup | None = None
    token_keys: Tensor | None = None
    rows: TokenRows | None = None
    sinks: SinkKeys | None = None
    are_sinks: bool = False
    experts: Tensor | None = None


class KeyValueStore(Protocol):
    """Holds the keys and values of a softmax layer in memory of its own, see models.generation.key_values."""

    def attend(self, q: Tensor, entries: dict[str, Tensor], sinks: KeysValues | None) -> Tensor:
        """Add the keys and values of new tokens, and attend from these tokens to all that each of them sees.

        Args:
            q: Queries of the new tokens, [B, T, H, K].
            entries: Their keys and values [B, T, Hkv, ...] by name, see `FullAttention.entries`.
            sinks: Keys and values that all of them see, see kernels.attention.

        Returns:
            [B, T, H, V] in q's dtype.
        """


@dataclass
class LayerCache:
    """State that one layer carries from token to token in generation; each mixer defines its own entries.

    Attributes:
        tensors: Entries of a mixer, each [B, ...].
        branches: Caches of the mixers of parallel branches.
        sinks: The layer's sink tokens, once they have been computed.
        store: Keys and values of a softmax mixer. None keeps them in `tensors`, for rows of equal lengths.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    branches: dict[int, "LayerCache"] = field(default_factory=dict)
    sinks: SinkKeys | None = None
    store: KeyValueStore | None = None

    def repeated(self, rows: int) -> "LayerCache":
        """The state of one row, copied for so many rows that continue it. Keeps the graph of gradients."""
        assert self.store is None, "a store's memory is not copied"
        tensors = {name: x.repeat_interleave(rows, dim=0) for name, x in self.tensors.items()}
        branches = {number: branch.repeated(rows) for number, branch in self.branches.items()}
        return LayerCache(tensors, branches, self.sinks)

    def keep(self, name: str, state: Tensor | None) -> None:
        """Store a kernel's final state."""
        assert state is not None, "kernels return a final state when they are asked for one"
        self.tensors[name] = state


class Mixer(Module):
    """A token mixer: `forward(x [T, B, D], info, cache=None) -> [T, B, D]`, causal, without mixing documents.

    With a cache, x continues the sequences whose state it holds, and the cache is updated.

    Attributes:
        rotary: (rotated channels, base, scaling) of the rotary embedding whose cosines and sines `info` must provide;
            None for none.
        head_counts: Names of the attributes that count heads, which are divided among tensor-parallel ranks.
    """

    head_counts: ClassVar[tuple[str, ...]] = ()
    in_region: ClassVar = True
    rotary: Rotary | None = None

    def set_groups(self, groups: Groups) -> None:
        """Divide the head counts by the number of tensor-parallel ranks."""
        super().set_groups(groups)
        if groups.tensor is not None:
            for name in self.head_counts:
                setattr(self, name, getattr(self, name) // dist.get_world_size(groups.tensor))


def split_heads(x_TBD: Tensor, num_heads: int) -> Tensor:
    """View [T, B, H*K] as [B, T, H, K], the layout of the kernels."""
    return x_TBD.unflatten(-1, (num_heads, -1)).transpose(0, 1)


def merge_heads(x_BTHK: Tensor) -> Tensor:
    """Reshape [B, T, H, K] to [T, B, H*K] for the output projection."""
    merged = _merged(x_BTHK)
    # A copy, unless heads lie beside each other. Attention's output may have any order of dimensions: if the operation
    # does not save it, this copy is stored, which has the same order in every layout.
    derive(merged, _merged, (x_BTHK,), stores_inputs=False)
    return merged


def _merged(x_BTHK: Tensor) -> Tensor:
    return x_BTHK.transpose(0, 1).flatten(-2)


def run_recurrence(
    kernel: Callable[..., tuple[Tensor, Tensor | None]],
    *inputs: Tensor,
    info: SequenceInfo,
    cache: LayerCache | None,
) -> Tensor:
    """Run a linear-attention kernel. A cache provides the initial state, whose memory may receive the final one."""
    # Context-parallel ranks save other tensors before these.
    label(**{f"input_{place}": x for place, x in enumerate(inputs)})
    o, state = kernel(
        *inputs,
        initial_state=None if cache is None else cache.tensors.get("state"),
        output_final_state=cache is not None,
        documents=info.documents,
        group=info.group,
        reuse_state=cache is not None,
    )
    if cache is not None:
        cache.keep("state", state)
    return o


def run_convolution(x_TBD: Tensor, weight: Tensor, name: str, info: SequenceInfo, cache: LayerCache | None) -> Tensor:
    """Apply a short convolution with SiLU to x [T, B, D]; the cache keeps its last inputs under `name`."""
    y, state = causal_conv1d(
        x_TBD.transpose(0, 1),
        weight,
        initial_state=None if cache is None else cache.tensors.get(name),
        output_final_state=cache is not None,
        documents=info.documents,
        group=info.group,
        reuse_state=cache is not None,
    )
    if cache is not None:
        cache.keep(name, state)
    return y.transpose(0, 1)


def draw_dt_bias(size: int, generator: torch.Generator) -> Tensor:
    """Inverse softplus of steps dt, log-uniform in [1e-3, 1e-1]: float32 [size] (as in Mamba, arXiv 2312.00752)."""
    low, high = math.log(1e-3), math.log(1e-1)
    # The lower bound is dt_init_floor of Mamba's code.
    dt = torch.empty(size).uniform_(low, high, generator=generator).exp_().clamp_(min=1e-4)
    # softplus^-1(dt) = log(e^dt - 1) = dt + log(1 - e^-dt), which keeps its digits at small dt.
    return dt + torch.log(-torch.expm1(-dt))


def decay_placements(draw: Callable[[Drawing], tuple[Tensor, Tensor]]) -> dict[str, Placement]:
    """Placements of A_log and dt_bias, both sharded with the heads; `draw` returns both, from one random stream."""

    def part(number: int) -> Init:
        def copy(block: Tensor, drawing: Drawing) -> None:
            # A_log and dt_bias come from the same stream, so each call draws both and keeps one.
            block.copy_(draw(drawing)[number])

        return copy

    placement = partial(Placement, shard_axis=0, float32=True, decayed=False, stream="decay")
    return {"A_log": placement(part(0)), "dt_bias": placement(part(1))}
