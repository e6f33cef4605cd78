"""What k answers to a problem achieve: pass@k and maj@k from n ≥ k answers, with intervals over problems."""

import math
from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.errors import ConfigError


@dataclass(frozen=True)
class Estimate:
    """A mean over problems.

    Attributes:
        mean: The mean.
        low: Lower end of its interval.
        high: Upper end of its interval.
    """

    mean: float
    low: float
    high: float


def pass_at_k(samples: np.ndarray | int, correct: np.ndarray, k: int) -> np.ndarray:
    """Estimate without bias the probability that at least one of k answers is correct.

    1 − C(n−c, k) / C(n, k) = 1 − prod_{j<k} (n−c−j) / (n−j), which is the share of subsets of k answers with a correct
    one (Chen et al. 2021, arXiv:2107.03374, equation 1). Every factor of the product is in [0, 1].

    Args:
        samples: n, integers [P] or one for all problems.
        correct: c, integers [P].
        k: 1 to the smallest n.

    Returns:
        float64 [P].

    Raises:
        ConfigError: a problem has fewer than k answers, or k is below 1.
        ValueError: a count is below 0 or above n.
    """
    samples, correct = np.broadcast_arrays(np.asarray(samples), np.asarray(correct))
    if (correct < 0).any() or (correct > samples).any():
        raise ValueError("pass_at_k: need 0 <= correct <= samples")
    _check(samples, k)
    steps = np.arange(k)
    # With fewer than k wrong answers one factor is 0, which makes up for negative ones after it.
    factors = (samples[:, None] - correct[:, None] - steps) / (samples[:, None] - steps)
    return 1.0 - factors.prod(axis=1)


def majority_at_k(answers: Sequence[Hashable | None], correct: Collection[Hashable], k: int) -> float:
    """Compute the probability that the most frequent of k answers to a problem is correct (arXiv:2203.11171).

    It is exact: the mean over all subsets of k of the n answers, where a tie is decided by a draw. No subset is listed.
    The cost is that of about k² · (number of different answers) additions of integers, for each number of votes that
    a correct answer has.

    Args:
        answers: The n answers, equal if they mean the same. None is no answer: it takes a place but has no vote. If
            nobody votes, the majority is wrong.
        correct: The answers that are correct.
        k: 1 to n.

    Raises:
        ConfigError: there are fewer than k answers, or k is below 1.
    """
    _check(np.array([len(answers)]), k)
    votes = Counter(answers)
    silent = votes.pop(None, 0)
    subsets = math.comb(len(answers), k)
    # Answers that occur as often have the same chance.
    winners = Counter(number for answer, number in votes.items() if answer in correct)
    favourable = 0.0
    for own, alike in winners.items():
        others = list(votes.values())
        others.remove(own)
        # All answers are one subset, in which none occurs less often than it does.
        for count in range(own if k == len(answers) else 1, min(own, k) + 1):
            ways = _ways(others, silent, count, k - count)
            choices = alike * math.comb(own, count)
            # Python divides integers of any size exactly rounded.
            favourable += sum(choices * number / ((ties + 1) * subsets) for ties, number in enumerate(ways))
    return favourable


def _ways(others: Sequence[int], silent: int, most: int, total: int) -> list[int]:
    """Count the ways to choose `total` answers of which none occurs more than `most` times, by the number that do so.

    Args:
        others: How often each answer occurs.
        silent: How many answers have no vote. Any number of them may be chosen.
        most: The limit, at least 1.
        total: How many to choose.

    Returns:
        Entry t is the number of ways in which exactly t answers occur `most` times.
    """
    ties = total // most
    # table[t][s]: ways to choose s so far, with t answers at the limit.
    table = [[0] * (total + 1) for _ in range(ties + 1)]
    table[0] = [math.comb(silent, chosen) for chosen in range(total + 1)]
    for number in others:
        new = [[0] * (total + 1) for _ in range(ties + 1)]
        for chosen in range(min(number, most, total) + 1):
            choices, tied = math.comb(number, chosen), int(chosen == most)
            for t in range(ties + 1 - tied):
                row, source = new[t + tied], table[t]
                for s in range(total + 1 - chosen):
                    if source[s]:
                        row[s + chosen] += choices * source[s]
        table = new
    return [row[total] for row in table]


def over_problems(values: np.ndarray, level: float = 0.95, draws: int = 2000, seed: int = 0) -> Estimate:
    """Average over problems, with the percentile bootstrap's interval (Efron & Tibshirani 1993, section 13.3).

    Problems are drawn with replacement, their values are kept. For the difference of two models on the same problems,
    pass the differences.

    Args:
        values: [P], at least one, for example of `pass_at_k`.
        level: Probability of the interval, between 0 and 1.
        draws: Number of resampled means.
        seed: Of the resampling.

    Raises:
        ConfigError: there are no problems, or the level is not between 0 and 1.
    """
    if len(values) == 0:
        raise ConfigError("no problems were evaluated: there is no mean")
    if not 0 < level < 1:
        raise ConfigError(f"the interval's level must be between 0 and 1, not {level}")
    random = np.random.default_rng(seed)
    # Draw the number of times that each problem occurs; it needs draws × P numbers like the indices, but no gather.
    occurrences = random.multinomial(len(values), np.full(len(values), 1 / len(values)), size=draws)
    means = occurrences @ np.asarray(values, dtype=np.float64) / len(values)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(np.mean(values)), float(low), float(high))


def pass_curve(
    samples: np.ndarray | int, correct: np.ndarray, ks: Sequence[int], level: float = 0.95, seed: int = 0
) -> dict[int, Estimate]:
    """Return the mean of pass@k for every k, all with the same resampled problems. See `pass_at_k`, `over_problems`."""
    return {k: over_problems(pass_at_k(samples, correct, k), level, seed=seed) for k in ks}


def _check(samples: np.ndarray, k: int) -> None:
    if k < 1:
        raise ConfigError(f"k of pass@k and maj@k must be at least 1, not {k}")
    if (samples < k).any():
        raise ConfigError(f"k = {k} needs at least {k} answers to every problem, but one has {samples.min()}")
