"""RMSNorm, gated RMSNorm and the l2 norm, with one forward and one backward kernel for all three.

    n = x · rstd,   rstd = (sum(x²) / divisor + eps)^(-1/2)        divisor = D, or 1 for the l2 norm
    y = n · weight · act(gate)

With g = dy · weight · act(gate), the gradient of n:

    dx = rstd · (g − n · sum(g · n) / divisor)
    dgate = dy · n · weight · act'(gate)            dweight = sum over rows of dy · n · act(gate)

A program holds whole rows, so x is read once per pass. In the backward a fixed number of programs loop over the rows,
and each writes its part of dweight. The parts are always summed in the same order.
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

# Programs of the backward: about two per multiprocessor of the largest current GPU.
_BACKWARD_PROGRAMS = 256


@triton.jit
def _forward_kernel(
    x_ptr,
    gate_ptr,
    weight_ptr,
    y_ptr,
    rstd_ptr,
    x_stride,
    gate_stride,
    rows,
    columns,
    divisor,
    eps,
    SIGMOID: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_D)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / divisor + eps)
    y = x * rstd[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + row[:, None] * gate_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        y *= tl.sigmoid(gate) if SIGMOID else gate * tl.sigmoid(gate)
    tl.store(y_ptr + row[:, None] * columns + column[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def _backward_kernel(
    dy_ptr,
    x_ptr,
    gate_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    dgate_ptr,
    dweight_ptr,
    dy_stride,
    x_stride,
    gate_stride,
    rows,
    columns,
    divisor,
    SIGMOID: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_D)
    dweight = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    for block in range(program, tl.cdiv(rows, BLOCK_N), tl.num_programs(0)):
        row = tl.cast(block, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        n = x * rstd
        scaled = dy
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + row[:, None] * gate_stride + column[None, :], mask=mask, other=0.0)
            gate = gate.to(tl.float32)
            sigmoid = tl.sigmoid(gate)
            slope = sigmoid * (1.0 - sigmoid) if SIGMOID else sigmoid * (1.0 + gate * (1.0 - sigmoid))
            dgate = dy * n * weight * slope
            tl.store(dgate_ptr + row[:, None] * columns + column[None, :], dgate.to(dgate_ptr.dtype.element_ty), mask)
            scaled = dy * (sigmoid if SIGMOID else gate * sigmoid)
        g = scaled
        if weight_ptr is not None:
            dweight += scaled * n
            g = scaled * weight
        dx = rstd * (g - n * (tl.sum(g * n, axis=1) / divisor)[:, None])
        tl.store(dx_ptr + row[:, None] * columns + column[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if weight_ptr is not None:
        part = dweight_ptr + program.to(tl.int64) * columns + column
        tl.store(part, tl.sum(dweight, axis=0), mask=column < columns)


def _tile(target: str, columns: int) -> tuple[int, int, int]:
    """Return (BLOCK_N, BLOCK_D, warps): at least 2048 elements per program, 16 per thread up to 16 warps."""
    width = next_power(columns)
    rows = max(1, 2048 // width)
    return rows, width, min(max(rows * width // (16 * warp_size(target)), 1), 16)


class _Norm(torch.autograd.Function):
    """Any of the three norms: saves the inputs and rstd `[N]`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float, divisor: int, sigmoid: bool
    ) -> Tensor:
        x_ND, gate_ND = unit_stride(x), None if gate is None else unit_stride(gate)
        weight = None if weight is None else weight.contiguous()
        rows, columns = x_ND.shape
        y_ND = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
        rstd_N = torch.empty(rows, dtype=torch.float32, device=x.device)
        block_n, block_d, warps = _tile(target_name(x.device), columns)
        strides = x_ND.stride(0), 0 if gate_ND is None else gate_ND.stride(0)
        sizes = {"SIGMOID": sigmoid, "BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": warps}
        if rows:
            with device_guard(x):
                grid = (triton.cdiv(rows, block_n),)
                tensors = x_ND, gate_ND, weight, y_ND, rstd_N
                _forward_kernel[grid](*tensors, *strides, rows, columns, float(divisor), eps, **sizes)
        save(ctx, activations=(x_ND, gate_ND), weights=(weight,), statistics=(rstd_N,))
        ctx.shape, ctx.divisor, ctx.strides, ctx.sizes = x.shape, divisor, strides, sizes
        return y_ND.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, gate_ND, weight, rstd_N = ctx.saved_tensors
        rows, columns = x_ND.shape
        dy_ND = unit_stride(dy)
        dx_ND = torch.empty((rows, columns), dtype=x_ND.dtype, device=dy.device)
        dgate_ND = None if gate_ND is None else torch.empty((rows, columns), dtype=gate_ND.dtype, device=dy.device)
        programs = min(triton.cdiv(rows, ctx.sizes["BLOCK_N"]), _BACKWARD_PROGRAMS)
        parts_PD = None
        if weight is not None:
            parts_PD = torch.empty((programs, columns), dtype=torch.float32, device=dy.device)
        if rows:
            with device_guard(dy):
                tensors = dy_ND, x_ND, gate_ND, weight, rstd_N, dx_ND, dgate_ND, parts_PD
                numbers = dy_ND.stride(0), *ctx.strides, rows, columns, float(ctx.divisor)
                _backward_kernel[(programs,)](*tensors, *numbers, **ctx.sizes)
        dgate = None if dgate_ND is None else dgate_ND.view(ctx.shape)
        dweight = None if parts_PD is None else parts_PD.sum(0).to(weight.dtype)
        return dx_ND.view(ctx.shape), dgate, dweight, None, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`kernels.norms.rms_norm` with checked arguments."""
    return _Norm.apply(x, None, weight, eps, x.shape[-1], False)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str) -> Tensor:
    """`kernels.norms.gated_rms_norm` with checked arguments."""
    return _Norm.apply(x, gate, weight, eps, x.shape[-1], activation == "sigmoid")


def l2_norm(x: Tensor, eps: float) -> Tensor:
    """`kernels.norms.l2_norm`."""
    return _Norm.apply(x, None, None, eps, 1, False)


def specs(target: str, head_dim: int, dtype: str) -> list[KernelSpec]:
    """Return the kernels for 8192 tokens of 16 heads: RMSNorm over a token, the others over a head."""
    tokens, heads = 8192, 16
    pointer, size = f"*{dtype}", dtype_bytes(dtype)
    found = []
    for op, columns in (("rms_norm", heads * head_dim), ("gated_rms_norm", head_dim), ("l2_norm", head_dim)):
        gated, weighted = op == "gated_rms_norm", op != "l2_norm"
        elements = tokens * heads * head_dim
        rows = elements // columns
        block_n, block_d, warps = _tile(target, columns)
        constexprs: dict[str, object] = {"SIGMOID": False, "BLOCK_N": block_n, "BLOCK_D": block_d}
        pointers = {"x_ptr": pointer, "gate_ptr": pointer, "weight_ptr": "*fp32"}
        absent = [] if gated else ["gate_ptr"]
        absent += [] if weighted else ["weight_ptr"]
        numbers = {"gate_stride": "i32:16", "rows": "i32:16", "columns": "i32:16", "divisor": "fp32"}
        forward = pointers | {"y_ptr": pointer, "rstd_ptr": "*fp32", "x_stride": "i32:16"} | numbers | {"eps": "fp32"}
        backward = {"dy_ptr": pointer, **pointers, "rstd_ptr": "*fp32", "dx_ptr": pointer, "dgate_ptr": pointer}
        backward |= {"dweight_ptr": "*fp32", "dy_stride": "i32:16", "x_stride": "i32:16"} | numbers
        backward_absent = [*absent, *([] if gated else ["dgate_ptr"]), *([] if weighted else ["dweight_ptr"])]
        parts = min(rows // block_n, _BACKWARD_PROGRAMS) * columns * 4 if weighted else 0
        for direction, fn, signature, missing, tensors, more, per_element in (
            ("forward", _forward_kernel, forward, absent, 3 if gated else 2, 0, 8 if gated else 5),
            ("backward", _backward_kernel, backward, backward_absent, 5 if gated else 3, parts, 20 if gated else 10),
        ):
            found.append(
                KernelSpec(
                    name=f"{op}_{direction}",
                    fn=fn,
                    signature={name: kind for name, kind in signature.items() if name not in missing},
                    constexprs=constexprs | dict.fromkeys(missing),
                    num_warps=warps,
                    num_stages=3,
                    multiplies=False,
                    bytes=tensors * elements * size + 4 * rows + more,
                    flops=per_element * elements,
                )
            )
    return found
