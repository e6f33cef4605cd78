"""Temporal-delta spikes: a neuron sends the change of its count since the token before, and the receiver adds it up.

    n_t = clip(round(x_t / V))                            the count of `spike` under a given V
    s_t = n_t                                             without a dead zone
    s_t = s_{t−1} if |x_t / V − s_{t−1}| <= d else n_t    with a dead zone of d counts
    δ_t = s_t − s_{t−1}                                   what is sent; s = 0 before a document's first token
    x̂_t = s_t · V = x̂_{t−1} + δ_t · V                     what the receiver holds

The loop is closed: a change is taken from what the receiver holds, not from x_{t−1}. So errors do not add up, and
|x̂_t − x_t| <= max(d, 1/2) · V wherever nothing is clipped: x̂ tends to x as V goes to 0. Without a dead zone these are
the differences of rounded activations of O'Connor & Welling 2016 (arXiv:1611.02024), and x̂ is that of `spike`: all
tokens are computed at once. The dead zone is the delta network's (Neil et al. 2016, arXiv:1612.05571), a loop over
tokens. A linear layer W receives y_t = y_{t−1} + W (V δ_t), so a token costs the products of channels that changed.

V is one number a neuron or channel, never a token: s_{t−1} would be no integer in units of another V. Gradients are
those of `spike`, straight through to x_t, also where the level is held, from which x_t is at most d · V away; and
dx̂/dV = s. What is not finite makes x̂ NaN in that channel of that token; a dead zone holds the level over it.
"""

import math
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.documents import Documents, sequences_in, takes_cu_seqlens
from kernels.linear_attention._sharded import all_gather, cut_documents, run_from
from kernels.shapes import has_values
from kernels.spiking.neuron import LARGEST_THRESHOLD, LEAST_THRESHOLD, Gradient, spike


@takes_cu_seqlens
def delta_spike(
    x: Tensor,
    *,
    threshold: float | Tensor,
    dead_zone: float = 0.0,
    count_range: tuple[int, int] | None = None,
    gradient: Gradient = "plain",
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    documents: Documents | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What the receiver of temporal-delta spikes holds, x̂ = s · V.

    Args:
        x: `[B, T, D]`, floating.
        threshold: V, a number or a tensor [] or [D], which may be learned; clamped as in `spike`.
        dead_zone: d, in counts: 0, or from 1/2 on.
        count_range: (low, high) that s is clipped to; None does not clip.
        gradient: that of x, as in `spike`; "surrogate" only without a dead zone.
        initial_state: `[N, D]`, s before each sequence's first token; zeros by default.
        output_final_state: whether to return s after each sequence's last token, else None.
        documents: the N documents packed into B = 1; without them N = B.
        group: ranks that hold consecutive, equal shards of the sequence. `documents` and states then describe the whole
            sequence and are the same on every rank. With a dead zone ranks compute one after the other.

    Returns:
        x̂ `[B, T, D]` in x's dtype, and s `[N, D]`, float32 or float64 like the arithmetic, or None.

    Raises:
        ValueError: an argument or a shape that does not fit.
    """
    if dead_zone and gradient == "surrogate":
        raise ValueError("delta_spike: a held level has no surrogate gradient; use plain or clipped, or no dead zone")
    fixed = threshold.detach() if isinstance(threshold, Tensor) else threshold
    straight = spike(x, threshold=fixed if dead_zone else threshold, count_range=count_range, gradient=gradient)
    if not (dead_zone or output_final_state):
        return straight, None
    levels, final = delta_levels(
        x,
        threshold=fixed,
        dead_zone=dead_zone,
        count_range=count_range,
        initial_state=initial_state,
        output_final_state=output_final_state,
        documents=documents,
        group=group,
    )
    if not dead_zone:
        return straight, final
    # Adds 0, or NaN where x is not finite, and has the gradient of `spike`.
    return (levels * _clamped(threshold, levels)).to(x.dtype) + (straight - straight.detach()), final


@takes_cu_seqlens
@torch.no_grad()
def delta_levels(
    x: Tensor,
    *,
    threshold: float | Tensor,
    dead_zone: float = 0.0,
    count_range: tuple[int, int] | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    documents: Documents | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The levels s of `delta_spike`, integers `[B, T, D]` in float32 (float64 for float64 inputs), and its final state.

    Without gradients. Arguments and errors as in `delta_spike`.
    """
    low, high = (-math.inf, math.inf) if count_range is None else count_range
    _check(x, threshold, dead_zone, (low, high))
    # In units of V, in which levels are integers and so exact.
    ratios = _widen(x) / _clamped(threshold, _widen(x))
    run = partial(_hold, dead_zone=dead_zone, low=low, high=high)
    if group is not None:
        return _over_ranks(run, ratios, initial_state, output_final_state, documents, group, waits=dead_zone > 0)
    return run(ratios, initial_state=initial_state, output_final_state=output_final_state, documents=documents)


@torch.no_grad()
def delta_changes(
    levels: Tensor,
    *,
    initial_state: Tensor | None = None,
    documents: Documents | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The changes δ that are sent, `[B, T, D]`, of levels s of `delta_levels`; arguments as there."""
    batch, time, _ = levels.shape
    entering = None
    if group is not None:
        last = all_gather(levels[:, -1], group)
        rank = dist.get_rank(group)
        entering = last[rank - 1] if rank else torch.zeros_like(last[0])
        if documents is not None:
            shard = cut_documents(documents, batch, time, group)
            states = levels.new_zeros(len(shard.numbers), levels.shape[-1])
            if initial_state is not None:
                states.copy_(initial_state[shard.numbers[0] : shard.numbers[-1] + 1])
            if shard.continues:
                states[:1] = entering
            initial_state, documents = states, shard.pieces
        elif rank or initial_state is None:
            initial_state = entering
    sequences = sequences_in(batch, time, documents)
    before = levels.roll(1, dims=1).view(batch * time, -1)
    starts = torch.tensor(sequences.bounds[:-1], device=levels.device)
    before[starts] = torch.zeros_like(before[starts]) if initial_state is None else initial_state.to(before.dtype)
    return levels - before.view_as(levels)


def _check(x: Tensor, threshold: float | Tensor, dead_zone: float, bounds: tuple[float, float]) -> None:
    if x.dim() != 3 or x.numel() == 0 or not x.is_floating_point():
        raise ValueError(f"x must be floating-point [B, T, D] and not empty, got {x.dtype} {tuple(x.shape)}")
    if isinstance(threshold, Tensor):
        if not threshold.is_floating_point() or threshold.shape not in ((), x.shape[-1:]):
            raise ValueError(f"threshold must be floating [] or [{x.shape[-1]}], got {tuple(threshold.shape)}")
    elif not 0 < threshold < math.inf:
        raise ValueError(f"threshold is {threshold}: it must be positive and finite")
    if not (dead_zone == 0 or 0.5 <= dead_zone < math.inf):
        raise ValueError(f"dead_zone is {dead_zone}: it must be 0, or 1/2 or more; rounding alone holds less")
    if not bounds[0] <= 0 <= bounds[1]:
        raise ValueError(f"count_range {bounds} must include 0, the level before a document")


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _clamped(threshold: float | Tensor, like: Tensor) -> Tensor:
    """V in the dtype of the arithmetic, within the limits of `spike`."""
    value = torch.as_tensor(threshold, dtype=like.dtype, device=like.device)
    return value.clamp(LEAST_THRESHOLD, LARGEST_THRESHOLD)


def _hold(
    ratios: Tensor,
    *,
    initial_state: Tensor | None,
    output_final_state: bool,
    documents: Documents | None,
    dead_zone: float,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor | None]:
    """Levels of x / V on one rank, and the last one of each sequence."""
    batch, time, channels = ratios.shape
    sequences = sequences_in(batch, time, documents)
    if initial_state is not None and initial_state.shape != (len(sequences), channels):
        shape = tuple(initial_state.shape)
        raise ValueError(f"initial_state must be [N, D] = {(len(sequences), channels)}, got shape {shape}")
    levels = ratios.round().clamp_(low, high)
    if dead_zone:
        _hold_over_tokens(ratios, levels, sequences if documents is not None else None, initial_state, dead_zone)
    if not output_final_state:
        return levels, None
    ends = torch.tensor([end - 1 for end in sequences.bounds[1:]], device=levels.device)
    return levels, levels.reshape(batch * time, channels)[ends]


def _hold_over_tokens(
    ratios: Tensor, levels: Tensor, documents: Documents | None, initial_state: Tensor | None, dead_zone: float
) -> None:
    """Overwrite levels [B, T, D] where the one before is near enough."""
    if not has_values():
        # A plan needs no numbers, and would wait for the loop.
        return
    batch, time, channels = ratios.shape
    states = ratios.new_zeros(batch if documents is None else len(documents), channels)
    if initial_state is not None:
        states.copy_(initial_state)
    for n, (start, end) in enumerate(pairwise((0, time) if documents is None else documents.bounds)):
        level = states if documents is None else states[n : n + 1]
        for t in range(start, end):
            # A NaN is not near anything, and would stay as the level: > is false for it.
            level = torch.where((ratios[:, t] - level).abs_() > dead_zone, levels[:, t], level)
            levels[:, t] = level


def _over_ranks(
    run: partial[tuple[Tensor, Tensor | None]],
    ratios: Tensor,
    initial_state: Tensor | None,
    output_final_state: bool,
    documents: Documents | None,
    group: dist.ProcessGroup,
    waits: bool,
) -> tuple[Tensor, Tensor | None]:
    """`_hold` over context-parallel ranks. Where a level depends on the one before, a rank waits for the rank before.

    Which tokens hold a level depends on that level, so no rank can begin before it knows its own.
    """
    batch, time, channels = ratios.shape
    shard = None if documents is None else cut_documents(documents, batch, time, group)
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    entering = ratios.new_zeros(batch, channels)
    if waits and rank:
        dist.recv(entering, group=group, group_src=rank - 1)

    def run_and_pass_on(own: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        levels, final = run(own, **options)
        # Here, before the exchange of final states, in which the next rank takes part once it knows this level.
        if waits and rank + 1 < world:
            dist.send(levels[:, -1].contiguous(), group=group, group_dst=rank + 1)
        return levels, final

    return run_from(run_and_pass_on, [ratios], entering, shard, group, initial_state, output_final_state)
