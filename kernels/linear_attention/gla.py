"""Gated linear attention (GLA, arXiv 2312.06635, eq. 3): a decay for every key channel.

    S_t = Diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T        S in R^{K x V}
    o_t = scale * S_t^T q_t

Chunked form (section 4), with P_i the product of the decays from the chunk's start to token i, R_j from after j to its
end, and S the state at its start:

    O  = (Q * P) S + A V,    A_ij = sum_c q_ic k_jc decay_c(j -> i)  for j <= i
    S' = Diag(P_last) S + (K * R)^T V

The paper evaluates A with sub-chunk reference points. Here the reference points are the splits of a binary tree over
the chunk (`decay_levels`): every pair j < i meets at one split s, where decay(j -> i) = decay(s -> i) * decay(j -> s),
both factors <= 1, and a level of the tree is one batched matrix product. The decays of each level follow from the level
below by one multiplication, so the whole chunk needs one exp per element and nothing can overflow at any decay.
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
from kernels.linear_attention._decays import block_groups, channel_scores, channel_scores_backward, sum_over_spans
from kernels.linear_attention._sharded import decays_after, run_sharded
from kernels.matmul import fastest_products, with_fastest_products
from kernels.triton import LARGEST_KEY
from kernels.triton import implementations as with_triton


def gla_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token; arguments as in `gla`, always returns the final state."""
    heads, _ = check_inputs(q, k, v, {"log_decay": (log_decay, q.shape[-1])}, initial_state, cu_seqlens)

    def step(state_BHKV: Tensor, k_BHK: Tensor, v_BHV: Tensor, log_decay_BHK: Tensor) -> Tensor:
        return log_decay_BHK.exp()[..., None] * state_BHKV + k_BHK[..., None] * v_BHV[..., None, :]

    return recurrence(step, q, (k, v, log_decay), heads, scale, initial_state, cu_seqlens)


def _packed(
    layout: ChunkLayout,
    heads: int,
    scale: float,
    dtypes: tuple[torch.dtype, torch.dtype],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Packs scale * q, k, v (in the operands' dtype), the decays, and ones like them: `[G, C, D]`, G = N * heads."""
    full, operands = dtypes
    packed_dtypes = full, full, operands, full
    q, k, v, decay = (
        layout.pack(x, heads, dtype) for x, dtype in zip((q, k, v, log_decay), packed_dtypes, strict=True)
    )
    return q.mul_(scale), k, v, decay.exp_(), torch.ones_like(decay)


def _scores(q: Tensor, k: Tensor, until: Tensor, after: Tensor) -> Tensor:
    """A `[G, C, C]`, lower triangular. Leaves `until` and `after` as P and R."""
    scores = q.new_zeros(*q.shape[:2], q.shape[1])
    groups = block_groups(q)
    for q_b, k_b, until_b, after_b, scores_b in zip(*(x.split(groups) for x in (q, k, until, after, scores))):
        channel_scores(q_b[:, None], k_b, until_b, after_b, scores_b[:, None])
        scores_b.diagonal(dim1=1, dim2=2).copy_(torch.linalg.vecdot(q_b, k_b))
    return scores


class _ChunkedGLA(torch.autograd.Function):
    """The chunked form, by segments. Saves its inputs and of each chunk A and the state at its start.

    The rest is computed again.
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
        dtypes = full, operand_dtype(q, k, v, full)
        o = v.new_empty(*v.shape[:2], heads, value_dim)
        state_shape = (layout.num_sequences, heads, key_dim, value_dim)
        state = layout.sort_state(initial_state, state_shape, v.new_empty((), dtype=full))
        ctx.segments = layout.segments(heads * layout.chunk * max(key_dim, value_dim), q.is_cpu)
        saved: list[Tensor] = []
        for segment in ctx.segments:
            o_c, *kept = _segment_forward(segment, state, *_packed(segment, heads, scale, dtypes, q, k, v, log_decay))
            segment.unpack(o_c, o)
            saved += kept
        ctx.save_for_backward(q, k, v, log_decay, initial_state, *saved)
        ctx.scale, ctx.layout, ctx.heads, ctx.dtypes = scale, layout, heads, dtypes
        return o, layout.unsort_state(state)

    @staticmethod
    @once_differentiable
    @with_fastest_products
    def backward(ctx: Any, d_o: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, initial_state, *saved = ctx.saved_tensors
        layout, heads, dtypes = ctx.layout, ctx.heads, ctx.dtypes
        state_shape = (layout.num_sequences, heads, q.shape[-1], v.shape[-1])
        d_state = layout.sort_state(d_final, state_shape, v.new_empty((), dtype=dtypes[0]))
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, log_decay)]
        for number, segment in reversed(list(enumerate(ctx.segments))):
            packed = _packed(segment, heads, ctx.scale, dtypes, q, k, v, log_decay)
            d_o_c = segment.pack(d_o, heads, dtypes[1])
            scores, states = saved[2 * number : 2 * number + 2]
            packed_grads = _segment_backward(segment, d_state, *packed, d_o_c, scores, states)
            packed_grads[0].mul_(ctx.scale)
            for packed_grad, grad in zip(packed_grads, grads, strict=True):
                segment.unpack(packed_grad, grad)
        d_initial = None if initial_state is None else layout.unsort_state(d_state).to(initial_state.dtype)
        return *grads, d_initial, None, None, None


def _segment_forward(
    layout: ChunkLayout, state: Tensor, q: Tensor, k: Tensor, v: Tensor, until: Tensor, after: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """O, A and the state at each chunk's start; runs `state` over the segment in place. Changes its other inputs."""
    full, operands = q.dtype, v.dtype
    heads, key_dim, value_dim = state.shape[1:]
    scores = _scores(q, k, until, after).to(operands)
    increments = product(k.mul_(after).mT, v, operands, full).view(-1, heads, key_dim, value_dim)
    states = scan_states(layout, state, until[:, -1].view(-1, heads, key_dim, 1), increments)
    states = states.view(-1, key_dim, value_dim).to(operands)
    return add_product(product(scores, v, operands, full), q.mul_(until), states, operands), scores, states


def _segment_backward(
    layout: ChunkLayout,
    d_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    until: Tensor,
    after: Tensor,
    d_o: Tensor,
    scores: Tensor,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of scale * q, k, v and log_decay, `[G, C, D]`; runs `d_state` back over the segment in place."""
    full, operands = q.dtype, v.dtype
    d_scores = product(d_o, v.mT, operands, full)
    d_q, d_k = torch.empty_like(q), torch.empty_like(k)
    groups = block_groups(q)
    for q_b, k_b, until_b, after_b, d_scores_b, d_q_b, d_k_b in zip(
        *(x.split(groups) for x in (q, k, until, after, d_scores, d_q, d_k))
    ):
        channel_scores_backward(q_b[:, None], k_b, until_b, after_b, d_scores_b[:, None], d_q_b[:, None], d_k_b)
    # Each score moves log_decay between its two tokens: + from the row on, - from the column on. A score on the
    # diagonal moves none, so the diagonal joins after this; it would cancel, but only up to rounding.
    d_cumulative = (q * d_q).addcmul_(k, d_k, value=-1)
    diagonal = d_scores.diagonal(dim1=1, dim2=2)[..., None]
    d_q.addcmul_(diagonal, k)
    d_k.addcmul_(diagonal, q)

    decay = until[:, -1]
    reads = product((q * until).mT, d_o, operands, full).view(-1, *d_state.shape[1:])
    d_after = scan_states(layout, d_state, decay.view(*reads.shape[:3], 1), reads, reverse=True).view(states.shape)
    d_total = (d_after * states).sum(-1).mul_(decay)
    d_after = d_after.to(operands)
    d_v = add_product(product(scores.mT, d_o, operands, full), k * after, d_after, operands)
    d_q_inter = product(d_o, states.mT, operands, full).mul_(until)
    d_k_inter = product(v, d_after.mT, operands, full).mul_(after)
    # The state read at i has seen the decays up to i; what j writes into the state sees those after j.
    d_cumulative.addcmul_(q, d_q_inter)
    d_log_decay = sum_over_spans(d_cumulative, k * d_k_inter).add_(d_total[:, None])
    return d_q.add_(d_q_inter), d_k.add_(d_k_inter), d_v, d_log_decay


def summarize_gla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """What these tokens do to a state (see `_sharded`): decays `[B, H, K, 1]` and sum_j decay_j k_j v_j^T."""
    dtype, heads = compute_dtype(q, k, v, log_decay), max(x.shape[2] for x in (q, k, v, log_decay))
    k, v, log_decay = (x.to(dtype).repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v, log_decay))
    decays = decays_after(log_decay)
    return decays[:, 0, :, :, None], torch.einsum("bthk,bthv->bhkv", k * decays[:, 1:], v)


def gla(
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
    """Gated linear attention (arXiv 2312.06635): S <- Diag(exp(log_decay)) S + k v^T, o = scale * S^T q.

    Args:
        q, k: `[B, T, H, K]`, used as given. float32, bfloat16 or float64.
        v: `[B, T, H, V]`.
        log_decay: `[B, T, H, K]`, natural logarithm, <= 0; float32 is advised beside bfloat16 inputs.
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
        one_rank = partial(gla, scale=scale, backend=backend)
        inputs = (q, k, v, log_decay)
        return run_sharded(one_rank, summarize_gla, inputs, group, initial_state, output_final_state, cu_seqlens)
    heads, bounds = check_inputs(q, k, v, {"log_decay": (log_decay, q.shape[-1])}, initial_state, cu_seqlens)
    with torch.autocast(q.device.type, enabled=False), fastest_products(q):
        fits = q.shape[-1] <= LARGEST_KEY
        available = with_triton(implementations(q.shape[1]), q, k, v, log_decay, initial_state, fits=fits)
        choice = resolve("gla", backend, available)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if choice == "reference":
            o, state = gla_reference(
                q, k, v, log_decay, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens
            )
        elif choice == "triton":
            from kernels.triton.gla import chunk_gla  # here, for machines without triton

            o, state = chunk_gla(q, k, v, log_decay, initial_state, scale, cu_seqlens)
        else:
            layout = chunk_layout(bounds, q.device)
            o, state = _ChunkedGLA.apply(q, k, v, log_decay, initial_state, scale, layout, heads)
    return o, state if output_final_state else None
