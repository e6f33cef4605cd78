"""Running ranges of compressed activations: the formula, clamping, and independence from micro-batches and shards."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.compression import Compression, Ranges, Rule
from models.compression_statistics import measure
from tests.helpers import draw_tokens
from tests.models.test_compression import EIGHT, EXPERTS, T, gradients, model_of, policy_of

X = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))


def observed(x, groups, group=4, rows=12, place="p"):
    """What ranks observe that have consecutive groups each, in micro-batches of so many rows."""
    found = []
    for first in range(0, x.shape[1] // group, groups):
        ranges = Ranges()
        for part in x[:, first * group : (first + groups) * group].split(rows):
            ranges.observe(place, first, part, group)
        found.append(ranges.take())
    return found


@given(st.sampled_from([1, 2, 4]), st.integers(1, 12))
def test_shards_and_micro_batches_give_one_range(groups, rows):
    whole, parts = Ranges(), Ranges()
    whole.update(observed(X, 4))
    parts.update(observed(X, groups, rows=rows))
    low, high = X.unflatten(1, (4, 4)).amin((0, 2)), X.unflatten(1, (4, 4)).amax((0, 2))
    assert torch.equal(whole.values["p"], torch.stack([low, high]))
    assert torch.equal(parts.values["p"], whole.values["p"])


def test_a_step_moves_a_range():
    ranges = Ranges(decay=0.75)
    ranges.update(observed(X, 4))
    first = ranges.values["p"]
    ranges.update(observed(3 * X, 4))
    assert torch.allclose(ranges.values["p"], 0.75 * first + 0.25 * 3 * first)
    ranges.update([])
    ranges.update(observed(X * math.inf, 4))
    assert torch.allclose(ranges.values["p"], 1.5 * first), "nothing seen, or nothing finite, moves nothing"


def test_nothing_is_taken_twice():
    ranges = Ranges()
    ranges.observe("p", 0, X, 4)
    assert set(ranges.take()) == {"p"} and ranges.take() == {}
    ranges.observe("p", 0, X[:0], 4)
    assert ranges.take() == {}, "no rows, as of an expert without tokens"


def running():
    return replace(EIGHT, range="running", ranges=Ranges())


@pytest.mark.parametrize("mixer", ["full_attention", "gated_delta_net"])
def test_gradients_stay_close_once_ranges_are_known(mixer):
    model, stored = model_of(mixer, moe=EXPERTS), running()
    exact = torch.cat([x.flatten() for x in gradients(model, policy_of(None))[1]])
    first = gradients(model, policy_of(stored))[1]
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(model, policy_of(EIGHT))[1], strict=True))
    stored.ranges.update([stored.ranges.take()])
    assert {place.split(".")[1] for place in stored.ranges.values} == {"0", "1"}
    later = gradients(model, policy_of(stored), step=1)[1]
    flat = torch.cat([x.flatten() for x in later])
    assert torch.cosine_similarity(flat, exact, dim=0) > 0.995
    assert not torch.equal(flat, torch.cat([x.flatten() for x in gradients(model, policy_of(EIGHT), step=1)[1]]))


def test_elements_beyond_a_range_are_clamped():
    """Mesa's code lets them wrap around: a large element becomes a small one."""
    model, stored = model_of("full_attention"), running()
    gradients(model, policy_of(stored))
    stored.ranges.update([stored.ranges.take()])
    for values in stored.ranges.values.values():
        values.mul_(0.5)
    model.keep(policy_of(stored))
    meters = measure(model, draw_tokens(1, T), torch.arange(T)[None])[1]
    # Half of a normal distribution's range still has most of its mass.
    for meter in meters.values():
        _, _, error, norm = meter.row()
        assert 0.02 < math.sqrt(error / norm) < 0.6


def test_modules_have_ranges_of_their_own():
    stored = Compression(rules=(Rule("layers.0.*", range="running"),))
    assert stored.settings_of("layers.0.ffn.0").range == "running"
    assert stored.settings_of("layers.1.ffn.0") == (8, 64, "exact")
