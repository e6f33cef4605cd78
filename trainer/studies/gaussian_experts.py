"""Gaussian mixtures of experts with a dense-to-sparse softmax gate: density, sampling, maximum likelihood, errors.

    g(y | x) = sum_k softmax_k(logits(x)) N(y | a_k x + b_k, sigma_k^2),   x and y are numbers
    logit_k(x) = (act(beta1_k x) + beta0_k) / tau,  and 0 for the last expert

The gate is that of "Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?" (arXiv 2401.13875). The
last logit is fixed to 0, because softmax sees differences only. The parameters form a vector
(beta1 [K-1], beta0 [K-1], log tau, a [K], b [K], log sigma [K]). Everything is float64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Observations per block. The scores of a block stay in the second-level cache.
_BLOCK = 4096


def _relu(z: Array) -> tuple[Array, Array]:
    return np.maximum(z, 0), (z > 0).astype(np.float64)


def _sigmoid(z: Array) -> tuple[Array, Array]:
    value = 0.5 * (1 + np.tanh(0.5 * z))
    return value, value * (1 - value)


def _tanh(z: Array) -> tuple[Array, Array]:
    value = np.tanh(z)
    return value, 1 - value * value


def _gelu(z: Array) -> tuple[Array, Array]:
    below = torch.special.ndtr(torch.from_numpy(np.ascontiguousarray(z))).numpy()
    return z * below, below + z * np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


# The activation before the softmax, and its derivative.
GATES: dict[str, Callable[[Array], tuple[Array, Array]]] = {
    "linear": lambda z: (z, np.ones_like(z)),
    "relu": _relu,
    "sigmoid": _sigmoid,
    "tanh": _tanh,
    "gelu": _gelu,
}
# Gates whose two experts may swap roles. For linear and tanh, act(z) + act(-z) = 0, so negated logits are logits again.
# For sigmoid the sum is 1, which beta0 absorbs. ReLU and GELU have no such symmetry.
_SWAPPABLE = ("linear", "sigmoid", "tanh")


@dataclass(frozen=True)
class Parameters:
    """A mixture of K experts. Fields have K elements; the gate's last ones are 0."""

    beta1: Array
    beta0: Array
    tau: float
    a: Array
    b: Array
    sigma: Array

    def vector(self) -> Array:
        """Return the parameters as a vector, in the module's order."""
        free = slice(None, -1)
        return np.concatenate(
            [self.beta1[free], self.beta0[free], [math.log(self.tau)], self.a, self.b, np.log(self.sigma)]
        )


def unpack(theta: Array) -> Parameters:
    """Split a vector into parameters. Its length 5 K - 1 determines K."""
    experts = (len(theta) + 1) // 5
    gate, rest = 2 * (experts - 1), theta[2 * experts - 1 :].reshape(3, experts)
    beta1, beta0 = theta[:gate].reshape(2, experts - 1)
    return Parameters(
        np.append(beta1, 0.0), np.append(beta0, 0.0), math.exp(theta[gate]), rest[0], rest[1], np.exp(rest[2])
    )


# x is uniform on (-3, 3). |beta1 x| then reaches 4.5: bounded gates saturate, and 1000 observations identify tau.
X_WIDTH = 3.0
TRUTH = Parameters(
    beta1=np.array([1.5, 0.0]),
    beta0=np.array([-0.3, 0.0]),
    tau=0.3,
    a=np.array([2.0, -2.0]),
    b=np.array([0.0, 1.0]),
    sigma=np.array([0.4, 0.5]),
)


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=0)
    return shifted - np.log(np.exp(shifted).sum(axis=0))


def gate_logits(p: Parameters, gate: str, x: Array) -> Array:
    """Return logits [K, n] at x [n]."""
    logits = (GATES[gate](p.beta1[:, None] * x)[0] + p.beta0[:, None]) / p.tau
    logits[-1] = 0.0
    return logits


def log_joint(p: Parameters, gate: str, x: Array, y: Array) -> Array:
    """Return the logarithm of gate times density, [K, n]."""
    residual = (y - p.a[:, None] * x - p.b[:, None]) / p.sigma[:, None]
    log_density = -0.5 * residual * residual - np.log(p.sigma * math.sqrt(2 * math.pi))[:, None]
    return _log_softmax(gate_logits(p, gate, x)) + log_density


def sample(gate: str, n: int, generator: np.random.Generator) -> tuple[Array, Array]:
    """Draw n observations (x, y) from the true mixture."""
    x = generator.uniform(-X_WIDTH, X_WIDTH, n)
    first = generator.random(n) < np.exp(_log_softmax(gate_logits(TRUTH, gate, x)))[0]
    expert = np.where(first, 0, 1)
    return x, TRUTH.a[expert] * x + TRUTH.b[expert] + TRUTH.sigma[expert] * generator.standard_normal(n)


def likelihood(theta: Array, gate: str, x: Array, y: Array) -> tuple[float, Array, Array]:
    """Return mean log-likelihood, its gradient [P], and the scores' mean outer product [P, P] (Fisher information)."""
    p = unpack(theta)
    experts, size = len(p.a), len(theta)
    total, gradient, information = 0.0, np.zeros(size), np.zeros((size, size))
    for start in range(0, len(x), _BLOCK):
        xs, ys = x[start : start + _BLOCK], y[start : start + _BLOCK]
        activated, slope = GATES[gate](p.beta1[:-1, None] * xs)
        logits = np.zeros((experts, len(xs)))
        logits[:-1] = (activated + p.beta0[:-1, None]) / p.tau
        log_gate = _log_softmax(logits)
        residual = (ys - p.a[:, None] * xs - p.b[:, None]) / p.sigma[:, None]
        joint = log_gate - 0.5 * residual * residual - np.log(p.sigma * math.sqrt(2 * math.pi))[:, None]
        # Log-sum-exp over the experts.
        top = joint.max(axis=0)
        posterior = np.exp(joint - top)
        mass = posterior.sum(axis=0)
        posterior /= mass
        excess = posterior[:-1] - np.exp(log_gate[:-1])
        scores = np.empty((size, len(xs)))
        gates = experts - 1
        np.divide(excess, p.tau, out=scores[gates : 2 * gates])
        np.multiply(scores[gates : 2 * gates], slope * xs, out=scores[:gates])
        # The derivative of a logit by log tau is minus the logit.
        scores[2 * gates] = -(excess * logits[:-1]).sum(axis=0)
        by_expert = scores[2 * gates + 1 :].reshape(3, experts, -1)
        np.multiply(posterior, residual, out=by_expert[2])
        np.divide(by_expert[2], p.sigma[:, None], out=by_expert[1])
        np.multiply(by_expert[1], xs, out=by_expert[0])
        # The derivative of log N by log sigma is residual^2 - 1.
        by_expert[2] *= residual
        by_expert[2] -= posterior
        total += float((top + np.log(mass)).sum())
        gradient += scores.sum(axis=1)
        information += scores @ scores.T
    return total / len(x), gradient / len(x), information / len(x)


def _bounds(experts: int) -> tuple[Array, Array]:
    """Return the box that stands for the theory's compact parameter space, wide around truth and initialisation."""
    gates = experts - 1
    upper = np.array([30.0] * 2 * gates + [math.log(30.0)] + [30.0] * 2 * experts + [math.log(10.0)] * experts)
    lower = -upper
    lower[2 * gates] = math.log(0.01)
    lower[-experts:] = math.log(0.05)  # otherwise the likelihood is unbounded: a spike on two observations
    return lower, upper


def random_start(experts: int, generator: np.random.Generator) -> Array:
    """Draw initial parameters with a width that depends neither on n nor on the truth."""
    gates = experts - 1
    return np.concatenate(
        [
            generator.normal(0, 2, gates),
            generator.normal(0, 1, gates),
            generator.uniform(math.log(0.1), math.log(3), 1),
            generator.normal(0, 2, 2 * experts),
            generator.uniform(math.log(0.5), math.log(3), experts),
        ]
    )


def climb(theta: Array, gate: str, x: Array, y: Array, steps: int, tolerance: float) -> tuple[Array, float, int]:
    """Maximise the likelihood by damped scoring: Fisher information as the Hessian, and Marquardt's damping.

    Stops after three consecutive accepted steps that each gain less than `tolerance` nats of the total log-likelihood.
    The damping keeps directions without information unchanged, such as (beta, tau) -> (c beta, c tau).

    Returns:
        The parameters, the mean log-likelihood, and the number of evaluations.
    """
    lower, upper = _bounds((len(theta) + 1) // 5)
    theta = np.clip(theta, lower, upper)
    value, gradient, information = likelihood(theta, gate, x, y)
    damping, small, count = 1e-2, 0, 1
    while count < steps and small < 3 and damping < 1e8:
        # Scale to unit information, so that the damping affects all parameters equally.
        scale = 1 / np.sqrt(np.diag(information) + 1e-9)
        matrix = information * scale * scale[:, None] + damping * np.eye(len(theta))
        candidate = np.clip(theta + scale * np.linalg.solve(matrix, scale * gradient), lower, upper)
        there = likelihood(candidate, gate, x, y)
        count += 1
        gain = there[0] - value
        if not gain > 0:
            # Only rounding separates the two values: this is the maximum.
            small = small + 1 if len(x) * abs(gain) < tolerance else 0
            damping *= 5
            continue
        small = small + 1 if len(x) * gain < tolerance else 0
        theta, (value, gradient, information) = candidate, there
        damping = max(damping / 5, 1e-9)
    return theta, value, count


def fit(
    gate: str, experts: int, x: Array, y: Array, restarts: int, generator: np.random.Generator
) -> tuple[Array, float, int]:
    """Return the best of `restarts` climbs from random starts, like `climb`.

    All climbs start on the first 1000 observations. The best continues on the first 10,000, together with up to five
    further climbs that ended at different heights less than 20 nats below. The best of these continues on all
    observations. The first two numbers do not grow with n, so the initialisation does not shrink with n either.
    """
    few = slice(0, 1000)
    starts = [climb(random_start(experts, generator), gate, x[few], y[few], 30, 0.1) for _ in range(restarts)]
    starts.sort(key=lambda start: -start[1])
    kept = starts[:1]
    for start in starts:
        below_last, below_best = (1000 * (other[1] - start[1]) for other in (kept[-1], kept[0]))
        if below_last > 0.2 and below_best < 20 and len(kept) < 6:
            kept.append(start)
    many = slice(0, 10000)
    found = max((climb(start[0], gate, x[many], y[many], 40, 1e-3) for start in kept), key=lambda end: end[1])
    return found if len(x) <= 10000 else climb(found[0], gate, x, y, 60, 1e-3)


def _cell_log_mass(log_weight: Array, cell: NDArray[np.intp]) -> Array:
    """Return the logarithm of the weight in each of the two cells. An empty cell counts as 1e-12."""
    return np.array([np.logaddexp.reduce(log_weight[cell == k], initial=math.log(1e-12)) for k in (0, 1)])


def errors(theta: Array, gate: str) -> dict[str, float]:
    """Measure the distance of a fit from the truth.

    Each fitted expert belongs to the Voronoi cell of the true expert nearest in (a, b, sigma). Weights are the gate's
    at x = 0, within a cell or over all experts, so that beta0's free translation drops out. If a gate's negated logits
    are again of its kind, the mixture has a second description with the experts' roles swapped. The nearer one counts.

    Returns:
        voronoi: sum over cells |weight - true| + |tau - true| + sum of weight times |beta1| + |a| + |b| + |sigma^2|
            errors, with powers 2, 2, 4, 2 in cells of several experts (4 and its half follow from the heat equation,
            which ties b to sigma^2).
        gate_raw: errors |beta1| + |tau| + |beta0|, with beta0 from the cells' log-odds at x = 0.
        gate_scaled: the same for beta1 / tau and beta0 / tau, which (beta, tau) -> (c beta, c tau) leaves unchanged.
        expert: errors |a| + |b| + |sigma|, weighted within a cell and summed over cells.
        gate_function: mean over x of the error of the first true expert's probability.
        density: Hellinger distance between the joint densities of (x, y).
    """
    p, true = unpack(theta), TRUTH
    distance = np.sum([abs(getattr(p, name)[:, None] - getattr(true, name)) for name in ("a", "b", "sigma")], axis=0)
    cell = distance.argmin(axis=1)
    log_weight, true_log_weight = (_log_softmax(gate_logits(q, gate, np.zeros(1)))[:, 0] for q in (p, true))
    log_mass = _cell_log_mass(log_weight, cell)
    weight, share = np.exp(log_weight), np.exp(log_weight - log_mass[cell])
    odds, true_odds = log_mass[0] - log_mass[1], true_log_weight[0] - true_log_weight[1]
    several = np.bincount(cell, minlength=2)[cell] > 1

    def power(values: Array, exponent: int) -> Array:
        return np.where(several, abs(values) ** exponent, abs(values))

    of_experts = power(p.a - true.a[cell], 2) + power(p.b - true.b[cell], 4)
    of_experts += power(p.sigma**2 - true.sigma[cell] ** 2, 2)
    of_masses = abs(np.exp(log_mass) - np.exp(true_log_weight)).sum()
    of_tau = abs(p.tau - true.tau)
    descriptions = []
    for beta1 in [true.beta1, -true.beta1[::-1]] if gate in _SWAPPABLE else [true.beta1]:
        off = p.beta1 - beta1[cell]
        descriptions.append(
            {
                "voronoi": of_masses + of_tau + (weight * (power(off, 2) + of_experts)).sum(),
                "gate_raw": (share * abs(off)).sum() + of_tau + abs(p.tau * odds - true.tau * true_odds),
                "gate_scaled": (share * abs(p.beta1 / p.tau - beta1[cell] / true.tau)).sum() + abs(odds - true_odds),
            }
        )
    found = min(descriptions, key=lambda description: description["voronoi"])
    found["expert"] = (share * distance[np.arange(len(cell)), cell]).sum()
    return {name: float(value) for name, value in (found | _function_errors(p, gate, cell)).items()}


def _function_errors(p: Parameters, gate: str, cell: NDArray[np.intp]) -> dict[str, float]:
    x = (np.arange(100) + 0.5) / 50 * X_WIDTH - X_WIDTH
    fitted, true = (np.exp(_log_softmax(gate_logits(q, gate, x))) for q in (p, TRUTH))
    y, step = np.linspace(-12, 12, 481, retstep=True)
    x_grid, y_grid = (axis.ravel() for axis in np.meshgrid(x[::4], y))
    mine, theirs = (np.exp(log_joint(q, gate, x_grid, y_grid)).sum(axis=0) for q in (p, TRUTH))
    squared = 0.5 * ((np.sqrt(mine) - np.sqrt(theirs)) ** 2).sum() * step / len(x[::4])
    return {"gate_function": abs(fitted[cell == 0].sum(axis=0) - true[0]).mean(), "density": math.sqrt(squared)}
