"""Temporal-delta spikes: a neuron sends the change of its count since the previous token, and the receiver sums them.

    n_t = clip(round(x_t / V))                            the count of `spike` under a given V
    s_t = n_t                                             the level, without a dead zone
    s_t = s_{t−1} if |x_t / V − s_{t−1}| <= d else n_t    the level, with a dead zone of d counts
    δ_t = s_t − s_{t−1}                                   the change that is sent; s = 0 before a document's first token
    x̂_t = s_t · V = x̂_{t−1} + δ_t · V                     the receiver's value

Each change is relative to the receiver's level s_{t−1}, not to x_{t−1}. Errors therefore do not accumulate:
|x̂_t − x_t| <= max(d, 1/2) · V wherever no count is clipped, and x̂ tends to x as V tends to 0. A linear layer W computes
y_t = y_{t−1} + W (V δ_t), so a token costs products only for the channels that changed.

Without a dead zone, the changes are the differences of rounded activations of O'Connor & Welling 2016
(arXiv:1611.02024). x̂ then equals that of `spike`, and all tokens are computed at once. The dead zone comes from delta
networks (Neil et al. 2016, arXiv:1612.05571) and needs a loop over tokens.

V is one number per neuron or per channel. A V per token is impossible, because s_{t−1} would not be an integer in units
of a different V. Gradients are those of `spike`: straight through to x_t, and dx̂/dV = s. The same rule applies where
the dead zone keeps the level, from which x_t is then at most d · V away. A non-finite x_t makes x̂_t NaN in its channel;
with a dead zone, the level stays as it was.
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
    """Compute x̂ = s · V, the receiver's values for temporal-delta spikes of x.

    Args:
        x: `[B, T, D]`, floating.
        threshold: V, a number or a tensor [] or [D], which may be learned; clamped as in `spike`.
        dead_zone: d, in counts: 0, or 1/2 or more.
        count_range: (low, high) to clip s to; None does not clip.
        gradient: the rule for x's gradient, as in `spike`; "surrogate" only without a dead zone.
        initial_state: `[N, D]`, s before each sequence's first token; zeros by default.
        output_final_state: whether to return s after each sequence's last token.
        documents: the N documents packed into B = 1; without them N = B.
        group: context-parallel ranks, which hold consecutive, equal shards of the sequence. `documents` and states then
            describe the whole sequence and are the same on every rank. With a dead zone, each rank waits for the
            previous one.

    Returns:
        x̂ `[B, T, D]` in x's dtype, and the final s `[N, D]` in the dtype of the arithmetic (float32, or float64 for
        float64 inputs), or None.

    Raises:
        ValueError: an argument or a shape does not fit.
    """
    if dead_zone and gradient == "surrogate":
        raise ValueError(
            f"delta_spike: gradient=surrogate is not defined with dead_zone={dead_zone}; use gradient=plain or "
            "gradient=clipped, or dead_zone=0"
        )
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
    # The second term is 0, or NaN where x is not finite, and carries the gradient of `spike`.
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
    """Return the levels s of `delta_spike` and its final state. No gradients.

    Levels are integers `[B, T, D]`, stored as float32 (float64 for float64 inputs). Arguments and errors are those of
    `delta_spike`.
    """
    low, high = (-math.inf, math.inf) if count_range is None else count_range
    _check(x, threshold, dead_zone, (low, high))
    # Compute in units of V, where levels are integers and therefore exact.
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
    """Return the changes δ `[B, T, D]` that are sent for levels `[B, T, D]`. Other arguments as in `delta_levels`."""
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
        raise ValueError(
            f"dead_zone is {dead_zone}: it must be 0, or 1/2 or more, as rounding alone is off by up to 1/2"
        )
    if not bounds[0] <= 0 <= bounds[1]:
        raise ValueError(f"count_range {bounds} must include 0, which is the level before a document's first token")


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _clamped(threshold: float | Tensor, like: Tensor) -> Tensor:
    """Return V in the dtype of the arithmetic, clamped to the limits of `spike`."""
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
    """Return the levels for `ratios` = x / V on one rank, and the last level of each sequence."""
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
    """Overwrite each level in [B, T, D] with the previous one if x / V is within the dead zone."""
    if not has_values():
        # `spiketrain plan` needs no values, and the loop would only take time.
        return
    batch, time, channels = ratios.shape
    states = ratios.new_zeros(batch if documents is None else len(documents), channels)
    if initial_state is not None:
        states.copy_(initial_state)
    for n, (start, end) in enumerate(pairwise((0, time) if documents is None else documents.bounds)):
        level = states if documents is None else states[n : n + 1]
        for t in range(start, end):
            # The comparison is false for a NaN, so the level is held. `<=` would let the NaN replace the level.
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
    """Run `_hold` over context-parallel ranks.

    If `waits`, levels depend on previous levels (dead zone), and each rank first receives the previous rank's last
    level. Which tokens hold a level depends on the level itself, so no rank can start earlier.
    """
    batch, time, channels = ratios.shape
    shard = None if documents is None else cut_documents(documents, batch, time, group)
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    entering = ratios.new_zeros(batch, channels)
    if waits and rank:
        dist.recv(entering, group=group, group_src=rank - 1)

    def run_and_pass_on(own: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        levels, final = run(own, **options)
        # Send before the exchange of final states. The next rank joins it only after it has received this level.
        if waits and rank + 1 < world:
            dist.send(levels[:, -1].contiguous(), group=group, group_dst=rank + 1)
        return levels, final

    return run_from(run_and_pass_on, [ratios], entering, shard, group, initial_state, output_final_state)
