"""Codings of spike counts into time steps, and linear layers and neurons that work on spikes.

SpikingBrain (arXiv:2509.05276, section 3.3 and appendix A.8) expands a count s into T spikes with s = Σ_t w_t s_t:

    coding           s_t          w_t                           counts
    binary           {0, 1}       1                             0 to T             s spikes, then none
    ternary          {-1, 0, 1}   1                             −T to T            |s| spikes with the sign of s
    bitwise          {0, 1}       2^(T−1−t)                     0 to 2^T − 1       binary digits, the highest first
    bidirectional    {-1, 0, 1}   2^(T−1−t)                     ± (2^T − 1)        digits of |s|, with the sign of s
    twos_complement  {0, 1}       −2^(T−1), then 2^(T−1−t)      −2^(T−1) to 2^(T−1) − 1

A linear layer is then y = V · W s = V · Σ_t w_t (W s_t) (the report's eq. 23, but with the highest weight first, as in
the released code). W s_t needs only additions. The codings are exact on integers, and nothing here defines a gradient.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Coding = Literal["binary", "ternary", "bitwise", "bidirectional", "twos_complement"]

CODINGS: tuple[Coding, ...] = ("binary", "ternary", "bitwise", "bidirectional", "twos_complement")
_SIGNED_SPIKES = ("ternary", "bidirectional")
_UNARY = ("binary", "ternary")
# Counts are decoded to int32, so digit codings stop at its range. For unary codings a larger count is surely a mistake.
_MOST_STEPS = {"binary": 1 << 16, "ternary": 1 << 16, "bitwise": 31, "bidirectional": 31, "twos_complement": 32}


@dataclass(frozen=True)
class SpikeTrain:
    """Spikes of T steps, packed eight to a byte.

    Attributes:
        packed: uint8 [T, planes, ..., ceil(D / 8)]; channel d is bit d % 8 of byte d // 8. Plane 0 marks spikes.
            Codings with negative spikes have a plane 1, which marks the negative ones.
        coding: the coding of the steps.
        channels: D.
    """

    packed: Tensor
    coding: Coding
    channels: int

    @property
    def steps(self) -> int:
        """Number of steps T."""
        return len(self.packed)

    def spikes(self, step: int) -> Tensor:
        """Return the spikes s_t of one step, int8 [..., D] with values -1, 0 and 1."""
        fired, *negative = (_unpack(plane, self.channels) for plane in self.packed[step])
        return fired * (1 - 2 * negative[0]) if negative else fired


def step_weights(coding: Coding, steps: int) -> tuple[int, ...]:
    """Return the weight w_t of each step.

    Raises:
        ValueError: the coding is unknown, or the number of steps is out of range.
    """
    _check_steps(coding, steps)
    if coding in _UNARY:
        return (1,) * steps
    weights = [1 << (steps - 1 - t) for t in range(steps)]
    return (-weights[0], *weights[1:]) if coding == "twos_complement" else tuple(weights)


def count_range(coding: Coding, steps: int) -> tuple[int, int]:
    """Return the smallest and the largest count that the steps can hold, a `count_range` for `spike`.

    Raises:
        ValueError: the coding is unknown, or the number of steps is out of range.
    """
    _check_steps(coding, steps)
    if coding == "twos_complement":
        return -(1 << (steps - 1)), (1 << (steps - 1)) - 1
    most = steps if coding in _UNARY else (1 << steps) - 1
    return (-most if coding in _SIGNED_SPIKES else 0), most


def encode(counts: Tensor, coding: Coding, steps: int | None = None) -> SpikeTrain:
    """Encode counts as spikes. `decode` is the inverse.

    Args:
        counts: [..., D], integers.
        coding: see the module docstring.
        steps: T; None takes the fewest that hold all counts, at least 1 (2 for twos_complement). A unary coding takes
            as many steps as the largest magnitude. A plane of a step is D / 8 bytes per token.

    Raises:
        ValueError: counts are not integers, a count is outside the coding's range, or steps are out of range.
    """
    if counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool or counts.dim() == 0:
        raise ValueError(f"encode: counts must be integers [..., D], not {counts.dtype} {tuple(counts.shape)}")
    wide = counts.long()
    steps = _fewest_steps(wide, coding) if steps is None else steps
    _check_counts(wide, coding, steps)
    magnitude = wide if coding == "twos_complement" else wide.abs()
    negative = _pack(wide < 0) if coding in _SIGNED_SPIKES else None
    packed = []
    for t in range(steps):
        # The sign digit of two's complement needs no special case, because >> preserves the sign.
        fired = _pack(magnitude > t if coding in _UNARY else (magnitude >> (steps - 1 - t)) & 1 == 1)
        packed.append(torch.stack([fired] if negative is None else [fired, negative & fired]))
    return SpikeTrain(torch.stack(packed), coding, counts.shape[-1])


def decode(train: SpikeTrain) -> Tensor:
    """Return the counts Σ_t w_t s_t, int32 [..., D]."""
    total = torch.zeros_like(train.spikes(0), dtype=torch.int32)
    for t, weight in enumerate(step_weights(train.coding, train.steps)):
        total += train.spikes(t).int() * weight
    return total


def spiking_linear(train: SpikeTrain, weight_OD: Tensor, thresholds: Tensor | None = None) -> Tensor:
    """Compute V · Σ_t w_t (W s_t): a linear layer on spikes, with one product per step. V is 1 without thresholds.

    The result equals V · W s up to rounding. It is bitwise equal if the dtype holds the sums exactly, for example in
    float64 with weights of bfloat16 or of a few bits.

    Args:
        train: spikes of [..., D].
        weight_OD: [O, D], floating; the arithmetic is in its dtype.
        thresholds: V from `spike_counts`, [..., 1] or []. Multiply a V per channel into W's columns instead.

    Returns:
        [..., O] in weight_OD's dtype.

    Raises:
        ValueError: the weight's or the thresholds' shape does not fit.
    """
    if weight_OD.dim() != 2 or weight_OD.shape[1] != train.channels:
        raise ValueError(f"spiking_linear: weight {tuple(weight_OD.shape)} must be [O, {train.channels}]")
    total = torch.zeros((), dtype=weight_OD.dtype, device=weight_OD.device)
    for t, weight in enumerate(step_weights(train.coding, train.steps)):
        total = total + weight * F.linear(train.spikes(t).to(weight_OD.dtype), weight_OD)
    return _scaled("spiking_linear", total, thresholds)


def event_linear(counts: Tensor, weight_DO: Tensor, thresholds: Tensor | None = None) -> Tensor:
    """Compute V · W s, reading only the weights of active channels. V is 1 without thresholds.

    For each token it sums the rows of W^T whose count is not 0. A dense product reads each weight from memory once for
    all tokens, this one once per token. On a CPU it is faster for few tokens, as in generation, or if nearly all
    channels are silent (measured by `spiketrain bench spiking`; figures in docs/benchmarks.md).

    Args:
        counts: [..., D], integers.
        weight_DO: [D, O], the transpose of a linear layer's weight, contiguous: a channel's weights are one row.
        thresholds: as in `spiking_linear`.

    Returns:
        [..., O] in weight_DO's dtype.

    Raises:
        ValueError: the weight's or the thresholds' shape does not fit.
    """
    if weight_DO.dim() != 2 or weight_DO.shape[0] != counts.shape[-1]:
        raise ValueError(f"event_linear: weight {tuple(weight_DO.shape)} must be [{counts.shape[-1]}, O]")
    rows = counts.reshape(-1, counts.shape[-1])
    token, channel = rows.nonzero(as_tuple=True)
    # Each token is a bag. It begins where the active channels of the previous tokens end.
    begins = torch.searchsorted(token, torch.arange(len(rows), device=rows.device))
    sizes = rows[token, channel].to(weight_DO.dtype)
    y = F.embedding_bag(channel, weight_DO, begins, mode="sum", per_sample_weights=sizes)
    return _scaled("event_linear", y.view(*counts.shape[:-1], -1), thresholds)


def integrate_and_fire(
    drives: Tensor, threshold: Tensor, *, initial: float = 0.5, signed: bool = True, steps: int | None = None
) -> tuple[Tensor, Tensor]:
    """Simulate neurons without leak: v += drive; if v >= V the neuron spikes and v −= V (soft reset).

    If `signed`, v < 0 fires a negative spike, and v += V. The final membrane is then in [0, V), and the sum of the
    spikes is floor(Σ drive / V + initial). With initial 0.5 that is the count of `spike`, except that halves round up
    here and to even there; with 0 it is the floor of the report's neuron. Unsigned, this holds for drives >= 0.

    Args:
        drives: [T, ..., D], floating and finite; later steps have no drive.
        threshold: V > 0, broadcasts against [..., D].
        initial: the initial membrane in units of V.
        signed: whether neurons fire negative spikes.
        steps: steps to simulate; None continues until no neuron fires, up to T plus the largest count.

    Returns:
        The spikes, int8 [steps, ..., D], and the final membrane, float64 [..., D]. The simulation runs in float64.

    Raises:
        ValueError: drives or threshold are not finite, or a threshold is not positive.
    """
    threshold = threshold.double()
    if not bool(drives.isfinite().all()) or not bool(((threshold > 0) & threshold.isfinite()).all()):
        raise ValueError("integrate_and_fire: drives must be finite, and thresholds positive and finite")
    membrane = (initial * threshold).expand(drives.shape[1:]).clone()
    spikes: list[Tensor] = []
    while steps is None or len(spikes) < steps:
        if len(spikes) < len(drives):
            membrane += drives[len(spikes)]
        fired = (membrane >= threshold).to(torch.int8)
        if signed:
            fired -= (membrane < 0).to(torch.int8)
        if steps is None and len(spikes) >= len(drives) and not bool(fired.any()):
            break
        membrane -= fired * threshold
        spikes.append(fired)
    return torch.stack(spikes) if spikes else drives.new_zeros(drives.shape, dtype=torch.int8), membrane


def _scaled(op: str, y: Tensor, thresholds: Tensor | None) -> Tensor:
    if thresholds is None:
        return y
    if thresholds.dim() and thresholds.shape[-1] != 1:
        shape = tuple(thresholds.shape)
        raise ValueError(
            f"{op}: thresholds {shape} must be [] or [..., 1]; multiply thresholds of channels into the weight"
        )
    return y * thresholds.to(y.dtype)


def _fewest_steps(counts: Tensor, coding: Coding) -> int:
    """Return the fewest steps whose range holds all counts. If none do, the following check raises."""
    least, most = (int(bound) for bound in torch.aminmax(counts)) if counts.numel() else (0, 0)
    if coding in _SIGNED_SPIKES:
        most = max(most, -least)
    needed = max(1, most if coding in _UNARY else most.bit_length())
    if coding == "twos_complement":
        # One digit for the sign. A negative n needs the digits of ~n = −n − 1.
        needed = 1 + max(needed, (~least).bit_length() if least < 0 else 0)
    return min(needed, _MOST_STEPS.get(coding, needed))


def _check_steps(coding: Coding, steps: int) -> None:
    if coding not in CODINGS:
        raise ValueError(f"a coding must be one of {', '.join(CODINGS)}, not {coding!r}")
    if not 1 <= steps <= _MOST_STEPS[coding]:
        raise ValueError(f"{coding}: steps are {steps}: they must be from 1 to {_MOST_STEPS[coding]}")


def _check_counts(counts: Tensor, coding: Coding, steps: int) -> None:
    low, high = count_range(coding, steps)
    wrong = (counts < low) | (counts > high)
    if not bool(wrong.any()):
        return
    place = int(wrong.flatten().nonzero()[0])
    plural = "step" if steps == 1 else "steps"
    raise ValueError(
        f"encode: a count of {counts.flatten()[place].item()} at place {place} of {counts.numel()} is outside "
        f"{low} to {high}, the range of {coding} in {steps} {plural}"
    )


def _bits(device: torch.device) -> Tensor:
    """Return the bit positions of a byte, 0 to 7."""
    return torch.arange(8, dtype=torch.uint8, device=device)


def _pack(bits: Tensor) -> Tensor:
    """Pack booleans [..., D] to uint8 [..., ceil(D / 8)]."""
    bytes_of_8 = F.pad(bits.to(torch.uint8), (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (bytes_of_8 << _bits(bits.device)).sum(-1, dtype=torch.uint8)


def _unpack(packed: Tensor, channels: int) -> Tensor:
    """The inverse of `_pack`, as int8."""
    bits = (packed[..., None] >> _bits(packed.device)) & 1
    return bits.flatten(-2)[..., :channels].to(torch.int8)
