"""Rotary frequencies for contexts longer than those of training. Imports no torch.

A pair of channels with frequency f turns by the angle t f at position t. Three rules lower the frequencies of slow
pairs, which have not completed a turn within the training length L, by a factor s:

    linear   f / s for all pairs                                       (position interpolation, arXiv 2306.15595)
    llama3   by the wavelength 2π / f: f / s above L / low, f below L / high, and a blend of both in between
             (Llama 3.1's model code)
    yarn     by the pair's number: f for pairs with more than beta_fast turns within L, f / s for those with less than
             beta_slow, and a linear blend in between; cosines and sines times `attention_factor`
             (arXiv 2309.00071, section 3)
"""

import math
from typing import NamedTuple


class RotaryScaling(NamedTuple):
    """One of the rules with its numbers.

    Attributes:
        kind: linear, llama3 or yarn.
        factor: s.
        original_length: L, in tokens; linear does not use it.
        low, high: llama3's low and high factors; yarn's beta_slow and beta_fast.
        attention_factor: Factor of cosines and sines.
    """

    kind: str
    factor: float
    original_length: int = 0
    low: float = 1.0
    high: float = 4.0
    attention_factor: float = 1.0


def yarn_attention_factor(factor: float) -> float:
    """The paper's factor, 0.1 ln s + 1 (eq. 22): the logits of attention grow by its square."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def yarn_range(scaling: RotaryScaling, dim: int, theta: float) -> tuple[float, float]:
    """The first pair that is blended and the first one that is scaled, of a head of `dim` channels."""

    def pair_of(turns: float) -> float:
        return dim * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = max(math.floor(pair_of(scaling.high)), 0), min(math.ceil(pair_of(scaling.low)), dim - 1)
    # A range without width would divide by zero.
    return first, last if last > first else first + 0.001
