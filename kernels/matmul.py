"""Matrix products for linear layers, through the library that is fastest on this processor.

    matmul(a, b) = a · b     batched_matmul(a, b) = a_x · b_x for every x     linear(x, W, bias) = x · Wᵀ + bias

torch multiplies float32 matrices on a CPU with MKL, which does not use AVX-512 on AMD's processors: 104 GFLOP/s on a
core of a Zen 5. oneDNN, which torch ships as well, reaches 180 to 240. Torch calls it for float32 only where it may
round operands to bfloat16, which oneDNN does where the processor has matrix units for that (AMX); where it has none,
the permission changes the library and not one digit. Both add in float32.

Backends:
    torch      torch.mm, on every device and for every dtype; also by the name of reference
    onednn     float32 matrices on an AMD processor with AVX-512 and without AMX
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from kernels.autograd import once_differentiable
from kernels.backend import resolve

# Multiplications of the smallest product that oneDNN's longer set-up pays for: torch 7 µs and oneDNN 15 at 64³, 41 and
# 30 at 128³.
_MIN_ONEDNN_SIZE = 1 << 20


_Backward = TypeVar("_Backward", bound=Callable[..., Any])


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
    if _choose(a, backend, size) == "torch":
        return torch.mm(a, b)
    with through_onednn():
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
    with through_onednn():
        return torch.bmm(a, b)


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


@contextmanager
def _float32_precision(allowed: str) -> Iterator[None]:
    mkldnn: Any = torch.backends.mkldnn
    setting = mkldnn.matmul
    before = setting.fp32_precision
    setting.fp32_precision = allowed
    try:
        yield
    finally:
        setting.fp32_precision = before


def through_onednn() -> AbstractContextManager[None]:
    """In here torch multiplies float32 matrices on the CPU through oneDNN."""
    return _float32_precision("bf16")


def through_mkl() -> AbstractContextManager[None]:
    """In here torch multiplies float32 matrices on the CPU as it does by default: for batches of tiny products."""
    return _float32_precision("ieee")


def fastest_products(x: Tensor) -> AbstractContextManager[None]:
    """In here torch multiplies float32 matrices by what `matmul` would choose for large ones on x's device."""
    if x.is_cpu and _onednn_is_faster() and resolve("matmul", "auto", ("onednn", "torch", "reference")) == "onednn":
        return through_onednn()
    return nullcontext()


def with_fastest_products(backward: _Backward) -> _Backward:
    """An autograd Function's backward, `fastest_products` of its first gradient around it."""

    @functools.wraps(backward)
    def call(ctx: Any, grad: Tensor, *grads: Tensor) -> Any:
        with fastest_products(grad):
            return backward(ctx, grad, *grads)

    return cast(_Backward, call)


@functools.cache
def _onednn_is_faster() -> bool:
    """An AMD processor with AVX-512 under Linux on which oneDNN keeps float32's digits."""
    cpu_info = Path("/proc/cpuinfo")
    return (
        cpu_info.is_file()
        and "AuthenticAMD" in cpu_info.read_text()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.backends.mkldnn, "matmul")
        and not torch.cpu.get_capabilities().get("amx_tile", True)
        and _keeps_digits()
    )


@_disable_current_modes()  # the question may come in a run on shapes alone, or while operations are counted
def _keeps_digits() -> bool:
    """Whether a product through oneDNN is a float32 one: it has the last word over what is known of the processor."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(128, 128, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    with through_onednn():
        rounded = a @ b
    return bool((rounded - exact).norm() < 1e-6 * exact.norm())


class _OneDNNLinear(torch.autograd.Function):
    """`linear` and its gradients dx = g · W, dW = gᵀ · x, db = sum(g)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        with through_onednn():
            return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_MN = grad.reshape(-1, grad.shape[-1])
        with through_onednn():
            return (
                torch.mm(grad_MN, weight).view(x.shape) if needs_x else None,
                torch.mm(grad_MN.T, x.reshape(-1, x.shape[-1])) if needs_weight else None,
                grad_MN.sum(0) if needs_bias else None,
            )
