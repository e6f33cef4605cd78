"""Retention (RetNet, Sun et al. 2023, arXiv 2307.08621, eq. 6): linear attention with one fixed decay per head.

    S_t = exp(log_decay) S_{t-1} + k_t v_t^T        S in R^{K x V}
    o_t = scale * S_t^T q_t

Chunked form (eq. 7). Let Gamma_ij be the decay from token j (exclusive) to i (inclusive), P_i from the chunk's start to
i, R_j from j to its end, and S the state at its start:

    O  = (P Q) S + (Q K^T * Gamma) V
    S' = P_last S + (R K)^T V

In chunks the fixed decay is expanded to [B, T, H]; sequences may end anywhere within a chunk.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.documents import Documents, takes_cu_seqlens
from kernels.linear_attention._decays import pairwise_decays, sum_over_spans
from kernels.linear_attention.driver import Inputs, Recurrence, Run, Segment, run
from kernels.linear_attention.gla import advance_decayed, summarize_decayed


class _Saved(NamedTuple):
    """The state at each chunk's start. Everything else is recomputed."""

    states_GKV: Tensor


class _Retention(Recurrence):
    """Inputs: q, k, v and log_decay `[B, T, H]`."""

    name = "retention"
    few = 8

    def per_head(self, inputs: Inputs) -> dict[str, tuple[Tensor, int | None]]:
        return {"log_decay": (inputs[3], None)}

    def step(self, state_BHKV: Tensor, inputs: Inputs) -> Tensor:
        k_BHK, v_BHV, log_decay_BH = inputs
        return log_decay_BH.exp()[..., None, None] * state_BHKV + k_BHK[..., None] * v_BHV[..., None, :]

    def advance(self, state_BHKV: Tensor, inputs: Inputs) -> Tensor:
        q_BHK, k_BHK, v_BHV, log_decay_BH = inputs
        return advance_decayed(state_BHKV, q_BHK, k_BHK, v_BHV, log_decay_BH.exp()[..., None]).mul_(self.scale)

    def segment_forward(self, segment: Segment, state: Tensor, inputs: Inputs) -> tuple[Tensor, _Saved]:
        q, k, v, gamma, until, after = self._packed(segment, inputs)
        increments = segment.product((k * after).mT, v)
        states = segment.scan_states(state, until[:, -1], increments).to(segment.operands)
        scores = segment.product(q, k.mT).mul_(gamma)
        return segment.add_product(segment.product(scores, v), q * until, states), _Saved(states)

    def segment_backward(
        self, segment: Segment, d_state: Tensor, saved: _Saved, d_o: Tensor, inputs: Inputs
    ) -> tuple[Tensor, ...]:
        q, k, v, gamma, until, after = self._packed(segment, inputs)
        d_o, states = segment.pack(d_o, segment.operands), saved.states_GKV
        decay = until[:, -1:]
        reads = segment.product((q * until).mT, d_o)
        d_after = segment.scan_states(d_state, decay[:, 0], reads, reverse=True)
        # The state's decay over the chunk, which `sum_over_spans` leaves out.
        d_total = (d_after * states).sum((1, 2), dtype=segment.full)[:, None, None] * decay
        d_after = d_after.to(segment.operands)

        scores = segment.product(q, k.mT).mul_(gamma)
        d_scores = segment.product(d_o, v.mT)
        d_log_gamma = scores * d_scores
        # A token's decay to itself is always 1. The sums below would cancel these entries, but only up to rounding.
        d_log_gamma.diagonal(dim1=1, dim2=2).zero_()
        d_scores.mul_(gamma)
        d_v = segment.add_product(segment.product(scores.mT, d_o), k * after, d_after)
        d_q_inter = segment.product(d_o, states.mT).mul_(until)
        d_k_inter = segment.product(v, d_after.mT).mul_(after)
        # Entry (i, j) of log Gamma contains the log decays of j + 1 … i: + on its row, - on its column.
        d_cumulative = d_log_gamma.sum(2) - d_log_gamma.sum(1) + torch.linalg.vecdot(d_q_inter, q.to(segment.full))
        d_written = torch.linalg.vecdot(d_k_inter, k.to(segment.full))
        d_log_decay = sum_over_spans(d_cumulative[..., None], d_written[..., None]).add_(d_total)
        d_q = segment.add_product(d_q_inter, d_scores, k).mul_(self.scale)
        return d_q, segment.add_product(d_k_inter, d_scores.mT, q), d_v, d_log_decay

    def _packed(self, segment: Segment, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Scale * q, k and v in the operands' dtype `[G, C, D]`, Gamma `[G, C, C]`, P and R `[G, C, 1]`."""
        q, k, v = (segment.pack(x, segment.operands) for x in inputs[:3])
        return q.mul_(self.scale), k, v, *pairwise_decays(segment.pack(inputs[3], segment.full).exp_())

    def summarize(self, one_rank: Run, inputs: Inputs) -> tuple[Tensor, Tensor]:
        q, k, v, log_decay = inputs
        return summarize_decayed(q, k, v, log_decay[..., None])

    def triton(
        self, inputs: Inputs, initial_state: Tensor | None, documents: Documents | None
    ) -> tuple[Tensor, Tensor]:
        from kernels.triton.gla import chunk_gla

        q, k, v, log_decay = inputs
        return chunk_gla(q, k, v, log_decay, initial_state, self.scale, documents)


def _every_token(q: Tensor, log_decay: Tensor) -> Tensor:
    """Expand `[H]` to `[B, T, H]` without copying."""
    if log_decay.dim() != 1:
        raise ValueError(f"log_decay must be [H], one fixed decay per head, got shape {tuple(log_decay.shape)}")
    return log_decay.expand(*q.shape[:2], -1)


def retention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence token by token; arguments as in `retention`; always returns the final state."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _Retention(scale).reference((q, k, v, _every_token(q, log_decay)), initial_state, documents)


@takes_cu_seqlens
def retention(
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
    """Retention (arXiv 2307.08621): S <- exp(log_decay) S + k v^T, o = scale * S^T q.

    Args:
        q, k: `[B, T, H, K]`, used as given. float32, bfloat16 or float64.
        v: `[B, T, H, V]`.
        log_decay: `[H]`, natural logarithm, <= 0; log(1 - 2^(-5 - h)) in the paper. It receives a gradient.
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
        _Retention(q.shape[-1] ** -0.5 if scale is None else scale),
        q,
        k,
        v,
        _every_token(q, log_decay),
        initial_state=initial_state,
        output_final_state=output_final_state,
        documents=documents,
        group=group,
        backend=backend,
        reuse_state=reuse_state,
    )
