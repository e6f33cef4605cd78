"""Generators and KL estimates against the divergences, by exact expectations over a small vocabulary."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.errors import ConfigError
from trainer.posttraining.divergences import Divergence, kl_estimate, rehearsal_loss

REFERENCE = torch.tensor([0.7, -1.2, 0.3, 2.0, -0.4], dtype=torch.float64).log_softmax(0)


def policy():
    logits = torch.tensor([-0.3, 0.9, 0.2, -1.0, 1.5], dtype=torch.float64, requires_grad=True)
    return logits, logits.log_softmax(0)


def kl(a, b):
    return (a.exp() * (a - b)).sum()


def jensen_shannon(a, b):
    middle = ((a.exp() + b.exp()) / 2).log()
    return (kl(a, middle) + kl(b, middle)) / 2


def alpha_divergence(theta, reference, a):
    return ((theta.exp() ** (1 - a) * reference.exp() ** a).sum() - 1) / (a * (a - 1))


def gradients(logits, *values):
    return [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in values]


@pytest.mark.parametrize(
    ("divergence", "exact"),
    [
        (Divergence(kind="forward"), lambda theta: kl(REFERENCE, theta)),
        (Divergence(kind="js"), lambda theta: jensen_shannon(REFERENCE, theta)),
        (Divergence(kind="js", doubled=True), lambda theta: 2 * jensen_shannon(REFERENCE, theta)),
        (Divergence(kind="alpha", alpha=0.2), lambda theta: alpha_divergence(theta, REFERENCE, 0.2)),
        (Divergence(kind="alpha", alpha=0.8), lambda theta: alpha_divergence(theta, REFERENCE, 0.8)),
    ],
)
def test_generators_are_their_divergences(divergence, exact):
    """The mean over samples of the reference, and its gradient."""
    logits, theta = policy()
    mean = (REFERENCE.exp() * divergence(theta, REFERENCE)).sum()
    torch.testing.assert_close(mean, exact(theta))
    torch.testing.assert_close(*gradients(logits, mean, exact(theta)))


@pytest.mark.parametrize(
    ("a", "limit"), [(1 - 1e-6, lambda theta: kl(REFERENCE, theta)), (1e-6, lambda theta: kl(theta, REFERENCE))]
)
def test_limits_of_alpha(a, limit):
    _, theta = policy()
    mean = (REFERENCE.exp() * Divergence(kind="alpha", alpha=a)(theta, REFERENCE)).sum()
    assert mean.item() == pytest.approx(limit(theta).item(), rel=1e-4)


def test_reverse_is_for_samples_of_the_policy():
    _, theta = policy()
    mean = (theta.exp() * Divergence(kind="reverse")(theta, REFERENCE)).sum()
    torch.testing.assert_close(mean, kl(theta, REFERENCE))


DERIVATIVES = {
    "forward": (Divergence(kind="forward"), lambda u: u - 1),
    "js": (Divergence(kind="js", doubled=True), lambda u: u * (2 * u / (u + 1)).log()),
    "half js": (Divergence(kind="js"), lambda u: u * (2 * u / (u + 1)).log() / 2),
    "alpha": (
        Divergence(kind="alpha", alpha=0.3),
        lambda u: (0.7 * u**0.7 - 0.7 * u) / (0.3 * (0.3 - 1)),
    ),
    "reverse": (Divergence(kind="reverse"), lambda u: 1 - 1 / u),
    "none": (Divergence(kind="none"), torch.zeros_like),
}


@pytest.mark.parametrize("name", DERIVATIVES)
@given(st.floats(-15, 15))
@settings(max_examples=25, deadline=None)
def test_derivatives_by_the_log_probability(name, log_ratio):
    divergence, derivative = DERIVATIVES[name]
    log_probs = torch.tensor([log_ratio - 3.0], dtype=torch.float64, requires_grad=True)
    value = divergence(log_probs, torch.tensor([-3.0], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(value.sum(), log_probs)
    u = (log_probs.detach() + 3.0).exp()
    torch.testing.assert_close(gradient, derivative(u), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in DERIVATIVES if name != "none"])
def test_values_are_not_negative_and_small_changes_keep_their_digits(name):
    """In float32, u is 1 to within a few roundings at the start of training."""
    divergence = DERIVATIVES[name][0]
    log_ratios = torch.linspace(-18, 18, 73, dtype=torch.float64)
    assert (divergence(log_ratios, torch.zeros(73, dtype=torch.float64)) >= -1e-12).all()
    assert divergence(torch.zeros(1), torch.zeros(1)) == 0
    if name != "half js" and name != "js":
        # f is l²/2 near 0, which u − 1 − l in float32 would lose entirely.
        value = divergence(torch.tensor([3e-4]), torch.zeros(1))
        assert value.item() == pytest.approx(4.5e-8, rel=0.01)


def test_bounds():
    far = torch.tensor([-30.0, 30.0, -12.0, 3.0], dtype=torch.float64, requires_grad=True)
    none = torch.zeros(4, dtype=torch.float64)

    def of(divergence):
        values = divergence(far, none)
        return values.detach().tolist(), torch.autograd.grad(values.sum(), far)[0].tolist()

    values, gradient = of(Divergence(kind="forward"))
    assert values[:2] == pytest.approx([29.0, math.exp(20) - 21]) and gradient[0] == pytest.approx(-1)
    assert gradient[1] == 0
    values, gradient = of(Divergence(kind="forward", min_log_ratio=-20.0))
    assert values[0] == pytest.approx(19.0) and gradient[0] == 0 and gradient[2] == pytest.approx(-1, abs=1e-4)
    values, gradient = of(Divergence(kind="forward", max_value=10.0))
    assert values == pytest.approx([10.0] * 4) and gradient == [0] * 4
    values, gradient = of(Divergence(kind="reverse"))
    assert values[:2] == pytest.approx([math.exp(20) - 21, 29.0]) and gradient[:2] == pytest.approx([0, 1])


def test_rehearsal_loss_and_its_metrics():
    log_probs = torch.tensor([-1.0, -3.0, torch.nan, -0.5], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.5, -1.0, -1.0, torch.inf], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.25, 0.0, 0.0], dtype=torch.float64)
    loss, metrics = rehearsal_loss(Divergence(kind="forward"), log_probs, reference, weights)
    u = [math.exp(0.5), math.exp(-2.0)]
    f = [u[0] - 1 - 0.5, u[1] - 1 + 2.0]
    assert loss.item() == pytest.approx(0.5 * f[0] + 0.25 * f[1])
    gradient = torch.autograd.grad(loss, log_probs)[0]
    torch.testing.assert_close(gradient, torch.tensor([0.5 * (u[0] - 1), 0.25 * (u[1] - 1), 0, 0]).double())
    found = {name: value.item() for name, value in metrics.items()}
    expected = {"tokens": 2, "u": sum(u), "f": sum(f), "max_u": u[0], "max_change": 1 - u[1]}
    assert found == pytest.approx(expected)


def test_rehearsal_of_nothing():
    none = torch.zeros(0, requires_grad=True)
    loss, metrics = rehearsal_loss(Divergence(), none, none.detach(), none.detach())
    assert loss == 0 and loss.requires_grad and not any(metrics.values())


@pytest.mark.parametrize("estimator", ["k1", "k3", "k3+"])
def test_unbiased_values(estimator):
    _, theta = policy()
    torch.testing.assert_close((theta.exp() * kl_estimate(theta, REFERENCE, estimator)).sum(), kl(theta, REFERENCE))


def test_the_value_of_k2_is_biased():
    _, theta = policy()
    mean = (theta.exp() * kl_estimate(theta, REFERENCE, "k2")).sum()
    torch.testing.assert_close(mean, (theta.exp() * (theta - REFERENCE).square() / 2).sum())
    assert (mean / kl(theta, REFERENCE) - 1).abs() > 0.1


@pytest.mark.parametrize(
    ("estimator", "exact"),
    [
        ("k1", lambda theta: 0 * theta.sum()),
        ("k2", lambda theta: kl(theta, REFERENCE)),
        ("k3", lambda theta: kl(REFERENCE, theta)),
        ("k3+", lambda theta: kl(theta, REFERENCE)),
    ],
)
def test_mean_gradients_are_what_the_docstring_says(estimator, exact):
    logits, theta = policy()
    # The samples' probabilities are not differentiated: a loss sees given samples.
    mean = (theta.detach().exp() * kl_estimate(theta, REFERENCE, estimator)).sum()
    torch.testing.assert_close(*gradients(logits, mean, exact(theta)))


def test_k3_stays_finite_and_keeps_the_digits_of_small_changes():
    log_probs = torch.tensor([-200.0, -1.0 - 2.0**-12], requires_grad=True)
    values = kl_estimate(log_probs, torch.tensor([-1.0, -1.0]), "k3")
    gradient = torch.autograd.grad(values.sum(), log_probs)[0]
    assert values.tolist() == pytest.approx([math.exp(20) - 21, 2.0**-25], rel=1e-3)
    assert gradient[0] == 0 and gradient[1].item() == pytest.approx(-(2.0**-12), rel=1e-3)


def test_refusals():
    for arguments, word in (
        ({"kind": "backward"}, "kind"),
        ({"alpha": 1.0}, "alpha"),
        ({"max_log_ratio": 0.0}, "max_log_ratio"),
        ({"min_log_ratio": 1.0}, "min_log_ratio"),
        ({"max_value": 0.0}, "max_value"),
    ):
        with pytest.raises(ConfigError, match=word):
            Divergence(**arguments)
    with pytest.raises(ConfigError, match="k4"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")
