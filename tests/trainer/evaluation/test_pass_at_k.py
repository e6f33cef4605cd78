"""pass@k and maj@k against all subsets; intervals against their definition."""

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.errors import ConfigError
from trainer.evaluation.pass_at_k import Estimate, majority_at_k, over_problems, pass_at_k, pass_curve


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets(samples):
    counts = np.arange(samples + 1)
    for k in range(1, samples + 1):
        subsets = list(combinations(range(samples), k))
        shares = [sum(min(subset) < correct for subset in subsets) / len(subsets) for correct in counts]
        assert pass_at_k(samples, counts, k) == pytest.approx(shares, abs=1e-15)


def test_pass_at_k_of_many_samples():
    """Binomials of this size overflow a float. One correct answer of n gives k / n."""
    found = pass_at_k(np.array([2048, 2048, 2048, 1024]), np.array([1, 0, 2048, 1]), 1024)
    assert found == pytest.approx([0.5, 0.0, 1.0, 1.0], rel=1e-12)
    exact = 1 - math.comb(2048 - 17, 100) / math.comb(2048, 100)
    assert pass_at_k(2048, np.array([17]), 100) == pytest.approx([exact], rel=1e-13)


def test_one_answer_is_the_mean():
    assert pass_at_k(np.array([4, 10]), np.array([3, 1]), 1).tolist() == pytest.approx([0.75, 0.1])


@given(st.lists(st.sampled_from(["a", "b", "c", "d", None]), min_size=1, max_size=7), st.data())
@settings(max_examples=80, deadline=None)
def test_majority_is_that_of_all_subsets(answers, data):
    k = data.draw(st.integers(1, len(answers)))
    correct = data.draw(st.sets(st.sampled_from(["a", "b", "z"])))
    total = 0.0
    subsets = list(combinations(answers, k))
    for subset in subsets:
        votes = Counter(answer for answer in subset if answer is not None)
        best = [answer for answer, number in votes.items() if number == max(votes.values())]
        total += sum(answer in correct for answer in best) / len(best) if best else 0.0
    assert majority_at_k(answers, correct, k) == pytest.approx(total / len(subsets), abs=1e-12)


def test_majority_of_many_answers():
    # All answers differ: every subset's votes are tied.
    assert majority_at_k(list(range(40)), {3}, 20) == pytest.approx(1 / 40)
    assert majority_at_k([1] * 33 + [0] * 31, [1], 64) == 1.0
    assert majority_at_k([1] * 32 + [0] * 32, [1], 31) == pytest.approx(0.5)


def test_intervals():
    values = np.array([0.0, 1.0, 0.5, 0.25])
    found = over_problems(values, level=0.9, draws=4000, seed=3)
    assert found.mean == pytest.approx(0.4375)
    # The bootstrap's distribution itself, over all 4^4 draws.
    means = np.sort(np.stack(np.meshgrid(*[values] * 4)).reshape(4, -1).mean(0))
    steps = np.quantile(means, [0.03, 0.07, 0.93, 0.97])
    assert steps[0] <= found.low <= steps[1] and steps[2] <= found.high <= steps[3]
    assert found == over_problems(values, level=0.9, draws=4000, seed=3)
    many = np.linspace(0, 1, 40) ** 2
    assert over_problems(many, seed=3) != over_problems(many, seed=4)
    # The mean of 40 values is nearly normal.
    found, width = over_problems(many, level=0.9, draws=20000), 1.645 * many.std() / math.sqrt(40)
    assert [found.mean - found.low, found.high - found.mean] == pytest.approx([width, width], rel=0.08)
    assert over_problems(np.array([0.5])) == Estimate(0.5, 0.5, 0.5)


def test_curve():
    samples, correct = np.array([8, 8, 16]), np.array([0, 2, 16])
    curve = pass_curve(samples, correct, [1, 4])
    assert list(curve) == [1, 4]
    assert curve[4] == over_problems(pass_at_k(samples, correct, 4))
    assert curve[1].mean == pytest.approx(1.25 / 3)


def test_refusals():
    with pytest.raises(ConfigError, match="at least 5 answers"):
        pass_at_k(np.array([8, 4]), np.array([0, 0]), 5)
    with pytest.raises(ConfigError, match="at least 1"):
        majority_at_k(["a"], ["a"], 0)
    with pytest.raises(ConfigError, match="at least 3"):
        majority_at_k(["a"], ["a"], 3)
    with pytest.raises(ValueError, match="correct <= samples"):
        pass_at_k(3, np.array([4]), 1)
    with pytest.raises(ConfigError, match="no problems"):
        over_problems(np.zeros(0))
    with pytest.raises(ConfigError, match="level"):
        over_problems(np.ones(2), level=95)
