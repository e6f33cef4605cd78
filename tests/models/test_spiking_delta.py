"""Temporal-delta spikes in a model: documents, generation, recomputation, and the changes that are counted."""

import pytest
import torch

from models import spiking_statistics as counted
from models.config import MIXERS, MoEConfig, RouterConfig, SpikingConfig
from models.saved_activations import EVERYTHING, RECOMPUTE, BlockPolicy, Policy
from models.spiking import finish_step, neurons
from models.statistics import StepStatistics
from tests.helpers import VOCABULARY, draw_tokens, greedy, pack, rows, tiny_decoder, tiny_model_config
from tests.trainer.test_plan import kept_by_block
from trainer.planning.dry_run import Cut, DryRun

ZONE = {"code": "delta", "threshold": "per_channel", "dead_zone": 1.5}
TOKENS = draw_tokens(2, 24)


def build(pattern=None, **settings):
    """A model whose neurons know their inputs' averages, after a step without an update."""
    model = tiny_decoder(pattern, spiking=SpikingConfig(layers=["all"], **ZONE | settings))
    statistics = StepStatistics(model.model_config, [model], measure_every=0)
    statistics.begin(0)
    model(*rows(TOKENS), labels=TOKENS)
    finish_step([model], None)
    statistics.begin(1)
    assert all(neuron.average.all() for neuron in neurons([model]))
    return model


def loss_and_gradients(model):
    model.zero_grad()
    total, _ = model(*rows(TOKENS), labels=TOKENS)
    total.backward()
    return [total.detach(), *(parameter.grad for parameter in model.parameters())]


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_without_a_dead_zone_it_is_the_model_that_sends_counts():
    ours, theirs = (build(code=code, dead_zone=0.0) for code in ("delta", "counts"))
    assert same(loss_and_gradients(ours), loss_and_gradients(theirs))
    assert not same(loss_and_gradients(build()), loss_and_gradients(theirs))


@pytest.mark.parametrize("mixer", MIXERS)
def test_documents_are_those_by_themselves(mixer):
    model = build(mixer)
    documents = [draw_tokens(1, length, seed=length)[0] for length in (5, 1, 9)]
    tokens, positions, packed = pack(documents)
    together = model(tokens, positions, packed)
    alone = torch.cat([model(*rows(document[None])) for document in documents], 1)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mixer", MIXERS)
def test_generation_holds_what_the_forward_holds(mixer):
    model = build(mixer)
    prompt = draw_tokens(2, 7)
    drawn = greedy(model, prompt, 9)
    whole = torch.cat([prompt, drawn], 1)
    with torch.no_grad():
        logits = model(*rows(whole))
    assert torch.equal(logits[:, 6:-1].argmax(-1), drawn)


def test_recomputation_changes_no_digit():
    found = []
    for policy in (BlockPolicy(), BlockPolicy(block=RECOMPUTE), BlockPolicy(mixer=RECOMPUTE, ffn=RECOMPUTE)):
        model = build()
        model.keep(Policy(policy))
        found.append(loss_and_gradients(model))
    assert same(found[0], found[1]) and same(found[0], found[2])


def test_what_it_keeps_is_planned_to_the_byte():
    for zone in (0.0, 1.5):
        spiking = SpikingConfig(layers=["all"], **ZONE | {"dead_zone": zone})
        model = tiny_model_config("full_attention", num_layers=1, spiking=spiking)
        planned = DryRun(model, VOCABULARY, torch.float32).kept(0, Cut(), 64, EVERYTHING)
        assert planned == kept_by_block(model, EVERYTHING, 64)


def test_changes_are_counted():
    """A model that holds its levels sends less, and one whose tokens do not change next to nothing."""
    sent = {}
    for zone in (0.0, 1.5, 3.0):
        model = build(dead_zone=zone)
        counted.begin([model], model.model_config)
        model(*rows(TOKENS))
        totals = counted.collect([model], model.model_config)
        sent[zone] = counted.metrics(model.model_config, totals)["spiking/firing_rate"]
    assert sent[0.0] > sent[1.5] > sent[3.0] > 0
    model, still = build("full_attention", dead_zone=0.0), torch.full((1, 24), 3)
    counted.begin([model], model.model_config)
    # Without positions that differ, nothing tells the tokens apart.
    model(still, torch.zeros_like(still))
    found = counted.activities(model.model_config, counted.collect([model], model.model_config))
    first = found["layers.0.mixer.neurons.input"].measures
    assert first.silent >= 23 / 24
    assert first.counts == 24 * model.model_config.hidden_size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"code": "delta"}, "threshold=adaptive computes one .* use threshold=running or threshold=per_channel"),
        (ZONE | {"dead_zone": 0.3}, "or 1/2 or more"),
        ({"dead_zone": 1.0}, "set model.spiking.code=delta"),
        (ZONE | {"gradient": "surrogate"}, r"surrogate needs .* dead_zone=\d"),
        (ZONE | {"queries": True}, "use queries=false or code=counts"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        SpikingConfig(layers=["all"], **settings)


def test_routed_experts_have_no_order():
    moe = MoEConfig(num_experts=4, shared_experts=1, expert_hidden_size=16, router=RouterConfig(top_k=2))
    with pytest.raises(ValueError, match=r"selects the routed experts layers\.\d\.ffn\.experts, "):
        tiny_decoder(moe=moe, spiking=SpikingConfig(layers=["all"], **ZONE))
    patterns = ["*.mixer.*", "*.shared_experts.*"]
    assert neurons([tiny_decoder(moe=moe, spiking=SpikingConfig(layers=patterns, **ZONE))])
