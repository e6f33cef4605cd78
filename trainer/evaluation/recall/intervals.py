"""Confidence intervals of shares."""

import math
from collections.abc import Sequence

import numpy as np

# The 97.5 % quantile of the normal distribution, for intervals of 95 %.
_Z = 1.959963984540054


def wilson(share: float, count: float) -> tuple[float, float]:
    """The score interval of a share among `count` independent trials, at 95 % (Wilson 1927, "Probable inference").

    Unlike the normal approximation, it stays in [0, 1] and has a width at shares of 0 and 1.
    """
    z2 = _Z**2 / count
    middle = (share + z2 / 2) / (1 + z2)
    half = _Z / (1 + z2) * math.sqrt(share * (1 - share) / count + z2 / 4 / count)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def effective_count(groups: Sequence[Sequence[bool]]) -> float:
    """How many independent trials tell as much as groups of equal numbers of trials, which may depend on each other.

    The variance of the share is estimated from the groups, and is p (1 - p) / n for n independent trials (the design
    effect of Kish 1965, "Survey sampling", section 8.2). The result is at least the number of groups, and at most that
    of trials. At a share of 0 or 1 nothing is known of the dependence, and each group counts once.
    """
    means = np.array([np.mean(group) for group in groups])
    share, trials = means.mean(), sum(map(len, groups))
    variance = means.var(ddof=1) / len(means) if len(means) > 1 else 0.0
    if not 0 < share < 1:
        return float(len(groups))
    return float(min(max(share * (1 - share) / variance if variance else trials, len(groups)), trials))
