"""Symmetric int8 quantization with one scale per group of consecutive elements of the last dimension.

    scale = clamp(max|x| / 127, least, 1e4)      code = clamp(round(x / scale), -128, 127)      x̂ = code · scale

SpikingBrain's W8A-spike models (arXiv 2509.05276, section 3.3) use it for keys and values, with one scale per token and
head, and for weights, with one scale per 128 inputs of an output. Their published code clamps the codes of keys and
values, but not those of weights, about 1 % of which do not fit int8. Here all codes are clamped. Scales are float32.
The gradient is a straight-through estimator: x receives the gradient of x̂.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kernels.autograd import once_differentiable

# The limits of the scales of keys and values in SpikingBrain's published code (W8ASpike).
LEAST_SCALE, LARGEST_SCALE = 1e-5, 1e4


def encode_int8(x: Tensor, least: float = LEAST_SCALE) -> tuple[Tensor, Tensor]:
    """Encode x [..., D] as codes, int8 [..., D], and scales, float32 [..., 1], each at least `least`. No gradient."""
    wide = x.detach().float()
    scale = _scales(wide.abs().amax(-1, keepdim=True), least)
    return _codes(wide, scale).to(torch.int8), scale


def decode_int8(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute x̂ = codes · scale in the floating `dtype`. The scales must broadcast against the codes."""
    return (codes.float() * scale).to(dtype)


def fake_int8(x: Tensor) -> Tensor:
    """Quantize and dequantize x [..., D], with one scale per row and a straight-through gradient."""
    return _StraightThrough.apply(x, decode_int8(*encode_int8(x), x.dtype))


def fake_int8_weight(
    weight: Tensor, size: int, *, group: dist.ProcessGroup | None = None, least: float = 1e-12
) -> Tensor:
    """Quantize and dequantize a weight [..., O, D] in groups of `size` inputs, with a straight-through gradient.

    Args:
        weight: [..., O, D]. With `group`, D are this rank's inputs.
        size: Inputs per group; the last group may be smaller.
        group: Ranks that each hold the same number of consecutive inputs. If groups span several ranks, one number per
            group and output is all-reduced.
        least: The smallest scale, which groups of zeros get.
    """
    wide = weight.detach().float()
    scale = _scales(group_maxima(wide, size, group), least)
    quantized = _codes(wide, scale).mul_(scale).to(weight.dtype)
    return _StraightThrough.apply(weight, quantized)


def clip_int8_weight(weight: Tensor, moments: Tensor, ratios: Sequence[float], size: int) -> tuple[Tensor, Tensor]:
    """Quantize and dequantize a weight, clipping each group at the ratio with the least squared error of the product.

    The scale of a group is ratio · max|w| / 127. For uncorrelated inputs x, the group's error is
    Σ_d E[x_d²] (w_d − ŵ_d)². Codes are clamped to ±127, so the largest magnitude in Ŵ reproduces the group's scale, and
    `fake_int8_weight` leaves Ŵ unchanged.

    Args:
        weight: [..., O, D], not sharded.
        moments: E[x_d²], [D], or [..., 1, D] for several weights.
        ratios: Clipping ratios to choose from. Of equal errors, the first ratio wins.
        size: Inputs per group.

    Returns:
        Ŵ in weight's dtype, and float64 [2]: the total error with the chosen ratios, and with the first ratio alone.
    """
    wide, maxima = weight.detach().float(), group_maxima(weight.detach().float(), size)
    best = least_error = first_error = None
    for ratio in ratios:
        scale = _scales(ratio * maxima, 1e-12)
        rounded = _codes(wide, scale).clamp_(min=-127).mul_(scale)
        error = _group_sums((wide - rounded).square_().mul_(moments), size)
        if best is None or least_error is None:
            best, least_error, first_error = rounded, error, error
            continue
        better = error < least_error
        spread = better.repeat_interleave(size, -1)[..., : wide.shape[-1]]
        best, least_error = torch.where(spread, rounded, best), torch.where(better, error, least_error)
    assert best is not None and least_error is not None and first_error is not None, "there are ratios"
    errors = torch.stack([least_error.sum(dtype=torch.float64), first_error.sum(dtype=torch.float64)])
    return best.to(weight.dtype), errors


def _group_sums(x: Tensor, size: int) -> Tensor:
    return F.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size)).sum(-1)


def group_maxima(weight: Tensor, size: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the largest magnitude in each element's group, in the weight's shape [..., D]; see `fake_int8_weight`."""
    own = weight.shape[-1]
    if group is None or own % size == 0:
        padded = F.pad(weight.abs(), (0, -own % size)).unflatten(-1, (-1, size))
        return padded.amax(-1).repeat_interleave(size, -1, output_size=padded.shape[-2] * size)[..., :own]
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    places = torch.arange(rank * own, (rank + 1) * own, device=weight.device) // size
    maxima = weight.new_zeros(*weight.shape[:-1], -(-ranks * own // size))
    maxima.index_reduce_(-1, places, weight.abs(), "amax")
    dist.all_reduce(maxima, dist.ReduceOp.MAX, group=group)
    return maxima.index_select(-1, places)


def _scales(largest: Tensor, least: float) -> Tensor:
    return (largest / 127).clamp_(least, LARGEST_SCALE)


def _codes(wide: Tensor, scale: Tensor) -> Tensor:
    return (wide / scale).round_().clamp_(-128, 127)


class _StraightThrough(torch.autograd.Function):
    """Return `rounded` in forward, and pass its gradient to x in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
