"""Temporal-delta spikes: the receiver's numbers, what is sent, borders of documents, states, and gradients."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.documents import Documents
from kernels.spiking import delta_changes, delta_levels, delta_spike, event_linear, spike
from tests.helpers import documents_of
from tests.processes import run_ranks

SETTINGS = settings(max_examples=60, deadline=None)
DEAD_ZONES = st.sampled_from([0.0, 0.5, 0.8, 2.0])
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def draw(time: int, channels: int = 4, batch: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(time)
    return 3 * torch.randn(batch, time, channels, generator=generator, dtype=torch.float64).to(dtype)


def levels_of_one_channel(x: list[float], threshold: float, dead_zone: float, level: int = 0) -> list[int]:
    """The definition, number by number."""
    found = []
    for value in x:
        if not dead_zone or abs(value / threshold - level) > dead_zone:
            level = round(value / threshold)
        found.append(level)
    return found


@SETTINGS
@given(LENGTHS, DEAD_ZONES, st.floats(0.05, 3), st.booleans())
def test_equals_the_definition_and_restarts_at_each_document(
    lengths: list[int], dead_zone: float, threshold: float, with_state: bool
) -> None:
    documents, x = documents_of(lengths), draw(sum(lengths))
    state = torch.arange(4.0 * len(lengths), dtype=torch.float64).view(len(lengths), 4) if with_state else None
    options: dict[str, Any] = {"threshold": threshold, "dead_zone": dead_zone, "initial_state": state}
    levels, final = delta_levels(x, documents=documents, output_final_state=True, **options)
    assert final is not None
    for n, part in enumerate(x[0].split(lengths)):
        for channel in range(4):
            before = 0 if state is None else int(state[n, channel])
            expected = levels_of_one_channel(part[:, channel].tolist(), threshold, dead_zone, before)
            assert levels[0].split(lengths)[n][:, channel].tolist() == expected
            assert final[n, channel] == expected[-1]
    out, _ = delta_spike(x, documents=documents, **options)
    assert torch.equal(out, levels * threshold)


@SETTINGS
@given(st.integers(2, 20), st.data(), DEAD_ZONES, st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_cut_anywhere_with_its_state_it_is_the_whole(
    time: int, data: st.DataObject, dead_zone: float, dtype: torch.dtype
) -> None:
    x, cut = draw(time, batch=3, dtype=dtype), data.draw(st.integers(1, time - 1))
    options: dict[str, Any] = {"threshold": torch.tensor([0.3, 0.5, 1.0, 2.0]), "dead_zone": dead_zone}
    whole, end = delta_spike(x, output_final_state=True, **options)
    parts, changes, state = [], [], None
    for part in (x[:, :cut], x[:, cut:]):
        out, after = delta_spike(part, initial_state=state, output_final_state=True, **options)
        levels, _ = delta_levels(part, initial_state=state, **options)
        changes.append(delta_changes(levels, initial_state=state))
        parts.append(out)
        state = after
    assert whole.dtype == dtype
    assert torch.equal(torch.cat(parts, 1), whole)
    assert end is not None and state is not None and torch.equal(state, end)
    levels, _ = delta_levels(x, **options)
    sent = delta_changes(levels)
    assert torch.equal(torch.cat(changes, 1), sent)
    assert torch.equal(sent.cumsum(1), levels), "the receiver adds up what is sent"


def test_packed_documents_are_those_by_themselves() -> None:
    lengths = [3, 1, 7, 2]
    documents, x = documents_of(lengths), draw(13)
    for dead_zone in (0.0, 1.5):
        options: dict[str, Any] = {"threshold": 0.9, "dead_zone": dead_zone}
        packed, _ = delta_levels(x, documents=documents, **options)
        alone = [delta_levels(part, **options)[0] for part in x.split(lengths, 1)]
        assert torch.equal(packed, torch.cat(alone, 1))
        sent = delta_changes(packed, documents=documents)
        assert torch.equal(sent, torch.cat([delta_changes(levels) for levels in alone], 1))
        # Bounds as a tensor, as the other kernels take them.
        bounds = torch.tensor(documents.bounds, dtype=torch.int32)
        assert torch.equal(delta_levels(x, cu_seqlens=bounds, **options)[0], packed)


@SETTINGS
@given(st.integers(1, 30), st.floats(1e-4, 3), DEAD_ZONES)
def test_errors_do_not_add_up_and_vanish_with_the_threshold(time: int, threshold: float, dead_zone: float) -> None:
    x = draw(time)
    out, _ = delta_spike(x, threshold=threshold, dead_zone=dead_zone)
    assert ((out - x).abs() <= max(dead_zone, 0.5) * threshold * (1 + 1e-9)).all()


def test_a_wider_dead_zone_sends_less_and_a_constant_input_nothing() -> None:
    x = draw(200).cumsum(1) * 0.05
    sent = []
    for dead_zone in (0.0, 0.5, 0.75, 1.0, 2.0):
        levels, _ = delta_levels(x, threshold=0.2, dead_zone=dead_zone)
        sent.append(int((delta_changes(levels) != 0).sum()))
    assert sent[0] == sent[1] and sent == sorted(sent, reverse=True) and sent[-1] < sent[0] / 2
    still = torch.full((1, 5, 2), 1.3)
    changes = delta_changes(delta_levels(still, threshold=0.5)[0])
    assert changes[0, :, 0].tolist() == [3, 0, 0, 0, 0]


def test_without_a_dead_zone_it_is_the_spike_with_its_gradients() -> None:
    for gradient in ("plain", "clipped", "surrogate"):
        found = []
        for op in (lambda x, **o: delta_spike(x, **o)[0], spike):
            x, threshold = draw(11).requires_grad_(), torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
            out = op(x, threshold=threshold, gradient=gradient, count_range=(-4, 4))
            (out * out.detach()).sum().backward()
            found.append((out, x.grad, threshold.grad))
        for ours, theirs in zip(*found, strict=True):
            assert torch.equal(ours, theirs)


def test_gradients_under_a_dead_zone() -> None:
    x = torch.tensor([[[1.0], [1.4], [9.0], [2.2]]], dtype=torch.float64, requires_grad=True)
    threshold = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    out, _ = delta_spike(x, threshold=threshold, dead_zone=1.0, count_range=(-3, 3), gradient="clipped")
    assert out[0, :, 0].tolist() == [0, 1, 3, 3]
    out.backward(torch.tensor([[[1.0], [10.0], [100.0], [1000.0]]], dtype=torch.float64))
    assert x.grad is not None and threshold.grad is not None
    # Straight through, but for the count 9 that is clipped; dx̂/dV is the level.
    assert x.grad[0, :, 0].tolist() == [1, 10, 0, 1000]
    assert threshold.grad == 0 * 1 + 1 * 10 + 3 * 100 + 3 * 1000


def test_what_is_not_finite_stays_with_its_token() -> None:
    x = draw(4)
    clean, _ = delta_spike(x, threshold=0.5, dead_zone=1.0)
    x[0, 1, 2] = math.nan
    x[0, 2, 3] = math.inf
    out, final = delta_spike(x, threshold=0.5, dead_zone=1.0, output_final_state=True)
    wrong = ~out.isfinite()
    assert wrong.nonzero().tolist() == [[0, 1, 2], [0, 2, 3]]
    assert final is not None and final[0, :3].isfinite().all()
    assert torch.equal(out[0, :, :2], clean[0, :, :2])


def test_a_linear_layer_adds_up_the_products_of_changed_channels() -> None:
    x = draw(12, channels=8)
    threshold = torch.linspace(0.3, 2, 8, dtype=torch.float64)
    weight = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out, _ = delta_spike(x, threshold=threshold, dead_zone=1.0)
    levels, _ = delta_levels(x, threshold=threshold, dead_zone=1.0)
    changes = delta_changes(levels)
    assert (changes == 0).any()
    y, weight_V = torch.zeros(5, dtype=torch.float64), threshold[:, None] * weight
    for t in range(12):
        y = y + event_linear(changes[0, t].int(), weight_V)
        torch.testing.assert_close(y, out[0, t] @ weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("world", [2, 4])
def test_tokens_over_ranks_give_the_numbers_of_one(world: int) -> None:
    run_ranks(world, "-m", "tests.kernels.spiking.delta_ranks", imported="torch")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, "threshold"),
        ({"threshold": torch.ones(3)}, "threshold"),
        ({"dead_zone": 0.3}, "dead_zone"),
        ({"dead_zone": math.inf}, "dead_zone"),
        ({"dead_zone": 1.0, "gradient": "surrogate"}, "surrogate"),
        ({"dead_zone": 1.0, "count_range": (1, 3)}, "include 0"),
        ({"dead_zone": 1.0, "initial_state": torch.zeros(2, 4)}, r"initial_state must be \[N, D\] = \(1, 4\)"),
        ({"dead_zone": 1.0, "documents": Documents((0, 3))}, "cu_seqlens"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        delta_spike(draw(5), **({"threshold": 1.0} | options))
