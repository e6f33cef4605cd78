"""Rotary position embedding in the half-split layout. A program rotates some heads of one token.

    out_1 = x_1 cos − x_2 sin        out_2 = x_2 cos + x_1 sin

The backward uses the same kernel to rotate by the negative angle.
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
from kernels.triton.launch import KernelSpec, device_guard, dtype_bytes, next_power, target_name, warp_size

_BLOCK_PAIRS = 1024


@triton.jit
def _kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    stride_b,
    stride_t,
    stride_h,
    stride_k,
    table_stride_b,
    time,
    heads,
    half,
    BACKWARD: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    b, t = token // time, token % time
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    pair = tl.arange(0, BLOCK_K)
    table = b * table_stride_b + t * half + pair
    cos = tl.load(cos_ptr + table, mask=pair < half, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + table, mask=pair < half, other=0.0).to(tl.float32)[None, :]
    if BACKWARD:
        sin = -sin
    pair = pair[None, :]
    mask = (head < heads) & (pair < half)
    first_ptr = x_ptr + b * stride_b + t * stride_t + head.to(tl.int64) * stride_h + pair.to(tl.int64) * stride_k
    first = tl.load(first_ptr, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(first_ptr + tl.cast(half, tl.int64) * stride_k, mask=mask, other=0.0).to(tl.float32)
    out = out_ptr + (token * heads + head) * (2 * half) + pair
    tl.store(out, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out + half, (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=mask)


def _tile(target: str, heads: int, half: int) -> tuple[int, int, int]:
    """Return (BLOCK_H, BLOCK_K, warps): all heads of a token if they are few, 8 pairs per thread."""
    width = next_power(half)
    block_h = min(next_power(heads), max(_BLOCK_PAIRS // width, 1))
    return block_h, width, min(max(block_h * width // (8 * warp_size(target)), 1), 16)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    batch, time, heads, dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_h, block_k, warps = _tile(target_name(x.device), heads, dim // 2)
    if x.numel():
        with device_guard(x):
            grid = batch * time, triton.cdiv(heads, block_h)
            numbers = *x.stride(), cos.stride(0) if cos.dim() == 3 and len(cos) > 1 else 0, time, heads, dim // 2
            blocks = {"BLOCK_H": block_h, "BLOCK_K": block_k, "num_warps": warps}
            _kernel[grid](x, cos, sin, out, *numbers, BACKWARD=backward, **blocks)
    return out


class _Rotary(torch.autograd.Function):
    """`apply_rotary`: saves the tables."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        save(ctx, statistics=(cos, sin))
        return _rotate(x, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(dy, cos, sin, True), None, None


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`kernels.rotary.apply_rotary` with checked arguments."""
    return _Rotary.apply(x, cos, sin)


def specs(target: str, head_dim: int, dtype: str) -> list[KernelSpec]:
    """Return the kernels of both directions for 8192 tokens of 16 heads."""
    tokens, heads = 8192, 16
    pointer, elements = f"*{dtype}", tokens * heads * head_dim
    block_h, block_k, warps = _tile(target, heads, head_dim // 2)
    signature = {"x_ptr": pointer, "cos_ptr": "*fp32", "sin_ptr": "*fp32", "out_ptr": pointer}
    strides = "stride_b", "stride_t", "stride_h", "table_stride_b"
    signature |= dict.fromkeys((*strides, "time", "heads", "half"), "i32:16")
    return [
        KernelSpec(
            name=name,
            fn=_kernel,
            signature=signature,
            constexprs={"stride_k": 1, "BACKWARD": backward, "BLOCK_H": block_h, "BLOCK_K": block_k},
            num_warps=warps,
            num_stages=3,
            multiplies=False,
            bytes=2 * elements * dtype_bytes(dtype) + tokens * head_dim * 4,
            flops=3 * elements,
        )
        for name, backward in (("rotary_forward", False), ("rotary_backward", True))
    ]
