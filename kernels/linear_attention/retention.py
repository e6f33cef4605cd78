"""Retention (RetNet, Sun et al. 2023, arXiv 2307.08621, eq. 6): linear attention with one fixed decay per head.

    S_t = exp(log_decay) S_{t-1} + k_t v_t^T        S in R^{K x V}
    o_t = scale * S_t^T q_t

Chunked form (eq. 7), with Gamma_ij the decay from token j (exclusive) to i (inclusive), P_i from the chunk's start to
i, R_j from j to its end, S the state at its start:

    O  = (P Q) S + (Q K^T * Gamma) V
    S' = P_last S + (R K)^T V

The kernel takes a decay for every token, [B, T, H], so that it knows nothing of where a sequence ends within a chunk.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.autograd import once_differentiable
from kernels.backend import resolve
from kernels.linear_attention._chunks import (
    ChunkLayout,
    add_product,
    check_inputs,
    chunk_layout,
    compute_dtype,
    implementations,
    operand_dtype,
    product,
    recurrence,
    scan_states,
)
from kernels.linear_attention._decays import pairwise_decays, sum_over_spans
from kernels.linear_attention._sharded import run_sharded
from kernels.linear_attention.gla import summarize_gla
from kernels.matmul import fastest_products, with_fastest_products
from kernels.triton import LARGEST_KEY
from kernels.triton import implementations as with_triton


def retention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token; arguments as in `retention`, always returns the final state."""
    log_decay_BTH = _every_token(q, log_decay)
    heads, _ = check_inputs(q, k, v, {"log_decay": (log_decay_BTH, None)}, initial_state, cu_seqlens)

    def step(state_BHKV: Tensor, k_BHK: Tensor, v_BHV: Tensor, log_decay_BH: Tensor) -> Tensor:
        return log_decay_BH.exp()[..., None, None] * state_BHKV + k_BHK[..., None] * v_BHV[..., None, :]

    return recurrence(step, q, (k, v, log_decay_BTH), heads, scale, initial_state, cu_seqlens)


def _every_token(q: Tensor, log_decay: Tensor) -> Tensor:
    """`[H]` as `[B, T, H]`, without copying."""
    if log_decay.dim() != 1:
        raise ValueError(f"log_decay must be [H], one fixed decay per head, got shape {tuple(log_decay.shape)}")
    return log_decay.expand(*q.shape[:2], -1)


class _ChunkedRetention(torch.autograd.Function):
    """The chunked form with a decay per token and head, by segments.

    Saves its inputs and the state at each chunk's start.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        initial_state: Tensor | None,
        scale: float,
        layout: ChunkLayout,
        heads: int,
    ) -> tuple[Tensor, Tensor]:
        key_dim, value_dim = q.shape[-1], v.shape[-1]
        full = compute_dtype(q, k, v, log_decay, initial_state)
        operands = operand_dtype(q, k, v, full)
        o = v.new_empty(*v.shape[:2], heads, value_dim)
        state_shape = (layout.num_sequences, heads, key_dim, value_dim)
        state = layout.sort_state(initial_state, state_shape, v.new_empty((), dtype=full))
        ctx.segments = layout.segments(heads * layout.chunk * max(key_dim, value_dim), q.is_cpu)
        saved = []
        for segment in ctx.segments:
            q_c, k_c, v_c = _packed(segment, heads, scale, operands, q, k, v)
            gamma, until, after = _decays(segment, heads, log_decay, full)
            increments = product((k_c * after).mT, v_c, operands, full).view(-1, *state_shape[1:])
            states = scan_states(segment, state, until[:, -1].view(-1, heads, 1, 1), increments)
            states = states.view(-1, key_dim, value_dim).to(operands)
            scores = product(q_c, k_c.mT, operands, full).mul_(gamma)
            o_c = add_product(product(scores, v_c, operands, full), q_c * until, states, operands)
            segment.unpack(o_c, o)
            saved.append(states)
        ctx.save_for_backward(q, k, v, log_decay, initial_state, *saved)
        ctx.scale, ctx.layout, ctx.heads, ctx.dtypes = scale, layout, heads, (full, operands)
        return o, layout.unsort_state(state)

    @staticmethod
    @once_differentiable
    @with_fastest_products
    def backward(ctx: Any, d_o: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, initial_state, *saved = ctx.saved_tensors
        layout, heads, (full, operands) = ctx.layout, ctx.heads, ctx.dtypes
        state_shape = (layout.num_sequences, heads, q.shape[-1], v.shape[-1])
        d_state = layout.sort_state(d_final, state_shape, v.new_empty((), dtype=full))
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, log_decay[..., None])]
        for segment, states in reversed(list(zip(ctx.segments, saved, strict=True))):
            packed = _packed(segment, heads, ctx.scale, operands, q, k, v)
            decays = _decays(segment, heads, log_decay, full)
            d_o_c = segment.pack(d_o, heads, operands)
            packed_grads = _segment_backward(segment, d_state, *packed, *decays, d_o_c, states)
            packed_grads[0].mul_(ctx.scale)
            for packed_grad, grad in zip(packed_grads, grads, strict=True):
                segment.unpack(packed_grad, grad)
        d_initial = None if initial_state is None else layout.unsort_state(d_state).to(initial_state.dtype)
        return *grads[:3], grads[3][..., 0], d_initial, None, None, None


def _segment_backward(
    layout: ChunkLayout,
    d_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma: Tensor,
    until: Tensor,
    after: Tensor,
    d_o: Tensor,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of scale * q, k, v and log_decay, `[G, C, D]`; runs `d_state` back over the segment in place."""
    full, operands = until.dtype, q.dtype
    heads = d_state.shape[1]
    decay = until[:, -1:]
    reads = product((q * until).mT, d_o, operands, full).view(-1, *d_state.shape[1:])
    d_after = scan_states(layout, d_state, decay.view(-1, heads, 1, 1), reads, reverse=True).view(states.shape)
    d_total = (d_after * states).sum((1, 2), dtype=full)[:, None, None] * decay
    d_after = d_after.to(operands)

    scores = product(q, k.mT, operands, full).mul_(gamma)
    d_scores = product(d_o, v.mT, operands, full)
    d_log_gamma = scores * d_scores
    # The decay from a token to itself is always 1; the sums below would cancel it, but only up to rounding.
    d_log_gamma.diagonal(dim1=1, dim2=2).zero_()
    d_scores.mul_(gamma)
    d_v = add_product(product(scores.mT, d_o, operands, full), k * after, d_after, operands)
    d_q_inter = product(d_o, states.mT, operands, full).mul_(until)
    d_k_inter = product(v, d_after.mT, operands, full).mul_(after)
    d_cumulative = d_log_gamma.sum(2) - d_log_gamma.sum(1) + torch.linalg.vecdot(d_q_inter, q.to(full))
    d_written = torch.linalg.vecdot(d_k_inter, k.to(full))
    d_log_decay = sum_over_spans(d_cumulative[..., None], d_written[..., None]).add_(d_total)
    d_q = add_product(d_q_inter, d_scores, k, operands)
    return d_q, add_product(d_k_inter, d_scores.mT, q, operands), d_v, d_log_decay


def _packed(
    layout: ChunkLayout, heads: int, scale: float, operands: torch.dtype, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Q times scale, k and v as `[G, C, D]`, G = N * heads, in the operands' dtype."""
    q, k, v = (layout.pack(x, heads, operands) for x in (q, k, v))
    return q.mul_(scale), k, v


def _decays(layout: ChunkLayout, heads: int, log_decay: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Gamma `[G, C, C]`, P and R `[G, C, 1]`."""
    return pairwise_decays(layout.pack(log_decay[..., None], heads, dtype).exp_())


def _summarize(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """`summarize_gla` with one decay per head."""
    return summarize_gla(q, k, v, _every_token(q, log_decay)[..., None])


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Retention (arXiv 2307.08621): S <- exp(log_decay) S + k v^T, o = scale * S^T q.

    Args:
        q, k: `[B, T, H, K]`, used as given. float32, bfloat16 or float64.
        v: `[B, T, H, V]`.
        log_decay: `[H]`, natural logarithm, <= 0; log(1 - 2^(-5 - h)) in the paper. It has a gradient.
        scale: multiplies the output; K^-1/2 by default.
        initial_state: `[B, H, K, V]`, float32 (float64 beside float64 inputs); zeros by default.
        output_final_state: whether to return the final state, else None.
        cu_seqlens: int32 `[N+1]`, the bounds of N documents packed into B = 1; states are then `[N, H, K, V]`.
        group: the ranks that hold consecutive, equal parts of the sequence; `cu_seqlens` and states are then those of
            the whole, the same on every rank, and the gradient of initial_state is this rank's share of it.
        backend: auto, reference (token by token), torch (chunked) or triton (chunked, on a GPU).

    Each tensor's number of heads must divide the largest one, H; heads are repeated to H, neighbours sharing one.

    Returns:
        o `[B, T, H, V]` in v's dtype, and the final state `[B, H, K, V]` in float32 (float64 if any input is) or None.

    Raises:
        ValueError: if shapes, heads, `cu_seqlens` or `backend` are not as above.
    """
    if group is not None:
        one_rank = partial(retention, log_decay=log_decay, scale=scale, backend=backend)
        summarize = partial(_summarize, log_decay=log_decay)
        return run_sharded(one_rank, summarize, (q, k, v), group, initial_state, output_final_state, cu_seqlens)
    log_decay_BTH = _every_token(q, log_decay)
    heads, bounds = check_inputs(q, k, v, {"log_decay": (log_decay_BTH, None)}, initial_state, cu_seqlens)
    with torch.autocast(q.device.type, enabled=False), fastest_products(q):
        fits = q.shape[-1] <= LARGEST_KEY
        available = with_triton(implementations(q.shape[1]), q, k, v, log_decay, initial_state, fits=fits)
        choice = resolve("retention", backend, available)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if choice == "reference":
            o, state = retention_reference(
                q, k, v, log_decay, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens
            )
        elif choice == "triton":
            from kernels.triton.gla import chunk_gla  # here, for machines without triton

            o, state = chunk_gla(q, k, v, log_decay_BTH, initial_state, scale, cu_seqlens)
        else:
            layout = chunk_layout(bounds, q.device)
            o, state = _ChunkedRetention.apply(q, k, v, log_decay_BTH, initial_state, scale, layout, heads)
    return o, state if output_final_state else None
