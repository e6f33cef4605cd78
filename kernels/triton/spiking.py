"""The adaptive-threshold spike: V = clamp(mean|x| / k) or clamp(V), s = round(x / V) in a range, x̂ = s · V.

    dx = dy · (1, or 4 |x/V − s|) · (1, or 0 where s was clipped)
    dk = −sum of dy · s · V / k where V is not clamped        dV = sum of dy · s where V is not clamped

A program holds whole rows, so x is read once per pass. In the backward a fixed number of programs loop over the rows,
and each writes its part of dk or dV. The parts are always summed in the same order.
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

# As for the norms: about two per multiprocessor of the largest current GPU.
_BACKWARD_PROGRAMS = 256
# Factor of magnitudes in sums, so that even the longest row cannot overflow.
_SCALE = tl.constexpr(2.0**-16)
# Every float32 from here on is an integer.
_INTEGERS = tl.constexpr(2.0**23)


@triton.jit
def _round(x):
    """Round half to even; keeps NaN and infinities. Triton's own rounding depends on the vendor's library."""
    magnitude = tl.abs(x)
    rounded = (magnitude + _INTEGERS) - _INTEGERS
    return tl.where(magnitude < _INTEGERS, tl.where(x < 0.0, -rounded, rounded), x)


@triton.jit
def _clamp(x, low, high):
    """Clamp to [low, high]; keeps NaN, which minima and maxima would drop."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _parameter(param_ptr, number, column, columns, PER_CHANNEL: tl.constexpr):
    """Return the parameter, k or V, as [1, D]."""
    if PER_CHANNEL:
        value = tl.load(param_ptr + column, mask=column < columns, other=1.0).to(tl.float32)
    elif param_ptr is not None:
        value = tl.load(param_ptr).to(tl.float32) + tl.zeros_like(column).to(tl.float32)
    else:
        value = number + tl.zeros_like(column).to(tl.float32)
    return value[None, :]


@triton.jit
def _forward_kernel(
    x_ptr,
    param_ptr,
    given_ptr,
    y_ptr,
    mean_ptr,
    x_stride,
    rows,
    columns,
    number,
    low,
    high,
    least,
    largest,
    PER_CHANNEL: tl.constexpr,
    CLIPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_D)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    raw = _parameter(param_ptr, number, column, columns, PER_CHANNEL)
    if mean_ptr is not None:
        if given_ptr is not None:
            mean = tl.load(given_ptr + row, mask=row < rows, other=0.0)
        else:
            mean = tl.div_rn(tl.sum(tl.abs(x) * _SCALE, axis=1), columns * _SCALE)
            mean += mean * 0.0  # NaN where it is infinite: the clamp would hide an infinity
        tl.store(mean_ptr + row, mean, mask=row < rows)
        raw = tl.div_rn(mean[:, None] + tl.zeros_like(x), raw + tl.zeros_like(x))
    threshold = _clamp(raw, least, largest) + tl.zeros_like(x)
    counts = _round(tl.div_rn(x, threshold))
    if CLIPS:
        counts = _clamp(counts, low, high)
    y = counts * threshold
    if mean_ptr is None:
        y += x * 0.0  # NaN where x is not finite
    tl.store(y_ptr + row[:, None] * columns + column[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dy_ptr,
    x_ptr,
    param_ptr,
    mean_ptr,
    dx_ptr,
    dparam_ptr,
    dy_stride,
    x_stride,
    rows,
    columns,
    number,
    low,
    high,
    least,
    largest,
    PER_CHANNEL: tl.constexpr,
    CLIPS: tl.constexpr,
    SURROGATE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_D)
    param = _parameter(param_ptr, number, column, columns, PER_CHANNEL)
    total = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for block in range(program, tl.cdiv(rows, BLOCK_N), tl.num_programs(0)):
        row = tl.cast(block, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        raw = param + tl.zeros_like(x)
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
            raw = tl.div_rn(mean[:, None] + tl.zeros_like(x), raw)
        threshold = _clamp(raw, least, largest)
        ratio = tl.div_rn(x, threshold)
        rounded = _round(ratio)
        counts = _clamp(rounded, low, high) if CLIPS else rounded
        if dx_ptr is not None:
            dx = dy * 4.0 * tl.abs(ratio - counts) if SURROGATE else dy
            dx = tl.where(rounded == counts, dx, 0.0) if CLIPS else dx
            tl.store(dx_ptr + row[:, None] * columns + column[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dparam_ptr is not None:
            part = dy * counts
            if mean_ptr is not None:
                part *= raw
            total += tl.where((raw >= least) & (raw <= largest), part, 0.0)
    if dparam_ptr is not None:
        sums = tl.sum(total, axis=0)
        if mean_ptr is not None:
            sums = -sums / tl.sum(param, axis=0)
        if PER_CHANNEL:
            tl.store(dparam_ptr + program.to(tl.int64) * columns + column, sums, mask=column < columns)
        else:
            tl.store(dparam_ptr + program, tl.sum(sums, axis=0))


def _tile(target: str, columns: int) -> tuple[int, int, int]:
    """Return (BLOCK_N, BLOCK_D, warps): at least 2048 elements per program, 8 per thread up to 16 warps."""
    # With 16 per thread, as in the norms, the backward spills on sm_103 and sm_120.
    width = next_power(columns)
    rows = max(1, 2048 // width)
    return rows, width, min(max(rows * width // (8 * warp_size(target)), 1), 16)


class _Spike(torch.autograd.Function):
    """`spike`: saves nothing for a plain gradient and a fixed parameter, else x, the parameter and the mean `[N]`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        parameter: Tensor,
        given_N1: Tensor | None,
        adaptive: bool,
        limits: tuple[float, float, float, float],
        gradient: str,
    ) -> Tensor:
        x_ND = unit_stride(x)
        rows, columns = x_ND.shape
        # A fixed parameter on the CPU is passed as a number; reading it does not synchronise.
        fixed = parameter.is_cpu and parameter.dim() == 0 and not ctx.needs_input_grad[1]
        values, number = (None, parameter.item()) if fixed else (parameter.contiguous(), 0.0)
        y_ND = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
        mean_N = torch.empty(rows, dtype=torch.float32, device=x.device) if adaptive else None
        block_n, block_d, warps = _tile(target_name(x.device), columns)
        clips = limits[0] > -float("inf") or limits[1] < float("inf")
        ctx.sizes = {"PER_CHANNEL": parameter.dim() == 1, "CLIPS": clips, "BLOCK_N": block_n, "BLOCK_D": block_d}
        ctx.sizes["num_warps"] = warps
        if rows:
            with device_guard(x):
                tensors = x_ND, values, given_N1, y_ND, mean_N
                numbers = x_ND.stride(0), rows, columns, number, *limits
                _forward_kernel[(triton.cdiv(rows, block_n),)](*tensors, *numbers, **ctx.sizes)
        ctx.number, ctx.limits, ctx.gradient, ctx.shape = number, limits, gradient, x.shape
        if gradient != "plain" or ctx.needs_input_grad[1]:
            save(ctx, weights=(values,), statistics=(x_ND, mean_N))
        return y_ND.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        if not kept:
            return dy, None, None, None, None, None
        values, x_ND, mean_N = kept
        rows, columns = x_ND.shape
        dy_ND, surrogate = unit_stride(dy), ctx.gradient == "surrogate"
        dx_ND = None if ctx.gradient == "plain" else torch.empty(x_ND.shape, dtype=x_ND.dtype, device=dy.device)
        programs = min(triton.cdiv(rows, ctx.sizes["BLOCK_N"]), _BACKWARD_PROGRAMS)
        parts = None
        if ctx.needs_input_grad[1]:
            parts = torch.empty((programs, *values.shape), dtype=torch.float32, device=dy.device)
        if rows:
            with device_guard(dy):
                tensors = dy_ND, x_ND, values, mean_N, dx_ND, parts
                numbers = dy_ND.stride(0), x_ND.stride(0), rows, columns, ctx.number, *ctx.limits
                _backward_kernel[(programs,)](*tensors, *numbers, SURROGATE=surrogate, **ctx.sizes)
        dx = dy if dx_ND is None else dx_ND.view(ctx.shape)
        return dx, None if parts is None else parts.sum(0).to(values.dtype), None, None, None, None


def spike(
    x: Tensor,
    parameter: Tensor,
    mean_N1: Tensor | None,
    adaptive: bool,
    limits: tuple[float, float, float, float],
    gradient: str,
) -> Tensor:
    """`kernels.spiking.spike` with checked arguments.

    Args:
        x: [..., D].
        parameter: k if `adaptive`, else V; [] or [D].
        mean_N1: mean|x| of each token, if its channels are sharded over ranks; None computes it.
        adaptive: whether V is computed from the mean.
        limits: the smallest and the largest count, and the smallest and the largest V.
        gradient: as in `kernels.spiking.spike`.
    """
    return _Spike.apply(x, parameter, mean_N1, adaptive, limits, gradient)


def specs(target: str, head_dim: int, dtype: str) -> list[KernelSpec]:
    """Return the kernels for 8192 tokens of 16 heads: k fixed, and k learned per channel with clipped counts."""
    rows, columns = 8192, 16 * head_dim
    block_n, block_d, warps = _tile(target, columns)
    pointer, elements, size = f"*{dtype}", rows * columns, dtype_bytes(dtype)
    limits = dict.fromkeys(("number", "low", "high", "least", "largest"), "fp32")
    extent = {"rows": "i32:16", "columns": "i32:16", **limits}
    parts = min(rows // block_n, _BACKWARD_PROGRAMS) * 4
    found = []
    for learned in (False, True):
        variant = "per_channel" if learned else "fixed"
        parameter = {"param_ptr": "*fp32"} if learned else {}
        forward = {"x_ptr": pointer, **parameter, "y_ptr": pointer, "mean_ptr": "*fp32", "x_stride": "i32:16", **extent}
        backward = {"dy_ptr": pointer, "x_ptr": pointer, **parameter, "mean_ptr": "*fp32", "dx_ptr": pointer}
        backward |= {"dparam_ptr": "*fp32"} if learned else {}
        backward |= {"dy_stride": "i32:16", "x_stride": "i32:16", **extent}
        more = (columns + 1) * parts if learned else 0
        for direction, fn, signature, absent, tensors, extra, flops in (
            ("forward", _forward_kernel, forward, ["given_ptr"], 2, 0, 8),
            ("backward", _backward_kernel, backward, [] if learned else ["dparam_ptr"], 3, more, 12),
        ):
            constexprs: dict[str, object] = {"PER_CHANNEL": learned, "CLIPS": learned}
            constexprs |= {"BLOCK_N": block_n, "BLOCK_D": block_d}
            constexprs |= {"SURROGATE": not learned} if direction == "backward" else {}
            constexprs |= dict.fromkeys(absent if learned else [*absent, "param_ptr"])
            found.append(
                KernelSpec(
                    name=f"spike_{direction}_{variant}",
                    fn=fn,
                    signature=signature,
                    constexprs=constexprs,
                    num_warps=warps,
                    num_stages=3,
                    multiplies=False,
                    bytes=tensors * elements * size + 4 * rows + extra,
                    flops=flops * elements,
                )
            )
    return found
