"""The gated delta rule: decay the state, then correct its prediction for k_t.

    S  <- Diag(exp(log_decay_t)) S_{t-1}            S in R^{K x V}
    u_t = beta_t (v_t - S^T k_t)
    S_t = S + k_t u_t^T
    o_t = scale * S_t^T q_t

One decay per head is Gated DeltaNet (arXiv 2412.06464, eq. 10), one per key channel Kimi Delta Attention (arXiv
2510.26692, eq. 1).

Chunked form (the UT transform of arXiv 2406.06484, section 3, with decays). Let k' = beta k, and let decay(j -> i) be
the decay from token j (exclusive) to i (inclusive), P_i from the chunk's start to i, R_j from j to its end, and S the
state at its start:

    A_k,ij = sum_c k_ic k'_jc decay_c(j -> i) for j < i      A_q,ij the same of q, for j <= i
    r   = T V - (T P K) S,  T = (I + A_k)^-1           r_i = u_i / beta_i: the state's prediction error at token i
    O   = (P Q) S + A_q r
    S'  = P_last S + (R K')^T r

With one decay per head, A is a matrix product times Gamma_ij = decay(j -> i); see `_decays` for one per channel. Using
the residual r instead of u moves beta into k' alone, so no step divides by it. T V and T P K are products over many
chunks at once, which leaves two products per chunk in the scan: r and S'. On a CPU, a segment's temporaries stay in the
cache until they are consumed.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kernels.documents import Documents, takes_cu_seqlens
from kernels.linear_attention._decays import (
    block_groups,
    channel_scores,
    channel_scores_backward,
    decay_levels,
    level_blocks,
    pairwise_decays,
    sum_over_spans,
)
from kernels.linear_attention.driver import Inputs, Recurrence, Run, Segment, compute_dtype, run
from kernels.matmul import through_mkl


class _Saved(NamedTuple):
    """For each chunk: (I + A_k)^-1, r, the state at its start and, with one decay per channel, A_q.

    With one decay per head, A_q is a single product and is recomputed, like everything else.
    """

    inverse_GCC: Tensor
    residual_GCV: Tensor
    states_GKV: Tensor
    scores_q_GCC: Tensor | None


class _GatedDeltaRule(Recurrence):
    """Inputs: q, k, v, log_decay (`[B, T, H]`, `[B, T, H, K]` or None) and beta `[B, T, H]`."""

    name = "gated_delta_rule"

    def per_head(self, inputs: Inputs) -> dict[str, tuple[Tensor, int | None]]:
        q, _, _, log_decay, beta = inputs
        decay = {} if log_decay is None else {"log_decay": (log_decay, q.shape[-1] if log_decay.dim() == 4 else None)}
        return {**decay, "beta": (beta, None)}

    def step(self, state_BHKV: Tensor, inputs: Inputs) -> Tensor:
        k_BHK, v_BHV, log_decay, beta_BH = inputs
        if log_decay is not None:  # [B, H, K], or [B, H]: one that serves every key channel
            state_BHKV = log_decay.exp().view(*k_BHK.shape[:2], -1, 1) * state_BHKV
        error_BHV = v_BHV - torch.einsum("bhkv,bhk->bhv", state_BHKV, k_BHK)
        return state_BHKV + k_BHK[..., None] * (beta_BH[..., None] * error_BHV)[..., None, :]

    def advance(self, state_BHKV: Tensor, inputs: Inputs) -> Tensor:
        q_BHK, k_BHK, v_BHV, log_decay, beta_BH = inputs
        read_BH2K = torch.stack((k_BHK, q_BHK), 2)
        decay = None
        if log_decay is not None:
            # [B, H, K or 1, 1]
            decay = log_decay.exp().view(*k_BHK.shape[:2], -1, 1)
            read_BH2K = read_BH2K * decay.mT
        predicted_BHV, o_BHV = (read_BH2K @ state_BHKV).unbind(2)
        u_BHV = (v_BHV - predicted_BHV).mul_(beta_BH[..., None])
        if decay is not None:
            state_BHKV.mul_(decay)
        state_BHKV.addcmul_(k_BHK[..., None], u_BHV[..., None, :])
        return o_BHV.addcmul(torch.linalg.vecdot(q_BHK, k_BHK)[..., None], u_BHV).mul_(self.scale)

    def segment_forward(self, segment: Segment, state: Tensor, inputs: Inputs) -> tuple[Tensor, _Saved]:
        chunks, chunk = _Chunks(segment, self.scale, inputs), segment.layout.chunk
        scores = chunks.scores()
        with through_mkl():  # the inverse's products are small
            inverse = _unit_lower_inverse(scores[:, :chunk]).to(segment.operands)
        states, residual = _scan(chunks, state, inverse, segment.pack(inputs[2], segment.full))
        o = segment.product(_stacked(chunks.kq_decayed)[:, 1], states)
        residual = residual.to(segment.operands)
        o = segment.add_product(o, scores[:, chunk:], residual)
        scores_q = scores[:, chunk:].to(segment.operands, copy=True) if chunks.per_channel else None
        return o, _Saved(inverse, residual, states, scores_q)

    def segment_backward(
        self, segment: Segment, d_state: Tensor, saved: _Saved, d_o: Tensor, inputs: Inputs
    ) -> tuple[Tensor | None, ...]:
        chunks, chunk = _Chunks(segment, self.scale, inputs), segment.layout.chunk
        inverse, residual, states, scores_q = saved
        if scores_q is None:
            scores = chunks.scores()
            scores_q = scores[:, chunk:]
        else:
            chunks.decays_alone()
        # Gradient of the reads from the state: rows of (P K) S above rows of (P Q) S.
        d_reads = residual.new_empty(residual.shape[0], 2 * chunk, residual.shape[-1])
        d_o_c = segment.pack(d_o, d_reads.dtype, out=d_reads[:, chunk:])
        d_residual = segment.product(scores_q.mT, d_o_c)
        d_after = _scan_backward(chunks, d_state, inverse, d_residual, d_o_c)
        d_v = segment.product(inverse.mT, d_residual)
        # r = T V - (T P K) S: the reads by k enter with a minus sign.
        d_reads[:, :chunk].copy_(d_v).neg_()

        d_scores = segment.product(d_reads, residual.mT)
        d_kq_decayed = segment.product(d_reads, states.mT)
        d_k_written = segment.product(residual, d_after.mT)
        if chunks.per_channel:
            d_kq, d_k_beta, d_log_decay = _channel_decay_gradients(chunks, d_scores, d_kq_decayed, d_k_written)
            # Add the state's decay over the chunk, which the sums over spans leave out.
            d_total = (d_after * states).sum(2, dtype=segment.full)[:, None]
            d_log_decay.addcmul_(d_total, chunks.until[:, -1:])
        else:
            d_log_decay = None
            if chunks.decay is not None:
                d_log_decay = _head_decay_gradient(chunks, scores, d_scores, d_kq_decayed, d_k_written)
                # Add the state's decay over the chunk, which the sums over spans leave out.
                d_total = (d_after * states).sum((1, 2), dtype=segment.full)[:, None, None]
                d_log_decay.addcmul_(d_total, chunks.until[:, -1:])
            chunks.mask(d_scores)
            d_scores = d_scores.to(segment.operands)
            d_kq = segment.product(d_scores, chunks.k_beta_operand)
            d_k_beta = segment.product(d_scores.mT, chunks.kq_operand)
        if chunks.decay is None:
            d_k_beta.add_(d_k_written)
            d_kq.add_(d_kq_decayed)
        else:
            d_k_beta.addcmul_(d_k_written, chunks.after)
            _stacked(d_kq).addcmul_(_stacked(d_kq_decayed), chunks.until[:, None])
        d_k, d_q = _stacked(d_kq).unbind(1)
        d_k.addcmul_(d_k_beta, chunks.beta)
        d_beta = torch.linalg.vecdot(d_k_beta, chunks.k)[..., None]
        return d_q.mul_(self.scale), d_k, d_v, d_log_decay, d_beta

    def summarize(self, one_rank: Run, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The transition matrix `[B, H, K, K]` and the contribution of these tokens.

        The rule acts on each column of the state independently. Columns that start as the identity, with v = 0, end as
        the transition matrix; columns that start as zeros end as the contribution.
        """
        _, k, v, log_decay, beta = inputs
        heads, dtype = max(x.shape[2] for x in inputs if x is not None), compute_dtype(*inputs)
        key_dim, value_dim = k.shape[-1], v.shape[-1]
        taught = _taught(v, heads, key_dim)
        start = F.pad(torch.eye(key_dim, dtype=dtype, device=k.device), (value_dim, 0))
        start = start.expand(k.shape[0], heads, -1, -1)
        _, state = one_rank(k, k, taught, log_decay, beta, initial_state=start, output_final_state=True)
        assert state is not None
        return state[..., value_dim:], state[..., :value_dim]

    def triton(
        self, inputs: Inputs, initial_state: Tensor | None, documents: Documents | None
    ) -> tuple[Tensor, Tensor]:
        from kernels.triton.delta_rule import chunk_delta_rule

        q, k, v, log_decay, beta = inputs
        return chunk_delta_rule(q, k, v, log_decay, beta, initial_state, self.scale, documents)


def _taught(v: Tensor, heads: int, key_dim: int) -> Tensor:
    """The values of every head, beside zeros for the columns of the transition matrix."""
    return F.pad(v.repeat_interleave(heads // v.shape[2], dim=2), (0, key_dim))


def _unit_lower_inverse(strict: Tensor) -> Tensor:
    """(I + strict)^-1 for strictly lower triangular `[G, C, C]`: inverts 4x4 blocks by a series, then merges pairs.

    [[T1, 0], [L, T2]]^-1 = [[T1^-1, 0], [-T2^-1 L T1^-1, T2^-1]]. At size 4 the series ends with the third power. At
    larger sizes its terms grow and cancel (binomially, for a repeated key), while the merge is stable.
    """
    chunk = strict.shape[-1]
    block = 4
    diagonal = _diagonal_blocks(strict, block).reshape(-1, block, block)
    identity = torch.eye(block, dtype=strict.dtype, device=strict.device)
    # (I - D)(I + D^2) = I - D + D^2 - D^3, exact because D^4 = 0.
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
    """Packed inputs of a segment, `[G, C, D]`, that forward and backward share.

    `kq` is k above scale * q, `[G, 2C, K]`. Pure matrix operands have the dtype `operands`, everything else `full`.
    `until` (P) and `after` (R) are `[G, C, 1]`, or `[G, C, K]` with one decay per channel. Without decay they would be
    1 everywhere, and are neither made nor multiplied.
    """

    gamma: Tensor
    until: Tensor
    after: Tensor

    def __init__(self, segment: Segment, scale: float, inputs: Inputs) -> None:
        q, k, _, log_decay, beta = inputs
        self.segment, layout, full = segment, segment.layout, segment.full
        chunk, groups = layout.chunk, layout.num_chunks * segment.heads
        self.kq = q.new_empty(groups, 2 * chunk, q.shape[-1], dtype=full)
        self.k, self.q = self.kq[:, :chunk], self.kq[:, chunk:]
        segment.pack(k, full, out=self.k)
        segment.pack(q, full, out=self.q).mul_(scale)
        self.beta = segment.pack(beta, full)
        self.k_beta = self.k * self.beta
        self.per_channel = log_decay is not None and log_decay.dim() == 4
        self.decay = None if log_decay is None else segment.pack(log_decay, full).exp_()

    def scores(self) -> Tensor:
        """A_k above A_q, `[G, 2C, C]`. Also makes `until` and `after`, and Gamma unless decays are per channel."""
        if self.per_channel:
            self._begin_decays()
            scores = self.kq.new_zeros(*self.kq.shape[:2], self.k.shape[1])
            groups = block_groups(self.k)
            for kq, k_beta, until, after, block in zip(
                *(x.split(groups) for x in (self.kq, self.k_beta, self.until, self.after, scores))
            ):
                pair = _stacked(block)
                channel_scores(_stacked(kq), k_beta, until, after, pair)
                pair[:, 1].diagonal(dim1=1, dim2=2).copy_(torch.linalg.vecdot(_stacked(kq)[:, 1], k_beta))
        else:
            if self.decay is None:
                self.gamma = self.kq.new_ones(1, self.k.shape[1], self.k.shape[1]).tril_()
            else:
                self.gamma, self.until, self.after = pairwise_decays(self.decay)
            operands = self.segment.operands
            self.kq_operand, self.k_beta_operand = self.kq.to(operands), self.k_beta.to(operands)
            scores = self.segment.product(self.kq_operand, self.k_beta_operand.mT)
            self.mask(scores)
        self._apply_decays()
        return scores

    def decays_alone(self) -> None:
        """Make `until` and `after` without the scores, for one decay per channel."""
        self._begin_decays()
        groups = block_groups(self.k)
        for until, after in zip(self.until.split(groups), self.after.split(groups)):
            for _ in decay_levels(until, after):
                pass
        self._apply_decays()

    def _begin_decays(self) -> None:
        assert self.decay is not None
        self.until, self.after = self.decay.clone(), torch.ones_like(self.decay)

    def _apply_decays(self) -> None:
        # Decay of the state over the chunk: [G, 1, 1] or [G, K, 1].
        self.state_decay = None
        if self.decay is None:
            self.kq_decayed, self.k_written = self.kq_operand, self.k_beta_operand
            return
        operands = self.segment.operands
        self.k_written = (self.k_beta * self.after).to(operands)
        self.kq_decayed = _stacked(self.kq).mul(self.until[:, None]).view_as(self.kq).to(operands)
        self.state_decay = self.until[:, -1, :, None]

    def mask(self, scores: Tensor) -> None:
        """Multiply both halves of `[G, 2C, C]` by Gamma and clear the diagonal of the first half, in place."""
        pair = _stacked(scores)
        pair *= self.gamma[:, None]
        pair[:, 0].diagonal(dim1=1, dim2=2).zero_()

    def forgetting(self, inverse: Tensor) -> Tensor:
        """-T P K `[G, C, K]`: the effect of the state at a chunk's start on the chunk's residuals."""
        return torch.bmm(inverse, _stacked(self.kq_decayed)[:, 0]).neg_()

    def of_position(self, first: int, count: int, state: Tensor) -> tuple[slice, Tensor, Tensor | None]:
        """Slice in `[G, ...]` of `count` chunks from `first` on, the states they continue, and these states' decay."""
        here = slice(first * self.segment.heads, (first + count) * self.segment.heads)
        return (
            here,
            state[:count].view(-1, *state.shape[2:]),
            None if self.state_decay is None else self.state_decay[here],
        )


def _stacked(x: Tensor) -> Tensor:
    """View `[G, 2C, D]` as `[G, 2, C, D]`."""
    return x.view(x.shape[0], 2, -1, x.shape[-1])


def _scan(chunks: _Chunks, state: Tensor, inverse: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Advance `state` `[sequences, H, K, V]` over the chunks in place.

    Returns the state at each chunk's start `[G, K, V]` and the residual r `[G, C, V]`.
    """
    segment = chunks.segment
    states = inverse.new_empty(len(v), *state.shape[2:])
    residual, forgetting = segment.product(inverse, v), chunks.forgetting(inverse)
    for span in segment.layout.spans:
        here, active, decay = chunks.of_position(*span, state)
        # Rounds to the operands' dtype, so that backward sees the values that the products here read.
        states[here] = active
        r = segment.add_product(residual[here], forgetting[here], states[here])
        if decay is not None:
            active.mul_(decay)
        segment.add_product(active, chunks.k_written[here].mT, r)
    return states, residual


def _scan_backward(chunks: _Chunks, d_state: Tensor, inverse: Tensor, d_residual: Tensor, d_o: Tensor) -> Tensor:
    """Move `d_state` back over the chunks in place, and complete `d_residual`.

    Returns the gradient of the state after each chunk `[G, K, V]`.
    """
    segment = chunks.segment
    d_after = inverse.new_empty(len(d_residual), *d_state.shape[2:])
    read, forgetting = segment.product(_stacked(chunks.kq_decayed)[:, 1].mT, d_o), chunks.forgetting(inverse)
    for span in reversed(segment.layout.spans):
        here, active, decay = chunks.of_position(*span, d_state)
        d_after[here] = active
        d_r = segment.add_product(d_residual[here], chunks.k_written[here], d_after[here])
        if decay is None:
            active.add_(read[here])
        else:
            torch.addcmul(read[here], active, decay, out=active)
        segment.add_product(active, forgetting[here].mT, d_r)
    return d_after


def _head_decay_gradient(
    chunks: _Chunks, scores: Tensor, d_scores: Tensor, d_kq_decayed: Tensor, d_k_written: Tensor
) -> Tensor:
    """Gradient of log_decay `[G, C, 1]`, without the state's decay over the chunk. Overwrites `scores`."""
    # Scores times their gradients are the gradient of log Gamma.
    d_log_gamma = _stacked(scores.mul_(d_scores)).sum(1)
    # A token's decay to itself is always 1. The sums below would cancel these entries, but only up to rounding.
    d_log_gamma.diagonal(dim1=1, dim2=2).zero_()
    d_until = _stacked((d_kq_decayed * chunks.kq_decayed).sum(-1, keepdim=True)).sum(1)
    d_after = (d_k_written * chunks.k_written).sum(-1, keepdim=True)
    # Entry (i, j) of log Gamma contains the log decays of j + 1 … i: + on its row, - on its column.
    d_cumulative = d_log_gamma.sum(2, keepdim=True) - d_log_gamma.sum(1)[..., None] + d_until
    return sum_over_spans(d_cumulative, d_after)


def _channel_decay_gradients(
    chunks: _Chunks, d_scores: Tensor, d_kq_decayed: Tensor, d_k_written: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of kq and k' through the scores, and of log_decay `[G, C, K]` without the state's decay over the chunk.

    Overwrites `chunks.decay`.
    """
    assert chunks.decay is not None
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
    """Write the gradients into the last three arguments."""
    channel_scores_backward(
        _stacked(kq), k_beta, decay, torch.ones_like(decay), _stacked(d_scores), _stacked(d_kq), d_k_beta
    )
    (k, q), pair, d_pair = (_stacked(x).unbind(1) for x in (kq, d_kq, d_scores))
    # Each score depends on the log decays between its two tokens: + from its row on, - from its column on. Scores on
    # the diagonal depend on none, so they are added only after this.
    d_cumulative = (k * pair[0]).addcmul_(q, pair[1]).addcmul_(k_beta, d_k_beta, value=-1)
    for d_read, read in zip(_stacked(d_kq_decayed).unbind(1), _stacked(kq_decayed).unbind(1)):
        d_cumulative.addcmul_(d_read, read.to(d_read.dtype))
    diagonal = d_pair[1].diagonal(dim1=1, dim2=2)[..., None]
    pair[1].addcmul_(diagonal, k_beta)
    d_k_beta.addcmul_(diagonal, q)
    d_log_decay.copy_(sum_over_spans(d_cumulative, d_k_written * k_written))


def gated_delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence token by token; arguments as in `gated_delta_rule`; always returns the final state."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _GatedDeltaRule(scale).reference((q, k, v, log_decay, beta), initial_state, documents)


@takes_cu_seqlens
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    documents: Documents | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    reuse_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule: S <- exp(log_decay) S; S <- S + beta k (v - S^T k)^T; o = scale * S^T q.

    Args:
        q, k: `[B, T, H, K]`, used as given (stable for k of norm <= 1). float32, bfloat16 or float64.
        v: `[B, T, H, V]`.
        log_decay: `[B, T, H]`, or `[B, T, H, K]` for one per key channel (Kimi Delta Attention); natural logarithm, <=
            0. Use float32 even if the other inputs are bfloat16. None means no decay: the delta rule.
        beta: `[B, T, H]`, in [0, 1] (up to 2 for negative eigenvalues).
        scale: multiplies the output; K^-1/2 by default.
        initial_state: `[B, H, K, V]`, float32 (float64 with float64 inputs); zeros by default.
        output_final_state: whether to return the final state, else None.
        documents: the N documents packed into B = 1; states are then `[N, H, K, V]`.
        group: ranks that hold consecutive, equal shards of the sequence. `documents` and states then describe the whole
            sequence and are the same on every rank; the gradient of initial_state is this rank's share.
        backend: auto, reference (token by token), torch (chunked), triton (chunked, on a GPU) or recurrent (token by
            token without gradients, for generation).
        reuse_state: whether `recurrent` may write the final state to initial_state's memory.

    Each tensor's number of heads must divide the largest one, H; neighbouring heads share an input head.

    Returns:
        o `[B, T, H, V]` in v's dtype, and the final state `[B, H, K, V]` in float32 (float64 if any input is) or None.

    Raises:
        ValueError: if shapes, heads, `documents` or `backend` are invalid.
    """
    return run(
        _GatedDeltaRule(q.shape[-1] ** -0.5 if scale is None else scale),
        q,
        k,
        v,
        log_decay,
        beta,
        initial_state=initial_state,
        output_final_state=output_final_state,
        documents=documents,
        group=group,
        backend=backend,
        reuse_state=reuse_state,
    )
