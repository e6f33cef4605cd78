"""Measures of compressed activations: bytes as counted by storage, the rounding error, and metrics of a step."""

import math
from dataclasses import replace

import pytest
import torch

from models import compression_statistics as measured
from models.decoder import Decoder
from models.saved_activations import KEEP, RECOMPUTE
from models.statistics import StepStatistics
from tests.helpers import VOCABULARY, draw_tokens, tiny_model_config
from tests.models.test_compression import EIGHT, EXPERTS, Count, T, gradients, model_of, policy_of


def run(model, policy):
    model.keep(policy)
    return measured.measure(model, draw_tokens(1, T), torch.arange(T)[None])[1]


def saved_by_blocks(model, policy):
    """Bytes of the storages that the blocks save, counted from outside."""
    model.keep(policy)
    count = Count(model.parameters())
    with count.counting():
        model.hidden_states(draw_tokens(1, T), torch.arange(T)[None])
    return count.bytes


@pytest.mark.parametrize("mixer", ["full_attention", "gated_delta_net"])
@pytest.mark.parametrize("parts", [{}, {"mixer": RECOMPUTE}], ids=["keep", "recompute"])
def test_bytes_are_those_of_storages(mixer, parts):
    model = model_of(mixer)
    meters = run(model, policy_of(EIGHT, **parts))
    kept, plain = (saved_by_blocks(model, p) for p in (policy_of(EIGHT, **parts), policy_of(None, block=KEEP, **parts)))
    outside = kept - sum(meter.kept for meter in meters.values())
    assert outside == plain - sum(meter.saved for meter in meters.values())
    assert 0 < outside < 3 * T * 32 * 4


def test_places_and_errors():
    model = model_of("full_attention", num_layers=2)
    meters = run(model, policy_of(EIGHT))
    assert list(meters) == [0, 1]
    assert {"mixer_norm.0", "ffn_norm.0", "ffn.0", "ffn.1"} <= set(meters[0].places)
    for meter in meters.values():
        for tensors in meter.places.values():
            error, norm = tensors.squares.tolist()
            # A step is a 255th of the range of a group of 16, which spans some four deviations.
            assert 0.001 < math.sqrt(error / norm) < 0.02
            assert tensors.kept < 0.45 * tensors.saved
    exact = run(model, policy_of(replace(EIGHT, bits=16)))
    assert all(meter.row()[2:] == [0, 0] and meter.kept < meter.saved for meter in exact.values())


def test_a_step_has_metrics_of_all_its_micro_batches():
    model = model_of("full_attention", moe=EXPERTS, num_layers=2)
    model.keep(policy_of(EIGHT))
    statistics = StepStatistics(model.model_config, [model], measure_every=2)
    found = []
    for step, micro_batches in enumerate([1, 1, 1, 2]):
        statistics.begin(step)
        for _ in range(micro_batches):
            model.hidden_states(draw_tokens(1, T), torch.arange(T)[None])
        found.append(statistics.metrics(statistics.collect()))
    assert not any(name.startswith("compression/") for name in found[0] | found[2])
    one, two = found[1], found[3]
    assert two["compression/kept_bytes"] == 2 * one["compression/kept_bytes"] > 0
    assert two["compression/saved"] == one["compression/saved"] > 0.5
    assert one["compression/kept_bytes"] == sum(one["compression/kept_bytes_by_layer"][0])
    assert min(one["compression/error_by_layer"][0]) > 0.001


def test_nothing_is_measured_without_compression():
    model = Decoder(tiny_model_config("full_attention"), VOCABULARY)
    assert measured.collect([model], model.model_config) == []
    assert measured.metrics([]) == {}


def test_measuring_changes_no_gradient():
    model = model_of("gated_delta_net, full_attention")
    plain = gradients(model, policy_of(EIGHT))[1]
    measured.begin([model])
    again = gradients(model, policy_of(EIGHT))[1]
    # `gradients` sets the policy again, which leaves the meters where they are.
    assert measured.collect([model], model.model_config)[0] > 0
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
