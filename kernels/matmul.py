"""Matrix products for linear layers, by the fastest library on this processor.

    matmul(a, b) = a · b     batched_matmul(a, b) = a_x · b_x for every x     linear(x, W, bias) = x · Wᵀ + bias

float32: torch multiplies on a CPU with MKL, which does not use AVX-512 on AMD processors (104 GFLOP/s on a core of a
Zen 5). oneDNN, which torch also ships, reaches 180 to 240. torch calls oneDNN for float32 only if operands may be
rounded to bfloat16. oneDNN rounds them only on processors with matrix units (AMX). Without AMX, giving the permission
changes the library but not the precision: both libraries accumulate in float32.

bfloat16: on a CPU without bfloat16 instructions, torch multiplies in a plain loop, a hundred times slower than float32.
There this module multiplies in float32 and rounds the result once. A CPU with the instructions also accumulates in
float32, but in another order, so results differ in the last bit between the two kinds of processor.

Backends:
    torch      torch.mm, on every device and for every dtype; `reference` is another name for it
    onednn     float32 matrices on an AMD processor with AVX-512 and without AMX
    float32    bfloat16 matrices on a CPU: converted to float32, multiplied, rounded once
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from kernels.autograd import once_differentiable, save
from kernels.backend import is_generating, resolve

# Multiplications of the smallest product for which oneDNN's longer set-up pays off. Measured: 64³ takes torch 7 µs and
# oneDNN 15, 128³ takes torch 41 and oneDNN 30.
_MIN_ONEDNN_SIZE = 1 << 20
# Rows of bfloat16 up to which `linear` multiplies from the left, without gradients.
_FEW_ROWS = 32
# Values of ONEDNN_MAX_CPU_ISA at which oneDNN accepts bfloat16 without using instructions for it. It refuses bfloat16
# at lower values.
_ISA_WITHOUT_BFLOAT16 = ("AVX512_CORE", "AVX512_CORE_VNNI")

_Backward = TypeVar("_Backward", bound=Callable[..., Any])


@functools.cache
@_disable_current_modes()  # the first call may be under a fake-tensor mode
def multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32.

    True if it has the instructions (x86: AVX512-BF16 or AMX) and ONEDNN_MAX_CPU_ISA allows torch's oneDNN to use them.
    """
    mkldnn: Any = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not mkldnn._is_mkldnn_bf16_supported():
        return False
    features = torch.cpu.get_capabilities()
    if features.get("architecture") != "x86_64":
        return True  # here oneDNN's answer above already depends on the processor
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    allowed = limit not in _ISA_WITHOUT_BFLOAT16
    return allowed and any(features.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def matmul(a: Tensor, b: Tensor, *, out: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Multiply two matrices. Defines no gradient.

    Args:
        a, b: [M, K] and [K, N] of one floating dtype, any strides.
        out: [M, N] in their dtype, the tensor to write; None allocates one.
        backend: "auto" or one of the module's backends; "auto" takes torch for small products in float32.

    Returns:
        [M, N] in their dtype.

    Raises:
        ValueError: the backend cannot serve these inputs.
    """
    choice = _choose(a, backend, a.shape[0] * b.numel())
    if choice == "float32":
        product = matmul(a.float(), b.float())
        return product.to(a.dtype) if out is None else out.copy_(product)
    with _through(choice):
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)


def batched_matmul(a: Tensor, b: Tensor, *, backend: str = "auto") -> Tensor:
    """Multiply every pair of matrices. Defines no gradient.

    Args:
        a, b: [X, M, K] and [X, K, N] of one floating dtype, any strides.
        backend: as in `matmul`; "small" refers to a single product.

    Returns:
        [X, M, N] in their dtype.

    Raises:
        ValueError: the backend cannot serve these inputs.
    """
    choice = _choose(a, backend, a.shape[1] * b.shape[1] * b.shape[2])
    if choice == "float32":
        return batched_matmul(a.float(), b.float()).to(a.dtype)
    with _through(choice):
        return torch.bmm(a, b)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` by torch.nn.functional.linear."""
    return F.linear(x, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Compute x · weightᵀ + bias, differentiable.

    Args:
        x: [..., K], floating.
        weight: [N, K] in x's dtype.
        bias: [N] or None.
        backend: "auto" or one of the module's backends; "auto" takes torch for small products in float32.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: the backend cannot serve these inputs.
    """
    choice = _choose(x, backend, x.numel() * weight.shape[0])
    if choice == "torch" and x.is_cpu and x.dtype == torch.bfloat16 and is_generating():
        rows = x.numel() // x.shape[-1]
        if rows <= _FEW_ROWS:
            return _linear_of_few_rows(x, weight, bias, rows)
    return F.linear(x, weight, bias) if choice == "torch" else _Linear.apply(x, weight, bias, choice)


def _linear_of_few_rows(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """`linear` of one or a few rows in bfloat16, with the weight as the left factor: `torch.mm` copies the other one.

    Measured on a Sapphire Rapids core: 1.3 to 1.9 times as fast as F.linear.
    """
    shape = (*x.shape[:-1], weight.shape[0])
    if rows == 1:
        x_K = x.reshape(-1)
        return (torch.mv(weight, x_K) if bias is None else torch.addmv(bias, weight, x_K)).view(shape)
    x_KM = x.reshape(rows, -1).t()
    y_NM = torch.mm(weight, x_KM) if bias is None else torch.addmm(bias[:, None], weight, x_KM)
    return y_NM.t().contiguous().view(shape)


def _choose(x: Tensor, backend: str, size: int) -> str:
    """Choose torch, onednn or float32 for a product of `size` multiplications."""
    available: tuple[str, ...] = ("torch", "reference")
    if x.is_cpu and x.dtype == torch.bfloat16:
        available = (*available, "float32") if multiplies_bfloat16() else ("float32", *available)
    elif x.is_cpu and x.dtype == torch.float32 and _onednn_is_faster():
        if backend == "auto" and size < _MIN_ONEDNN_SIZE:
            return "torch"
        available = ("onednn", *available)
    choice = resolve("matmul", backend, available)
    return "torch" if choice == "reference" else choice


def _through(choice: str) -> AbstractContextManager[None]:
    return through_onednn() if choice == "onednn" else nullcontext()


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
    """Context in which torch multiplies float32 matrices on the CPU with oneDNN."""
    return _float32_precision("bf16")


def through_mkl() -> AbstractContextManager[None]:
    """Context in which torch multiplies float32 matrices on the CPU with MKL, its default; for many tiny products."""
    return _float32_precision("ieee")


def fastest_products(x: Tensor) -> AbstractContextManager[None]:
    """Context in which torch uses the library that `matmul` chooses for large float32 matrices on x's device."""
    if x.is_cpu and _onednn_is_faster() and resolve("matmul", "auto", ("onednn", "torch", "reference")) == "onednn":
        return through_onednn()
    return nullcontext()


def with_fastest_products(backward: _Backward) -> _Backward:
    """Decorate an autograd Function's backward to run within `fastest_products` of its first gradient."""

    @functools.wraps(backward)
    def call(ctx: Any, grad: Tensor, *grads: Tensor) -> Any:
        with fastest_products(grad):
            return backward(ctx, grad, *grads)

    return cast(_Backward, call)


@functools.cache
def _onednn_is_faster() -> bool:
    """Whether this is an AMD processor with AVX-512, under Linux, on which oneDNN keeps float32 precision."""
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


@_disable_current_modes()  # the first call may be under a fake-tensor mode or an operation counter
def _keeps_digits() -> bool:
    """Whether oneDNN's product has float32 precision. Measured, because the processor's features are not proof."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(128, 128, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    with through_onednn():
        rounded = a @ b
    return bool((rounded - exact).norm() < 1e-6 * exact.norm())


class _Linear(torch.autograd.Function):
    """`linear` by the onednn or float32 backend, with gradients dx = g · W, dW = gᵀ · x, db = sum(g)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, choice: str) -> Tensor:
        # Save the unconverted tensors, so that every processor keeps the same bytes for backward.
        save(ctx, activations=(x,), weights=(weight,))
        ctx.choice = choice
        if choice == "float32":
            return linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
        with through_onednn():
            return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        g_MN, x_MK, w_NK = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]), weight
        backend = ctx.choice
        if backend == "float32":  # convert the gradient once for both products
            g_MN, x_MK, w_NK, backend = g_MN.float(), x_MK.float(), w_NK.float(), "auto"
        return (
            matmul(g_MN, w_NK, backend=backend).to(x.dtype).view(x.shape) if needs_x else None,
            matmul(g_MN.T, x_MK, backend=backend).to(weight.dtype) if needs_weight else None,
            g_MN.sum(0).to(grad.dtype) if needs_bias else None,
            None,
        )
