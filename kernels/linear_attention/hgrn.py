"""HGRN (Qin et al. 2023, arXiv 2311.04823, eq. 5): a gated recurrence of vectors, every channel for itself.

    h_t = exp(log_decay_t) h_{t-1} + x_t

Chunked form: all chunks of all sequences run from zero at once, one token of each at a time, and so do the products P
of their decays; then the state is carried from chunk to chunk, and what it adds to a token, P_i times the state at the
chunk's start, is added everywhere at once. Products of numbers <= 1 only, so nothing overflows.
"""

from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.autograd import once_differentiable
from kernels.backend import resolve
from kernels.linear_attention._chunks import (
    ChunkLayout,
    chunk_layout,
    compute_dtype,
    implementations,
    sequence_bounds,
)
from kernels.linear_attention._sharded import decays_after, run_sharded
from kernels.triton import implementations as with_triton

# A segment's tokens are this many times those of the other recurrences: its work is a step for every slot of a chunk,
# and small steps are all overhead.
_SEGMENT_FACTOR = 4


def hgrn_reference(
    x: Tensor, log_decay: Tensor, *, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token; arguments as in `hgrn`, always returns the final state."""
    bounds = _check(x, log_decay, initial_state, cu_seqlens)
    dtype = compute_dtype(x, log_decay, initial_state)
    x_TD, decay_TD = (tensor.to(dtype).flatten(0, 1) for tensor in (x, log_decay.exp()))
    outputs, finals = [], []
    for n, (start, end) in enumerate(pairwise(bounds)):
        state = x_TD.new_zeros(x.shape[-1]) if initial_state is None else initial_state[n].to(dtype)
        for t in range(start, end):
            state = decay_TD[t] * state + x_TD[t]
            outputs.append(state)
        finals.append(state)
    return torch.stack(outputs).view(x.shape).to(x.dtype), torch.stack(finals)


def _check(x: Tensor, log_decay: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    if x.dim() != 3 or not x.is_floating_point() or x.numel() == 0:
        raise ValueError(
            f"x must be a floating-point tensor [B, T, D] that is not empty, got {tuple(x.shape)} {x.dtype}"
        )
    if log_decay.shape != x.shape or not log_decay.is_floating_point():
        raise ValueError(
            f"log_decay must be a floating-point tensor of x's shape {tuple(x.shape)}, got {tuple(log_decay.shape)} "
            f"{log_decay.dtype}"
        )
    bounds = sequence_bounds(x.shape[0], x.shape[1], cu_seqlens)
    if initial_state is not None and initial_state.shape != (len(bounds) - 1, x.shape[2]):
        raise ValueError(
            f"initial_state must be [N, D] = {(len(bounds) - 1, x.shape[2])}, got {tuple(initial_state.shape)}"
        )
    return bounds


def _packed(layout: ChunkLayout, x: Tensor, dtype: torch.dtype) -> Tensor:
    """`[B, T, D]` as `[N, C, D]`."""
    return layout.pack(x[:, :, None], 1, dtype)


def _unpack(layout: ChunkLayout, x_NCD: Tensor, into: Tensor) -> None:
    """`[N, C, D]` into `[B, T, D]`."""
    layout.unpack(x_NCD, into[:, :, None])


def _scan(
    layout: ChunkLayout, x_NCD: Tensor, decay_NCD: Tensor, state: Tensor, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """h_i = decay_i h_{i-1} + x_i from `state` `[N_sequences, D]` on, which becomes the final state in place.

    In reverse, h_i = x_i + decay_{i+1} h_{i+1}, and the state is decay_i h_i of a chunk's first token: what reaches the
    token before it. Returns h `[N, C, D]` and the state that each chunk met `[N, D]`.
    """
    slots = range(x_NCD.shape[1])[:: -1 if reverse else 1]
    h_NCD, products = torch.empty_like(x_NCD), torch.empty_like(x_NCD)
    h_NCD[:, slots[0]] = x_NCD[:, slots[0]]
    products[:, slots[0]] = 1 if reverse else decay_NCD[:, slots[0]]
    for before, slot in pairwise(slots):
        decay = decay_NCD[:, before if reverse else slot]
        torch.addcmul(x_NCD[:, slot], decay, h_NCD[:, before], out=h_NCD[:, slot])
        torch.mul(products[:, before], decay, out=products[:, slot])
    met = torch.empty_like(x_NCD[:, 0])
    for first, count in reversed(layout.spans) if reverse else layout.spans:
        chunks, active = slice(first, first + count), state[:count]
        met[chunks] = active
        last = torch.addcmul(h_NCD[chunks, slots[-1]], products[chunks, slots[-1]], active)
        torch.mul(last, decay_NCD[chunks, 0], out=active) if reverse else active.copy_(last)
    return h_NCD.addcmul_(products, met[:, None]), met


class _ChunkedHGRN(torch.autograd.Function):
    """The chunked form, by segments. Saves its inputs but x, h, and the state at each chunk's start."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, log_decay: Tensor, initial_state: Tensor | None, layout: ChunkLayout
    ) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(x, log_decay, initial_state)
        state = layout.sort_state(initial_state, (layout.num_sequences, x.shape[2]), x.new_empty((), dtype=dtype))
        ctx.segments = layout.segments(layout.chunk * x.shape[2] // _SEGMENT_FACTOR, x.is_cpu)
        h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        saved: list[Tensor] = []
        for segment in ctx.segments:
            x_NCD, decay_NCD = _packed(segment, x, dtype), _packed(segment, log_decay, dtype).exp_()
            h_NCD, met = _scan(segment, x_NCD, decay_NCD, state)
            _unpack(segment, h_NCD, h)
            saved += h_NCD, met
        ctx.save_for_backward(log_decay, initial_state, *saved)
        ctx.layout, ctx.dtype = layout, dtype
        return h, layout.unsort_state(state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_h: Tensor, d_final: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        log_decay, initial_state, *saved = ctx.saved_tensors
        layout, dtype = ctx.layout, ctx.dtype
        d_state = layout.sort_state(d_final, (layout.num_sequences, d_h.shape[2]), d_h.new_empty((), dtype=dtype))
        d_x = torch.empty(d_h.shape, dtype=d_h.dtype, device=d_h.device)
        d_log_decay = torch.empty(d_h.shape, dtype=log_decay.dtype, device=d_h.device)
        for number, segment in reversed(list(enumerate(ctx.segments))):
            h_NCD, met = saved[2 * number : 2 * number + 2]
            decay_NCD = _packed(segment, log_decay, dtype).exp_()
            d_x_NCD, _ = _scan(segment, _packed(segment, d_h, dtype), decay_NCD, d_state, reverse=True)
            _unpack(segment, d_x_NCD, d_x)
            before_NCD = torch.cat((met[:, None], h_NCD[:, :-1]), dim=1)
            _unpack(segment, before_NCD.mul_(decay_NCD).mul_(d_x_NCD), d_log_decay)
        d_initial = None if initial_state is None else layout.unsort_state(d_state).to(initial_state.dtype)
        return d_x, d_log_decay, d_initial, None


def _summarize(x: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """What these tokens do to a state (see `_sharded`): decays and what they leave behind, both `[B, D]`."""
    dtype = compute_dtype(x, log_decay)
    decays = decays_after(log_decay.to(dtype))
    return decays[:, 0], (x.to(dtype) * decays[:, 1:]).sum(1)


def hgrn(
    x: Tensor,
    log_decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """HGRN's recurrence (arXiv 2311.04823): h_t = exp(log_decay_t) h_{t-1} + x_t.

    Args:
        x: `[B, T, D]`, float32, bfloat16 or float64.
        log_decay: `[B, T, D]`, natural logarithm, <= 0; float32 is advised beside bfloat16 inputs.
        initial_state: `[B, D]`, float32 (float64 beside float64 inputs); zeros by default.
        output_final_state: whether to return the final state, else None.
        cu_seqlens: int32 `[N+1]`, the bounds of N documents packed into B = 1; states are then `[N, D]`.
        group: the ranks that hold consecutive, equal parts of the sequence; `cu_seqlens` and states are then those of
            the whole, the same on every rank, and the gradient of initial_state is this rank's share of it.
        backend: auto, reference (token by token), torch (chunked) or triton (chunked, on a GPU).

    Returns:
        h `[B, T, D]` in x's dtype, and the final state `[B, D]` in float32 (float64 if any input is) or None.

    Raises:
        ValueError: if shapes, `cu_seqlens` or `backend` are not as above.
    """
    if group is not None:
        one_rank, inputs = partial(hgrn, backend=backend), (x, log_decay)
        return run_sharded(one_rank, _summarize, inputs, group, initial_state, output_final_state, cu_seqlens)
    bounds = _check(x, log_decay, initial_state, cu_seqlens)
    with torch.autocast(x.device.type, enabled=False):
        choice = resolve("hgrn", backend, with_triton(implementations(x.shape[1]), x, log_decay, initial_state))
        if choice == "reference":
            h, state = hgrn_reference(x, log_decay, initial_state=initial_state, cu_seqlens=cu_seqlens)
        elif choice == "triton":
            from kernels.triton.hgrn import scan_hgrn  # here, for machines without triton

            h, state = scan_hgrn(x, log_decay, initial_state, cu_seqlens)
        else:
            h, state = _ChunkedHGRN.apply(x, log_decay, initial_state, chunk_layout(bounds, x.device))
    return h, state if output_final_state else None
