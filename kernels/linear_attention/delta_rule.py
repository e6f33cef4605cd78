"""The delta rule (DeltaNet, arXiv 2406.06484, eq. 2): the gated delta rule without decay.

u_t = beta_t (v_t - S_{t-1}^T k_t)
S_t = S_{t-1} + k_t u_t^T                       S in R^{K x V}
o_t = scale * S_t^T q_t
"""

import torch.distributed as dist
from torch import Tensor

from kernels.documents import Documents, takes_cu_seqlens
from kernels.linear_attention.gated_delta_rule import gated_delta_rule, gated_delta_rule_reference


def delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence token by token; arguments as in `delta_rule`; always returns the final state."""
    return gated_delta_rule_reference(
        q, k, v, None, beta, scale=scale, initial_state=initial_state, documents=documents
    )


@takes_cu_seqlens
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    """The delta rule (arXiv 2406.06484): S <- S + beta k (v - S^T k)^T; o = scale * S^T q.

    Args:
        q, k: `[B, T, H, K]`, used as given (the recurrence is stable for k of norm <= 1). float32, bfloat16 or float64.
        v: `[B, T, H, V]`.
        beta: `[B, T, H]`, in [0, 1] (up to 2 if negative eigenvalues are wanted).
        scale, initial_state, output_final_state, documents, group: as in `gated_delta_rule`, including head counts.
        backend: as in `gated_delta_rule`, under whose name it is logged and configured in the environment.
        reuse_state: as in `gated_delta_rule`.

    Returns:
        o `[B, T, H, V]` in v's dtype, and the final state `[B, H, K, V]` or None.

    Raises:
        ValueError: as in `gated_delta_rule`.
    """
    return gated_delta_rule(
        q,
        k,
        v,
        None,
        beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        documents=documents,
        group=group,
        backend=backend,
        reuse_state=reuse_state,
    )
