"""Per-group quantization to 8 or 4 bits, and dequantization, in Triton; see kernels/quantization/quantizer.py.

Each program handles one group of several rows, and reads x once. With 8 bits it loads the group as one tile; with 4
bits as two tiles, one for each half of the channels, because a byte holds one code of each half. The kernel computes
the noise from row and channel indices, so noise takes no memory.

Codes equal those of the torch path bit by bit, except in groups that are not finite. For this, quantization must not
fuse multiplications and additions. Dequantization may fuse them, because the product of a code and a scale, with 8
significant bits each, is exact.
"""

# Triton interprets a kernel's annotations, and only constexpr annotations are meaningful to it.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, import-untyped"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.noise import BITS, FIRST_FACTOR, GOLDEN, SECOND_FACTOR, Noise
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
_GOLDEN, _FIRST, _SECOND = tl.constexpr(GOLDEN), tl.constexpr(FIRST_FACTOR), tl.constexpr(SECOND_FACTOR)
_SURPLUS, _UNIT = tl.constexpr(64 - BITS), tl.constexpr(2.0**-BITS)
_LEAST = tl.constexpr(2.0**-126)
_LARGEST_HALF = tl.constexpr(65504.0)


@triton.jit
def _shift(z, by):
    """Logical right shift of an int64."""
    return (z.to(tl.uint64, bitcast=True) >> by).to(tl.int64, bitcast=True)


@triton.jit
def _uniform(key, number):
    """Return the leading bits of each int64 number's splitmix64 hash as a float32 in [0, 1)."""
    z = number * _GOLDEN + key
    z = (z ^ _shift(z, 30)) * _FIRST
    z = (z ^ _shift(z, 27)) * _SECOND
    z = z ^ _shift(z, 31)
    return _shift(z, _SURPLUS).to(tl.float32) * _UNIT


@triton.jit
def _round_up(scale):
    """Round positive finite numbers up to bfloat16 precision."""
    return ((scale.to(tl.int32, bitcast=True) + 0xFFFF) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _noise(rows_ptr, row, rows, key, channel):
    """Return the noise [N, C] of these rows and channels; without `rows_ptr` 1/2, which rounds to nearest."""
    u = 0.5
    if rows_ptr is not None:
        a = _uniform(key, tl.load(rows_ptr + row, mask=row < rows, other=0))[:, None]
        # −1 − key is ~key, as in kernels/noise.py. The sum and its fraction are exact.
        total = a + _uniform(-1 - key, channel.to(tl.int64))
        u = tl.where(total >= 1.0, total - 1.0, total)
    return u


@triton.jit
def _first_byte(group, BITS: tl.constexpr):
    """Return the offset of the program's group in a row of codes, in bytes."""
    return tl.program_id(1) * (group if BITS == 8 else (group + 1) // 2)


@triton.jit
def _code(x, offset, factor, u, LEVELS: tl.constexpr):
    """Compute clamp(floor((x − offset) · factor + u), 0, LEVELS) as int32; 0 for NaN."""
    y = (x - offset[:, None]) * factor[:, None] + u
    return tl.where(y > 0.0, tl.where(y < LEVELS, y, LEVELS), 0.0).to(tl.int32)


@triton.jit
def _tiles(row, rows, columns, group, BITS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the channels of the program's first and second tile, and their masks.

    The first mask is also that of the bytes of codes. With 8 bits, the second tile is not used.
    """
    start = tl.program_id(1) * group
    size = tl.minimum(group, columns - start)
    width = size if BITS == 8 else (size + 1) // 2
    index = tl.arange(0, BLOCK_C)
    exists = (row < rows)[:, None]
    lower, upper = (start + index)[None, :], (start + width + index)[None, :]
    mask = exists & (index < width)[None, :]
    return lower, upper, mask, exists & (width + index < size)[None, :]


# Do not specialize on these: the compiler would build another kernel for values that are multiples of 16.
@triton.jit(do_not_specialize=["key", "first_channel"])
def _quantize_kernel(
    x_ptr,
    low_ptr,
    high_ptr,
    rows_ptr,
    codes_ptr,
    scale_ptr,
    offset_ptr,
    x_stride,
    codes_stride,
    rows,
    columns,
    groups,
    group,
    key,
    first_channel,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    LEVELS: tl.constexpr = (1 << BITS) - 1
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    lower, upper, mask, upper_mask = _tiles(row, rows, columns, group, BITS, BLOCK_C)
    x = tl.load(x_ptr + row[:, None] * x_stride + lower, mask=mask, other=0.0).to(tl.float32)
    low = tl.min(tl.where(mask, x, float("inf")), axis=1)
    high = tl.max(tl.where(mask, x, float("-inf")), axis=1)
    # Minima and maxima drop NaN. This sum is NaN if any x is not finite.
    poison = tl.sum(x * 0.0, axis=1)
    if BITS == 4:
        x2 = tl.load(x_ptr + row[:, None] * x_stride + upper, mask=upper_mask, other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.min(tl.where(upper_mask, x2, float("inf")), axis=1))
        high = tl.maximum(high, tl.max(tl.where(upper_mask, x2, float("-inf")), axis=1))
        poison += tl.sum(x2 * 0.0, axis=1)
    place = row * groups + tl.program_id(1)
    offset, span = low, high - low
    if low_ptr is not None:
        offset = tl.load(low_ptr + place, mask=row < rows, other=0.0).to(x_ptr.dtype.element_ty).to(tl.float32)
        span = tl.load(high_ptr + place, mask=row < rows, other=0.0) - offset + span * 0.0
    scale = tl.div_rn(span + poison, tl.zeros_like(span) + LEVELS)
    scale = tl.where(scale < _LEAST, _LEAST, scale)
    # The second term is NaN if twice the range is not finite. Rounding up would not preserve a NaN or an infinity.
    scale = _round_up(scale) + scale * (2 * LEVELS) * 0.0
    tl.store(scale_ptr + place, scale.to(scale_ptr.dtype.element_ty), mask=row < rows)
    tl.store(offset_ptr + place, offset.to(offset_ptr.dtype.element_ty), mask=row < rows)
    factor = tl.div_rn(tl.zeros_like(scale) + 1.0, scale)
    code = _code(x, offset, factor, _noise(rows_ptr, row, rows, key, first_channel + lower), LEVELS)
    if BITS == 4:
        upper_code = _code(x2, offset, factor, _noise(rows_ptr, row, rows, key, first_channel + upper), LEVELS)
        code += tl.where(upper_mask, upper_code, 0) * 16
    byte = row[:, None] * codes_stride + _first_byte(group, BITS) + tl.arange(0, BLOCK_C)[None, :]
    tl.store(codes_ptr + byte, code.to(tl.uint8), mask=mask)


@triton.jit
def _dequantize_kernel(
    codes_ptr,
    scale_ptr,
    offset_ptr,
    y_ptr,
    codes_stride,
    rows,
    columns,
    groups,
    group,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    lower, upper, mask, upper_mask = _tiles(row, rows, columns, group, BITS, BLOCK_C)
    place = row * groups + tl.program_id(1)
    scale = tl.load(scale_ptr + place, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    offset = tl.load(offset_ptr + place, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    byte = row[:, None] * codes_stride + _first_byte(group, BITS) + tl.arange(0, BLOCK_C)[None, :]
    code = tl.load(codes_ptr + byte, mask=mask, other=0).to(tl.int32)
    if BITS == 4:
        _store(y_ptr + row[:, None] * columns + upper, (code >> 4).to(tl.float32) * scale + offset, upper_mask)
        code = code & 15
    _store(y_ptr + row[:, None] * columns + lower, code.to(tl.float32) * scale + offset, mask)


@triton.jit
def _store(places, y, mask):
    """Store y in the pointer's dtype. For float16, clamp it to the largest finite number; NaN is kept."""
    if places.dtype.element_ty == tl.float16:
        y = tl.where(y > _LARGEST_HALF, _LARGEST_HALF, tl.where(y < -_LARGEST_HALF, -_LARGEST_HALF, y))
    tl.store(places, y.to(places.dtype.element_ty), mask=mask)


def _tile(target: str, channels: int, bits: int) -> tuple[int, int, int]:
    """Return (BLOCK_N, BLOCK_C, warps) for groups of `channels`: 16 elements per thread, up to 16 warps."""
    width = next_power(channels if bits == 8 else -(-channels // 2))
    # With 4 bits there are two tiles of this width.
    elements = width if bits == 8 else 2 * width
    rows = max(1, _BLOCK_ELEMENTS // elements)
    return rows, width, min(max(rows * elements // (16 * warp_size(target)), 1), 16)


def quantize(
    x_ND: Tensor, codes: Tensor, bits: int, group: int, noise: Noise | None, bounds: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """`kernels.quantization.quantize` with checked arguments: write the codes and return (scale, offset) [N, G].

    Args:
        x_ND: [N, D], not empty.
        codes: uint8 [N, bytes per row]; written.
        bits, group, noise: as in `kernels.quantization.quantize`.
        bounds: (low, high), each [N, G], or None for the exact ranges.
    """
    x_ND = unit_stride(x_ND)
    rows, columns = x_ND.shape
    groups = triton.cdiv(columns, group)
    scale_NG, offset_NG = x_ND.new_empty(rows, groups, dtype=torch.bfloat16), x_ND.new_empty(rows, groups)
    given = (None, None) if bounds is None else tuple(bound.float().contiguous() for bound in bounds)
    numbers_N = None if noise is None else noise.row_numbers(rows, x_ND.device)
    key, first_channel = (0, 0) if noise is None else (noise.key, noise.first_channel)
    block_n, block_c, warps = _tile(target_name(x_ND.device), min(group, columns), bits)
    with device_guard(x_ND):
        tensors = x_ND, *given, numbers_N, codes, scale_NG, offset_NG
        numbers = x_ND.stride(0), codes.stride(0), rows, columns, groups, group, key, first_channel
        sizes = {"BITS": bits, "BLOCK_N": block_n, "BLOCK_C": block_c, "num_warps": warps}
        _quantize_kernel[triton.cdiv(rows, block_n), groups](*tensors, *numbers, **sizes, enable_fp_fusion=False)
    return scale_NG, offset_NG


def dequantize(codes: Tensor, scale_NG: Tensor, offset_NG: Tensor, y_ND: Tensor, bits: int, group: int) -> None:
    """`kernels.quantization.dequantize`: write the dequantized tensor to y_ND, contiguous [N, D] and not empty."""
    rows, columns = y_ND.shape
    groups = scale_NG.shape[1]
    block_n, block_c, warps = _tile(target_name(y_ND.device), min(group, columns), bits)
    with device_guard(y_ND):
        sizes = {"BITS": bits, "BLOCK_N": block_n, "BLOCK_C": block_c, "num_warps": warps}
        numbers = codes.stride(0), rows, columns, groups, group
        grid = triton.cdiv(rows, block_n), groups
        _dequantize_kernel[grid](codes, scale_NG, offset_NG, y_ND, *numbers, **sizes)


def specs(target: str, head_dim: int, dtype: str) -> list[KernelSpec]:
    """Return the kernels for 8192 tokens of 16 heads, with 8 and 4 bits and one group per token and head."""
    rows, columns, groups = 8192, 16 * head_dim, 16
    pointer, elements, size = f"*{dtype}", rows * columns, dtype_bytes(dtype)
    kept = {"codes_ptr": "*u8", "scale_ptr": "*bf16", "offset_ptr": pointer}
    extent = {"rows": "i32:16", "columns": "i32:16", "groups": "i32:16", "group": "i32:16"}
    noise = {"key": "i64", "first_channel": "i32"}
    forward = {"x_ptr": pointer, "rows_ptr": "*i64", **kept, "x_stride": "i32:16", "codes_stride": "i32:16"}
    backward = {**kept, "y_ptr": pointer, "codes_stride": "i32:16", **extent}
    found = []
    for bits in (8, 4):
        block_n, block_c, warps = _tile(target, head_dim, bits)
        for name, fn, signature, absent, flops in (
            ("quantize", _quantize_kernel, forward | extent | noise, ["low_ptr", "high_ptr"], 10),
            ("dequantize", _dequantize_kernel, backward, [], 2),
        ):
            found.append(
                KernelSpec(
                    name=f"{name}_{bits}",
                    fn=fn,
                    signature=signature,
                    constexprs={"BITS": bits, "BLOCK_N": block_n, "BLOCK_C": block_c, **dict.fromkeys(absent)},
                    num_warps=warps,
                    num_stages=3,
                    multiplies=False,
                    bytes=elements * (size + bits / 8) + rows * groups * (2 + size),
                    flops=flops * elements,
                )
            )
    return found
