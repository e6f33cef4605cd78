"""Advantages against loops over groups and tokens."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.errors import ConfigError
from trainer.posttraining.advantages import (
    carries_signal,
    discounted_returns,
    gae,
    group_advantages,
    reinforce_advantages,
    reinforce_plus_plus_advantages,
    rewards_with_kl,
    srft_demonstrations,
    srft_on_policy,
    whiten,
)

# Rewards whose mean is not exact in binary, so that a constant group has a rounding error to hide.
BATCHES = st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.1, 0.3, 1.0])), max_size=14)


def tensors(batch):
    groups = torch.tensor([group for group, _ in batch], dtype=torch.int64)
    return torch.tensor([reward for _, reward in batch], dtype=torch.float64), groups


def by_hand(batch, how, unbiased=True):
    found = []
    for i, (group, reward) in enumerate(batch):
        members = [other for g, other in batch if g == group]
        others = [other for j, (g, other) in enumerate(batch) if g == group and j != i]
        if len(set(members)) == 1:
            found.append(0.0)
        elif how == "leave_one_out":
            found.append(reward - statistics.mean(others))
        else:
            std = statistics.stdev(members) if unbiased else statistics.pstdev(members)
            found.append((reward - statistics.mean(members)) / ((std + 1e-6) if how == "group_std" else 1))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("how", ["group_std", "group", "leave_one_out"])
@given(BATCHES)
@settings(max_examples=50, deadline=None)
def test_group_advantages(how, batch):
    rewards, groups = tensors(batch)
    advantages = group_advantages(rewards, groups, how)
    torch.testing.assert_close(advantages, by_hand(batch, how))
    signal = carries_signal(rewards, groups, 4)
    for group in range(4):
        # Exactly 0, or the optimizer would take a step of noise.
        assert bool((advantages[groups == group] != 0).any()) == bool(signal[group])
        assert bool(signal[group]) == (len({reward for g, reward in batch if g == group}) > 1)


def test_a_biased_standard_deviation():
    batch = [(0, 1.0), (0, 0.0), (0, 0.3)]
    found = group_advantages(*tensors(batch), unbiased=False)
    torch.testing.assert_close(found, by_hand(batch, "group_std", unbiased=False))


def test_zero_is_exact_in_float32():
    rewards, groups = torch.full((7,), 0.1), torch.zeros(7, dtype=torch.int64)
    assert rewards.sum() / 7 != rewards[0], "the mean rounds"
    for how in ("group_std", "group", "leave_one_out"):
        assert not group_advantages(rewards, groups, how).any()
    assert not reinforce_advantages(rewards, "batch_mean").any()
    assert not whiten(rewards).any()


def test_the_union_with_demonstrations():
    """Question 0: answers 0, 1 and a demonstration; 1: answers 0, 0 and one; 2: one demonstration, no answers."""
    rewards = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    groups = torch.tensor([0, 0, 1, 1, 0, 1, 2])
    union = group_advantages(rewards, groups, "group")
    torch.testing.assert_close(union, torch.tensor([-2, 1, -1, -1, 1, 2, 0], dtype=torch.float64) / 3)
    own = torch.tensor([True] * 4 + [False] * 3)
    split = group_advantages(rewards, groups, "group", statistics=own)
    assert split.tolist() == [-0.5, 0.5, 0, 0, 0.5, 1.0, 0]
    std = math.sqrt(0.5) + 1e-6
    scaled = group_advantages(rewards, groups, "group_std", statistics=own)
    expected = torch.tensor([-0.5 / std, 0.5 / std, 0, 0, 0.5 / std, 1.0, 0], dtype=torch.float64)
    torch.testing.assert_close(scaled, expected)
    left_out = group_advantages(rewards, groups, "leave_one_out", statistics=own)
    assert left_out.tolist() == [-1.0, 1.0, 0, 0, 0.5, 1.0, 0]


def test_reinforce():
    rewards = torch.tensor([1.0, -1.0, 3.0])
    assert reinforce_advantages(rewards).tolist() == [1, -1, 3]
    assert reinforce_advantages(rewards, "batch_mean").tolist() == [0, -2, 2]


def test_reinforce_plus_plus():
    rewards, groups = torch.tensor([1.0, 0.0, 1.0, 0.5]).double(), torch.tensor([0, 0, 1, 1])
    lengths = torch.tensor([1, 2, 3, 4])

    def normalized(values, counts):
        flat = [value for value, count in zip(values, counts) for _ in range(count)]
        mean, std = statistics.mean(flat), statistics.pstdev(flat)
        return torch.tensor([(value - mean) / std for value in values], dtype=torch.float64)

    expected = normalized([1.0, 0.0, 1.0, 0.5], [1] * 4)
    torch.testing.assert_close(reinforce_plus_plus_advantages(rewards), expected)
    expected = normalized([1.0, 0.0, 1.0, 0.5], lengths.tolist())
    torch.testing.assert_close(reinforce_plus_plus_advantages(rewards, lengths=lengths), expected)
    expected = normalized([0.5, -0.5, 0.25, -0.25], [1] * 4)
    torch.testing.assert_close(reinforce_plus_plus_advantages(rewards, groups), expected)


def test_whitening_ignores_what_has_no_weight():
    values = torch.tensor([1.0, 5.0, 3.0], dtype=torch.float64)
    found = whiten(values, torch.tensor([1, 0, 1]))
    torch.testing.assert_close(found, torch.tensor([-1.0, 3.0, 1.0], dtype=torch.float64))
    assert whiten(torch.zeros(0)).shape == (0,)


def test_srft():
    entropies = torch.tensor([0.5, 0.5, 2.0])
    found = srft_on_policy(torch.tensor([1.0, 0.0, 1.0]), entropies)
    torch.testing.assert_close(found, torch.tensor([0.1 * math.exp(0.5), -1.0, 0.1 * math.exp(2)]))
    torch.testing.assert_close(srft_demonstrations(entropies[:1]), torch.tensor([0.5 * math.exp(-0.5)]))


@given(
    st.lists(st.integers(0, 5), max_size=5),
    st.sampled_from([0.0, 0.9, 1.0]),
    st.sampled_from([0.0, 0.95, 1.0]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_gae(lengths, gamma, lam, truncated):
    """The definition, a sum over later errors of the value (equation 11 of the paper), sequence by sequence."""
    random = torch.Generator().manual_seed(sum(lengths))
    rewards, values = torch.randn(2, sum(lengths), dtype=torch.float64, generator=random)
    last = torch.randn(len(lengths), dtype=torch.float64, generator=random)
    expected, start = [], 0
    for number, length in enumerate(lengths):
        v = [*values[start : start + length].tolist(), last[number].item() if truncated else 0.0]
        r = rewards[start : start + length].tolist()
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        expected += [sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, length)) for t in range(length)]
        start += length
    found, targets = gae(
        rewards, values, torch.tensor(lengths, dtype=torch.int64), gamma, lam, last if truncated else None
    )
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(targets, found + values)


def test_rewards_per_token_and_their_returns():
    lengths = torch.tensor([2, 0, 3])
    log_probs = torch.tensor([-1.0, -2.0, -1.0, -1.0, -3.0], dtype=torch.float64)
    reference = torch.tensor([-1.5, -2.0, -1.0, -2.0, -1.0], dtype=torch.float64)
    rewards = torch.tensor([1.0, 9.0, -1.0])
    found = rewards_with_kl(rewards, lengths, log_probs, reference, 0.1)
    expected = torch.tensor([-0.05, 0 + 1.0, 0, -0.1, 0.2 - 1.0], dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    k3 = rewards_with_kl(rewards, lengths, log_probs, reference, 0.1, "k3")
    assert k3[0].item() == pytest.approx(-0.1 * (math.exp(-0.5) - 1 + 0.5))
    returns = discounted_returns(found, lengths, 0.5)
    expected = torch.tensor([-0.05 + 0.5, 1.0, -0.05 - 0.2, -0.1 - 0.4, -0.8], dtype=torch.float64)
    torch.testing.assert_close(returns, expected)


def test_an_unknown_baseline_is_refused():
    with pytest.raises(ConfigError, match="leave_one_out"):
        group_advantages(torch.zeros(1), torch.zeros(1, dtype=torch.int64), "mean")
