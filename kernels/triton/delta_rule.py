"""The delta rule in Triton: without decay, with a decay per head (Gated DeltaNet), or per key channel (KDA).

    S  <- Diag(exp(log_decay_t)) S_{t-1}
    S_t = S + k_t beta_t (v_t - S^T k_t)^T,   o_t = scale * S_t^T q_t

The equations are those of `kernels.linear_attention.gated_delta_rule`; the kernels are in `chunked`.
"""

from torch import Tensor

from kernels.documents import Documents
from kernels.triton.chunked import chunked, chunked_specs
from kernels.triton.launch import KernelSpec


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor,
    initial_state: Tensor | None,
    scale: float,
    documents: Documents | None,
) -> tuple[Tensor, Tensor]:
    """Run the delta rule.

    Args:
        q, k: `[B, T, H', K]`, K <= 256, k of norm <= 1; float32, bfloat16 or float16.
        v: `[B, T, H', V]`.
        log_decay: None, `[B, T, H']` per head, or `[B, T, H', K]` per channel; natural logarithm, <= 0.
        beta: `[B, T, H']`, in [0, 1] (up to 2 to allow negative eigenvalues).
        initial_state: `[N, H, K, V]`; None for zeros.
        scale: factor of the output.
        documents: the N documents packed into B = 1, or None.

    Each H' divides the largest one, H; neighbouring heads share an input head.

    Returns:
        o `[B, T, H, V]` in v's dtype and the final states `[N, H, K, V]` in float32.

    Raises:
        ValueError: if K is larger than 256, or `documents` do not cover one row.
    """
    return chunked(q, k, v, log_decay, beta, initial_state, scale, documents)


def specs(target: str, head_dim: int, dtype: str) -> list[KernelSpec]:
    """Return the kernels for 8192 tokens of 16 heads, without decay, with a decay per head, and per channel."""
    return chunked_specs(target, head_dim, dtype, (0, 3, 4), delta=True)
