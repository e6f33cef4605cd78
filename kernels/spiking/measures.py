"""Measures of spikes: tallies of spike counts, and sparsity, firing rate and energy computed from them.

Tallies are sums, so those of several tensors, micro-batches and ranks can be added.

A channel sends its count s for a token in the bidirectional bitwise code (kernels.spiking.coding): each non-zero binary
digit of |s| is one spike with the sign of s. Sparsity is 1 − spikes / (steps · counts), under one of two rules:

    window    Three steps, as in SpikingBrain's report (arXiv:2509.05276, section 3.3). Only the digits with weights 1,
              2 and 4 are counted. Higher digits are ignored; few counts exceed 7.
    all       T steps, where T is the number of digits of the largest count. This code is lossless.

The report states a sparsity of 69.15 % in the window for k = 3, and does not say how it treats higher digits. Its
figure of 1.13 spikes per channel counts all steps.

Energy is idealised, as in the report's appendix: it includes arithmetic at 45 nm alone. Memory and control are left
out, although they cost more than the arithmetic in practice.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# The report's energies in pJ at 45 nm (after Horowitz 2014): adding a weight for a spike, and one multiply-add.
PICOJOULES_SPIKE, PICOJOULES_FP16, PICOJOULES_INT8 = 0.03, 1.5, 0.23
WINDOW_STEPS = 3
_LARGEST_IN_WINDOW = (1 << WINDOW_STEPS) - 1
# Float32 represents all integers of up to 24 digits. Larger counts are tallied as 2^24 − 1.
_DIGITS = 24
# One bin for each |s| from 0 to 7, then one for each number of digits: 8 to 15, 16 to 31, …
_BINS = _LARGEST_IN_WINDOW + 1 + _DIGITS - WINDOW_STEPS
_SUMS = ("window_spikes", "spikes", "total", "rows")
TALLIES = _BINS + len(_SUMS)
# Counts with |s| below this are tallied through a lookup table.
_TABLE_SIZE = 256


def tally(counts: Tensor) -> Tensor:
    """Return the tallies of counts [..., D], float64 [TALLIES] on their device.

    The tallies are the number of counts in each bin of |s|, the spikes in the window, all spikes, the sum of |s|, and
    the number of rows. Counts are integers in any dtype. A count that is not finite is tallied as 0.
    """
    magnitude = counts.detach().abs().flatten()
    if magnitude.is_floating_point():
        magnitude = magnitude.nan_to_num_(0, 0, 0)
    seen = torch.bincount(magnitude.clamp(max=_TABLE_SIZE).int(), minlength=_TABLE_SIZE + 1)
    tallies = seen[:_TABLE_SIZE].double() @ _table(counts.device)
    if bool(seen[_TABLE_SIZE]):
        large = magnitude[magnitude >= _TABLE_SIZE].clamp(max=(1 << _DIGITS) - 1).long()
        tallies += _tallies_of(large).sum(0)
    tallies[-1] = counts.numel() // counts.shape[-1]
    return tallies


def _table(device: torch.device) -> Tensor:
    return _tallies_of(torch.arange(_TABLE_SIZE, device=device))


def _tallies_of(magnitude: Tensor) -> Tensor:
    """Return the contribution of each count to the tallies, float64 [N, TALLIES]. The number of rows is left at 0."""
    place = torch.arange(_DIGITS, device=magnitude.device)
    digits = (magnitude[:, None] >> place) & 1
    # The number of digits is one more than the position of the highest.
    length = (digits * (place + 1)).amax(1)
    bins = torch.where(magnitude <= _LARGEST_IN_WINDOW, magnitude, length + _LARGEST_IN_WINDOW - WINDOW_STEPS)
    found = torch.zeros(len(magnitude), TALLIES, dtype=torch.float64, device=magnitude.device)
    found.scatter_(1, bins[:, None], 1.0)
    sums = digits[:, :WINDOW_STEPS].sum(1), digits.sum(1), magnitude
    found[:, _BINS:-1] = torch.stack(sums, 1).double()
    return found


@dataclass(frozen=True)
class Measures:
    """The spikes of one or several neurons, read from tallies.

    Attributes:
        counts: Number of counts, one per channel and token.
        rows: Number of tokens. For routed experts, a token counts once per expert that it is routed to.
        histogram: Number of counts with |s| equal to 0, 1, …, 7, then from 8 to 15, from 16 to 31, ….
        window_spikes: Number of spikes in the window.
        spikes: Number of all spikes.
        total: Sum of |s|, which is the number of spikes of a unary code.
    """

    counts: float
    rows: float
    histogram: tuple[float, ...]
    window_spikes: float
    spikes: float
    total: float

    @classmethod
    def of(cls, tallies: Iterable[float]) -> "Measures":
        """Read tallies [TALLIES], or sums of them."""
        numbers = list(tallies)
        histogram, sums = numbers[:_BINS], dict(zip(_SUMS, numbers[_BINS:], strict=True))
        return cls(sum(histogram), sums["rows"], tuple(histogram), sums["window_spikes"], sums["spikes"], sums["total"])

    def __add__(self, other: "Measures") -> "Measures":
        histogram = tuple(a + b for a, b in zip(self.histogram, other.histogram, strict=True))
        return Measures(
            self.counts + other.counts,
            self.rows + other.rows,
            histogram,
            self.window_spikes + other.window_spikes,
            self.spikes + other.spikes,
            self.total + other.total,
        )

    @property
    def steps(self) -> int:
        """T, the number of digits of the largest count, at least 1."""
        largest = max((place for place, number in enumerate(self.histogram) if number), default=0)
        if largest > _LARGEST_IN_WINDOW:
            return largest - _LARGEST_IN_WINDOW + WINDOW_STEPS
        return max(largest.bit_length(), 1)

    @property
    def sparsity(self) -> float:
        """The share of silent steps in the window of three steps; 1 without counts."""
        return _silent(self.window_spikes, WINDOW_STEPS * self.counts)

    @property
    def sparsity_all_steps(self) -> float:
        """The share of silent steps among all `steps`."""
        return _silent(self.spikes, self.steps * self.counts)

    @property
    def firing_rate(self) -> float:
        """Mean number of spikes per channel and token, over all steps (1.13 in the report)."""
        return self.spikes / max(self.counts, 1.0)

    @property
    def mean_count(self) -> float:
        """The mean of |s|."""
        return self.total / max(self.counts, 1.0)

    @property
    def within_window(self) -> float:
        """The share of counts with |s| <= 7, which the window represents exactly."""
        return sum(self.histogram[: _LARGEST_IN_WINDOW + 1]) / self.counts if self.counts else 1.0

    @property
    def silent(self) -> float:
        """The share of counts that are 0 (18.4 % in the report)."""
        return self.histogram[0] / self.counts if self.counts else 1.0


def _silent(spikes: float, places: float) -> float:
    return 1.0 - spikes / places if places else 1.0


@dataclass(frozen=True)
class Operations:
    """Numbers of operations of linear layers. Those of several layers can be added.

    Attributes:
        additions: Additions of a weight on spikes: spikes times outputs.
        products: Multiply-adds of the same layers without spikes: counts times outputs.
    """

    additions: float = 0.0
    products: float = 0.0

    @classmethod
    def of(cls, measures: Measures, outputs: float) -> "Operations":
        """Return the operations of the linear layers that read a neuron and have `outputs` outputs in all."""
        return cls(measures.spikes * outputs, measures.counts * outputs)

    def __add__(self, other: "Operations") -> "Operations":
        return Operations(self.additions + other.additions, self.products + other.products)

    @property
    def picojoules(self) -> float:
        """Energy with spikes, pJ."""
        return self.additions * PICOJOULES_SPIKE

    @property
    def picojoules_fp16(self) -> float:
        """Energy without spikes in FP16, pJ."""
        return self.products * PICOJOULES_FP16

    @property
    def picojoules_int8(self) -> float:
        """Energy without spikes in INT8, pJ."""
        return self.products * PICOJOULES_INT8

    def saved(self, dense: float) -> float:
        """Return the share of the energy `dense`, pJ, that spikes save; NaN if `dense` is 0."""
        return 1.0 - self.picojoules / dense if dense else math.nan
