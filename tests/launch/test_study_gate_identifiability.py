"""The gates' benchmark: its likelihood, its errors, its slopes, and a file of fits that a rerun goes on from."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import WAIT
from trainer.errors import ConfigError
from trainer.studies import gate_identifiability as bench
from trainer.studies import gaussian_experts as mixture

ROOT = Path(__file__).resolve().parents[2]


def _bench(*arguments):
    command = [sys.executable, "launch/bench.py", "gate_identifiability", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=WAIT)


@pytest.mark.parametrize("experts", [2, 3])
@pytest.mark.parametrize("gate", bench.GATE_NAMES)
def test_scores_equal_finite_differences(gate, experts):
    generator = np.random.default_rng(experts)
    x, y = mixture.sample(gate, 5000, generator)  # more than a block
    theta = mixture.random_start(experts, generator)
    value, gradient, information = mixture.likelihood(theta, gate, x, y)
    joint = mixture.log_joint(mixture.unpack(theta), gate, x, y)
    assert value == pytest.approx(np.logaddexp.reduce(joint, axis=0).mean(), rel=1e-12)

    def gradient_by_differences(x, y):
        at = [
            mixture.likelihood(theta + sign * 1e-6 * axis, gate, x, y)[0]
            for axis in np.eye(len(theta))
            for sign in (1, -1)
        ]
        return (np.array(at[::2]) - np.array(at[1::2])) / 2e-6

    np.testing.assert_allclose(gradient, gradient_by_differences(x, y), atol=1e-8 * abs(gradient).max() + 1e-8)
    scores = np.array([gradient_by_differences(x[i : i + 1], y[i : i + 1]) for i in range(20)])
    of_20 = mixture.likelihood(theta, gate, x[:20], y[:20])[2]
    np.testing.assert_allclose(of_20, scores.T @ scores / 20, rtol=1e-5, atol=1e-6 * abs(of_20).max())
    np.testing.assert_array_equal(information, information.T)


def test_samples_have_the_density_of_the_truth():
    x, y = mixture.sample("tanh", 200_000, np.random.default_rng(0))
    posterior = np.exp(mixture.log_joint(mixture.TRUTH, "tanh", x, y))
    posterior /= posterior.sum(axis=0)
    residual = (y - mixture.TRUTH.a[:, None] * x - mixture.TRUTH.b[:, None]) / mixture.TRUTH.sigma[:, None]
    np.testing.assert_allclose((posterior * residual**2).sum(axis=1) / posterior.sum(axis=1), 1, atol=0.02)


@pytest.mark.parametrize("gate", bench.GATE_NAMES)
def test_errors_vanish_at_the_truth_and_where_an_expert_is_split(gate):
    truth = mixture.TRUTH
    assert max(mixture.errors(truth.vector(), gate).values()) < 1e-6
    at_zero = float(mixture.GATES[gate](np.zeros(1))[0][0])
    split = mixture.Parameters(
        np.array([truth.beta1[0], 0.0, 0.0]),
        # The halves of the second expert have logit 0 each, so the first one's rises by log 2.
        np.array([truth.beta0[0] + truth.tau * np.log(2), -at_zero, 0.0]),
        truth.tau,
        *(np.append(value, value[-1]) for value in (truth.a, truth.b, truth.sigma)),
    )
    assert max(mixture.errors(split.vector(), gate).values()) < 1e-6


@pytest.mark.parametrize("gate", bench.GATE_NAMES)
def test_scaling_beta_and_tau_together_is_unseen_by_homogeneous_gates_alone(gate):
    theta = mixture.TRUTH.vector()
    theta[:2] *= 2
    theta[2] += np.log(2)
    found = mixture.errors(theta, gate)
    if gate in ("linear", "relu"):
        assert found["gate_raw"] == pytest.approx(1.5 + 0.3 + 0.3)  # beta1, beta0 and tau, each off by its own size
        assert max(found[name] for name in ("gate_scaled", "expert", "gate_function", "density")) < 1e-6
    else:
        assert found["gate_function"] > 1e-3 and found["density"] > 1e-3


def test_one_wrong_parameter_is_its_own_error():
    sizes = {"voronoi": 0.1, "gate_raw": 0.1, "gate_scaled": 0.1 / 0.3, "expert": 0.0}
    theta = mixture.TRUTH.vector()
    theta[0] += 0.1
    found = mixture.errors(theta, "linear")
    weight = np.exp(-1) / (1 + np.exp(-1))  # of the first expert at x = 0, where its logit is -0.3 / 0.3
    sizes["voronoi"] *= weight
    assert {name: found[name] for name in sizes} == pytest.approx(sizes)
    theta = mixture.TRUTH.vector()
    theta[3] += 0.1
    assert mixture.errors(theta, "linear")["expert"] == pytest.approx(0.1)
    assert mixture.errors(theta, "linear")["voronoi"] == pytest.approx(0.1 * weight)


@pytest.mark.parametrize(("gate", "beta0"), [("linear", 0.3), ("tanh", 0.3), ("sigmoid", -0.7)])
def test_exchanged_experts_are_the_same_mixture(gate, beta0):
    truth = mixture.TRUTH
    exchanged = mixture.Parameters(
        np.array([-1.5, 0.0]), np.array([beta0, 0.0]), truth.tau, truth.a[::-1], truth.b[::-1], truth.sigma[::-1]
    )
    assert max(mixture.errors(exchanged.vector(), gate).values()) < 1e-6


@pytest.mark.parametrize("gate", ["tanh", "gelu"])
def test_a_fit_from_random_starts_finds_the_truth(gate):
    generator = np.random.default_rng(3)
    x, y = mixture.sample(gate, 4000, generator)
    theta, value, _ = mixture.fit(gate, 2, x, y, 10, generator)
    assert value > mixture.likelihood(mixture.TRUTH.vector(), gate, x, y)[0]
    found = mixture.errors(theta, gate)
    assert found["density"] < 0.05 and found["expert"] < 0.2 and found["gate_raw"] < 0.5


@pytest.mark.parametrize("gate", ["linear", "tanh"])
def test_a_climb_keeps_the_scale_of_a_homogeneous_gate_alone(gate):
    x, y = mixture.sample(gate, 4000, np.random.default_rng(3))
    start = mixture.TRUTH.vector()
    scaled = start.copy()
    scaled[:2] *= 4
    scaled[2] += np.log(4)
    ends = [mixture.climb(theta, gate, x, y, 200, 1e-6) for theta in (start, scaled)]
    assert ends[0][1] == pytest.approx(ends[1][1], abs=1e-7)  # the same maximum
    ratio = np.exp(ends[1][0][2] - ends[0][0][2])
    assert ratio == pytest.approx(4 if gate == "linear" else 1, rel=1e-2)


def test_slope_and_interval_of_a_power_law():
    generator = np.random.default_rng(0)
    law = {n: 3 * n**-0.5 * np.exp(0.3 * generator.standard_normal(40)) for n in (1000, 10000, 100000)}
    found = bench.curve(law)
    assert found.slope == pytest.approx(-0.5, abs=0.05)
    assert found.interval[0] < -0.5 < found.interval[1] and found.interval[1] - found.interval[0] < 0.2


def test_quick_run_is_resumed(tmp_path):
    fits, plot, path = tmp_path / "fits.jsonl", tmp_path / "plot.png", tmp_path / "result.json"
    done = _bench("--quick", "true", "--output", str(fits), "--json", str(path), "--plot", str(plot))
    assert done.returncode == 0, done.stderr
    assert "40/40 fits" in done.stderr and plot.stat().st_size > 10_000
    lines = json.loads(path.read_text())
    assert len(lines) == len(bench.SETTINGS) * len(bench.ERRORS) * len(bench.GATE_NAMES)
    for line in lines:
        assert set(line) == {"case", "ours", "peer", "ratio", "unit", "note"}
        assert line["ratio"] == pytest.approx(10 ** (line["peer"] - line["ours"]))
    whole = fits.read_text()
    fits.write_text(whole[:-200])  # the last fit was being written
    config = bench.Config(quick=True, output=str(fits))
    bench.run(config)
    mended, first = fits.read_text().splitlines(), whole.splitlines()
    assert mended[:-1] == first[:-1]
    assert json.loads(mended[-1])["theta"] == json.loads(first[-1])["theta"]
    with pytest.raises(ConfigError, match="seed"):
        bench.run(replace(config, seed=1))


def test_it_stops_at_the_limit_of_processor_time(tmp_path, capsys):
    fits = tmp_path / "fits.jsonl"
    with pytest.raises(SystemExit) as stopped:
        bench.main(bench.Config(quick=True, output=str(fits), cpu_minutes=1e-9))
    assert stopped.value.code == 2 and "cpu_minutes" in capsys.readouterr().err
    assert len(fits.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("sizes", "expected"), [({"sample_sizes": [1000]}, "sample_sizes"), ({"replicates": 0}, "replicates")]
)
def test_bad_sizes_are_refused(sizes, expected):
    with pytest.raises(ConfigError, match=expected):
        bench.Config(**sizes)


def test_a_refusal_is_one_line():
    done = _bench("--restarts", "0")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "restarts" in done.stderr
