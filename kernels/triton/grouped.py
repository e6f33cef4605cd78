"""The experts' matrix products: one kernel for y = x · W_eᵀ and dx = dy · W_e, one for dW_e = dy_eᵀ · x_e.

The rows of an expert are split into tiles; the last tile may be partly empty. `_schedule_kernel` finds each tile's
expert and first row on the device. The host only knows that there are at most N / BLOCK_M + E tiles, and launches that
many programs. Surplus programs return immediately. Products accumulate in float32.

The schedule also detects counts that do not sum to the number of rows. Then no expert has rows, and all tiles belong to
a nonexistent expert E, whose product is NaN. Nothing is read or written out of bounds.
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
    dot,
    dot_precision,
    dtype_bytes,
    next_power,
    target_name,
    unit_stride,
)

# Elements of the schedule's comparison of tiles and experts: 16 per thread.
_SCHEDULE_ELEMENTS = 2048


@triton.jit
def _schedule_kernel(
    count_ptr,
    end_ptr,
    expert_ptr,
    tiles,
    experts,
    rows,
    BLOCK_M: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Write the end of each expert's rows, and each tile's expert and first row."""
    column = tl.arange(0, BLOCK_E)
    count = tl.load(count_ptr + column, mask=column < experts, other=0).to(tl.int64)
    wrong = (tl.min(count, axis=0) < 0) | (tl.sum(count, axis=0) != rows)
    count = tl.where(wrong, tl.where(column == experts, rows, 0), count).to(tl.int32)
    end = tl.cumsum(count, axis=0)
    if tl.program_id(0) == 0:
        tl.store(end_ptr + column, end, mask=column < experts)
    expert_tiles = (count + BLOCK_M - 1) // BLOCK_M
    tile_end = tl.cumsum(expert_tiles, axis=0)
    tile = tl.program_id(0) * BLOCK_TILES + tl.arange(0, BLOCK_TILES)
    # A surplus tile gets a number above `experts`.
    before = tile_end[None, :] <= tile[:, None]
    expert = tl.sum((before & (column <= experts)[None, :]).to(tl.int32), axis=1)
    own = column[None, :] == expert[:, None]
    first = tl.sum(tl.where(own, (tile_end - expert_tiles)[None, :], 0), axis=1)
    begin = tl.sum(tl.where(own, (end - count)[None, :], 0), axis=1)
    tl.store(expert_ptr + tile, expert, mask=tile < tiles)
    tl.store(expert_ptr + tiles + tile, begin + (tile - first) * BLOCK_M, mask=tile < tiles)


@triton.jit
def _rows_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    end_ptr,
    expert_ptr,
    x_stride,
    expert_stride,
    n_stride,
    k_stride,
    tiles,
    experts,
    rows,
    n_size,
    k_size,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute a tile of y[m, n] = sum over k of x[m, k] W_e[n, k]."""
    # In this order neighbouring programs share rows of x, and an expert's matrix stays in the cache over its tiles.
    n_tiles = tl.cdiv(n_size, BLOCK_N)
    tile = tl.program_id(0) // n_tiles
    expert = tl.load(expert_ptr + tile)
    if expert <= experts:
        # With wrong counts, expert E has all rows and reads the last expert's matrix.
        known = tl.minimum(expert, experts - 1)
        begin = tl.load(expert_ptr + tiles + tile)
        end = tl.where(expert < experts, tl.load(end_ptr + known), rows)
        row = begin + tl.arange(0, BLOCK_M)
        n = (tl.program_id(0) % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + row[:, None].to(tl.int64) * x_stride + k[None, :]
        weight_ptr += known.to(tl.int64) * expert_stride
        weight_ptrs = weight_ptr + n[None, :] * n_stride + k[:, None] * k_stride
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, k_size, BLOCK_K):
            inside = k < k_size - start
            x = tl.load(x_ptrs, mask=(row < end)[:, None] & inside[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=(n < n_size)[None, :] & inside[:, None], other=0.0)
            total += dot(x, weight, PRECISION)
            x_ptrs += BLOCK_K
            weight_ptrs += BLOCK_K * k_stride
        total = tl.where(expert < experts, total, float("nan"))
        y_ptrs = y_ptr + row[:, None].to(tl.int64) * n_size + n[None, :]
        tl.store(y_ptrs, total.to(y_ptr.dtype.element_ty), mask=(row < end)[:, None] & (n < n_size)[None, :])


@triton.jit
def _weight_kernel(
    dy_ptr,
    x_ptr,
    dweight_ptr,
    end_ptr,
    dy_stride,
    x_stride,
    o_size,
    d_size,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute a tile of dW_e[o, d] = sum over the rows r of e of dy[r, o] x[r, d]; zeros without rows."""
    expert = tl.program_id(1)
    d_tiles = tl.cdiv(d_size, BLOCK_D)
    o = (tl.program_id(0) // d_tiles) * BLOCK_O + tl.arange(0, BLOCK_O)
    d = (tl.program_id(0) % d_tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = tl.load(end_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(end_ptr + expert)
    total = tl.zeros((BLOCK_O, BLOCK_D), dtype=tl.float32)
    for start in range(begin, end, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        place = row.to(tl.int64)
        dy_ptrs = dy_ptr + place[None, :] * dy_stride + o[:, None]
        dy = tl.load(dy_ptrs, mask=(row < end)[None, :] & (o < o_size)[:, None], other=0.0)
        x_ptrs = x_ptr + place[:, None] * x_stride + d[None, :]
        x = tl.load(x_ptrs, mask=(row < end)[:, None] & (d < d_size)[None, :], other=0.0)
        total += dot(dy, x, PRECISION)
    out_ptrs = dweight_ptr + (expert.to(tl.int64) * o_size + o[:, None]) * d_size + d[None, :]
    tl.store(out_ptrs, total.to(dweight_ptr.dtype.element_ty), mask=(o < o_size)[:, None] & (d < d_size)[None, :])


def _tile(target: str, size: int) -> tuple[dict[str, int], int, int]:
    """Return ({BLOCK_M, BLOCK_N, BLOCK_K}, warps, stages) for products of elements of `size` bytes."""
    if size == 4:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, 4, 2
    stages = 2 if target.startswith("gfx") else 3
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64 if stages == 3 else 32}, 8, stages


def _weight_tile(target: str, size: int) -> tuple[dict[str, int], int, int]:
    """`_tile` with the block names of the weight's gradient, which has tiles [O, D] and sums over rows."""
    blocks, warps, stages = _tile(target, size)
    names = {"BLOCK_O": "BLOCK_M", "BLOCK_D": "BLOCK_N", "BLOCK_K": "BLOCK_K"}
    return {name: blocks[block] for name, block in names.items()}, warps, stages


def _schedule_blocks(experts: int, block_m: int) -> dict[str, int]:
    width = next_power(experts + 1)
    return {"BLOCK_M": block_m, "BLOCK_TILES": max(1, _SCHEDULE_ELEMENTS // width), "BLOCK_E": width}


def _schedule(tokens_per_expert_E: Tensor, rows: int, block_m: int) -> tuple[Tensor, Tensor]:
    """Return the end of each expert's rows `[E]`, and each tile's expert and first row `[2, tiles]`; int32."""
    experts, device = len(tokens_per_expert_E), tokens_per_expert_E.device
    tiles = rows // block_m + experts
    ends_E = torch.empty(experts, dtype=torch.int32, device=device)
    schedule = torch.empty((2, tiles), dtype=torch.int32, device=device)
    blocks = _schedule_blocks(experts, block_m)
    with device_guard(ends_E):
        grid = (triton.cdiv(tiles, blocks["BLOCK_TILES"]),)
        counts_E = tokens_per_expert_E.contiguous()
        _schedule_kernel[grid](counts_E, ends_E, schedule, tiles, experts, rows, **blocks, num_warps=4)
    return ends_E, schedule


def _rows_product(
    x: Tensor, weight: Tensor, ends_E: Tensor, schedule: Tensor, n_stride: int, k_stride: int, n_size: int
) -> Tensor:
    """Compute y or dx: each expert's rows of x times its matrix, read with the given strides."""
    y = torch.empty((len(x), n_size), dtype=x.dtype, device=x.device)
    target, tiles = target_name(x.device), schedule.shape[1]
    blocks, warps, stages = _tile(target, x.element_size())
    if y.numel():
        with device_guard(x):
            grid = (tiles * triton.cdiv(n_size, blocks["BLOCK_N"]),)
            strides = x.stride(0), weight.stride(0), n_stride, k_stride
            _rows_kernel[grid](
                *(x, weight, y, ends_E, schedule),
                *strides,
                *(tiles, len(ends_E), len(x), n_size, x.shape[1]),
                PRECISION=dot_precision(target),
                **blocks,
                num_warps=warps,
                num_stages=stages,
            )
    return y


def _weight_gradient(dy_NO: Tensor, x_ND: Tensor, ends_E: Tensor) -> Tensor:
    o_size, d_size, experts = dy_NO.shape[1], x_ND.shape[1], len(ends_E)
    dweight_EOD = torch.empty((experts, o_size, d_size), dtype=x_ND.dtype, device=x_ND.device)
    target = target_name(x_ND.device)
    blocks, warps, stages = _weight_tile(target, x_ND.element_size())
    if dweight_EOD.numel():
        with device_guard(x_ND):
            grid = triton.cdiv(o_size, blocks["BLOCK_O"]) * triton.cdiv(d_size, blocks["BLOCK_D"]), experts
            tensors = dy_NO, x_ND, dweight_EOD, ends_E
            sizes = {"PRECISION": dot_precision(target), **blocks, "num_warps": warps, "num_stages": stages}
            _weight_kernel[grid](*tensors, dy_NO.stride(0), x_ND.stride(0), o_size, d_size, **sizes)
    return dweight_EOD


class _GroupedLinear(torch.autograd.Function):
    """`grouped_linear`: saves its inputs and the schedule."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_EOD: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
        x_ND, weight_EOD = unit_stride(x_ND), weight_EOD.contiguous()
        blocks, _, _ = _tile(target_name(x_ND.device), x_ND.element_size())
        ends_E, schedule = _schedule(tokens_per_expert_E, len(x_ND), blocks["BLOCK_M"])
        save(ctx, activations=(x_ND,), weights=(weight_EOD,), indices=(ends_E, schedule))
        return _rows_product(x_ND, weight_EOD, ends_E, schedule, x_ND.shape[1], 1, weight_EOD.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_ND, weight_EOD, ends_E, schedule = ctx.saved_tensors
        dy_NO, d_size = unit_stride(dy), x_ND.shape[1]
        needs_x, needs_weight, _ = ctx.needs_input_grad
        dx = _rows_product(dy_NO, weight_EOD, ends_E, schedule, 1, d_size, d_size) if needs_x else None
        return dx, _weight_gradient(dy_NO, x_ND, ends_E) if needs_weight else None, None


def grouped_linear(x_ND: Tensor, weight_EOD: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
    """`kernels.moe.grouped.grouped_linear` with checked arguments."""
    return _GroupedLinear.apply(x_ND, weight_EOD, tokens_per_expert_E)


def specs(target: str, head_dim: int, dtype: str) -> list[KernelSpec]:
    """Return the kernels for 32768 rows of 16 heads, and `head_dim` experts of the same width."""
    rows, experts, width = 32768, head_dim, 16 * head_dim
    pointer, size = f"*{dtype}", dtype_bytes(dtype)
    blocks, warps, stages = _tile(target, size)
    tiles = rows // blocks["BLOCK_M"] + experts
    weight_blocks, _, _ = _weight_tile(target, size)
    precision = {"PRECISION": dot_precision(target)}
    product = {"x_ptr": pointer, "weight_ptr": pointer, "y_ptr": pointer, "end_ptr": "*i32", "expert_ptr": "*i32"}
    product |= dict.fromkeys(("x_stride", "expert_stride", "n_stride", "k_stride", "tiles", "experts"), "i32:16")
    product |= dict.fromkeys(("rows", "n_size", "k_size"), "i32:16")
    weight = {"dy_ptr": pointer, "x_ptr": pointer, "dweight_ptr": pointer, "end_ptr": "*i32"}
    weight |= dict.fromkeys(("dy_stride", "x_stride", "o_size", "d_size"), "i32:16")
    schedule = {"count_ptr": "*i64", "end_ptr": "*i32", "expert_ptr": "*i32", "tiles": "i32:16", "experts": "i32:16"}
    schedule["rows"] = "i32:16"
    schedule_blocks = _schedule_blocks(experts, blocks["BLOCK_M"])
    kernels: list[tuple[str, Any, dict[str, str], dict[str, Any], int, int]] = [
        ("schedule", _schedule_kernel, schedule, schedule_blocks, 4, 3),
        ("forward", _rows_kernel, product, {"k_stride": 1, **precision, **blocks}, warps, stages),
        ("backward_rows", _rows_kernel, product, {"n_stride": 1, **precision, **blocks}, warps, stages),
        ("backward_weight", _weight_kernel, weight, precision | weight_blocks, warps, stages),
    ]
    return [
        KernelSpec(
            name=name,
            fn=fn,
            signature={key: kind for key, kind in signature.items() if key not in constexprs},
            constexprs=constexprs,
            num_warps=num_warps,
            num_stages=num_stages,
            multiplies=name != "schedule",
            bytes=12 * experts + 8 * tiles if name == "schedule" else (2 * rows + experts * width) * width * size,
            flops=0.0 if name == "schedule" else 2.0 * rows * width * width,
        )
        for name, fn, signature, constexprs, num_warps, num_stages in kernels
    ]
