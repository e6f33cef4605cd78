"""Gather rows from tokens, and sum the rows of each token: two kernels, each the other's backward.

    gather   rows_n = w_n · x_t(n),   dw_n = ⟨y_n, x_t(n)⟩        a program handles a few rows
    sum      x_t = sum over the rows n of token t of w_n · rows_n   a program handles a token and a block of columns

The sum follows a list of each token's rows, made by a stable sort. It needs no atomics, so it is deterministic.
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
from kernels.indices import rows_by_token
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
def _gather_kernel(
    x_ptr,
    token_ptr,
    weight_ptr,
    y_ptr,
    rows_ptr,
    dweight_ptr,
    x_stride,
    y_stride,
    tokens,
    rows,
    columns,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.load(token_ptr + row, mask=row < rows, other=0).to(tl.int64)
    known = ((token >= 0) & (token < tokens))[:, None]
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
        dweight = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(0, columns, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)[None, :]
        mask = (row < rows)[:, None] & (column < columns)
        x = tl.load(x_ptr + token[:, None] * x_stride + column, mask=mask & known, other=0.0)
        x = tl.where(known, x, float("nan"))
        if weight_ptr is not None:
            x = x.to(tl.float32)
            y = tl.load(y_ptr + row[:, None] * y_stride + column, mask=mask, other=0.0).to(tl.float32)
            dweight += tl.sum(x * y, axis=1)
            x *= weight
        tl.store(rows_ptr + row[:, None] * columns + column, x.to(rows_ptr.dtype.element_ty), mask=mask)
    if weight_ptr is not None:
        tl.store(dweight_ptr + row, dweight.to(dweight_ptr.dtype.element_ty), mask=row < rows)


@triton.jit
def _sum_kernel(rows_ptr, order_ptr, bounds_ptr, weight_ptr, x_ptr, rows_stride, rows, columns, BLOCK_D: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for place in range(tl.load(bounds_ptr + token), tl.load(bounds_ptr + token + 1)):
        row = tl.load(order_ptr + place)
        x = tl.load(rows_ptr + row * rows_stride + column, mask=column < columns, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            x *= tl.load(weight_ptr + row).to(tl.float32)
        total += x
    # Rows of tokens out of range are missing from every sum, so the result must not look complete.
    whole = (tl.load(bounds_ptr) == 0) & (tl.load(bounds_ptr + tl.num_programs(0)) == rows)
    total = tl.where(whole, total, float("nan"))
    tl.store(x_ptr + token * columns + column, total.to(x_ptr.dtype.element_ty), mask=column < columns)


def _gather_tile(target: str, columns: int) -> tuple[int, int, int]:
    """Return (BLOCK_N, BLOCK_D, warps), for 16 elements per thread."""
    width = min(next_power(columns), _BLOCK_ELEMENTS)
    return _BLOCK_ELEMENTS // width, width, _BLOCK_ELEMENTS // (16 * warp_size(target))


def _sum_tile(target: str, columns: int) -> tuple[int, int]:
    """Return (BLOCK_D, warps), for 8 elements per thread: a token has few rows, and loads in flight hide latency."""
    width = min(next_power(columns), _BLOCK_ELEMENTS // 2)
    return width, max(width // (8 * warp_size(target)), 1)


def _gather(
    x_TD: Tensor, row_tokens_N: Tensor, weight_N: Tensor | None, y_ND: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the rows, and with weights their gradient, where y are the rows of the forward."""
    rows, columns = len(row_tokens_N), x_TD.shape[1]
    x_TD, weight_N = unit_stride(x_TD), None if weight_N is None else weight_N.contiguous()
    rows_ND = torch.empty((rows, columns), dtype=x_TD.dtype, device=x_TD.device)
    dweight_N = None if weight_N is None else torch.empty_like(weight_N)
    block_n, block_d, warps = _gather_tile(target_name(x_TD.device), columns)
    if rows:
        with device_guard(x_TD):
            tensors = x_TD, row_tokens_N.contiguous(), weight_N, y_ND, rows_ND, dweight_N
            numbers = x_TD.stride(0), 0 if y_ND is None else y_ND.stride(0), len(x_TD), rows, columns
            blocks = {"BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": warps}
            _gather_kernel[(triton.cdiv(rows, block_n),)](*tensors, *numbers, **blocks)
    return rows_ND, dweight_N


def _sum(rows_ND: Tensor, row_tokens_N: Tensor, num_tokens: int, weight_N: Tensor | None) -> Tensor:
    columns = rows_ND.shape[1]
    x_TD = torch.empty((num_tokens, columns), dtype=rows_ND.dtype, device=rows_ND.device)
    block_d, warps = _sum_tile(target_name(rows_ND.device), columns)
    if x_TD.numel():
        order_N, bounds = rows_by_token(row_tokens_N, num_tokens)
        with device_guard(rows_ND):
            grid = num_tokens, triton.cdiv(columns, block_d)
            tensors = rows_ND, order_N, bounds, None if weight_N is None else weight_N.contiguous(), x_TD
            numbers = rows_ND.stride(0), len(rows_ND), columns
            _sum_kernel[grid](*tensors, *numbers, BLOCK_D=block_d, num_warps=warps)
    return x_TD


class _Permute(torch.autograd.Function):
    """The rows of `permute`: saves their tokens."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, row_tokens_N: Tensor) -> Tensor:
        save(ctx, indices=(row_tokens_N,))
        ctx.num_tokens = len(x_TD)
        return _gather(x_TD, row_tokens_N, None, None)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (row_tokens_N,) = ctx.saved_tensors
        return _sum(unit_stride(grad), row_tokens_N, ctx.num_tokens, None), None


class _Unpermute(torch.autograd.Function):
    """`unpermute`: saves the tokens, and if there are weights, the rows and the weights."""

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, row_tokens_N: Tensor, num_tokens: int, row_probs_N: Tensor | None) -> Tensor:
        rows_ND = unit_stride(rows_ND)
        rows = None if row_probs_N is None else rows_ND
        save(ctx, activations=(rows,), statistics=(row_probs_N,), indices=(row_tokens_N,))
        return _sum(rows_ND, row_tokens_N, num_tokens, row_probs_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
        rows_ND, row_probs_N, row_tokens_N = ctx.saved_tensors
        grad_rows, grad_probs = _gather(grad, row_tokens_N, row_probs_N, rows_ND)
        return grad_rows, None, None, grad_probs


def permute(x_TD: Tensor, row_tokens_N: Tensor) -> Tensor:
    """Gather the rows of `kernels.moe.permutation.permute`, given their tokens."""
    return _Permute.apply(x_TD, row_tokens_N)


def unpermute(rows_ND: Tensor, row_tokens_N: Tensor, num_tokens: int, row_probs_N: Tensor | None) -> Tensor:
    """`kernels.moe.permutation.unpermute` with checked arguments."""
    return _Unpermute.apply(rows_ND, row_tokens_N, num_tokens, row_probs_N)


def specs(target: str, head_dim: int, dtype: str) -> list[KernelSpec]:
    """Return the kernels for 8192 tokens of 16 heads with 4 experts each, with and without weights."""
    tokens, rows, columns = 8192, 4 * 8192, 16 * head_dim
    pointer, size = f"*{dtype}", dtype_bytes(dtype)
    block_n, block_d, warps = _gather_tile(target, columns)
    sum_block, sum_warps = _sum_tile(target, columns)
    found = []
    for suffix, weighted in (("", False), ("_weighted", True)):
        gather = {"x_ptr": pointer, "token_ptr": "*i64", "weight_ptr": "*fp32", "y_ptr": pointer, "rows_ptr": pointer}
        gather |= {"dweight_ptr": "*fp32", "x_stride": "i32:16", "y_stride": "i32:16"}
        gather |= dict.fromkeys(("tokens", "rows", "columns"), "i32:16")
        add = {"rows_ptr": pointer, "order_ptr": "*i64", "bounds_ptr": "*i64", "weight_ptr": "*fp32", "x_ptr": pointer}
        add |= dict.fromkeys(("rows_stride", "rows", "columns"), "i32:16")
        absent = [] if weighted else ["weight_ptr", "y_ptr", "dweight_ptr"]
        gather_blocks = {"BLOCK_N": block_n, "BLOCK_D": block_d}
        moved = (tokens + (2 if weighted else 1) * rows) * columns * size + (16 if weighted else 8) * rows
        summed = (tokens + rows) * columns * size + (12 if weighted else 8) * rows + 8 * tokens
        for name, fn, signature, blocks, num_warps, traffic, per_element in (
            ("gather", _gather_kernel, gather, gather_blocks, warps, moved, 3 if weighted else 0),
            ("sum", _sum_kernel, add, {"BLOCK_D": sum_block}, sum_warps, summed, 2 if weighted else 1),
        ):
            missing = [pointer_name for pointer_name in absent if pointer_name in signature]
            found.append(
                KernelSpec(
                    name=f"{name}{suffix}",
                    fn=fn,
                    signature={key: kind for key, kind in signature.items() if key not in missing},
                    constexprs=blocks | dict.fromkeys(missing),
                    num_warps=num_warps,
                    num_stages=3,
                    multiplies=False,
                    bytes=traffic,
                    flops=per_element * rows * columns,
                )
            )
    return found
