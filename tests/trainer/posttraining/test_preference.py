"""Losses of preference against their formulas, pair by pair."""

import math

import pytest
import torch

from trainer.errors import ConfigError
from trainer.posttraining.preference import Preference, preference_loss

# Answers 0 to 3 of 3, 1, 2 and 2 tokens, and a token that does not count; pairs (chosen, rejected).
SEQUENCE = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3, -1])
PAIRS = torch.tensor([[0, 1], [3, 2]])
WEIGHTS = torch.tensor([0.25, 0.75], dtype=torch.float64)


def log_probs():
    random = torch.Generator().manual_seed(0)
    theta, reference = -2 * torch.rand(2, len(SEQUENCE), dtype=torch.float64, generator=random)
    theta[-1] = torch.nan
    return theta.requires_grad_(), reference


def sigmoid(x):
    return 1 / (1 + (-x).exp())


def by_hand(theta, reference, preference):
    total = 0
    for (chosen, rejected), weight in zip(PAIRS.tolist(), WEIGHTS):
        parts = []
        for number in (chosen, rejected):
            own = number == SEQUENCE
            log_ratio = theta[own].sum() - reference[own].sum()
            parts.append(log_ratio / own.sum() if preference.length_normalized else log_ratio)
        h = parts[0] - parts[1]
        if preference.kind == "ipo":
            loss = (h - 1 / (2 * preference.beta)) ** 2
        else:
            eps = preference.label_smoothing
            loss = -(1 - eps) * sigmoid(preference.beta * h).log() - eps * sigmoid(-preference.beta * h).log()
        total = total + weight * loss
    return total


@pytest.mark.parametrize(
    "preference",
    [
        Preference(),
        Preference(beta=0.7, label_smoothing=0.2),
        Preference(beta=0.5, length_normalized=True),
        Preference(kind="ipo", beta=0.3),
        Preference(kind="ipo", length_normalized=True),
    ],
)
def test_losses_and_gradients(preference):
    theta, reference = log_probs()
    loss, _ = preference_loss(preference, theta, reference, SEQUENCE, PAIRS, WEIGHTS, sequences=4)
    expected = by_hand(theta, reference, preference)
    torch.testing.assert_close(loss, expected)
    found, wanted = (torch.autograd.grad(x, theta)[0] for x in (loss, expected))
    torch.testing.assert_close(found[:-1], wanted[:-1])
    assert found[-1] == 0 and found[:-1].abs().min() > 0


def test_the_gradient_of_dpo_is_the_papers():
    """Equation in section 4: −β σ(−β h) (∇log π(chosen) − ∇log π(rejected))."""
    theta, reference = log_probs()
    loss, metrics = preference_loss(Preference(), theta, reference, SEQUENCE, PAIRS[:1], WEIGHTS[:1], sequences=4)
    h = (theta - reference)[:3].sum() - (theta - reference)[3]
    scale = (0.25 * 0.1 * sigmoid(-0.1 * h)).item()
    expected = torch.tensor([-scale] * 3 + [scale] + [0.0] * 5, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(loss, theta)[0], expected)
    assert metrics["margin"].item() == pytest.approx(0.1 * h.item())


def test_metrics_and_the_start():
    theta, reference = log_probs()
    _, metrics = preference_loss(Preference(), theta, reference, SEQUENCE, PAIRS, WEIGHTS, sequences=4)
    log_ratio = (theta - reference).detach()
    sums = torch.stack([log_ratio[number == SEQUENCE].sum() for number in range(4)])
    margins = 0.1 * torch.stack([sums[0] - sums[1], sums[3] - sums[2]])
    expected = {
        "pairs": 2.0,
        "accuracy": (margins > 0).sum().item(),
        "margin": margins.sum().item(),
        "chosen_reward": 0.1 * (sums[0] + sums[3]).item(),
        "rejected_reward": 0.1 * (sums[1] + sums[2]).item(),
    }
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected)
    loss, metrics = preference_loss(Preference(), reference, reference, SEQUENCE, PAIRS, WEIGHTS, sequences=4)
    assert loss.item() == pytest.approx(math.log(2)) and metrics["accuracy"] == 0


def test_far_pairs_stay_finite():
    theta = torch.tensor([-1e4, -1.0], requires_grad=True)
    loss, _ = preference_loss(
        *(Preference(beta=1.0), theta, -torch.ones(2), torch.arange(2), torch.tensor([[0, 1]]), torch.ones(1)),
        sequences=2,
    )
    assert loss.item() == pytest.approx(1e4, rel=1e-3)
    assert torch.autograd.grad(loss, theta)[0].tolist() == pytest.approx([-1.0, 1.0])


def test_refusals():
    for arguments, word in (
        ({"kind": "hinge"}, "ipo"),
        ({"beta": 0.0}, "beta"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"kind": "ipo", "label_smoothing": 0.1}, "set it to 0"),
    ):
        with pytest.raises(ConfigError, match=word):
            Preference(**arguments)
