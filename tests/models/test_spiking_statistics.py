"""What neurons count: against counting by hand, over micro-batches, stages and recomputation, and the metrics of it."""

import pytest
import torch

from kernels.spiking import spike_counts
from kernels.spiking.measures import PICOJOULES_SPIKE
from models import spiking_statistics as counted
from models.config import MoEConfig, RouterConfig, SpikingConfig
from models.decoder import Decoder, initialize
from models.saved_activations import RECOMPUTE, BlockPolicy, Policy
from models.statistics import StepStatistics
from tests.helpers import VOCABULARY, draw_tokens, tiny_model_config

EXPERTS = MoEConfig(num_experts=4, shared_experts=1, expert_hidden_size=16, router=RouterConfig(top_k=2))
TOKENS, POSITIONS = draw_tokens(3, 12), torch.arange(12)[None]


def configure(pattern=None, **settings):
    moe = settings.pop("moe", MoEConfig())
    return tiny_model_config(pattern, spiking=SpikingConfig(layers=["all"], **settings), moe=moe)


def build(config, layers=None):
    model = Decoder(config, VOCABULARY, layers)
    initialize(model, 0)
    return model


def count(model, tokens=TOKENS, micro_batches=1, backward=False):
    """The totals of some tokens, and the inputs that neurons got, by name."""
    seen = {}
    hooks = [
        neuron.register_forward_pre_hook(lambda module, args, name=name: seen.setdefault(name, []).append(args[0]))
        for name, neuron in counted.named_neurons([model]).items()
    ]
    counted.begin([model], model.model_config)
    for part in tokens.chunk(micro_batches):
        total, _ = model(part, POSITIONS.expand(len(part), -1), labels=part)
        if backward:
            total.backward()
    for hook in hooks:
        hook.remove()
    return counted.collect([model], model.model_config), seen


def test_activities_are_those_of_the_counts():
    model = build(configure("full_attention", k=2.0))
    totals, seen = count(model)
    found = counted.activities(model.model_config, totals)
    assert list(found) == [
        f"layers.{i}.{n}"
        for i in range(model.model_config.num_layers)
        for n in ("mixer.neurons.o_proj", "mixer.neurons.input", "ffn.neurons.down_proj", "ffn.neurons.input")
    ]
    for name, activity in found.items():
        inputs = {id(x): x.detach() for x in seen[name]}
        assert len(inputs) == 1, "readers of one tensor share a neuron"
        counts = spike_counts(next(iter(inputs.values())), k=2.0)[0].int().abs()
        measures = activity.measures
        assert measures.counts == counts.numel() and measures.rows == 36
        assert measures.total == counts.sum()
        bits = sum((counts >> place) & 1 for place in range(12))
        assert measures.spikes == bits.sum()
        assert activity.silent_channels == int((counts.flatten(0, 1).sum(0) == 0).sum())
        assert activity.channels == counts.shape[-1]
    # The queries, keys and values read one input; the gate and up projection another.
    first, attention = model.layers["0"], model.model_config.attention
    outputs = first.mixer.q_proj.out_features + first.mixer.k_proj.out_features + first.mixer.v_proj.out_features
    assert attention.num_kv_heads < attention.num_heads
    entering = found["layers.0.mixer.neurons.input"]
    assert entering.operations.additions == entering.measures.spikes * outputs
    gate = found["layers.0.ffn.neurons.input"]
    assert gate.operations.products == gate.measures.counts * 2 * model.model_config.ffn_hidden_size


@pytest.mark.parametrize("moe", [MoEConfig(), EXPERTS])
def test_micro_batches_stages_and_recomputation_count_once(moe):
    config = configure(moe=moe)
    whole, _ = count(build(config))
    parts, _ = count(build(config), micro_batches=3)
    # Of a channel, the micro-batches in which it fired are counted.
    assert same_totals(config, whole, parts)
    for policy in (BlockPolicy(block=RECOMPUTE), BlockPolicy(mixer=RECOMPUTE, ffn=RECOMPUTE)):
        model = build(config)
        model.keep(Policy(policy))
        again, _ = count(model, backward=True)
        assert again == whole
    stages = [build(config, range(1)), build(config, range(1, config.num_layers))]
    counted.begin(stages, config)
    hidden = stages[0].hidden_states(TOKENS, POSITIONS.expand(3, -1))
    stages[1].hidden_states(TOKENS, POSITIONS.expand(3, -1), entering=hidden)
    shares = [counted.collect([stage], config) for stage in stages]
    assert [a + b for a, b in zip(*shares, strict=True)] == whole
    assert all(any(share) for share in shares)


def same_totals(config, a, b):
    found = [counted.activities(config, totals) for totals in (a, b)]
    return found[0] == found[1]


def test_routed_experts_count_the_tokens_that_they_get():
    config = configure(moe=EXPERTS)
    totals, _ = count(build(config))
    found = counted.activities(config, totals)
    routed = {name: place for name, place in counted.places(config).items() if place.is_routed}
    assert routed and all(".ffn.experts.neurons." in name for name in routed)
    for name, place in routed.items():
        # Two experts a token.
        assert found[name].measures.rows == 2 * TOKENS.numel()
        assert place.outputs == (config.hidden_size if name.endswith("down_proj") else 2 * 16)
    assert counted.tokens(config, found) == TOKENS.numel()


def test_metrics_are_of_all_neurons_and_by_layer():
    config = configure(k=3.0)
    totals, _ = count(build(config))
    found, metrics = counted.activities(config, totals), counted.metrics(config, totals)
    spikes = sum(a.measures.spikes for a in found.values())
    counts = sum(a.measures.counts for a in found.values())
    window = sum(a.measures.window_spikes for a in found.values())
    assert metrics["spiking/firing_rate"] == pytest.approx(spikes / counts)
    assert metrics["spiking/sparsity"] == pytest.approx(1 - window / (3 * counts))
    additions = sum(a.operations.additions for a in found.values())
    assert metrics["spiking/operations_per_token"] == pytest.approx(additions / 36)
    assert metrics["spiking/picojoules_per_token"] == pytest.approx(additions * PICOJOULES_SPIKE / 36)
    products = sum(a.operations.products for a in found.values())
    assert metrics["spiking/energy_saved"] == pytest.approx(1 - additions * 0.03 / (products * 1.5))
    assert len(metrics["spiking/sparsity_by_layer"][0]) == config.num_layers
    by_layer = metrics["spiking/picojoules_per_token_by_layer"][0]
    assert sum(by_layer) == pytest.approx(metrics["spiking/picojoules_per_token"])
    # A finer neuron fires more.
    finer, _ = count(build(configure(k=6.0)))
    assert counted.metrics(configure(k=6.0), finer)["spiking/sparsity"] < metrics["spiking/sparsity"]


def test_steps_in_which_neurons_count():
    config = configure(start_step=2)
    model = build(config)
    statistics = StepStatistics(config, [model], measure_every=2)
    found = []
    for step in range(4):
        statistics.begin(step)
        model(TOKENS, POSITIONS.expand(3, -1), labels=TOKENS)
        totals = statistics.collect()
        statistics.finish(totals)
        found.append(statistics.metrics(totals))
        # Nobody counts between steps: a validation is not a step's.
        assert all(neuron.observer is None for neuron in counted.named_neurons([model]).values())
    assert [bool(metrics) for metrics in found] == [False, False, False, True]
    never = StepStatistics(config, [model], measure_every=0)
    never.begin(3)
    assert never.collect() == [] and never.metrics([]) == {}
    floats = tiny_model_config()
    nothing = StepStatistics(floats, [build(floats)], measure_every=1)
    nothing.begin(0)
    assert nothing.collect() == [] and nothing.metrics([]) == {}


def test_counting_changes_nothing():
    config = configure()
    outputs = []
    for counts in (False, True):
        model = build(config)
        if counts:
            counted.begin([model], config)
        total, _ = model(TOKENS, POSITIONS.expand(3, -1), labels=TOKENS)
        total.backward()
        outputs.append([total.detach(), *(parameter.grad for parameter in model.parameters())])
    for a, b in zip(*outputs, strict=True):
        assert torch.equal(a, b)


def test_a_silent_channel_is_found():
    config = configure("full_attention")
    model = build(config)
    with torch.no_grad():
        model.layers["0"].ffn.up_proj.weight[5] = 0
    totals, _ = count(model)
    assert counted.activities(config, totals)["layers.0.ffn.neurons.down_proj"].silent_channels >= 1


def test_a_raster_records_counts_and_leaves_the_neurons_as_they_were():
    config = configure(moe=EXPERTS)
    model = build(config)
    counts = counted.record(model, TOKENS[:1], POSITIONS)
    assert counts and not any(".experts." in name for name in counts)
    assert all(neuron.observer is None for neuron in counted.named_neurons([model]).values())
    for name, image in counted.rasters(counts, channels=8, tokens_shown=10).items():
        assert image.shape == (8, 10)
        step = counts[name].shape[-1] // 8
        assert image[1].tolist() == counts[name][:10, 0, step].tolist()
