"""HGRN2 (Qin et al. 2024, arXiv 2404.07904, eq. 7): gated linear attention with the key tied to the decay, k = 1 - a.

S_t = Diag(a_t) S_{t-1} + (1 - a_t) v_t^T       a_t = exp(log_decay_t), S in R^{K x V}
o_t = scale * S_t^T q_t
"""

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.documents import Documents, takes_cu_seqlens
from kernels.linear_attention.gla import gla, gla_reference


def hgrn2_reference(
    q: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence token by token; arguments as in `hgrn2`; always returns the final state."""
    k = 1 - log_decay.exp()
    return gla_reference(q, k, v, log_decay, scale=scale, initial_state=initial_state, documents=documents)


@takes_cu_seqlens
def hgrn2(
    q: Tensor,
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
    """`gla` with k = 1 - exp(log_decay), computed without loss of precision near a decay of 1.

    Args:
        q: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        log_decay: `[B, T, H, K]`, natural logarithm, <= 0. Use float32 even if the other inputs are bfloat16.
        scale, initial_state, output_final_state, documents, group: as in `gla`, including head counts.
        backend: as in `gla`, under whose name it is logged and configured in the environment.
        reuse_state: as in `gla`.

    Returns:
        o `[B, T, H, V]` in v's dtype, and the final state `[B, H, K, V]` or None.

    Raises:
        ValueError: as in `gla`.
    """
    return gla(
        q,
        -torch.expm1(log_decay).to(q.dtype),
        v,
        log_decay,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        documents=documents,
        group=group,
        backend=backend,
        reuse_state=reuse_state,
    )
