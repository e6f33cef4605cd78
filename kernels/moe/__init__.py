"""Mixture of experts: the gates, the permutation of tokens to experts and back, and the experts' matrix products."""

from kernels.moe.grouped import grouped_linear, grouped_linear_reference
from kernels.moe.permutation import permute, permute_reference, unpermute, unpermute_reference
from kernels.moe.routing import (
    dense_to_sparse_gate,
    dense_to_sparse_gate_reference,
    top_k_gate,
    top_k_gate_reference,
)

__all__ = [
    "dense_to_sparse_gate",
    "dense_to_sparse_gate_reference",
    "grouped_linear",
    "grouped_linear_reference",
    "permute",
    "permute_reference",
    "top_k_gate",
    "top_k_gate_reference",
    "unpermute",
    "unpermute_reference",
]
