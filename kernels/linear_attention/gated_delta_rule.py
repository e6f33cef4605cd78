"""The gated delta rule: decay the state, then correct its answer to k_t.

    S  <- Diag(exp(log_decay_t)) S_{t-1}            S in R^{K x V}
    u_t = beta_t (v_t - S^T k_t)
    S_t = S + k_t u_t^T
    o_t = scale * S_t^T q_t

One decay per head is Gated DeltaNet (arXiv 2412.06464, eq. 10), one per key channel Kimi Delta Attention (arXiv
2510.26692, eq. 1).

Chunked form (the UT transform of arXiv 2406.06484, section 3, with decays). With k' = beta k, decay(j -> i) from token
j (exclusive) to i (inclusive), P_i from the chunk's start to i, R_j from j to its end, S the state at its start:

    A_k,ij = sum_c k_ic k'_jc decay_c(j -> i) for j < i      A_q,ij the same of q, for j <= i
    r   = T V - (T P K) S,  T = (I + A_k)^-1           r_i = u_i / beta_i: what the state got wrong at token i
    O   = (P Q) S + A_q r
    S'  = P_last S + (R K')^T r

With one decay per head A is a product of matrices times Gamma_ij = decay(j -> i); see `_decays` for one per channel.
Writing the residual r instead of u puts beta into k' alone, so that no step divides by it. T V and T P K are products
for many chunks at once, so that the scan over the chunks has two: r, and S'. On a CPU what is computed of a segment of
chunks stays in its cache until it is used up.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
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
)
from kernels.linear_attention._decays import (
    block_groups,
    channel_scores,
    channel_scores_backward,
    decay_levels,
    level_blocks,
    pairwise_decays,
    sum_over_spans,
)
from kernels.linear_attention._sharded import run_sharded
from kernels.matmul import fastest_products, through_mkl, with_fastest_products
from kernels.triton import LARGEST_KEY
from kernels.triton import implementations as with_triton


def gated_delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token; arguments as in `gated_delta_rule`, always returns the final state."""
    heads, _ = _check(q, k, v, log_decay, beta, initial_state, cu_seqlens)

    def step(state_BHKV: Tensor, k_BHK: Tensor, v_BHV: Tensor, log_decay_BHK: Tensor, beta_BH: Tensor) -> Tensor:
        state_BHKV = log_decay_BHK.exp()[..., None] * state_BHKV
        error_BHV = v_BHV - torch.einsum("bhkv,bhk->bhv", state_BHKV, k_BHK)
        return state_BHKV + k_BHK[..., None] * (beta_BH[..., None] * error_BHV)[..., None, :]

    # A decay per head is one of width 1, which serves every key channel.
    log_decay = log_decay if log_decay.dim() == 4 else log_decay[..., None]
    return recurrence(step, q, (k, v, log_decay, beta), heads, scale, initial_state, cu_seqlens)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[int, tuple[int, ...]]:
    """`check_inputs`, log_decay being [B, T, H] or [B, T, H, K]."""
    decay_dim = q.shape[-1] if log_decay.dim() == 4 else None
    per_head = {"log_decay": (log_decay, decay_dim), "beta": (beta, None)}
    return check_inputs(q, k, v, per_head, initial_state, cu_seqlens)


def _unit_lower_inverse(strict: Tensor) -> Tensor:
    """(I + strict)^-1 for strictly lower triangular `[G, C, C]`: 4x4 blocks by a series, then merged in pairs.

    [[T1, 0], [L, T2]]^-1 = [[T1^-1, 0], [-T2^-1 L T1^-1, T2^-1]]. At size 4 the series ends with the third power; at
    larger sizes its terms grow and cancel (binomially, for a repeated key), which the merge does not.
    """
    chunk = strict.shape[-1]
    block = 4
    diagonal = _diagonal_blocks(strict, block).reshape(-1, block, block)
    identity = torch.eye(block, dtype=strict.dtype, device=strict.device)
    inverse = torch.baddbmm(identity - diagonal, identity - diagonal, torch.bmm(diagonal, diagonal))
    while block < chunk:
        pairs = inverse.view(-1, 2, block, block)
        lower = level_blocks(strict, block).reshape(-1, block, block)
        merged = strict.new_zeros(len(pairs), 2 * block, 2 * block)
        merged[:, :block, :block] = pairs[:, 0]
        merged[:, block:, block:] = pairs[:, 1]
        merged[:, block:, :block] = torch.bmm(pairs[:, 1], torch.bmm(lower, pairs[:, 0])).neg_()
        inverse, block = merged, 2 * block
    return inverse


def _diagonal_blocks(matrix: Tensor, block: int) -> Tensor:
    """The diagonal blocks of `[G, C, C]`: a view `[G, C/block, block, block]`."""
    groups, chunk, _ = matrix.shape
    blocks = matrix.view(groups, chunk // block, block, chunk // block, block)
    return blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


class _Chunks:
    """What forward and backward both need of the inputs of a segment, as `[G, C, D]` with G = N * heads.

    `kq` is k above scale * q `[G, 2C, K]`. What is only ever multiplied is in the dtype `operands`, the rest in `full`.
    `until` (P) and `after` (R) are `[G, C, 1]`, or `[G, C, K]` with one decay per channel.
    """

    def __init__(
        self,
        layout: ChunkLayout,
        heads: int,
        scale: float,
        dtypes: tuple[torch.dtype, torch.dtype],
        q: Tensor,
        k: Tensor,
        log_decay: Tensor,
        beta: Tensor,
    ) -> None:
        self.full, self.operands = dtypes
        chunk, groups = layout.chunk, layout.num_chunks * heads
        self.kq = q.new_empty(groups, 2 * chunk, q.shape[-1], dtype=self.full)
        self.k, self.q = self.kq[:, :chunk], self.kq[:, chunk:]
        layout.pack(k, heads, self.full, out=self.k)
        layout.pack(q, heads, self.full, out=self.q).mul_(scale)
        self.beta = layout.pack(beta[..., None], heads, self.full)
        self.k_beta = self.k * self.beta
        self.per_channel = log_decay.dim() == 4
        self.decay = layout.pack(log_decay if self.per_channel else log_decay[..., None], heads, self.full).exp_()

    def scores(self) -> Tensor:
        """A_k above A_q, `[G, 2C, C]`. Makes `until` and `after`, and Gamma where there is one decay per head."""
        if self.per_channel:
            self.until, self.after = self.decay.clone(), torch.ones_like(self.decay)
            scores = self.kq.new_zeros(*self.kq.shape[:2], self.k.shape[1])
            groups = block_groups(self.k)
            for kq, k_beta, until, after, block in zip(
                *(x.split(groups) for x in (self.kq, self.k_beta, self.until, self.after, scores))
            ):
                pair = _stacked(block)
                channel_scores(_stacked(kq), k_beta, until, after, pair)
                pair[:, 1].diagonal(dim1=1, dim2=2).copy_(torch.linalg.vecdot(_stacked(kq)[:, 1], k_beta))
        else:
            self.gamma, self.until, self.after = pairwise_decays(self.decay)
            self.kq_operand, self.k_beta_operand = self.kq.to(self.operands), self.k_beta.to(self.operands)
            scores = self.product(self.kq_operand, self.k_beta_operand.mT)
            self.mask(scores)
        self._apply_decays()
        return scores

    def decays_alone(self) -> None:
        """Make `until` and `after` without the scores, with one decay per channel."""
        self.until, self.after = self.decay.clone(), torch.ones_like(self.decay)
        groups = block_groups(self.k)
        for until, after in zip(self.until.split(groups), self.after.split(groups)):
            for _ in decay_levels(until, after):
                pass
        self._apply_decays()

    def _apply_decays(self) -> None:
        self.k_written = (self.k_beta * self.after).to(self.operands)
        self.kq_decayed = _stacked(self.kq).mul(self.until[:, None]).view_as(self.kq).to(self.operands)
        # Of the state over the chunk: [G, 1, 1] or [G, K, 1].
        self.state_decay = self.until[:, -1, :, None]

    def mask(self, scores: Tensor) -> None:
        """Multiplies both halves of `[G, 2C, C]` by Gamma and clears the diagonal of the first, in place."""
        pair = _stacked(scores)
        pair *= self.gamma[:, None]
        pair[:, 0].diagonal(dim1=1, dim2=2).zero_()

    def forgetting(self, inverse: Tensor) -> Tensor:
        """-T P K `[G, C, K]`: how the state at a chunk's start enters its residuals."""
        return torch.bmm(inverse, _stacked(self.kq_decayed)[:, 0]).neg_()

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return product(a, b, self.operands, self.full)


def _stacked(x: Tensor) -> Tensor:
    """`[G, 2C, D]` as `[G, 2, C, D]`."""
    return x.view(x.shape[0], 2, -1, x.shape[-1])


def _scan(
    layout: ChunkLayout, heads: int, state: Tensor, chunks: _Chunks, inverse: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Runs `state` `[N_sequences, H, K, V]` over the chunks in place.

    Returns the state at each chunk's start `[G, K, V]` and the residual r `[G, C, V]`.
    """
    key_dim, value_dim = state.shape[2:]
    states = inverse.new_empty(len(v), key_dim, value_dim)
    residual = chunks.product(inverse, v)
    forgetting, decay = chunks.forgetting(inverse), chunks.state_decay
    for first, count in layout.spans:
        here, active = slice(first * heads, (first + count) * heads), state[:count].view(-1, key_dim, value_dim)
        states[here] = active
        r = add_product(residual[here], forgetting[here], states[here], chunks.operands)
        add_product(active.mul_(decay[here]), chunks.k_written[here].mT, r, chunks.operands)
    return states, residual


def _scan_backward(
    layout: ChunkLayout,
    heads: int,
    d_state: Tensor,
    chunks: _Chunks,
    inverse: Tensor,
    d_residual: Tensor,
    d_o: Tensor,
) -> Tensor:
    """Runs `d_state` back over the chunks in place, completing `d_residual`.

    Returns the gradient of the state after each chunk `[G, K, V]`.
    """
    key_dim, value_dim = d_state.shape[2:]
    d_after = inverse.new_empty(len(d_residual), key_dim, value_dim)
    read = chunks.product(_stacked(chunks.kq_decayed)[:, 1].mT, d_o)
    forgetting, decay = chunks.forgetting(inverse), chunks.state_decay
    for first, count in reversed(layout.spans):
        here, active = slice(first * heads, (first + count) * heads), d_state[:count].view(-1, key_dim, value_dim)
        d_after[here] = active
        d_r = add_product(d_residual[here], chunks.k_written[here], d_after[here], chunks.operands)
        torch.addcmul(read[here], active, decay[here], out=active)
        add_product(active, forgetting[here].mT, d_r, chunks.operands)
    return d_after


def _head_decay_gradients(
    chunks: _Chunks, scores: Tensor, d_scores: Tensor, d_kq_decayed: Tensor, d_k_written: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of kq and k' through the scores, and of log_decay `[G, C, 1]` but for the state's decay over the chunk.

    Changes `scores` and `d_scores`.
    """
    # The scores times their gradients are the gradient of log Gamma.
    d_log_gamma = _stacked(scores.mul_(d_scores)).sum(1)
    # The decay from a token to itself is 1 at any log_decay; the sums below would cancel it, but only up to rounding.
    d_log_gamma.diagonal(dim1=1, dim2=2).zero_()
    d_until = _stacked((d_kq_decayed * chunks.kq_decayed).sum(-1, keepdim=True)).sum(1)
    d_after = (d_k_written * chunks.k_written).sum(-1, keepdim=True)
    d_cumulative = d_log_gamma.sum(2, keepdim=True) - d_log_gamma.sum(1)[..., None] + d_until
    chunks.mask(d_scores)
    d_scores = d_scores.to(chunks.operands)
    d_kq = chunks.product(d_scores, chunks.k_beta_operand)
    d_k_beta = chunks.product(d_scores.mT, chunks.kq_operand)
    return d_kq, d_k_beta, sum_over_spans(d_cumulative, d_after)


def _channel_decay_gradients(
    chunks: _Chunks, d_scores: Tensor, d_kq_decayed: Tensor, d_k_written: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`_head_decay_gradients` with one decay per channel; log_decay's is `[G, C, K]`. Uses up `chunks.decay`."""
    d_kq, d_k_beta, d_log_decay = (torch.empty_like(x) for x in (chunks.kq, chunks.k_beta, chunks.decay))
    tensors = (chunks.kq, chunks.k_beta, chunks.decay, chunks.kq_decayed, chunks.k_written)
    gradients = (d_scores, d_kq_decayed, d_k_written, d_kq, d_k_beta, d_log_decay)
    groups = block_groups(chunks.k_beta)
    for block in zip(*(x.split(groups) for x in tensors + gradients)):
        _channel_decay_gradients_of_block(*block)
    return d_kq, d_k_beta, d_log_decay


def _channel_decay_gradients_of_block(
    kq: Tensor,
    k_beta: Tensor,
    decay: Tensor,
    kq_decayed: Tensor,
    k_written: Tensor,
    d_scores: Tensor,
    d_kq_decayed: Tensor,
    d_k_written: Tensor,
    d_kq: Tensor,
    d_k_beta: Tensor,
    d_log_decay: Tensor,
) -> None:
    """Write the last three."""
    channel_scores_backward(
        _stacked(kq), k_beta, decay, torch.ones_like(decay), _stacked(d_scores), _stacked(d_kq), d_k_beta
    )
    (k, q), pair, d_pair = (_stacked(x).unbind(1) for x in (kq, d_kq, d_scores))
    # Each score moves log_decay between its two tokens: + from the row on, - from the column on. One on the diagonal
    # moves none, and joins after this.
    d_cumulative = (k * pair[0]).addcmul_(q, pair[1]).addcmul_(k_beta, d_k_beta, value=-1)
    for d_read, read in zip(_stacked(d_kq_decayed).unbind(1), _stacked(kq_decayed).unbind(1)):
        d_cumulative.addcmul_(d_read, read.to(d_read.dtype))
    diagonal = d_pair[1].diagonal(dim1=1, dim2=2)[..., None]
    pair[1].addcmul_(diagonal, k_beta)
    d_k_beta.addcmul_(diagonal, q)
    d_log_decay.copy_(sum_over_spans(d_cumulative, d_k_written * k_written))


class _ChunkedGatedDeltaRule(torch.autograd.Function):
    """The chunked form, by segments. Saves its inputs and of each chunk the inverse, r and the state at its start.

    With one decay per channel A_q, too; with one per head it is one product. The rest is computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        initial_state: Tensor | None,
        scale: float,
        layout: ChunkLayout,
        heads: int,
    ) -> tuple[Tensor, Tensor]:
        chunk, key_dim, value_dim = layout.chunk, q.shape[-1], v.shape[-1]
        full = compute_dtype(q, k, v, log_decay, beta, initial_state)
        dtypes = full, operand_dtype(q, k, v, full)
        o = v.new_empty(*v.shape[:2], heads, value_dim)
        state_shape = (layout.num_sequences, heads, key_dim, value_dim)
        state = layout.sort_state(initial_state, state_shape, v.new_empty((), dtype=full))
        ctx.segments = layout.segments(heads * chunk * max(key_dim, value_dim), q.is_cpu)
        saved: list[Tensor | None] = []
        for segment in ctx.segments:
            chunks = _Chunks(segment, heads, scale, dtypes, q, k, log_decay, beta)
            scores = chunks.scores()
            with through_mkl():  # the inverse's products are small
                inverse = _unit_lower_inverse(scores[:, :chunk]).to(chunks.operands)
            states, residual = _scan(segment, heads, state, chunks, inverse, segment.pack(v, heads, full))
            o_c = chunks.product(_stacked(chunks.kq_decayed)[:, 1], states)
            residual = residual.to(chunks.operands)
            segment.unpack(add_product(o_c, scores[:, chunk:], residual, chunks.operands), o)
            scores_q = scores[:, chunk:].to(chunks.operands, copy=True) if chunks.per_channel else None
            saved += inverse, residual, states, scores_q
        ctx.save_for_backward(q, k, v, log_decay, beta, initial_state, *saved)
        ctx.scale, ctx.layout, ctx.heads, ctx.dtypes = scale, layout, heads, dtypes
        return o, layout.unsort_state(state)

    @staticmethod
    @once_differentiable
    @with_fastest_products
    def backward(ctx: Any, d_o: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, beta, initial_state, *saved = ctx.saved_tensors
        scale, layout, heads = ctx.scale, ctx.layout, ctx.heads
        state_shape = (layout.num_sequences, heads, q.shape[-1], v.shape[-1])
        d_state = layout.sort_state(d_final, state_shape, v.new_empty((), dtype=ctx.dtypes[0]))
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, log_decay, beta)]
        for number, segment in reversed(list(enumerate(ctx.segments))):
            chunks = _Chunks(segment, heads, scale, ctx.dtypes, q, k, log_decay, beta)
            packed_grads = _segment_backward(segment, heads, d_state, chunks, d_o, *saved[4 * number : 4 * number + 4])
            packed_grads[0].mul_(scale)
            for packed, grad in zip(packed_grads, grads, strict=True):
                segment.unpack(packed, grad if grad.dim() == 4 else grad[..., None])
        d_initial = None if initial_state is None else layout.unsort_state(d_state).to(initial_state.dtype)
        return *grads, d_initial, None, None, None


def _segment_backward(
    layout: ChunkLayout,
    heads: int,
    d_state: Tensor,
    chunks: _Chunks,
    d_o: Tensor,
    inverse: Tensor,
    residual: Tensor,
    states: Tensor,
    scores_q: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients of scale * q, k, v, log_decay and beta, `[G, C, D]`; runs `d_state` back over the segment in place."""
    chunk = layout.chunk
    if scores_q is None:
        scores = chunks.scores()
        scores_q = scores[:, chunk:]
    else:
        chunks.decays_alone()
    # The gradient of what is read from the state: of (P K) S above that of (P Q) S.
    d_reads = residual.new_empty(residual.shape[0], 2 * chunk, residual.shape[-1])
    d_o_c = layout.pack(d_o, heads, d_reads.dtype, out=d_reads[:, chunk:])
    d_residual = chunks.product(scores_q.mT, d_o_c)
    d_after = _scan_backward(layout, heads, d_state, chunks, inverse, d_residual, d_o_c)
    d_v = chunks.product(inverse.mT, d_residual)
    d_reads[:, :chunk].copy_(d_v).neg_()

    d_scores = chunks.product(d_reads, residual.mT)
    d_kq_decayed = chunks.product(d_reads, states.mT)
    d_k_written = chunks.product(residual, d_after.mT)
    if chunks.per_channel:
        d_kq, d_k_beta, d_log_decay = _channel_decay_gradients(chunks, d_scores, d_kq_decayed, d_k_written)
        d_total = (d_after * states).sum(2, dtype=chunks.full)[:, None]
    else:
        d_kq, d_k_beta, d_log_decay = _head_decay_gradients(chunks, scores, d_scores, d_kq_decayed, d_k_written)
        d_total = (d_after * states).sum((1, 2), dtype=chunks.full)[:, None, None]
    d_log_decay.addcmul_(d_total, chunks.until[:, -1:])
    d_k_beta.addcmul_(d_k_written, chunks.after)
    _stacked(d_kq).addcmul_(_stacked(d_kq_decayed), chunks.until[:, None])
    d_k, d_q = _stacked(d_kq).unbind(1)
    d_k.addcmul_(d_k_beta, chunks.beta)
    d_beta = torch.linalg.vecdot(d_k_beta, chunks.k)[..., None]
    return d_q, d_k, d_v, d_log_decay, d_beta


def _summarize(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """What these tokens do to a state (see `_sharded`): a matrix `[B, H, K, K]` and what they leave behind.

    The rule acts on each column of the state alone. Columns that begin as the identity and are taught nothing, v = 0,
    end as the matrix; those that begin as zeros end as what is left behind.
    """
    heads, dtype = max(x.shape[2] for x in (q, k, v, log_decay, beta)), compute_dtype(q, k, v, log_decay, beta)
    key_dim, value_dim = k.shape[-1], v.shape[-1]
    taught = F.pad(v.repeat_interleave(heads // v.shape[2], dim=2), (0, key_dim))
    start = F.pad(torch.eye(key_dim, dtype=dtype, device=k.device), (value_dim, 0))
    start = start.expand(k.shape[0], heads, -1, -1)
    _, state = gated_delta_rule(
        k, k, taught, log_decay, beta, initial_state=start, output_final_state=True, backend=backend
    )
    assert state is not None
    return state[..., value_dim:], state[..., :value_dim]


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule: S <- exp(log_decay) S; S <- S + beta k (v - S^T k)^T; o = scale * S^T q.

    Args:
        q, k: `[B, T, H, K]`, used as given (the recurrence is stable for k of norm <= 1). float32, bfloat16 or float64.
        v: `[B, T, H, V]`.
        log_decay: `[B, T, H]`, or `[B, T, H, K]` for one per key channel (Kimi Delta Attention); natural logarithm,
            <= 0; float32 is advised beside bfloat16 inputs.
        beta: `[B, T, H]`, in [0, 1] (up to 2 if negative eigenvalues are wanted).
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
        one_rank, inputs = partial(gated_delta_rule, scale=scale, backend=backend), (q, k, v, log_decay, beta)
        summarize = partial(_summarize, backend=backend)
        return run_sharded(one_rank, summarize, inputs, group, initial_state, output_final_state, cu_seqlens)
    heads, bounds = _check(q, k, v, log_decay, beta, initial_state, cu_seqlens)
    with torch.autocast(q.device.type, enabled=False), fastest_products(q):
        fits = q.shape[-1] <= LARGEST_KEY
        available = with_triton(implementations(q.shape[1]), q, k, v, log_decay, beta, initial_state, fits=fits)
        choice = resolve("gated_delta_rule", backend, available)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if choice == "reference":
            o, state = gated_delta_rule_reference(
                q, k, v, log_decay, beta, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens
            )
        elif choice == "triton":
            from kernels.triton.delta_rule import chunk_delta_rule  # here, for machines without triton

            o, state = chunk_delta_rule(q, k, v, log_decay, beta, initial_state, scale, cu_seqlens)
        else:
            layout = chunk_layout(bounds, q.device)
            o, state = _ChunkedGatedDeltaRule.apply(q, k, v, log_decay, beta, initial_state, scale, layout, heads)
    return o, state if output_final_state else None
