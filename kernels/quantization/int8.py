"""Symmetric int8: whole numbers times a scale, one for each group of consecutive numbers of the last dimension.

    scale = clamp(max|x| / 127, least, 1e4)      code = clamp(round(x / scale), -128, 127)      x̂ = code · scale

SpikingBrain's W8A-spike models (arXiv 2509.05276, section 3.3) have keys and values of a head and groups of 128 weights
of one output in it. Their published code clamps keys' and values' codes and not those of weights, of which about 1 % do
not fit int8. Scales are float32; round has no gradient, and x gets that of x̂, straight through.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kernels.autograd import once_differentiable

# The limits of the scales of keys and values in the published code (W8ASpike).
LEAST_SCALE, LARGEST_SCALE = 1e-5, 1e4


def encode_int8(x: Tensor, least: float = LEAST_SCALE) -> tuple[Tensor, Tensor]:
    """Codes, int8 [..., D], and scales, float32 [..., 1], of x [..., D]; without a gradient."""
    wide = x.detach().float()
    scale = _scales(wide.abs().amax(-1, keepdim=True), least)
    return _codes(wide, scale).to(torch.int8), scale


def decode_int8(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """X̂ of codes and scales that broadcast against them, in a floating dtype."""
    return (codes.float() * scale).to(dtype)


def fake_int8(x: Tensor) -> Tensor:
    """X̂ of x [..., D] with one scale for each row: what `decode_int8` gives of its codes."""
    return _StraightThrough.apply(x, decode_int8(*encode_int8(x), x.dtype))


def fake_int8_weight(
    weight: Tensor, size: int, *, group: dist.ProcessGroup | None = None, least: float = 1e-12
) -> Tensor:
    """Ŵ of a weight [..., O, D] in groups of `size` inputs, the last of which may be smaller.

    Args:
        weight: With `group`, this rank's inputs.
        size: Inputs of a group.
        group: Ranks that hold equally many consecutive inputs each. Where groups lie on several of them, one number a
            group and output is all-reduced.
        least: The least scale, for groups of zeros.
    """
    wide = weight.detach().float()
    scale = _scales(group_maxima(wide, size, group), least)
    quantized = _codes(wide, scale).mul_(scale).to(weight.dtype)
    return _StraightThrough.apply(weight, quantized)


def clip_int8_weight(weight: Tensor, moments: Tensor, ratios: Sequence[float], size: int) -> tuple[Tensor, Tensor]:
    """Ŵ of a weight, of whose groups each clips where the squared error of the product is least.

    For inputs x that are uncorrelated it is Σ_d E[x_d²] (w_d − ŵ_d)², with scale = ratio · max|w| / 127. Codes are
    clamped to ±127, so that a group's largest magnitude gives its scale again: `fake_int8_weight` of Ŵ is Ŵ.

    Args:
        weight: [..., O, D]; whole.
        moments: E[x_d²], [D], or [..., 1, D] for several weights.
        ratios: Of clipping, from which the best is chosen; the earliest among equals.
        size: Inputs of a group.

    Returns:
        Ŵ in weight's dtype, and the error with the chosen ratios, and with the first one, float64 [2].
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
    """For each number of a weight [..., D] the largest magnitude of its group, in its shape; see `fake_int8_weight`."""
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
    """What x was rounded to, with x's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
