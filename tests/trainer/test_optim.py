"""The learning rate as a function of the step."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config import OptimConfig
from trainer.optim import learning_rate

SCHEDULES = ("cosine", "wsd")

configs = st.builds(
    OptimConfig,
    lr=st.floats(1e-8, 10),
    min_lr_ratio=st.floats(0, 1),
    schedule=st.sampled_from(SCHEDULES),
    warmup_steps=st.integers(0, 40),
    decay_fraction=st.floats(0, 1),
)


def rates(config, steps):
    return [learning_rate(config, step, steps) for step in range(steps)]


@settings(deadline=None)
@given(configs, st.integers(1, 200))
def test_rates_lie_between_zero_and_the_peak(config, steps):
    for step, rate in enumerate(rates(config, steps)):
        assert 0 <= rate <= config.lr * (1 + 1e-12)
        assert rate > 0 or (config.lr * config.min_lr_ratio == 0 and step >= config.warmup_steps)
        if step >= config.warmup_steps:
            assert rate >= config.lr * config.min_lr_ratio * (1 - 1e-12)


@settings(deadline=None)
@given(configs, st.integers(1, 200))
def test_rates_rise_in_the_warm_up_and_never_after(config, steps):
    every = rates(config, steps)
    warm, rest = every[: config.warmup_steps], every[config.warmup_steps :]
    assert all(a < b for a, b in itertools.pairwise(warm))
    assert all(a >= b * (1 - 1e-12) for a, b in itertools.pairwise(rest))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_linear_from_the_first_step(schedule):
    config = OptimConfig(lr=0.8, warmup_steps=4, schedule=schedule)
    assert rates(config, 100)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    assert learning_rate(OptimConfig(lr=0.8, warmup_steps=0, schedule=schedule), 0, 100) == 0.8


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_the_last_step_has_the_lowest_rate(schedule, ratio):
    config = OptimConfig(lr=2.0, warmup_steps=10, schedule=schedule, min_lr_ratio=ratio)
    assert learning_rate(config, 99, 100) == pytest.approx(2.0 * ratio)
    # A run that was lengthened and shortened again goes on at the end of its schedule.
    assert learning_rate(config, 99 + 1, 100) == pytest.approx(2.0 * ratio)


def test_cosine():
    config = OptimConfig(lr=1.0, warmup_steps=10, min_lr_ratio=0.2)
    expected = [0.2 + 0.8 * (1 + math.cos(math.pi * i / 90)) / 2 for i in range(91)]
    assert rates(config, 101)[10:] == pytest.approx(expected)
    assert learning_rate(config, 55, 101) == pytest.approx(0.6)


def test_warm_up_stable_decay():
    config = OptimConfig(lr=1.0, warmup_steps=10, min_lr_ratio=0.2, schedule="wsd", decay_fraction=0.2)
    every = rates(config, 100)
    assert every[10:80] == [1.0] * 70
    assert every[79:] == pytest.approx([1.0 - 0.8 * i / 20 for i in range(21)])


def test_no_decay_in_the_limit():
    assert rates(OptimConfig(lr=1.0, warmup_steps=0, schedule="wsd", decay_fraction=0.0), 50) == [1.0] * 50


def test_all_decay_in_the_limit():
    every = rates(OptimConfig(lr=1.0, warmup_steps=0, schedule="wsd", decay_fraction=1.0, min_lr_ratio=0.0), 11)
    differences = {round(a - b, 9) for a, b in itertools.pairwise(every)}
    assert len(differences) == 1 and every[-1] == 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_that_is_all_warm_up(schedule):
    assert rates(OptimConfig(lr=1.0, warmup_steps=4, schedule=schedule), 4) == pytest.approx([0.25, 0.5, 0.75, 1.0])


@settings(deadline=None)
@given(configs, st.integers(50, 200), st.integers(0, 49), st.integers(1, 100))
def test_a_longer_run_is_stable_for_longer(config, steps, step, more):
    """Before the decay begins, raising train.steps changes no rate of wsd: what was trained stays the run."""
    if config.schedule == "wsd" and config.decay_fraction < 0.5 and step < steps * (1 - config.decay_fraction) - 1:
        assert learning_rate(config, step, steps) == learning_rate(config, step, steps + more)
