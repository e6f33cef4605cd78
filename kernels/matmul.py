"""Matrix products for linear layers, through the library that is fastest on this processor.

    matmul(a, b) = a · b     batched_matmul(a, b) = a_x · b_x for every x     linear(x, W, bias) = x · Wᵀ + bias

torch multiplies float32 matrices on a CPU with MKL, which does not use AVX-512 on AMD's processors: 104 GFLOP/s on a
core of a Zen 5. oneDNN, which torch ships as well but calls for bfloat16 only, reaches 180 to 240. Both add in float32.

Backends:
    torch      torch.mm, on every device and for every dtype; also by the name of reference
    onednn     float32 matrices on an AMD processor with AVX-512
"""

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import resolve

# Multiplications of the smallest product that oneDNN's longer set-up pays for: torch 7 µs and oneDNN 15 at 64³, 41 and
# 30 at 128³.
_MIN_ONEDNN_SIZE = 1 << 20


def matmul(a: Tensor, b: Tensor, *, backend: str = "auto") -> Tensor:
    """Multiply two matrices, without a gradient of its own.

    Args:
        a, b: [M, K] and [K, N] of one floating dtype, any strides.
        backend: "auto" or one of the module's backends; "auto" takes torch for small products.

    Returns:
        [M, N] in their dtype.

    Raises:
        ValueError: the backend cannot serve these inputs.
    """
    size = a.shape[0] * b.numel()
    if _choose(a, backend, size) == "onednn":
        return _onednn(a, b)
    return torch.mm(a, b)


def batched_matmul(a: Tensor, b: Tensor, *, backend: str = "auto") -> Tensor:
    """Multiply every pair of matrices, without a gradient of its own.

    Args:
        a, b: [X, M, K] and [X, K, N] of one floating dtype, any strides.
        backend: as in `matmul`, for each product.

    Returns:
        [X, M, N] in their dtype.

    Raises:
        ValueError: the backend cannot serve these inputs.
    """
    if _choose(a, backend, a.shape[1] * b.shape[1] * b.shape[2]) == "torch":
        return torch.bmm(a, b)
    if len(a) == 1:
        return _onednn(a[0], b[0])[None]
    out = a.new_empty(len(a), a.shape[1], b.shape[2])
    for a_MK, b_KN, out_MN in zip(a, b, out):
        out_MN.copy_(_onednn(a_MK, b_KN))
    return out


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` as torch has it."""
    return F.linear(x, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Project x · weightᵀ + bias, differentiable.

    Args:
        x: [..., K], floating.
        weight: [N, K] in x's dtype.
        bias: [N] or None.
        backend: "auto" or one of the module's backends; "auto" takes torch for small products.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: the backend cannot serve these inputs.
    """
    if _choose(x, backend, x.numel() * weight.shape[0]) == "onednn":
        return _OneDNNLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def _choose(x: Tensor, backend: str, size: int) -> str:
    """The library, onednn or torch, for a product of `size` multiplications."""
    if x.dtype != torch.float32 or not x.is_cpu or not _onednn_is_faster():
        available: tuple[str, ...] = ("torch", "reference")
    elif backend == "auto" and size < _MIN_ONEDNN_SIZE:
        return "torch"
    else:
        available = ("onednn", "torch", "reference")
    return "onednn" if resolve("matmul", backend, available) == "onednn" else "torch"


@functools.cache
def _onednn_is_faster() -> bool:
    """An AMD processor with AVX-512 under Linux, and a torch with the operation by which torch.compile calls oneDNN."""
    cpu_info = Path("/proc/cpuinfo")
    return (
        cpu_info.is_file()
        and "AuthenticAMD" in cpu_info.read_text()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _onednn(a_MK: Tensor, b_KN: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """Compute a · b + bias. oneDNN copies a left factor stored by columns, and takes a right one either way."""
    if bias_N is None and not a_MK.is_contiguous() and b_KN.shape[1] < a_MK.shape[0]:
        # As (bᵀ · aᵀ)ᵀ the narrower factor is copied: 177 to 210 GFLOP/s for the gradient of a [1408, 512] weight.
        return _onednn_product(b_KN.T, a_MK.T, None).T
    return _onednn_product(a_MK, b_KN, bias_N)


def _onednn_product(a_MK: Tensor, b_KN: Tensor, bias_N: Tensor | None) -> Tensor:
    if not (b_KN.is_contiguous() or b_KN.T.is_contiguous()):
        # Gaps between the rows would send oneDNN to its reference loops, a hundred times slower.
        b_KN = b_KN.contiguous()
    return torch.ops.mkldnn._linear_pointwise(a_MK, b_KN.T, bias_N, "none", [], "")


class _OneDNNLinear(torch.autograd.Function):
    """`linear` and its gradients dx = g · W, dW = gᵀ · x, db = sum(g)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x.reshape(-1, x.shape[-1]), weight.T, bias).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_MN = grad.reshape(-1, grad.shape[-1])
        return (
            _onednn(grad_MN, weight).view(x.shape) if needs_x else None,
            _onednn(grad_MN.T, x.reshape(-1, x.shape[-1])) if needs_weight else None,
            grad_MN.sum(0) if needs_bias else None,
        )
