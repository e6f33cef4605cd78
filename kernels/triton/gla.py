"""Gated linear attention in Triton, with a decay per key channel, per head (retention, simple GLA), or none.

    S_t = Diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T,   o_t = scale * S_t^T q_t

The equations are those of `kernels.linear_attention.gla`; the kernels are in `chunked`.
"""

from torch import Tensor

from kernels.documents import Documents
from kernels.triton.chunked import chunked, chunked_specs
from kernels.triton.launch import KernelSpec


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    documents: Documents | None,
) -> tuple[Tensor, Tensor]:
    """Run gated linear attention.

    Args:
        q, k: `[B, T, H', K]`, K <= 256; float32, bfloat16 or float16.
        v: `[B, T, H', V]`.
        log_decay: `[B, T, H', K]` per channel, `[B, T, H']` per head, or None; natural logarithm, <= 0.
        initial_state: `[N, H, K, V]`; None for zeros.
        scale: factor of the output.
        documents: the N documents packed into B = 1, or None.

    Each H' divides the largest one, H; neighbouring heads share an input head.

    Returns:
        o `[B, T, H, V]` in v's dtype and the final states `[N, H, K, V]` in float32.

    Raises:
        ValueError: if K is larger than 256, or `documents` do not cover one row.
    """
    return chunked(q, k, v, log_decay, None, initial_state, scale, documents)


def specs(target: str, head_dim: int, dtype: str) -> list[KernelSpec]:
    """Return the kernels for 8192 tokens of 16 heads, with a decay per channel and per head."""
    return chunked_specs(target, head_dim, dtype, (4, 3), delta=False)
