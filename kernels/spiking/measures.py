"""Measures of spikes: tallies of counts, which add up over tensors, micro-batches and ranks, and what follows of them.

A count s of a channel of a token is sent as the spikes of its bidirectional bitwise code (kernels.spiking.coding): the
non-zero digits of |s|, each with the sign of s. What is stated of a neuron's counts is stated under one of two rules:

    window    three steps, as in SpikingBrain's report (arXiv:2509.05276, section 3.3): the digits 1, 2 and 4 of every
              count. Digits above are left out, also of counts above 7, of which there are few.
    all       T steps, the digits of the largest count: what a lossless code takes.

Under either rule, sparsity is 1 − spikes / (steps · counts). The report gives 69.15 % by the window for k = 3, and does
not say what it makes of the digits above the window; 1.13 spikes a channel, its other figure, are of all steps.

Energy is idealised, as in the report's appendix: arithmetic alone at 45 nm, and neither memory nor control, which in
practice cost more than either.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# Energies of the report, pJ at 45 nm (after Horowitz 2014): adding a weight up, and a product with its addition.
PICOJOULES_SPIKE, PICOJOULES_FP16, PICOJOULES_INT8 = 0.03, 1.5, 0.23
WINDOW_STEPS = 3
_LARGEST_IN_WINDOW = (1 << WINDOW_STEPS) - 1
# Float32 holds integers up to here; larger ones are tallied as it.
_DIGITS = 24
# |s| of 0 to 7, then by the number of digits: 8 to 15, 16 to 31, …
_BINS = _LARGEST_IN_WINDOW + 1 + _DIGITS - WINDOW_STEPS
_SUMS = ("window_spikes", "spikes", "total", "rows")
TALLIES = _BINS + len(_SUMS)
# Counts below are looked up.
_TABLE_SIZE = 256


def tally(counts: Tensor) -> Tensor:
    """The tallies of counts [..., D], float64 [TALLIES] on their device; those of several tensors add up.

    They are the numbers of counts with |s| in each bin, the spikes in the window, all spikes, the sum of |s|, and the
    rows of D counts. Counts are integers in any dtype; what is not finite is tallied as silent.
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
    """What each count adds to the tallies, float64 [N, TALLIES], without its row."""
    place = torch.arange(_DIGITS, device=magnitude.device)
    digits = (magnitude[:, None] >> place) & 1
    # The number of digits: one more than the place of the highest.
    length = (digits * (place + 1)).amax(1)
    bins = torch.where(magnitude <= _LARGEST_IN_WINDOW, magnitude, length + _LARGEST_IN_WINDOW - WINDOW_STEPS)
    found = torch.zeros(len(magnitude), TALLIES, dtype=torch.float64, device=magnitude.device)
    found.scatter_(1, bins[:, None], 1.0)
    sums = digits[:, :WINDOW_STEPS].sum(1), digits.sum(1), magnitude
    found[:, _BINS:-1] = torch.stack(sums, 1).double()
    return found


@dataclass(frozen=True)
class Measures:
    """What tallies say of a neuron, or of several.

    Attributes:
        counts: How many counts there are: channels of tokens.
        rows: How many tokens; of routed experts, tokens that an expert got.
        histogram: Numbers of counts with |s| of 0, 1, …, 7, 8 to 15, 16 to 31, ….
        window_spikes: Spikes in the window.
        spikes: All spikes.
        total: The sum of |s|: the spikes of a unary code.
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
        """T, the digits of the largest count, at least 1."""
        largest = max((place for place, number in enumerate(self.histogram) if number), default=0)
        if largest > _LARGEST_IN_WINDOW:
            return largest - _LARGEST_IN_WINDOW + WINDOW_STEPS
        return max(largest.bit_length(), 1)

    @property
    def sparsity(self) -> float:
        """The share of silent steps in the window of three; 1 of no counts."""
        return _silent(self.window_spikes, WINDOW_STEPS * self.counts)

    @property
    def sparsity_all_steps(self) -> float:
        """The share of silent steps among all `steps`."""
        return _silent(self.spikes, self.steps * self.counts)

    @property
    def firing_rate(self) -> float:
        """Spikes of a channel of a token, all steps together (1.13 in the report)."""
        return self.spikes / max(self.counts, 1.0)

    @property
    def mean_count(self) -> float:
        """The mean of |s|."""
        return self.total / max(self.counts, 1.0)

    @property
    def within_window(self) -> float:
        """The share of counts with |s| <= 7, which the window holds whole."""
        return sum(self.histogram[: _LARGEST_IN_WINDOW + 1]) / self.counts if self.counts else 1.0

    @property
    def silent(self) -> float:
        """The share of counts that are 0 (18.4 % in the report)."""
        return self.histogram[0] / self.counts if self.counts else 1.0


def _silent(spikes: float, places: float) -> float:
    return 1.0 - spikes / places if places else 1.0


@dataclass(frozen=True)
class Operations:
    """Operations of linear layers on spikes; those of several layers add up.

    Attributes:
        additions: A weight added up for a spike: spikes times outputs.
        products: Multiply-additions of the same layers without spikes: inputs times outputs.
    """

    additions: float = 0.0
    products: float = 0.0

    @classmethod
    def of(cls, measures: Measures, outputs: float) -> "Operations":
        """Those of a neuron whose channels lead to so many outputs, of all the linear layers that read it."""
        return cls(measures.spikes * outputs, measures.counts * outputs)

    def __add__(self, other: "Operations") -> "Operations":
        return Operations(self.additions + other.additions, self.products + other.products)

    @property
    def picojoules(self) -> float:
        """Energy on spikes, pJ."""
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
        """The share of a dense energy, pJ, that spikes save; NaN without operations."""
        return 1.0 - self.picojoules / dense if dense else math.nan
