"""Per-group asymmetric quantization of activations to 8 or 4 bits, with stochastic rounding.

A group is `group` consecutive channels of one row; the last group of a row may be shorter. With L = 2^bits − 1, each
group has:

    offset = min x                                in x's dtype, so it is exact
    scale  = max((max x − min x) / L, 2^-126)     rounded up to bfloat16, so the range still covers the group
    code   = clamp(floor((x − offset) / scale + u), 0, L)        u in [0, 1) from `Noise`; 1/2 rounds to nearest
    x̂      = code · scale + offset                one multiplication, one addition, rounded once to x's dtype

The scheme is Mesa's (Pan et al. 2021, arXiv:2111.11124, section 3.2). Let y = (x − offset) / scale. Because
P(floor(y + u) = floor(y) + 1) = frac(y), x̂ is unbiased and has variance frac(y) (1 − frac(y)) scale². This holds for
the stored, rounded scale, up to float32's rounding of y, which is 2^-23 of the range.

Storage for N rows of D channels is N · D · bits / 8 bytes of codes. Each group adds 2 bytes for the scale, and for the
offset 2 bytes (16-bit inputs) or 4 bytes (float32). With 8 bits and groups of 128, this is 8.25 bits per element for
bfloat16 inputs and 8.375 for float32. A float32 scale would add 0.125 bits; the bfloat16 scale, rounded up, makes a
quantization step at most 0.8 % larger. The offset is not stored in bfloat16 for other dtypes: in a group far from 0,
the rounded offset would lose the digits that distinguish the group's elements.

A group belongs to one token, so its range needs no collective. If the group size divides a rank's channels, the groups
are the same in every tensor-parallel layout.

- Constant groups, including zeros, are exact: x − offset is 0, and the minimum scale prevents 0 / 0.
- An infinity, a NaN, or a range above half of the arithmetic's largest number (1.7e38 in float32) makes the whole group
  NaN. With `check` it raises an error instead. Codes never wrap around.
- The smallest scale is 2^-126, so ranges below 2^-126 · L have a coarser grid. x̂ is still unbiased.
- If x is within one quantization step of its dtype's largest number, x̂ may be infinite. In float16, x̂ is clamped to
  that number.
- float64 inputs have float64 scales and arithmetic, and a smallest scale of 2^-1022.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.backend import resolve
from kernels.noise import Noise, uniform
from kernels.shapes import block_limit
from kernels.triton import LARGEST_GROUP, implementations

# Elements per block of rows on the CPU: the block and its two float32 temporaries stay in a core's L2 cache.
_BLOCK_ELEMENTS = 1 << 17

_BACKENDS = ("torch", "reference")

Bounds = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Quantized:
    """A tensor [..., D] quantized by `quantize`: N rows of G groups each.

    Attributes:
        codes: Codes, uint8 [N, bytes per row]. With 4 bits, each byte holds two codes of one group: the low four bits
            belong to the first half of the group's channels, the high four bits to the second half.
        scale: Scales, bfloat16 [N, G] (float64 for a float64 tensor).
        offset: Offsets, [N, G], in the tensor's dtype.
        shape: Shape of the tensor.
        bits: Bits per element, 8 or 4.
        group: Channels per group.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    shape: torch.Size
    bits: int
    group: int

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tensor before quantization."""
        return self.offset.dtype

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors to store: codes, scale and offset."""
        return self.codes, self.scale, self.offset

    @property
    def bytes(self) -> int:
        """Total size of `tensors` in bytes."""
        return sum(x.numel() * x.element_size() for x in self.tensors)


def quantized_bytes(shape: torch.Size, dtype: torch.dtype, *, bits: int, group: int) -> int:
    """Return `Quantized.bytes` for a tensor with this shape and dtype, without quantizing it."""
    channels = shape[-1]
    rows = shape.numel() // channels if channels else 0
    per_group = dtype.itemsize + _scale_dtype(dtype).itemsize
    return rows * (_row_bytes(channels, bits, group) + -(-channels // group) * per_group)


@torch.no_grad()
def quantize_reference(
    x: Tensor, *, bits: int, group: int, noise: Noise | None = None, bounds: Bounds | None = None
) -> Quantized:
    """`quantize` in plain operations, one group at a time."""
    rows_ND = _widen(x.detach()).reshape(-1, x.shape[-1])
    u_ND = torch.full_like(rows_ND, 0.5)
    if noise is not None:
        u_ND = uniform(noise, len(rows_ND), rows_ND.shape[1], x.device).to(rows_ND.dtype)
    codes, scales, offsets = [], [], []
    for index, (part, u) in enumerate(zip(rows_ND.split(group, dim=1), u_ND.split(group, dim=1))):
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        given = None if bounds is None else (bounds[0][:, index, None], bounds[1][:, index, None])
        offset, scale = _grid(low, high, x.dtype, bits, given)
        y = (part - _widen(offset)) * torch.reciprocal(_widen(scale)) + u
        codes.append(_pack(y.floor().clamp(0, _levels(bits)).to(torch.uint8), bits))
        scales.append(scale)
        offsets.append(offset)
    return Quantized(torch.cat(codes, 1), torch.cat(scales, 1), torch.cat(offsets, 1), x.shape, bits, group)


@torch.no_grad()
def dequantize_reference(q: Quantized) -> Tensor:
    """`dequantize` in plain operations, one group at a time."""
    parts, first = [], 0
    for index, channels in enumerate(_group_sizes(q.shape[-1], q.group)):
        last = first + _row_bytes(channels, q.bits, q.group)
        code = _unpack(q.codes[:, first:last], channels, q.bits)
        offset, scale = (_widen(part[:, index, None]) for part in (q.offset, q.scale))
        parts.append(_narrow(code.to(offset.dtype) * scale + offset, q.dtype))
        first = last
    return torch.cat(parts, 1).view(q.shape)


def quantize(
    x: Tensor,
    *,
    bits: int,
    group: int,
    noise: Noise | None = None,
    bounds: Bounds | None = None,
    check: str | None = None,
    backend: str = "auto",
) -> Quantized:
    """Quantize x to 8 or 4 bits. The module docstring describes the format and the accuracy.

    Args:
        x: [..., D], floating. For groups of (token, head), merge the heads and their channels into D.
        bits: 8, or 4 (two elements per byte).
        group: number of channels that share a scale and an offset; the last group of a row may be shorter.
        noise: noise of stochastic rounding, a function of token and channel. None rounds to nearest, which is biased.
        bounds: (low, high), each broadcastable to [N, G], used in place of the exact ranges. Values outside are
            clamped.
        check: name of x for an error message. If given, a group that is not finite raises an error; this synchronises
            with a GPU. If None, the group is dequantized to NaN.
        backend: auto, reference, torch or triton; all give the same bits.

    Raises:
        ValueError: x is not floating or has no dimension, bits or group is invalid, noise or bounds do not fit x, a
            group is not finite and `check` is given, or the backend cannot serve x.
    """
    _check_arguments(x, bits, group)
    groups = -(-x.shape[-1] // group)
    if bounds is not None:
        bounds = _checked_bounds(x, groups, bounds)
    choice = resolve("quantize", backend, _implementations(x, min(group, x.shape[-1])))
    if choice == "reference" and x.numel():
        q = quantize_reference(x, bits=bits, group=group, noise=noise, bounds=bounds)
    else:
        run = _quantize_triton if choice == "triton" and x.numel() else _quantize
        codes, scale_NG, offset_NG = run(_rows(x), bits, group, noise, bounds)
        q = Quantized(codes, scale_NG, offset_NG, x.shape, bits, group)
    if check is not None:
        _check_finite(check, q)
    return q


def dequantize(q: Quantized, *, backend: str = "auto") -> Tensor:
    """Return the dequantized tensor in its original shape and dtype. Groups that were not finite are NaN.

    Args:
        q: the result of `quantize`.
        backend: auto, reference, torch or triton; all give the same bits.

    Raises:
        ValueError: the backend cannot serve q.
    """
    choice = resolve("dequantize", backend, _implementations(q.offset, min(q.group, q.shape[-1])))
    if choice == "reference" and q.codes.numel():
        return dequantize_reference(q)
    out = q.offset.new_empty(q.shape)
    if choice == "triton" and q.codes.numel():
        from kernels.triton import quantization  # here, for machines without triton

        quantization.dequantize(*q.tensors, _rows(out), q.bits, q.group)
    else:
        _dequantize(q, _rows(out))
    return out


@torch.no_grad()
def group_bounds(x: Tensor, group: int) -> Bounds:
    """Return (low, high), the exact range of every group of x [..., D], each [N, G] in x's dtype.

    `quantize` uses these ranges if `bounds` is None. Callers use them to keep their own ranges, such as Mesa's running
    averages, which have one range per group of channels for all tokens.
    """
    _check_arguments(x, 8, group)
    x_ND = _rows(x)
    low_NG, high_NG = (x_ND.new_empty(len(x_ND), -(-x.shape[-1] // group)) for _ in range(2))
    rows = _block_rows(x_ND)
    for part in _parts(x.shape[-1], group, 8):
        tensors = part.channels(x_ND), low_NG[:, part.groups], high_NG[:, part.groups]
        for block, low, high in zip(*(tensor.split(rows) for tensor in tensors)):
            # float32 reductions are five times as fast as bfloat16 ones.
            wide = _widen(block)
            low.copy_(wide.amin(-1))
            high.copy_(wide.amax(-1))
    return low_NG, high_NG


def _implementations(x: Tensor, channels: int) -> tuple[str, ...]:
    """Return the backends that can serve x in groups of `channels`."""
    return implementations(_BACKENDS, x, fits=channels <= LARGEST_GROUP)


class _Part(NamedTuple):
    """Consecutive groups of one size: either all full groups of a row, or its last, shorter group.

    Attributes:
        first: Index of the first group in the row.
        number: Number of groups.
        size: Channels per group.
        start: Index of the first channel in the row.
        width: Bytes of codes per group.
        place: Index of the first byte in the row of codes.
    """

    first: int
    number: int
    size: int
    start: int
    width: int
    place: int

    @property
    def groups(self) -> slice:
        """The slice of these groups in a row of G groups."""
        return slice(self.first, self.first + self.number)

    def channels(self, x_ND: Tensor) -> Tensor:
        """View these groups' channels of x [N, D] as [N, groups, C]."""
        return x_ND[:, self.start : self.start + self.number * self.size].unflatten(1, (self.number, self.size))

    def codes(self, codes: Tensor) -> Tensor:
        """View these groups' codes as [N, groups, bytes per group]."""
        return codes[:, self.place : self.place + self.number * self.width].unflatten(1, (self.number, self.width))


def _parts(channels: int, group: int, bits: int) -> Iterator[_Part]:
    whole, rest = divmod(channels, group)
    width = -(-group * bits // 8)
    if whole:
        yield _Part(0, whole, group, 0, width, 0)
    if rest:
        yield _Part(whole, 1, rest, whole * group, -(-rest * bits // 8), whole * width)


def _quantize_triton(
    x_ND: Tensor, bits: int, group: int, noise: Noise | None, bounds: Bounds | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (codes, scale, offset), computed by Triton."""
    from kernels.triton import quantization

    codes = x_ND.new_empty(len(x_ND), _row_bytes(x_ND.shape[1], bits, group), dtype=torch.uint8)
    scale_NG, offset_NG = quantization.quantize(x_ND, codes, bits, group, noise, bounds)
    return codes, scale_NG, offset_NG


@torch.no_grad()
def _quantize(
    x_ND: Tensor, bits: int, group: int, noise: Noise | None, bounds: Bounds | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (codes, scale, offset), computed by torch: first all scales and offsets, then the codes by row blocks."""
    rows, columns = x_ND.shape
    low_NG, high_NG = group_bounds(x_ND, group)
    offset_NG, scale_NG = _grid(_widen(low_NG), _widen(high_NG), x_ND.dtype, bits, bounds)
    shift_NG1, factor_NG1 = _widen(offset_NG)[..., None], torch.reciprocal(_widen(scale_NG))[..., None]
    codes = x_ND.new_empty(rows, _row_bytes(columns, bits, group), dtype=torch.uint8)
    a_N1, b_D = (x_ND.new_zeros(rows, 1), None) if noise is None else noise.terms(rows, columns, x_ND.device)
    for part in _parts(columns, group, bits):
        at = slice(None), part.groups
        tensors = part.channels(x_ND), shift_NG1[at], factor_NG1[at], part.codes(codes), a_N1[..., None]
        _quantize_groups(*tensors, None if b_D is None else part.channels(b_D[None]), bits)
    return codes, scale_NG, offset_NG


def _quantize_groups(
    x_NGC: Tensor, shift_NG1: Tensor, factor_NG1: Tensor, codes: Tensor, a_N11: Tensor, b_1GC: Tensor | None, bits: int
) -> None:
    """Write the codes of groups of one size. Two temporaries are reused for every block of rows."""
    rows = _block_rows(x_NGC)
    y_NGC, u_NGC = (shift_NG1.new_empty(rows, *x_NGC.shape[1:]) for _ in range(2))
    tensors = x_NGC, shift_NG1, factor_NG1, codes, a_N11
    for block, shift, factor, out, a in zip(*(tensor.split(rows) for tensor in tensors)):
        y, u = y_NGC[: len(block)], u_NGC[: len(block)]
        # Convert first: an operation on mixed dtypes takes twice as long as the conversion and the operation.
        torch.sub(block if block.dtype == y.dtype else y.copy_(block), shift, out=y).mul_(factor)
        y.add_(0.5 if b_1GC is None else torch.add(a, b_1GC, out=u).frac_())
        _store(y.clamp_(0, _levels(bits)), out, bits)


def _store(y_NGC: Tensor, codes: Tensor, bits: int) -> None:
    """Convert 0 ≤ y < 2^bits to integer codes, dropping the fractions, and write them packed."""
    # Converting through int16 takes half the time.
    code = y_NGC.to(torch.int16)
    if bits == 4:
        half = codes.shape[-1]
        upper = code[..., half:]
        # With an odd number of channels, the middle channel has a byte to itself.
        code = code[..., :half]
        code[..., : upper.shape[-1]].add_(upper, alpha=16)
    codes.copy_(code)


def _dequantize(q: Quantized, out_ND: Tensor) -> None:
    """Write the dequantized tensor to `out_ND`, computed by torch in blocks of rows."""
    offset_NG1, scale_NG1 = _widen(q.offset)[..., None], _widen(q.scale)[..., None]
    rows = _block_rows(out_ND)
    for part in _parts(out_ND.shape[1], q.group, q.bits):
        at = slice(None), part.groups
        tensors = part.codes(q.codes), scale_NG1[at], offset_NG1[at], part.channels(out_ND)
        wide = None if q.dtype == offset_NG1.dtype else offset_NG1.new_empty(rows, part.number, part.size)
        for codes, scale, offset, target in zip(*(tensor.split(rows) for tensor in tensors)):
            y = target if wide is None else wide[: len(target)]
            _load(codes, y, q.bits)
            y.mul_(scale).add_(offset)
            if wide is not None:
                target.copy_(_narrow(y, q.dtype))


def _load(codes: Tensor, y_NGC: Tensor, bits: int) -> None:
    """Unpack the codes into y as floating-point numbers."""
    if bits == 8:
        y_NGC.copy_(codes)
        return
    half = codes.shape[-1]
    y_NGC[..., :half] = codes & 15
    y_NGC[..., half:] = (codes >> 4)[..., : y_NGC.shape[-1] - half]


def _grid(low: Tensor, high: Tensor, dtype: torch.dtype, bits: int, given: Bounds | None) -> Bounds:
    """Compute (offset, scale) in their stored dtypes.

    `low` and `high` are the groups' exact ranges in the dtype of the arithmetic. `given` are bounds to use instead.
    """
    offset = low.to(dtype)
    span = high - low
    if given is not None:
        # Copy, because the caller updates running ranges in place while this offset is stored.
        offset = given[0].to(low.dtype).to(dtype, copy=True, memory_format=torch.contiguous_format)
        # Codes cannot represent non-finite values. Adding 0 · the exact range makes the scale NaN in that case.
        span = given[1].to(low.dtype) - _widen(offset) + span * 0.0
    scale = span.div_(_levels(bits)).clamp_min_(torch.finfo(span.dtype).smallest_normal)
    # 0 · (twice the range) is NaN where twice the range overflows. The factor 2 leaves room for the rounded-up scale in
    # code · scale.
    poison = scale * (2 * _levels(bits)) * 0.0
    stored = scale if scale.dtype == torch.float64 else _round_up(scale)
    return offset, (stored + poison).to(_scale_dtype(dtype))


def _round_up(scale: Tensor) -> Tensor:
    """Round positive finite float32 numbers up to bfloat16 precision."""
    # bfloat16 is the upper half of a float32. If any bit of the lower half is set, the addition carries into the upper
    # half. The result is undefined for non-finite numbers: a GPU's NaN is all ones, carries into the sign and gives 0.
    return (scale.view(torch.int32) + 0xFFFF).bitwise_and_(~0xFFFF).view(torch.float32)


def _pack(code: Tensor, bits: int) -> Tensor:
    """Pack one group's codes [N, C] into bytes."""
    if bits == 8:
        return code
    half = -(-code.shape[1] // 2)
    return code[:, :half] | torch.nn.functional.pad(code[:, half:], (0, code.shape[1] % 2)) << 4


def _unpack(packed: Tensor, channels: int, bits: int) -> Tensor:
    """Unpack one group's codes to [N, channels]."""
    return packed if bits == 8 else torch.cat((packed & 15, packed >> 4), 1)[:, :channels]


def _levels(bits: int) -> int:
    """L, the largest code."""
    return (1 << bits) - 1


def _group_sizes(channels: int, group: int) -> list[int]:
    return [min(group, channels - first) for first in range(0, channels, group)]


def _row_bytes(channels: int, bits: int, group: int) -> int:
    """Return the bytes of one row's codes. Every group starts on a byte boundary."""
    return sum(-(-size * bits // 8) for size in _group_sizes(channels, group))


def _scale_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.bfloat16


def _widen(x: Tensor) -> Tensor:
    """Convert x to the dtype of the arithmetic: float64 for float64, float32 for all others."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert x to `dtype`."""
    # x̂ may exceed a group's maximum by up to one quantization step. In float16, whose largest number activations can
    # reach, this must not overflow to infinity.
    return x.clamp(-65504, 65504).to(dtype) if dtype == torch.float16 else x.to(dtype)


def _rows(x: Tensor) -> Tensor:
    """Reshape x [..., D] to [N, D], detached."""
    return x.detach().reshape(x.shape[:-1].numel(), x.shape[-1])


def _block_rows(x: Tensor) -> int:
    """Return the rows per block of x [N, ...], at least 1. On a GPU all rows are one block."""
    limit = block_limit(_BLOCK_ELEMENTS) // max(x[0].numel(), 1) if x.is_cpu and len(x) else len(x)
    return max(1, min(len(x), limit))


def _check_arguments(x: Tensor, bits: int, group: int) -> None:
    if not x.is_floating_point() or x.dim() == 0:
        raise ValueError(f"quantize: x must be floating [..., D], not {x.dtype} {tuple(x.shape)}")
    if bits not in (4, 8):
        raise ValueError(f"quantize: bits must be 8 or 4, not {bits}")
    if group < 1:
        raise ValueError(f"quantize: a group must have at least one channel, not {group}")


def _checked_bounds(x: Tensor, groups: int, bounds: Bounds) -> Bounds:
    """Expand the bounds to [N, G]. Raise ValueError if they do not broadcast."""
    shape = (x.shape[:-1].numel(), groups)
    try:
        return bounds[0].expand(shape), bounds[1].expand(shape)
    except RuntimeError:
        found = " and ".join(str(tuple(bound.shape)) for bound in bounds)
        raise ValueError(f"quantize: bounds {found} must be broadcastable to {shape}, rows and groups") from None


def _check_finite(name: str, q: Quantized) -> None:
    wrong = q.scale.isfinite().logical_not_()
    if wrong.any():
        row, group = (int(place) for place in wrong.nonzero()[0])
        raise ValueError(
            f"quantize: {name} has an infinity or a NaN, or too wide a range, in group {group} of row {row}"
        )
