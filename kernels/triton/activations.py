"""SwiGLU, silu(gate) · up, of two tensors or of one that holds both halves.

    d gate = dy · up · silu'(gate)        d up = dy · silu(gate)        silu'(g) = σ(g) (1 + g (1 − σ(g)))

Arithmetic is float32. Each program handles a block of rows and columns, and reads it once per pass.
"""

# Triton interprets a kernel's annotations, and only constexpr annotations are meaningful to it.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, import-untyped"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.autograd import once_differentiable, save
from kernels.triton.launch import (
    KernelSpec,
    device_guard,
    dtype_bytes,
    next_power,
    target_name,
    unit_stride,
    warp_size,
)

_BLOCK_ELEMENTS = 2048


@triton.jit
def _block(rows, columns, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr):
    """Return the program's rows and columns, and the mask of those that exist."""
    row = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    column = (tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F))[None, :]
    return row, column, (row < rows) & (column < columns)


@triton.jit
def _forward_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,
    gate_stride,
    up_stride,
    rows,
    columns,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    row, column, mask = _block(rows, columns, BLOCK_N, BLOCK_F)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * columns + column, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    dy_stride,
    gate_stride,
    up_stride,
    gradient_stride,
    rows,
    columns,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    row, column, mask = _block(rows, columns, BLOCK_N, BLOCK_F)
    dy = tl.load(dy_ptr + row * dy_stride + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    dup = dy * gate * sigmoid
    tl.store(dgate_ptr + row * gradient_stride + column, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + row * gradient_stride + column, dup.to(dup_ptr.dtype.element_ty), mask=mask)


def _tile(target: str, columns: int) -> tuple[int, int, int]:
    """Return (BLOCK_N, BLOCK_F, warps), for 16 elements per thread."""
    width = min(next_power(columns), _BLOCK_ELEMENTS)
    return _BLOCK_ELEMENTS // width, width, _BLOCK_ELEMENTS // (16 * warp_size(target))


def _forward(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    rows, columns = gate_NF.shape
    y_NF = torch.empty((rows, columns), dtype=gate_NF.dtype, device=gate_NF.device)
    block_n, block_f, warps = _tile(target_name(y_NF.device), columns)
    if y_NF.numel():
        with device_guard(y_NF):
            grid = triton.cdiv(rows, block_n), triton.cdiv(columns, block_f)
            strides = gate_NF.stride(0), up_NF.stride(0)
            blocks = {"BLOCK_N": block_n, "BLOCK_F": block_f, "num_warps": warps}
            _forward_kernel[grid](gate_NF, up_NF, y_NF, *strides, rows, columns, **blocks)
    return y_NF


def _backward(dy_NF: Tensor, gate_NF: Tensor, up_NF: Tensor, dgate_NF: Tensor, dup_NF: Tensor) -> None:
    """Write both gradients, which share one row stride."""
    rows, columns = gate_NF.shape
    block_n, block_f, warps = _tile(target_name(dy_NF.device), columns)
    if dy_NF.numel():
        with device_guard(dy_NF):
            grid = triton.cdiv(rows, block_n), triton.cdiv(columns, block_f)
            tensors = dy_NF, gate_NF, up_NF, dgate_NF, dup_NF
            strides = dy_NF.stride(0), gate_NF.stride(0), up_NF.stride(0), dgate_NF.stride(0)
            blocks = {"BLOCK_N": block_n, "BLOCK_F": block_f, "num_warps": warps}
            _backward_kernel[grid](*tensors, *strides, rows, columns, **blocks)


class _SwiGLU(torch.autograd.Function):
    """`swiglu`: saves its inputs."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate_NF, up_NF = unit_stride(gate), unit_stride(up)
        save(ctx, activations=(gate_NF, up_NF))
        return _forward(gate_NF, up_NF).view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate_NF, up_NF = ctx.saved_tensors
        dgate_NF = torch.empty(gate_NF.shape, dtype=gate_NF.dtype, device=gate_NF.device)
        dup_NF = torch.empty_like(dgate_NF)
        _backward(unit_stride(dy), gate_NF, up_NF, dgate_NF, dup_NF)
        return dgate_NF.view(dy.shape), dup_NF.view(dy.shape)


class _SwiGLUPacked(torch.autograd.Function):
    """`swiglu_packed`: saves its input; the gradient is one tensor of the input's shape."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        rows = unit_stride(gate_up)
        save(ctx, activations=(rows,))
        return _forward(*rows.chunk(2, dim=-1)).view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        gradient = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        _backward(unit_stride(dy), *rows.chunk(2, dim=-1), *gradient.chunk(2, dim=-1))
        return gradient.view(*dy.shape[:-1], rows.shape[1])


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`kernels.activations.swiglu` with checked arguments."""
    return _SwiGLU.apply(gate, up)


def swiglu_packed(gate_up: Tensor) -> Tensor:
    """`kernels.activations.swiglu_packed` with a checked argument."""
    return _SwiGLUPacked.apply(gate_up)


def specs(target: str, head_dim: int, dtype: str) -> list[KernelSpec]:
    """Return the kernels for 8192 tokens of a feed-forward four times as wide as a model of 16 heads."""
    rows, columns = 8192, 64 * head_dim
    pointer, elements = f"*{dtype}", 8192 * 64 * head_dim
    block_n, block_f, warps = _tile(target, columns)
    sizes = {"gate_stride": "i32:16", "up_stride": "i32:16"}
    extent = {"rows": "i32:16", "columns": "i32:16"}
    inputs = {"gate_ptr": pointer, "up_ptr": pointer}
    gradients = {"dgate_ptr": pointer, "dup_ptr": pointer, "dy_stride": "i32:16"}
    found = []
    for name, fn, signature, tensors, per_element in (
        ("swiglu_forward", _forward_kernel, inputs | {"y_ptr": pointer} | sizes | extent, 3, 5),
        (
            "swiglu_backward",
            _backward_kernel,
            {"dy_ptr": pointer} | inputs | gradients | sizes | {"gradient_stride": "i32:16"} | extent,
            5,
            11,
        ),
    ):
        found.append(
            KernelSpec(
                name=name,
                fn=fn,
                signature=signature,
                constexprs={"BLOCK_N": block_n, "BLOCK_F": block_f},
                num_warps=warps,
                num_stages=3,
                multiplies=False,
                bytes=tensors * rows * columns * dtype_bytes(dtype),
                flops=per_element * elements,
            )
        )
    return found
