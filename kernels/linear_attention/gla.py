"""Gated linear attention (GLA, arXiv 2312.06635, eq. 3): one decay per key channel.

    S_t = Diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T        S in R^{K x V}
    o_t = scale * S_t^T q_t

Chunked form (section 4). Let P_i be the product of the decays from the chunk's start to token i, R_j from after token j
to its end, and S the state at its start:

    O  = (Q * P) S + A V,    A_ij = sum_c q_ic k_jc decay_c(j -> i)  for j <= i
    S' = Diag(P_last) S + (K * R)^T V

The paper evaluates A with sub-chunk reference points. Here the reference points are the splits of a binary tree over
the chunk (`decay_levels`): every pair j < i meets at one split s, where decay(j -> i) = decay(s -> i) * decay(j -> s)
with both factors <= 1, and each level of the tree is one batched matrix product. The decays of a level follow from the
level below by one multiplication, so the whole chunk needs one exp per element and no decay can overflow.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.documents import Documents, takes_cu_seqlens
from kernels.linear_attention._decays import block_groups, channel_scores, channel_scores_backward, sum_over_spans
from kernels.linear_attention._sharded import decays_after
from kernels.linear_attention.driver import Inputs, Recurrence, Run, Segment, compute_dtype, run


class _Saved(NamedTuple):
    """A, and the state at each chunk's start. Everything else is recomputed."""

    scores_GCC: Tensor
    states_GKV: Tensor


class _GLA(Recurrence):
    """Inputs: q, k, v and log_decay `[B, T, H, K]`."""

    name = "gla"

    def per_head(self, inputs: Inputs) -> dict[str, tuple[Tensor, int | None]]:
        q, _, _, log_decay = inputs
        return {"log_decay": (log_decay, q.shape[-1])}

    def step(self, state_BHKV: Tensor, inputs: Inputs) -> Tensor:
        k_BHK, v_BHV, log_decay_BHK = inputs
        return log_decay_BHK.exp()[..., None] * state_BHKV + k_BHK[..., None] * v_BHV[..., None, :]

    def advance(self, state_BHKV: Tensor, inputs: Inputs) -> Tensor:
        q_BHK, k_BHK, v_BHV, log_decay_BHK = inputs
        return advance_decayed(state_BHKV, q_BHK, k_BHK, v_BHV, log_decay_BHK.exp()).mul_(self.scale)

    def segment_forward(self, segment: Segment, state: Tensor, inputs: Inputs) -> tuple[Tensor, _Saved]:
        q, k, v, until, after = self._packed(segment, inputs)
        scores = _scores(q, k, until, after).to(segment.operands)
        # In place, because the packed tensors belong to this segment alone.
        increments = segment.product(k.mul_(after).mT, v)
        states = segment.scan_states(state, until[:, -1], increments).to(segment.operands)
        o = segment.add_product(segment.product(scores, v), q.mul_(until), states)
        return o, _Saved(scores, states)

    def segment_backward(
        self, segment: Segment, d_state: Tensor, saved: _Saved, d_o: Tensor, inputs: Inputs
    ) -> tuple[Tensor, ...]:
        q, k, v, until, after = self._packed(segment, inputs)
        d_o, states = segment.pack(d_o, segment.operands), saved.states_GKV
        d_scores = segment.product(d_o, v.mT)
        d_q, d_k = torch.empty_like(q), torch.empty_like(k)
        groups = block_groups(q)
        for q_b, k_b, until_b, after_b, d_scores_b, d_q_b, d_k_b in zip(
            *(x.split(groups) for x in (q, k, until, after, d_scores, d_q, d_k))
        ):
            channel_scores_backward(q_b[:, None], k_b, until_b, after_b, d_scores_b[:, None], d_q_b[:, None], d_k_b)
        # Each score depends on the log decays between its two tokens: + from its row on, - from its column on. Scores
        # on the diagonal depend on none, so they are added only after this: they would cancel, but only up to rounding.
        d_cumulative = (q * d_q).addcmul_(k, d_k, value=-1)
        diagonal = d_scores.diagonal(dim1=1, dim2=2)[..., None]
        d_q.addcmul_(diagonal, k)
        d_k.addcmul_(diagonal, q)

        decay = until[:, -1]
        reads = segment.product((q * until).mT, d_o)
        d_after = segment.scan_states(d_state, decay, reads, reverse=True)
        # The state's decay over the chunk, which `sum_over_spans` leaves out.
        d_total = (d_after * states).sum(-1).mul_(decay)
        d_after = d_after.to(segment.operands)
        d_v = segment.add_product(segment.product(saved.scores_GCC.mT, d_o), k * after, d_after)
        d_q_inter = segment.product(d_o, states.mT).mul_(until)
        d_k_inter = segment.product(v, d_after.mT).mul_(after)
        # A read at i has passed the decays up to i; a write at j passes those after j.
        d_cumulative.addcmul_(q, d_q_inter)
        d_log_decay = sum_over_spans(d_cumulative, k * d_k_inter).add_(d_total[:, None])
        return d_q.add_(d_q_inter).mul_(self.scale), d_k.add_(d_k_inter), d_v, d_log_decay

    def _packed(self, segment: Segment, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Scale * q, k, v (in the operands' dtype), the decays, and ones of the same shape: `[G, C, D]`."""
        q, k, v, log_decay = inputs
        q, k = segment.pack(q, segment.full).mul_(self.scale), segment.pack(k, segment.full)
        decay = segment.pack(log_decay, segment.full).exp_()
        return q, k, segment.pack(v, segment.operands), decay, torch.ones_like(decay)

    def summarize(self, one_rank: Run, inputs: Inputs) -> tuple[Tensor, Tensor]:
        return summarize_decayed(*inputs)

    def triton(
        self, inputs: Inputs, initial_state: Tensor | None, documents: Documents | None
    ) -> tuple[Tensor, Tensor]:
        from kernels.triton.gla import chunk_gla

        q, k, v, log_decay = inputs
        return chunk_gla(q, k, v, log_decay, initial_state, self.scale, documents)


def _scores(q: Tensor, k: Tensor, until: Tensor, after: Tensor) -> Tensor:
    """A `[G, C, C]`, lower triangular. Leaves `until` and `after` as P and R."""
    scores = q.new_zeros(*q.shape[:2], q.shape[1])
    groups = block_groups(q)
    for q_b, k_b, until_b, after_b, scores_b in zip(*(x.split(groups) for x in (q, k, until, after, scores))):
        channel_scores(q_b[:, None], k_b, until_b, after_b, scores_b[:, None])
        scores_b.diagonal(dim1=1, dim2=2).copy_(torch.linalg.vecdot(q_b, k_b))
    return scores


def advance_decayed(state_BHKV: Tensor, q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, decay_BHK: Tensor) -> Tensor:
    """S <- Diag(decay) S + k v^T in place; returns S^T q `[B, H, V]`. A decay per head is `[B, H, 1]`."""
    o_BHV = ((q_BHK * decay_BHK)[..., None, :] @ state_BHKV)[..., 0, :]
    state_BHKV.mul_(decay_BHK[..., None]).addcmul_(k_BHK[..., None], v_BHV[..., None, :])
    return o_BHV.addcmul_(torch.linalg.vecdot(q_BHK, k_BHK)[..., None], v_BHV)


def summarize_decayed(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens' affine effect on a state (see `_sharded`): decays `[B, H, K, 1]` and sum_j decay_j k_j v_j^T."""
    dtype, heads = compute_dtype(q, k, v, log_decay), max(x.shape[2] for x in (q, k, v, log_decay))
    k, v, log_decay = (x.to(dtype).repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v, log_decay))
    decays = decays_after(log_decay)
    return decays[:, 0, :, :, None], torch.einsum("bthk,bthv->bhkv", k * decays[:, 1:], v)


def gla_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence token by token; arguments as in `gla`; always returns the final state."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _GLA(scale).reference((q, k, v, log_decay), initial_state, documents)


@takes_cu_seqlens
def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    documents: Documents | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    reuse_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention (arXiv 2312.06635): S <- Diag(exp(log_decay)) S + k v^T, o = scale * S^T q.

    Args:
        q, k: `[B, T, H, K]`, used as given. float32, bfloat16 or float64.
        v: `[B, T, H, V]`.
        log_decay: `[B, T, H, K]`, natural logarithm, <= 0. Use float32 even if the other inputs are bfloat16.
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
        _GLA(q.shape[-1] ** -0.5 if scale is None else scale),
        q,
        k,
        v,
        log_decay,
        initial_state=initial_state,
        output_final_state=output_final_state,
        documents=documents,
        group=group,
        backend=backend,
        reuse_state=reuse_state,
    )
