"""Which layers stay softmax attention: the damage that is measured, and the choice that is made of it."""

import itertools
import math

import pytest
import torch

from models.config import MoEConfig
from tests.helpers import draw_tokens, tiny_decoder
from tests.trainer.test_hybrid import converted, softmax
from trainer.data.batch import make_batch
from trainer.errors import ConfigError
from trainer.layer_choice import (
    Damage,
    Meter,
    candidates,
    choose,
    describe,
    evenly_spaced,
    final_errors,
    measurements,
    open_replacer,
)
from trainer.stored.inference import LoadedModel

LENGTH = 12


def loaded(model, path="base"):
    return LoadedModel(model, None, path, {}, None)


def replacer(model, linear="gated_delta_net", keep=0, **changes):
    options = {"keep": keep, "window": None, "drop_biases": False, "seed": 0} | changes
    return open_replacer(loaded(model), linear, {}, **options)


def windows(count=4, packed=False, seed=0):
    """Micro-batches of two windows each, with a document's end now and then; the last window is padding."""
    batches = []
    for number in range(count):
        tokens = draw_tokens(2, LENGTH + 1, seed=seed + number).numpy()
        mask = torch.ones(2, LENGTH).numpy()
        mask[1] = 0 if number == count - 1 else mask[1]
        batches.append(make_batch(tokens, 7, packed, mask))
    return batches


def with_one_layer_that_matters(layer, layers=3):
    """Only this layer's attention adds much to the residual stream."""
    model = tiny_decoder("full_attention", num_layers=layers)
    with torch.no_grad():
        for number, block in model.layers.items():
            block.mixer.o_proj.weight.mul_(20 if int(number) == layer else 0.05)
    return model


@pytest.mark.parametrize("packed", [False, True])
def test_damage_is_the_divergence_of_the_converted_model(tmp_path, packed):
    base = softmax(tmp_path / "source")
    hybrid, _ = converted(tmp_path, "full_attention, retention, full_attention")
    meter = Meter(replacer(base, "retention"), windows(packed=packed), LENGTH)
    found = meter.damage(frozenset({1}))
    divergences = []
    with torch.no_grad():
        for batch in windows(packed=packed):
            p, q = (
                model(batch.tokens, batch.positions, batch.documents).log_softmax(-1).flatten(0, 1)
                for model in (base, hybrid)
            )
            kl = (p.exp() * (p - q)).sum(-1).view(2, LENGTH).mean(1)
            divergences += kl[batch.loss_mask.view(2, LENGTH)[:, 0] > 0].tolist()
    assert len(divergences) == 7, "the eighth window is padding"
    mean, spread = torch.tensor(divergences).mean().item(), torch.tensor(divergences).std().item()
    assert found.kl == pytest.approx(mean, rel=1e-4) and found.kl > 0
    assert found.error == pytest.approx(spread / math.sqrt(7), rel=1e-3)


def test_what_changes_nothing_does_no_damage():
    meter = Meter(
        replacer(tiny_decoder("full_attention"), "sliding_window_attention", window=LENGTH), windows(), LENGTH
    )
    assert meter.damage(frozenset({0, 1})).kl == pytest.approx(0, abs=1e-6)
    narrow = replacer(tiny_decoder("full_attention"), "sliding_window_attention", window=2)
    assert Meter(narrow, windows(), LENGTH).damage(frozenset({0, 1})).kl > 1e-3


@pytest.mark.parametrize("method", ["greedy", "one_shot"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_layer_that_matters_stays(layer, method):
    meter = Meter(replacer(with_one_layer_that_matters(layer)), windows(), LENGTH)
    choice = choose(meter.damage, [0, 1, 2], 1, method)
    assert set(choice.replaced) == {0, 1, 2} - {layer}
    alone = choice.measured[0]
    assert alone[layer].kl > 10 * max(alone[other].kl for other in choice.replaced)


@pytest.mark.parametrize("linear", ["gated_delta_net", "hgrn2", "retention + sliding_window_attention"])
def test_greedy_s_steps_are_the_least_of_all_subsets(linear):
    base = tiny_decoder("full_attention", num_layers=4)
    meter = Meter(replacer(base, linear), windows(), LENGTH)
    every = {
        frozenset(subset): meter.damage(frozenset(subset))
        for size in (1, 2, 3)
        for subset in itertools.combinations(range(4), size)
    }
    choice = choose(meter.damage, range(4), 1, "greedy")
    assert choice.replaced[0] == min(range(4), key=lambda layer: every[frozenset({layer})].kl)
    so_far = set()
    for layer, step in zip(choice.replaced, choice.measured, strict=True):
        assert step == {other: every[frozenset(so_far | {other})] for other in set(range(4)) - so_far}
        assert layer == min(step, key=lambda other: step[other].kl)
        so_far.add(layer)
    assert choice.damage == every[frozenset(so_far)]
    once = choose(meter.damage, range(4), 2, "one_shot")
    assert list(once.replaced) == sorted(range(4), key=lambda layer: every[frozenset({layer})].kl)[:2]
    assert once.damage == every[frozenset(once.replaced)]


def test_greedy_sees_layers_that_stand_in_for_each_other():
    """0 and 1 do the same: one of them can go, but not both."""

    def measure(replaced):
        return Damage(sum({0: 1, 1: 1.5, 2: 2}[layer] for layer in replaced) + 10.0 * (replaced >= {0, 1}), 0.1)

    assert choose(measure, [0, 1, 2], 1, "one_shot").replaced == (0, 1)
    assert choose(measure, [0, 1, 2], 1, "greedy").replaced == (0, 2)


@pytest.mark.parametrize("method", ["greedy", "one_shot"])
@pytest.mark.parametrize(("layers", "keep"), [(4, 3), (4, 1), (5, 0), (2, 1)])
def test_how_often_it_measures(layers, keep, method):
    asked = []
    choice = choose(lambda replaced: asked.append(replaced) or Damage(len(replaced), 0), range(layers), keep, method)
    assert len(asked) == measurements(layers, keep, method)
    assert len(choice.replaced) == layers - keep and choice.damage.kl == layers - keep


def test_an_evenly_spaced_pattern():
    assert evenly_spaced(range(8), 2) == {0, 1, 2, 4, 5, 6}
    assert evenly_spaced([0, 1, 3, 5, 6], 2) == {0, 1, 5}
    assert evenly_spaced(range(3), 3) == set()


@pytest.mark.parametrize("linear", ["gated_delta_net", "hgrn", "retention", "spikingbrain_gla"])
def test_alignment_learns_the_attention_s_outputs(linear):
    base = tiny_decoder("full_attention", num_layers=3)
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    own = replacer(base, linear)
    damage = Meter(own, windows(), LENGTH).damage(frozenset({0, 1, 2}))
    errors = list(own.align(windows(8, seed=50), 40, 1e-2))
    assert len(errors) == 40
    for layer in range(3):
        assert final_errors(errors)[layer] < 0.8 * errors[0][layer]
    assert all(torch.equal(parameter, before[name]) for name, parameter in base.named_parameters())
    after = Meter(own, windows(), LENGTH).damage(frozenset({0, 1, 2}))
    assert after.kl < damage.kl
    text = describe(choose(Meter(own, windows(), LENGTH).damage, range(3), 1, "greedy"), final_errors(errors), after)
    assert "| stays" in text and "an evenly spaced pattern that keeps as many: " in text


def test_layers_are_aligned_independently():
    """On the base's own inputs: a layer learns the same whatever becomes of the others."""
    changes = {"delta_net__num_heads": 4, "delta_net__expand_v": 1.0}
    base = tiny_decoder("full_attention, delta_net", num_layers=4, **changes)
    both = list(replacer(base, "delta_net").align(windows(seed=9), 5, 1e-2))
    assert both[-1].keys() == {0, 2}
    alone = replacer(base, "delta_net")
    alone.layers = [2]
    assert [step[2] for step in alone.align(windows(seed=9), 5, 1e-2)] == [step[2] for step in both]


def test_what_cannot_be_chosen():
    with pytest.raises(ConfigError, match="keep is 2, and base has 2 layers to replace; keep fewer"):
        replacer(tiny_decoder("full_attention"), keep=2)
    with pytest.raises(ConfigError, match="base has experts; choose the layers first"):
        replacer(tiny_decoder("full_attention", moe=MoEConfig(num_experts=2)))
    config = tiny_decoder("full_attention, sliding_window_attention, hgrn2", num_layers=3).model_config
    assert candidates(config, "gated_delta_net") == [0, 1]
    assert candidates(config, "sliding_window_attention") == [0]
