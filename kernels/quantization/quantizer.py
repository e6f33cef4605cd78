"""Activations in 8 or 4 bits: asymmetric, by groups of a token's channels, rounded stochastically.

For each group, `group` consecutive channels of one row (the last one of a row may be shorter), with L = 2^bits − 1:

    offset = min x                                in x's dtype, so exact
    scale  = max((max x − min x) / L, 2^-126)     rounded up to bfloat16, so the range still covers the group
    code   = clamp(floor((x − offset) / scale + u), 0, L)        u in [0, 1) from `Noise`; 1/2 rounds to nearest
    x̂      = code · scale + offset                one multiplication, one addition, rounded once to x's dtype

The scheme is Mesa's (Pan et al. 2021, arXiv:2111.11124, section 3.2). As P(floor(y + u) = floor(y) + 1) = frac(y), x̂ is
unbiased, with the variance frac(y) (1 − frac(y)) scale². It is so for the scale that is stored, and up to float32's
rounding of (x − offset) / scale, 2^-23 of the range.

What is kept of N rows of D channels, in bytes: N · D · bits / 8 of codes, and for each group the scale (2) and the
offset (2 for 16-bit inputs, 4 for float32). Of groups of 128 that is 8.25 bits an element in bfloat16 and 8.375 in
float32. A float32 scale would take 0.125 more; rounding it up widens a step by 0.8 % at most. An offset in bfloat16
would be exact for bfloat16 inputs alone: of others, a group far from 0 would lose the digits that tell its elements
apart.

A group belongs to one token, so no range needs a collective, and groups that divide a rank's channels are the same in
every tensor-parallel layout.

- A constant group is exact, and so are zeros: x − offset is 0, and with the least scale 0 / scale is no NaN.
- An infinity or a NaN makes its group NaN, and so does a range beyond half of the largest number of the arithmetic
  (1.7e38 in float32); with `check` it is an error. Codes never wrap around.
- Ranges below 2^-126 · L are resolved to 2^-126, still unbiased. Within a step of the dtype's largest number, x̂ may
  be infinite (float16: that largest number).
- float64 has float64 scales and arithmetic, with 2^-1022 as the least.
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

# Elements per block of rows on the CPU: the block and its two float32 temporaries stay in a core's second cache.
_BLOCK_ELEMENTS = 1 << 17

_BACKENDS = ("torch", "reference")

Bounds = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Quantized:
    """A tensor in 8 or 4 bits, as `quantize` makes it of N rows [..., D] with G groups each.

    Attributes:
        codes: [N, bytes of a row], uint8. With 4 bits a byte has two codes of one group: its lower half those of the
            first half of the group's channels, its upper half those of the second.
        scale: [N, G], bfloat16 (float64 of a float64 tensor).
        offset: [N, G], in the dtype of the tensor.
        shape: Of the tensor.
        bits: 8 or 4.
        group: Channels of a group.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    shape: torch.Size
    bits: int
    group: int

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor."""
        return self.offset.dtype

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """What must be stored."""
        return self.codes, self.scale, self.offset

    @property
    def bytes(self) -> int:
        """Of what must be stored."""
        return sum(x.numel() * x.element_size() for x in self.tensors)


def quantized_bytes(shape: torch.Size, dtype: torch.dtype, *, bits: int, group: int) -> int:
    """`Quantized.bytes` of a tensor of this shape and dtype."""
    channels = shape[-1]
    rows = shape.numel() // channels if channels else 0
    per_group = dtype.itemsize + _scale_dtype(dtype).itemsize
    return rows * (_row_bytes(channels, bits, group) + -(-channels // group) * per_group)


@torch.no_grad()
def quantize_reference(
    x: Tensor, *, bits: int, group: int, noise: Noise | None = None, bounds: Bounds | None = None
) -> Quantized:
    """`quantize` in plain operations, a group after another."""
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
    """`dequantize` in plain operations, a group after another."""
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
    """Store x in 8 or 4 bits; see the module for what is kept and what comes back.

    Args:
        x: [..., D], floating. For groups of (token, head), heads and their channels are one dimension.
        bits: 8, or 4 with two elements a byte.
        group: channels that have one scale and offset; the last group of a row may be shorter.
        noise: of stochastic rounding, by the token and channel; None rounds to nearest, which is biased.
        bounds: (low, high), each broadcastable to [N, G], in place of the exact ranges; what is beyond is clamped.
        check: x's name: what is not finite is then an error that names it, for which a GPU is waited for. Without
            it, its group comes back as NaN.
        backend: auto, reference, torch or triton; all give the same bits.

    Raises:
        ValueError: x is not floating or has no dimension, bits or group do not exist, noise or bounds do not fit x,
            something is not finite and `check` asks, or the backend cannot serve x.
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
    """The tensor of q in its shape and dtype; groups that were not finite are NaN.

    Args:
        q: what `quantize` gave.
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
    """(low, high) of every group of x [..., D], each [N, G] in x's dtype: what `quantize` takes without `bounds`.

    For ranges that the caller keeps, as Mesa's running ones: those of a block of channels, over all tokens.
    """
    _check_arguments(x, 8, group)
    x_ND = _rows(x)
    low_NG, high_NG = (x_ND.new_empty(len(x_ND), -(-x.shape[-1] // group)) for _ in range(2))
    rows = _block_rows(x_ND)
    for part in _parts(x.shape[-1], group, 8):
        tensors = part.channels(x_ND), low_NG[:, part.groups], high_NG[:, part.groups]
        for block, low, high in zip(*(tensor.split(rows) for tensor in tensors)):
            # Reductions of float32 are five times as fast as those of bfloat16.
            wide = _widen(block)
            low.copy_(wide.amin(-1))
            high.copy_(wide.amax(-1))
    return low_NG, high_NG


def _implementations(x: Tensor, channels: int) -> tuple[str, ...]:
    """What serves x in groups of so many channels."""
    return implementations(_BACKENDS, x, fits=channels <= LARGEST_GROUP)


class _Part(NamedTuple):
    """Groups of one size, beside each other: all whole ones of a row, or the last one, which is shorter.

    Attributes:
        first: The first group's number.
        number: How many groups there are.
        size: Channels of one.
        start: The first channel.
        width: Bytes of one.
        place: The first byte.
    """

    first: int
    number: int
    size: int
    start: int
    width: int
    place: int

    @property
    def groups(self) -> slice:
        """Where the groups are in a row of groups."""
        return slice(self.first, self.first + self.number)

    def channels(self, x_ND: Tensor) -> Tensor:
        """[N, G, C] of the channels, a view."""
        return x_ND[:, self.start : self.start + self.number * self.size].unflatten(1, (self.number, self.size))

    def codes(self, codes: Tensor) -> Tensor:
        """[N, G, bytes of a group] of the codes, a view."""
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
    """(codes, scale, offset), by Triton."""
    from kernels.triton import quantization

    codes = x_ND.new_empty(len(x_ND), _row_bytes(x_ND.shape[1], bits, group), dtype=torch.uint8)
    scale_NG, offset_NG = quantization.quantize(x_ND, codes, bits, group, noise, bounds)
    return codes, scale_NG, offset_NG


@torch.no_grad()
def _quantize(
    x_ND: Tensor, bits: int, group: int, noise: Noise | None, bounds: Bounds | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, offset), by torch: the grids of all groups, then the codes, block by block of rows."""
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
    """The codes of groups of one size, in passes over two temporaries that are used again for every block."""
    rows = _block_rows(x_NGC)
    y_NGC, u_NGC = (shift_NG1.new_empty(rows, *x_NGC.shape[1:]) for _ in range(2))
    tensors = x_NGC, shift_NG1, factor_NG1, codes, a_N11
    for block, shift, factor, out, a in zip(*(tensor.split(rows) for tensor in tensors)):
        y, u = y_NGC[: len(block)], u_NGC[: len(block)]
        # Widened first: an operation on two dtypes takes twice the time of both.
        torch.sub(block if block.dtype == y.dtype else y.copy_(block), shift, out=y).mul_(factor)
        y.add_(0.5 if b_1GC is None else torch.add(a, b_1GC, out=u).frac_())
        _store(y.clamp_(0, _levels(bits)), out, bits)


def _store(y_NGC: Tensor, codes: Tensor, bits: int) -> None:
    """The codes of 0 ≤ y < 2^bits, whose fractions the conversion to integers drops."""
    # By way of int16 it takes half the time.
    code = y_NGC.to(torch.int16)
    if bits == 4:
        half = codes.shape[-1]
        upper = code[..., half:]
        # Of an odd number of channels, the middle one has its byte alone.
        code = code[..., :half]
        code[..., : upper.shape[-1]].add_(upper, alpha=16)
    codes.copy_(code)


def _dequantize(q: Quantized, out_ND: Tensor) -> None:
    """Write the tensor of q, by torch, block by block of rows."""
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
    """The codes as numbers, into y."""
    if bits == 8:
        y_NGC.copy_(codes)
        return
    half = codes.shape[-1]
    y_NGC[..., :half] = codes & 15
    y_NGC[..., half:] = (codes >> 4)[..., : y_NGC.shape[-1] - half]


def _grid(low: Tensor, high: Tensor, dtype: torch.dtype, bits: int, given: Bounds | None) -> Bounds:
    """(offset, scale) in their stored dtypes, of groups with these exact ranges in the dtype of the arithmetic."""
    offset = low.to(dtype)
    span = high - low
    if given is not None:
        # A copy: running ranges go on while this is kept.
        offset = given[0].to(low.dtype).to(dtype, copy=True, memory_format=torch.contiguous_format)
        # What is not finite must show under a given range, too: there is no telling it from the codes.
        span = given[1].to(low.dtype) - _widen(offset) + span * 0.0
    scale = span.div_(_levels(bits)).clamp_min_(torch.finfo(span.dtype).smallest_normal)
    # 0 times twice the range: NaN where that is not finite. Half of it is left for code · scale not to overflow.
    poison = scale * (2 * _levels(bits)) * 0.0
    stored = scale if scale.dtype == torch.float64 else _round_up(scale)
    return offset, (stored + poison).to(_scale_dtype(dtype))


def _round_up(scale: Tensor) -> Tensor:
    """Positive finite float32 numbers to those of bfloat16, upwards."""
    # bfloat16 is the upper half of float32: with any bit in the lower half, the upper one is raised. What is not finite
    # may come out as anything: a GPU's NaN, all ones, carries into the sign and is 0.
    return (scale.view(torch.int32) + 0xFFFF).bitwise_and_(~0xFFFF).view(torch.float32)


def _pack(code: Tensor, bits: int) -> Tensor:
    """Codes [N, C] of one group as bytes."""
    if bits == 8:
        return code
    half = -(-code.shape[1] // 2)
    return code[:, :half] | torch.nn.functional.pad(code[:, half:], (0, code.shape[1] % 2)) << 4


def _unpack(packed: Tensor, channels: int, bits: int) -> Tensor:
    """Codes [N, channels] of one group."""
    return packed if bits == 8 else torch.cat((packed & 15, packed >> 4), 1)[:, :channels]


def _levels(bits: int) -> int:
    """L: steps of the grid."""
    return (1 << bits) - 1


def _group_sizes(channels: int, group: int) -> list[int]:
    return [min(group, channels - first) for first in range(0, channels, group)]


def _row_bytes(channels: int, bits: int, group: int) -> int:
    """Bytes of a row's codes: whole bytes for every group."""
    return sum(-(-size * bits // 8) for size in _group_sizes(channels, group))


def _scale_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.bfloat16


def _widen(x: Tensor) -> Tensor:
    """X in the dtype of the arithmetic: float32, or float64 if x has it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """X in the stored tensor's dtype."""
    # float16 ends where activations may come: a step above the largest of a group must not make an infinity.
    return x.clamp(-65504, 65504).to(dtype) if dtype == torch.float16 else x.to(dtype)


def _rows(x: Tensor) -> Tensor:
    """X as a matrix of its last dimension's rows."""
    return x.detach().reshape(x.shape[:-1].numel(), x.shape[-1])


def _block_rows(x: Tensor) -> int:
    """Rows per block of [N, ...], at least 1; one block where there is no CPU cache to keep them in."""
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
    """The bounds as [N, G]."""
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
