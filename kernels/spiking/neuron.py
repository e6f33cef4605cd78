"""The adaptive-threshold spike of SpikingBrain (arXiv:2509.05276, section 3.3): activations as integer spike counts.

    V = clamp(mean|x| / k, 1e-5, 1e4)        one threshold per token, the mean over its channels; or a given V
    s = round(x / V)                         the spike count, half to even; optionally clipped to a range
    x̂ = s · V

Gradient of x. round has none, so a straight-through estimator is used, with V taken as a constant (the report's rule):

    plain        dx̂/dx = 1
    clipped      dx̂/dx = 1, and 0 where the count was clipped (Bengio et al. 2013, arXiv:1308.3432, for a hard limit)
    surrogate    dx̂/dx = 4 |x/V − s|, and 0 where the count was clipped. This is the triangular pseudo-derivative of
                 Bellec et al. 2018 (arXiv:1803.09574) around each half-integer at which the count changes. Each
                 triangle extends V/2 to either side and has area V: 0 in the middle of a step, 2 at its edge, 1 on
                 average.

Gradients of V and k. s is constant almost everywhere, so they are exact: dx̂/dV = s and dV/dk = −mean|x| / k² = −V / k,
with 0 where V was clamped.

Arithmetic is float32, or float64 for float64 inputs. Only the mean is summed in higher precision: groups of 64 channels
in float32, and the groups' sums in float64 (all channels in float64 if their number is no multiple of 64).
Tensor-parallel ranks that hold multiples of 64 channels therefore get the V of a single process, and the same counts.

Non-finite values propagate. A NaN, an infinity, or numbers above 1e33 (whose float32 sum may be infinite) make the
whole token NaN. Under a given V, which does not depend on other channels, only that channel becomes NaN.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.autograd import compresses, derive, once_differentiable, save
from kernels.backend import resolve
from kernels.shapes import block_limit
from kernels.triton import LARGEST_ROW, implementations

Gradient = Literal["plain", "clipped", "surrogate"]

# The limits of V in the published code (W8ASpike/quant_linear.py).
LEAST_THRESHOLD, LARGEST_THRESHOLD = 1e-5, 1e4
# V has a gradient inside these bounds. They include the limits, with a margin for rounding, so that a learned V can
# move away from a limit.
_FREE = (LEAST_THRESHOLD * (1 - 1e-6), LARGEST_THRESHOLD * (1 + 1e-6))
# Beyond 2^24 float32 skips integers, so a count might be clipped to another number than the requested one.
_LARGEST_COUNT = 1 << 24

# Elements per block of rows on the CPU: the block and its temporaries stay in a core's L2 cache.
_BLOCK_ELEMENTS = 1 << 17
# Channels that are summed in float32 first, because summing all of them in float64 costs five times as much.
_NARROW_SUM = 64

_LARGEST_INT8, _LARGEST_INT4 = 127, 7

_BACKENDS = ("torch", "reference")


@dataclass(frozen=True)
class _Neuron:
    """Settings of a spike: whether its parameter is k (adaptive) or V, the range of counts, and x's gradient."""

    adaptive: bool
    low: float
    high: float
    gradient: Gradient

    @property
    def clips(self) -> bool:
        return self.low > -math.inf or self.high < math.inf


def spike_reference(
    x: Tensor,
    *,
    k: float | Tensor | None = None,
    threshold: float | Tensor | None = None,
    count_range: tuple[int, int] | None = None,
    gradient: Gradient = "plain",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """`spike` in plain operations, any floating dtype. Gradients are autograd's, with the module's rule for x."""
    neuron, parameter = _checked("spike", x, k, threshold, count_range, gradient)
    wide = _widen(x)
    mean = mean_abs(wide.detach(), group) if neuron.adaptive else None
    threshold = _thresholds(mean, _widen(parameter))
    ratio = (wide / threshold).detach()
    rounded = ratio.round()
    counts = rounded.clamp(neuron.low, neuron.high)
    factor = torch.ones_like(ratio)
    if gradient == "surrogate":
        factor = 4 * (ratio - counts).abs()
    if gradient != "plain":
        factor = torch.where(rounded == counts, factor, 0.0)
    return (counts * threshold + (wide - wide.detach()) * factor).to(x.dtype)


def spike(
    x: Tensor,
    *,
    k: float | Tensor | None = None,
    threshold: float | Tensor | None = None,
    count_range: tuple[int, int] | None = None,
    gradient: Gradient = "plain",
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute x̂ = round(x / V) · V, with V = mean|x| / k of each token or a given V.

    Args:
        x: [..., D], floating; with `group`, this rank's channels.
        k: the count of a channel of mean magnitude: a number (3 in the report), or a tensor [] or [D], which may be
            learned. A tensor's values must be positive; they are not checked.
        threshold: V, in place of k: a number, or a tensor [] or [D] (running or learned). Clamped to the same limits.
        count_range: (low, high) to clip counts to; None does not clip.
        gradient: the rule for x's gradient, "plain", "clipped" or "surrogate"; see the module docstring.
        group: ranks that each hold the same number of a token's channels. The mean is over all ranks: forward
            all-reduces one number per token, backward communicates nothing. A k [] shared by the ranks gets a partial
            gradient on each.
        backend: auto, reference, torch or triton. Without a group, triton sums the mean in float32, so a count whose
            x / V is within rounding of a half may differ by one.

    Returns:
        [..., D] in x's dtype. Saves nothing for "plain" with a fixed k or V, else x and one number per token.

    Raises:
        ValueError: not exactly one of k and threshold is given, a number or shape does not fit, the gradient is
            unknown, count_range is empty, or the backend cannot serve these inputs.
    """
    neuron, parameter = _checked("spike", x, k, threshold, count_range, gradient)
    choice = resolve("spike", backend, _implementations(x, k, threshold))
    if choice == "reference":
        return spike_reference(x, k=k, threshold=threshold, count_range=count_range, gradient=gradient, group=group)
    mean_N1 = mean_abs(_rows(x).detach(), group) if neuron.adaptive and group is not None else None
    if choice == "triton":
        from kernels.triton import spiking  # lazily: not every machine has Triton

        limits = neuron.low, neuron.high, LEAST_THRESHOLD, LARGEST_THRESHOLD
        return spiking.spike(x, parameter, mean_N1, neuron.adaptive, limits, gradient)
    return _Spike.apply(x, parameter, mean_N1, neuron)


def spike_counts(
    x: Tensor,
    *,
    k: float | Tensor | None = None,
    threshold: float | Tensor | None = None,
    count_range: tuple[int, int] | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the counts s and thresholds V of `spike`, with x̂ = s · V. No gradients; plain operations.

    Args:
        x, k, threshold, count_range, group: as in `spike`.

    Returns:
        s [..., D] in the smallest of int8, int16 and int32 that holds `count_range`, or if that is None, the counts
        (finding their maximum synchronises with a GPU); and V, broadcastable to s, in the dtype of the arithmetic.

    Raises:
        ValueError: as in `spike`; x is not finite, which no integer represents; or a count exceeds int32.
    """
    counts, thresholds = float_counts(x, k=k, threshold=threshold, count_range=count_range, group=group)
    # Adding 0 * x exposes NaN and infinities that clipping has hidden.
    if not bool((counts + 0 * x.detach()).isfinite().all()):
        raise ValueError("spike_counts: x has numbers that are not finite; spike() passes them on as NaN")
    if count_range is not None:
        largest = float(max(-count_range[0], count_range[1]))
    else:
        largest = float(counts.abs().amax()) if counts.numel() else 0.0
    return counts.to(_integer(largest)), thresholds


@torch.no_grad()
def float_counts(
    x: Tensor,
    *,
    k: float | Tensor | None = None,
    threshold: float | Tensor | None = None,
    count_range: tuple[int, int] | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the counts and thresholds of `spike_counts` in the dtype of the arithmetic, without synchronising a GPU.

    The arguments are those of `spike`. Where x is not finite, counts are NaN or clipped.
    """
    neuron, parameter = _checked("spike_counts", x, k, threshold, count_range, "plain")
    wide = _widen(x)
    thresholds = _thresholds(mean_abs(wide, group) if neuron.adaptive else None, _widen(parameter))
    return torch.div(wide, thresholds).round_().clamp_(neuron.low, neuron.high), thresholds


def mean_abs(x: Tensor, group: dist.ProcessGroup | None = None, *, scratch: Tensor | None = None) -> Tensor:
    """Compute mean|x| over the last dimension, [..., 1] in the dtype of the arithmetic; NaN where it is not finite.

    With `group`, the mean is over the channels of all ranks, by an all-reduce of one float64 per token. If `scratch` is
    given, |x| is written to it; it has x's shape and the dtype of the arithmetic.
    """
    total, channels = _sum_abs(torch.abs(_widen(x), out=scratch)), x.shape[-1]
    if group is not None:
        dist.all_reduce(total, group=group)
        channels *= dist.get_world_size(group)
    mean = total.div_(channels).to(torch.promote_types(x.dtype, torch.float32))
    # inf + 0 · inf is NaN. Clamping would turn an infinite V into a finite one.
    return mean.add_(mean, alpha=0)


def _sum_abs(magnitude: Tensor) -> Tensor:
    """Sum |x| over the last dimension, [..., 1] in float64. See the module docstring for the order."""
    if magnitude.dtype == torch.float32 and magnitude.shape[-1] % _NARROW_SUM == 0:
        magnitude = magnitude.unflatten(-1, (-1, _NARROW_SUM)).sum(-1)
    return magnitude.sum(-1, keepdim=True, dtype=torch.float64)


def _checked(
    op: str,
    x: Tensor,
    k: float | Tensor | None,
    threshold: float | Tensor | None,
    count_range: tuple[int, int] | None,
    gradient: str,
) -> tuple[_Neuron, Tensor]:
    """Return the neuron and its parameter (k or V) as a tensor [] or [D]. Raise ValueError for unfit arguments."""
    if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x must be floating [..., D] with D > 0, not {x.dtype} {tuple(x.shape)}")
    if (k is None) == (threshold is None):
        raise ValueError(f"{op}: give either k (V = mean|x| / k) or threshold (V)")
    name, given = ("k", k) if k is not None else ("threshold", threshold)
    if isinstance(given, Tensor):
        if not given.is_floating_point() or given.shape not in ((), x.shape[-1:]):
            shape = f"{given.dtype} {tuple(given.shape)}"
            raise ValueError(f"{op}: {name} must be a number or a floating tensor [] or [{x.shape[-1]}], not {shape}")
    elif given is None or not 0 < given < math.inf:
        raise ValueError(f"{op}: {name} is {given}: it must be positive and finite")
    if gradient not in ("plain", "clipped", "surrogate"):
        raise ValueError(f"{op}: gradient must be plain, clipped or surrogate, not {gradient!r}")
    low, high = (-math.inf, math.inf) if count_range is None else count_range
    if count_range is not None and not -_LARGEST_COUNT <= low <= high <= _LARGEST_COUNT:
        raise ValueError(f"{op}: count_range {count_range} must be (low, high), low <= high, both within 2^24 of 0")
    # A number stays on the CPU: operations on every device accept a CPU scalar.
    wide = torch.promote_types(x.dtype, torch.float32)
    parameter = given if isinstance(given, Tensor) else torch.tensor(given, dtype=wide, device="cpu")
    return _Neuron(k is not None, low, high, gradient), parameter  # type: ignore[arg-type]


def _implementations(x: Tensor, *parameters: float | Tensor | None) -> tuple[str, ...]:
    tensors = [parameter for parameter in parameters if isinstance(parameter, Tensor)]
    return implementations(_BACKENDS, x, *tensors, fits=x.shape[-1] <= LARGEST_ROW)


def _integer(largest: float) -> torch.dtype:
    """Return the smallest integer dtype that holds ± `largest`."""
    for dtype in (torch.int8, torch.int16, torch.int32):
        if largest <= torch.iinfo(dtype).max:
            return dtype
    raise ValueError(f"spike_counts: a count of {largest:.4g} is above int32's range; give a count_range, or larger V")


def _widen(x: Tensor) -> Tensor:
    """Convert x to the dtype of the arithmetic: float64 for float64, float32 for all others."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rows(x: Tensor) -> Tensor:
    """Reshape x [..., D] to [N, D]."""
    return x.reshape(-1, x.shape[-1])


def _thresholds(mean: Tensor | None, parameter: Tensor) -> Tensor:
    """Compute V from mean [..., 1] and k, or from a given V, with the shape that they broadcast to."""
    raw = parameter if mean is None else mean / parameter
    return raw.clamp(LEAST_THRESHOLD, LARGEST_THRESHOLD)


def _pass(grad: Tensor, x: Tensor, low: float, high: float, out: Tensor | None = None) -> Tensor:
    """Return grad where low < x < high, else 0, in one pass. Boolean masks would take two more, slower passes."""
    if out is None:
        return torch.ops.aten.hardtanh_backward(grad, x, low, high)
    return torch.ops.aten.hardtanh_backward.grad_input(grad, x, low, high, grad_input=out)


def _blocks(x_ND: Tensor, *others_ND: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield blocks of rows: as many rows as fit a CPU's cache; all on a GPU."""
    rows = _block_rows(x_ND)
    yield from zip(*(tensor.split(rows) for tensor in (x_ND, *others_ND)))


def _block_rows(x_ND: Tensor) -> int:
    rows = len(x_ND)
    return max(1, min(rows, block_limit(_BLOCK_ELEMENTS) // x_ND.shape[1]) if x_ND.is_cpu else rows)


class _Spike(torch.autograd.Function):
    """The torch backend of `spike`. The mean [N, 1] is given if the channels are sharded over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: Tensor, mean_N1: Tensor | None, neuron: _Neuron) -> Tensor:
        x_ND, wide_parameter = _rows(x), _widen(parameter)
        wide = torch.promote_types(x.dtype, torch.float32)
        out_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
        means_N1 = mean_N1
        if means_N1 is None and neuron.adaptive:
            means_N1 = torch.empty((len(x_ND), 1), dtype=wide, device=x.device)
        means = (out_ND,) if means_N1 is None else (out_ND, means_N1)
        scratch = torch.empty((_block_rows(x_ND), x_ND.shape[1]), dtype=wide, device=x.device)
        for block, out, *mean_of_block in _blocks(x_ND, *means):
            values = block.to(wide)
            mean = mean_of_block[0] if mean_of_block else None
            if mean is not None and mean_N1 is None:
                mean.copy_(mean_abs(values, scratch=scratch[: len(out)] if out.dtype != wide else out))
            thresholds = _thresholds(mean, wide_parameter)
            spikes = torch.div(values, thresholds, out=out if out.dtype == wide else values).round_()
            if neuron.clips:
                spikes.clamp_(neuron.low, neuron.high)
            spikes.mul_(thresholds)
            if not neuron.adaptive:
                spikes.add_(block, alpha=0)  # NaN where x is not finite; a given V does not propagate it
            if spikes is not out:
                out.copy_(spikes)
        ctx.neuron = neuron
        if neuron.gradient != "plain" or ctx.needs_input_grad[1]:
            # Backward recomputes the counts. A compressed x could give other counts, so x is saved as a statistic.
            save(ctx, weights=(parameter,), statistics=(x, means_N1))
        out = out_ND.view(x.shape)
        if compresses() and neuron.clips:
            _derive_from_counts(out, _thresholds(means_N1, wide_parameter), max(-neuron.low, neuron.high))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        kept = ctx.saved_tensors
        if not kept:
            return grad, None, None, None
        parameter, x, means_N1 = kept
        neuron, learned = ctx.neuron, ctx.needs_input_grad[1]
        grad_x = grad
        if neuron.gradient != "plain":
            grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        total = torch.zeros_like(_widen(parameter)) if learned else None
        tensors = [_rows(x), _rows(grad), _rows(grad_x), *([] if means_N1 is None else [means_N1])]
        for block, grad_block, out, *mean in _blocks(*tensors):
            _backward_block(neuron, block, grad_block, out, mean[0] if mean else None, _widen(parameter), total)
        if total is not None:
            wide = _widen(parameter)
            # The sum is over dy · s for a given V, and over dy · s · V for k. Apply the remaining factor of the module
            # docstring's formulas.
            total = total.neg_().div_(wide) if neuron.adaptive else _pass(total, wide, *_FREE)
            total = total.to(parameter.dtype)
        return grad_x, total, None, None


def _derive_from_counts(out: Tensor, thresholds: Tensor, largest: float) -> None:
    """Declare that x̂ = s · V can be recomputed exactly from counts in 4 or 8 bits and thresholds (`derive`).

    The counts are recovered as round(x̂ / V). This is exact for counts up to 127, even if x̂ is rounded to bfloat16.
    Larger ranges of counts are not compressed this way.
    """
    if largest > _LARGEST_INT8:
        return
    counts = torch.empty(_rows(out).shape, dtype=torch.int8, device=out.device)
    spread = thresholds.expand(len(counts), -1) if thresholds.dim() == 2 else thresholds
    for block, out_block, *threshold in _blocks(counts, _rows(out), *([spread] if spread.dim() == 2 else [])):
        block.copy_(torch.div(_widen(out_block), threshold[0] if threshold else spread).round_())
    pair = largest <= _LARGEST_INT4 and out.shape[-1] % 2 == 0
    kept = _packed(counts) if pair else counts
    derive(out, partial(_times_thresholds, shape=out.shape, dtype=out.dtype), (), kept, thresholds)


def _packed(counts_ND: Tensor) -> Tensor:
    """Pack counts [N, D] from -7 to 7 as uint8 [N, D/2], the first half of each row in the low four bits."""
    low, high = (counts_ND + 8).view(torch.uint8).chunk(2, dim=1)
    return low | high << 4


def _times_thresholds(kept: Tensor, thresholds: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Compute s · V from the packed counts and the thresholds that `_derive_from_counts` keeps."""
    counts = kept if kept.dtype == torch.int8 else torch.cat((kept & 15, kept >> 4), 1).to(torch.int8) - 8
    return (counts * thresholds).to(dtype).view(shape)


def _backward_block(
    neuron: _Neuron,
    x_ND: Tensor,
    grad_ND: Tensor,
    grad_x_ND: Tensor,
    mean_N1: Tensor | None,
    parameter: Tensor,
    total: Tensor | None,
) -> None:
    """Write x's gradient, unless it is grad itself, and add the parameter's to `total`, [] or [D], if not None."""
    wide_grad = _widen(grad_ND)
    raw = parameter if mean_N1 is None else mean_N1 / parameter
    ratio = _widen(x_ND) / raw.clamp(LEAST_THRESHOLD, LARGEST_THRESHOLD)
    counts = ratio.round() if neuron.gradient == "surrogate" else ratio.round_()
    if neuron.gradient != "plain":
        grad_in = wide_grad
        if neuron.gradient == "surrogate":
            grad_in = ratio.sub_(counts).abs_().mul_(wide_grad).mul_(4)
        if neuron.clips:
            out = grad_x_ND if grad_x_ND.dtype == counts.dtype else None
            grad_in = _pass(grad_in, counts, neuron.low - 0.5, neuron.high + 0.5, out)
        if grad_in is not grad_x_ND:
            grad_x_ND.copy_(grad_in)
    if total is None:
        return
    if neuron.clips:
        counts.clamp_(neuron.low, neuron.high)
    products = counts.mul_(wide_grad)
    if mean_N1 is None or total.dim():
        if mean_N1 is not None:
            products.mul_(_pass(raw, raw, *_FREE))
        total.add_(products.sum(0) if total.dim() else products.sum())
    else:  # one threshold per token
        total.add_(torch.dot(products.sum(-1), _pass(raw, raw, *_FREE)[:, 0]))
