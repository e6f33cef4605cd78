"""Spiking neurons in a model: where they are, what they share, when they are on, and what their averages follow."""

import copy
import re
from dataclasses import replace

import pytest
import torch

from kernels.quantization.int8 import fake_int8, fake_int8_weight
from kernels.spiking import spike_counts, spike_reference
from models import spiking
from models.config import MIXERS, ActivityConfig, MoEConfig, RouterConfig, SpikingConfig
from models.decoder import Decoder
from models.mixers import softmax
from models.mixers.base import LayerCache
from models.parallel import Projection
from models.saved_activations import EVERYTHING, RECOMPUTE, BlockPolicy, Policy
from models.spiking import Neuron, begin_step, finish_step, neurons, set_step
from tests.helpers import CountMargin, draw_tokens, greedy, rows, tiny_decoder

EXPERTS = MoEConfig(num_experts=4, shared_experts=1, expert_hidden_size=16, router=RouterConfig(top_k=2))


def spiking_decoder(pattern=None, layers=("all",), seed=0, moe=None, **settings):
    changes = {"spiking": SpikingConfig(layers=list(layers), **settings)} | ({} if moe is None else {"moe": moe})
    return tiny_decoder(pattern, seed, **changes)


def projections(model):
    return {name: module for name, module in model.layers.named_modules() if isinstance(module, Projection)}


def reading_spikes(model):
    return {name for name, projection in projections(model).items() if projection.neuron is not None}


def loss_and_gradients(model):
    model.zero_grad()
    tokens = draw_tokens(2, 13)
    total, _ = model(*rows(tokens[:, :-1]), labels=tokens[:, 1:])
    total.backward()
    return total.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def same(one, other):
    (loss, gradients), (other_loss, others) = one, other
    return torch.equal(loss, other_loss) and all(torch.equal(gradients[name], others[name]) for name in gradients)


@pytest.mark.parametrize("mixer", MIXERS)
def test_presets_reach_the_inputs_of_every_mixer(mixer):
    every, released = spiking_decoder(mixer), spiking_decoder(mixer, ["released"])
    assert reading_spikes(every) == projections(every).keys()
    assert reading_spikes(released) == {name for name in projections(every) if not name.endswith("down_proj")}
    assert not reading_spikes(tiny_decoder(mixer)) and not neurons([tiny_decoder(mixer)])
    # What enters is read by all but the output projection, and the second of two in sequence.
    (entering,) = {every.layers["0"].mixer.neurons["input"]} - {None}
    shared = [p for name, p in projections(every).items() if re.fullmatch(r"0\.mixer\.\w+_proj(\.0)?", name)]
    assert len([p for p in shared if p.neuron.__self__ is entering]) == len(shared) - 1


def test_patterns_choose_single_layers():
    model = spiking_decoder(layers=["layers.1.mixer.[qk]_proj", "*.down_proj"])
    assert reading_spikes(model) == {"1.mixer.q_proj", "1.mixer.k_proj", "0.ffn.down_proj", "1.ffn.down_proj"}
    assert [name for name, m in model.named_modules() if isinstance(m, Neuron)] == [
        "layers.0.ffn.neurons.down_proj",
        "layers.1.mixer.neurons.input",
        "layers.1.ffn.neurons.down_proj",
    ]


def test_a_pattern_that_matches_nothing_is_refused_with_close_names():
    with pytest.raises(ValueError, match=r"'layers\.0\.mixer\.qproj' matches no .* are layers\.0\.mixer\.q_proj, "):
        spiking_decoder(layers=["all", "layers.0.mixer.qproj"])


def test_a_feed_forward_is_that_of_its_spikes():
    """Adaptive and by the definition; with float inputs it is another function."""
    model = spiking_decoder(k=2.0, count_range=[-3, 3])
    ffn, x = model.layers["0"].ffn, torch.randn(6, 2, 32)

    def spikes(x):
        return spike_reference(x, k=2.0, count_range=(-3, 3))

    entering = spikes(x)
    hidden = torch.nn.functional.silu(entering @ ffn.gate_proj.weight.T) * (entering @ ffn.up_proj.weight.T)
    torch.testing.assert_close(ffn(x), spikes(hidden) @ ffn.down_proj.weight.T)
    plain = tiny_decoder().layers["0"].ffn
    assert (plain(x) - ffn(x)).norm() > 0.01 * ffn(x).norm()


@pytest.fixture
def fired(monkeypatch):
    """The inputs that were turned into spikes, in order."""
    seen, fire = [], spiking.spike
    monkeypatch.setattr(spiking, "spike", lambda x, **options: seen.append(tuple(x.shape)) or fire(x, **options))
    return seen


@pytest.mark.parametrize("gradients", [False, True])
def test_what_reads_one_tensor_shares_its_spikes(fired, gradients):
    model = spiking_decoder()
    with torch.set_grad_enabled(gradients):
        model(*rows(draw_tokens(2, 12)))
    # Of each layer what enters mixer and feed-forward, and what enters their last projections.
    assert len(fired) == 2 * 4
    assert all(neuron._last is None for neuron in neurons([model])), "nothing is kept beyond a region"


def test_another_input_or_content_or_a_gradient_asks_for_spikes_of_its_own(fired):
    neuron = Neuron(SpikingConfig(layers=["all"]), 8)
    first, second = torch.randn(4, 8), torch.randn(4, 8)
    for x in (first, first, second, first):
        torch.testing.assert_close(neuron(x), spike_reference(x, k=3.0))
    assert len(fired) == 3
    first += 1
    torch.testing.assert_close(neuron(first), spike_reference(first, k=3.0))
    first.requires_grad_()
    with torch.no_grad():
        neuron(first)
    assert neuron(first).requires_grad


RECOMPUTED = {
    "block": BlockPolicy(block=RECOMPUTE),
    "mixer and ffn": BlockPolicy(mixer=RECOMPUTE, ffn=RECOMPUTE),
    "experts": BlockPolicy(moe_activation=RECOMPUTE),
    "all experts": BlockPolicy(moe_experts=RECOMPUTE),
    "busy experts": BlockPolicy(recompute_above=1.0),
}


@pytest.mark.parametrize("threshold", ["adaptive", "learned", "running", "per_channel"])
@pytest.mark.parametrize("policy", RECOMPUTED)
def test_recomputation_gives_the_same_numbers_and_counts_once(fired, policy, threshold):
    model = spiking_decoder("gated_delta_net, full_attention", moe=EXPERTS, threshold=threshold, gradient="surrogate")
    found = []
    for choice in (EVERYTHING, RECOMPUTED[policy]):
        model.keep(Policy(choice))
        begin_step([model], 3)
        found.append((loss_and_gradients(model), [neuron.statistics for neuron in neurons([model])]))
        found[-1] = copy.deepcopy(found[-1])
    (plain, counted), (recomputed, counted_again) = found
    if policy == "busy experts" and threshold == "learned":
        # Their rows are summed up apart from the others', and so are k's gradients.
        for of_one, of_other in zip(plain, recomputed, strict=True):
            torch.testing.assert_close(of_one, of_other)
    else:
        assert same(plain, recomputed)
    if threshold in ("running", "per_channel"):
        torch.testing.assert_close(counted, counted_again, rtol=1e-12, atol=0)
    else:
        assert counted == counted_again == [None] * len(counted)


@pytest.mark.parametrize("threshold", ["adaptive", "learned", "running"])
def test_before_the_start_it_is_the_float_model(threshold):
    model, plain = spiking_decoder(threshold=threshold, start_step=5, moe=EXPERTS), tiny_decoder(moe=EXPERTS)
    begin_step([model], 4)
    loss, gradients = loss_and_gradients(model)
    theirs, others = loss_and_gradients(plain)
    assert torch.equal(loss, theirs)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in others.items())
    of_neurons = [gradient for name, gradient in gradients.items() if name not in others]
    assert len(of_neurons) == (len(neurons([model])) if threshold == "learned" else 0)
    assert all(not gradient.any() for gradient in of_neurons)
    begin_step([model], 5)
    assert not torch.equal(loss_and_gradients(model)[0], theirs)


def test_k_goes_from_its_start_to_its_end():
    config = SpikingConfig(layers=["all"], k=3.0, k_start=15.0, anneal_steps=4, start_step=10)
    assert [config.k_at(step) for step in (0, 10, 11, 13, 14, 100, None)] == [15, 15, 12, 6, 3, 3, 3]
    neuron, x = Neuron(config, 8), torch.randn(4, 8)
    for step, k in ((10, 15.0), (13, 6.0)):
        set_step([neuron], step)
        torch.testing.assert_close(neuron(x), spike_reference(x, k=k))
    # Finer steps are nearer to the floats.
    assert (spike_reference(x, k=15.0) - x).norm() < (spike_reference(x, k=6.0) - x).norm()


def test_a_learned_k_has_the_gradient_of_its_definition():
    neuron = Neuron(SpikingConfig(layers=["all"], threshold="learned"), 8)
    neuron.log_k.data.fill_(0.4)
    x, weight, h = torch.randn(40, 8, dtype=torch.float64), torch.randn(40, 8, dtype=torch.float64), 1e-6
    counts, _ = spike_counts(x, k=neuron.log_k.detach().exp()[0])

    def with_fixed_counts(log_k):
        # Between the steps of the counts.
        return (
            counts * (x.abs().mean(-1, keepdim=True) / torch.tensor(log_k, dtype=torch.float64).exp()) * weight
        ).sum()

    (neuron(x) * weight).sum().backward()
    numeric = (with_fixed_counts(0.4 + h) - with_fixed_counts(0.4 - h)) / (2 * h)
    torch.testing.assert_close(neuron.log_k.grad[0].double(), numeric, rtol=1e-4, atol=0)


@pytest.mark.parametrize("threshold", ["running", "per_channel"])
def test_averages_follow_the_means_of_all_micro_batches(threshold):
    """The first means are taken, the next move them; validation and an earlier step count nothing."""
    neuron = Neuron(SpikingConfig(layers=["all"], threshold=threshold, momentum=0.75), 8)
    steps = [[torch.randn(3, 2, 8), torch.randn(5, 2, 8)], [2 * torch.randn(3, 2, 8), torch.randn(1, 2, 8)]]
    means = []
    for number, parts in enumerate(steps):
        begin_step([neuron], number)
        for x in parts:
            y = neuron(x)
        if number == 0:
            torch.testing.assert_close(y, spike_reference(x, k=3.0))
        else:
            given = means[0].float() / 3
            torch.testing.assert_close(y, spike_reference(x, threshold=given))
        with torch.no_grad():
            neuron(100 * x)
        neuron.eval()(100 * x)
        neuron.train()
        together = torch.cat(parts).abs().double().flatten(0, 1)
        means.append(together.mean() if threshold == "running" else together.mean(0))
        finish_step([neuron], None)
    expected = (0.75 * means[0] + 0.25 * means[1]).float().view(-1)
    torch.testing.assert_close(neuron.average, expected)


def test_averages_do_not_move_without_tokens():
    neuron = Neuron(SpikingConfig(layers=["all"], threshold="per_channel"), 8)
    averages = []
    for step, x in enumerate((torch.randn(4, 8), torch.randn(0, 8))):
        begin_step([neuron], step)
        neuron(x)
        finish_step([neuron], None)
        averages.append(neuron.average.clone())
    assert torch.equal(*averages) and averages[0].all()


def test_every_row_of_an_expert_has_its_own_threshold():
    # In float64, so that products of one row and of five cannot round a count differently.
    experts = spiking_decoder(moe=EXPERTS).double().layers["0"].ffn.experts
    x = torch.randn(5, 32, dtype=torch.float64) * torch.logspace(-2, 2, 5, dtype=torch.float64)[:, None]
    alone = [experts(row[None], torch.tensor([0, 1, 0, 0])) for row in x]
    torch.testing.assert_close(experts(x, torch.tensor([0, 5, 0, 0])), torch.cat(alone))


@pytest.mark.parametrize("pattern", ["gated_delta_net, full_attention", "spikingbrain_gla, sliding_window_attention"])
def test_generation_goes_token_by_token_through_the_same_model(pattern):
    """Each token that is drawn is the most likely one of a forward pass over all before it."""
    model = spiking_decoder(pattern, moe=EXPERTS, seed=4).eval()
    prompt = draw_tokens(2, 6)
    drawn = greedy(model, prompt, 9)
    tokens = torch.cat([prompt, drawn], 1)
    with torch.no_grad(), CountMargin() as margin:
        logits = model(*rows(tokens))
    assert margin.least > 1e-5, "rounding decides no count here"
    assert torch.equal(logits[:, 5:-1].argmax(-1), drawn)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "model.spiking.k is 0: it must be positive"),
        ({"k": float("inf")}, "k is inf: it must be finite"),
        ({"start_step": -1}, "start_step is -1"),
        ({"k_start": 2.0, "anneal_steps": 5}, "k_start is 2.0: it must be finite and at least k=3.0"),
        ({"k_start": 9.0}, "k_start=9.0 with anneal_steps=0"),
        ({"anneal_steps": 9}, "k_start=None with anneal_steps=9"),
        (
            {"k_start": 9.0, "anneal_steps": 9, "threshold": "learned"},
            "k_start=9.0 schedules k, but threshold=learned trains",
        ),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"count_range": [3, 1]}, r"count_range is \[3, 1\]"),
        ({"count_range": [1]}, r"count_range is \[1\]"),
        ({"gradient": "clipped"}, "gradient=clipped needs"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SpikingConfig(layers=["all"], **changes)


def test_a_stage_has_the_neurons_of_its_layers():
    config = spiking_decoder(layers=["layers.0.*", "layers.1.ffn.*"]).model_config
    last = Decoder(replace(config, tie_embeddings=False), 50, range(1, 2))
    assert {name for name, m in last.named_modules() if isinstance(m, Neuron)} == {
        "layers.1.ffn.neurons.input",
        "layers.1.ffn.neurons.down_proj",
    }


W8A = {"queries": True, "int8_keys_values": True, "weights": "int8"}
ATTENTION = "full_attention, sliding_window_attention"


def test_attention_reads_spikes_of_rotated_queries_and_int8_keys_and_values(monkeypatch):
    seen = {}

    def watched(q, k, v, **options):
        seen.update(q=q, k=k, v=v)
        return attention(q, k, v, **options)

    attention = softmax.attention
    monkeypatch.setattr(softmax, "attention", watched)
    inputs = rows(draw_tokens(2, 12))
    tiny_decoder("full_attention", num_layers=1)(*inputs)
    plain = dict(seen)
    changes = {"queries": True, "int8_keys_values": True}
    model = tiny_decoder("full_attention", num_layers=1, spiking=SpikingConfig(**changes))
    model(*inputs).sum().backward()
    torch.testing.assert_close(seen["q"], spike_reference(plain["q"], k=3.0))
    assert torch.equal(seen["k"], fake_int8(plain["k"])) and torch.equal(seen["v"], fake_int8(plain["v"]))
    assert model.layers["0"].mixer.q_proj.weight.grad.any() and model.layers["0"].mixer.k_proj.weight.grad.any()
    assert not reading_spikes(model)


def test_int8_weights_enter_the_products_and_floats_are_trained():
    model = spiking_decoder(layers=["*.ffn.*"], weights="int8", start_step=3)
    ffn, x = model.layers["0"].ffn, torch.randn(6, 2, 32)
    set_step([model], 2)
    plain = ffn(x)
    set_step([model], 3)
    ffn(x).sum().backward()
    assert ffn.down_proj.weight.grad.any()
    entering = spike_reference(x, k=3.0)
    gate, up, down = (fake_int8_weight(p.weight, 128) for p in (ffn.gate_proj, ffn.up_proj, ffn.down_proj))
    hidden = torch.nn.functional.silu(entering @ gate.T) * (entering @ up.T)
    torch.testing.assert_close(ffn(x), spike_reference(hidden, k=3.0) @ down.T)
    assert not torch.equal(plain, ffn(x)) and model.layers["0"].mixer.q_proj.rounding is None


@pytest.mark.parametrize("window", [5, 100])
def test_generation_with_int8_keys_and_values_keeps_a_byte_for_each(window):
    model = tiny_decoder(ATTENTION, 7, moe=EXPERTS, attention__window=window, spiking=SpikingConfig(["all"], **W8A))
    model.eval()
    prompt = draw_tokens(2, 6)
    drawn = greedy(model, prompt, 9)
    tokens = torch.cat([prompt, drawn], 1)
    with torch.no_grad(), CountMargin() as margin:
        logits = model(*rows(tokens))
    assert margin.least > 1e-5, "rounding decides no count here"
    assert torch.equal(logits[:, 5:-1].argmax(-1), drawn)
    caches = [LayerCache() for _ in model.layers]
    with torch.no_grad():
        model.hidden_states(*rows(tokens), caches=caches)
    for cache, length in zip(caches, (15, min(window - 1, 15)), strict=True):
        held = cache.tensors
        assert held["k"].dtype == held["v"].dtype == torch.int8
        assert held["k"].shape == (2, length, 2, 8) and held["k_scale"].shape == (2, length, 2, 1)


@pytest.mark.parametrize("loss", ["rate", "l1"])
@pytest.mark.parametrize("threshold", ["adaptive", "learned", "running", "per_channel"])
def test_the_activity_loss_has_the_gradient_of_its_definition(loss, threshold):
    """Of a whole input: d|s|/dx = sign(s) / V, straight through, and d|s|/d log k = |x / V|; added to what flows."""
    activity = ActivityConfig(loss=loss, weight=0.3, target=2.0)
    neuron = Neuron(SpikingConfig(["all"], threshold=threshold, activity=activity), 8)
    if neuron.log_k is not None:
        neuron.log_k.data.fill_(0.7)
    if neuron.average is not None:
        neuron.average.uniform_(0.5, 2.0)
    begin_step([neuron], 4, loss_scale=5.0)
    x, grad = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8)
    neuron(x).backward(grad)
    counts, threshold_ = spike_counts(x, **neuron.count_options())
    rate = counts.float().abs().mean(-1, keepdim=True)
    outer = 2 * (rate - 2.0) if loss == "rate" else torch.ones_like(rate)
    inner = 5.0 * 0.3 * outer / 8 * counts.sign()
    torch.testing.assert_close(x.grad, grad + inner / threshold_)
    if neuron.log_k is not None:
        own = (inner * (x / threshold_)).sum()
        through_the_spikes = (grad * counts * -threshold_).sum()
        torch.testing.assert_close(neuron.log_k.grad[0], (own + through_the_spikes).detach(), rtol=1e-4, atol=1e-5)


def test_the_activity_loss_is_no_part_of_what_is_reported_nor_of_validation():
    quiet = spiking_decoder(moe=EXPERTS)
    loud = spiking_decoder(moe=EXPERTS, activity=ActivityConfig(loss="l1", weight=0.1))
    (loss, gradients), (same_loss, others) = loss_and_gradients(quiet), loss_and_gradients(loud)
    assert torch.equal(loss, same_loss)
    assert any(not torch.equal(gradients[name], others[name]) for name in gradients)
    for model in (quiet, loud):
        model.eval()
    assert same(loss_and_gradients(quiet), loss_and_gradients(loud))


def test_an_activity_loss_recomputed_is_the_same():
    model = spiking_decoder(moe=EXPERTS, threshold="learned", activity=ActivityConfig(loss="rate"))
    found = []
    for choice in (EVERYTHING, BlockPolicy(mixer=RECOMPUTE, ffn=RECOMPUTE), BlockPolicy(block=RECOMPUTE)):
        model.keep(Policy(choice))
        found.append(loss_and_gradients(model))
    assert same(found[0], found[1]) and same(found[0], found[2])


@pytest.mark.parametrize("loss", ["rate", "l1"])
def test_a_learned_k_gets_quieter_under_an_activity_loss(loss):
    """From 3 down to a target of 1, by the loss alone."""
    neuron = Neuron(SpikingConfig(["all"], threshold="learned", activity=ActivityConfig(loss, 1.0, 1.0)), 64)
    neuron.log_k.data.fill_(3.0).log_()
    optimizer = torch.optim.SGD(neuron.parameters(), 0.05 / 128)
    x = torch.randn(128, 64)
    for step in range(20):
        begin_step([neuron], step)
        optimizer.zero_grad()
        (0 * neuron(x)).sum().backward()
        optimizer.step()
    k = float(neuron.log_k.detach().exp())
    assert 0.7 < k < 1.6 if loss == "rate" else k < 2.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "int8"}, "weights=int8 needs .* model.spiking.layers is empty"),
        ({"activity": ActivityConfig("l1")}, "activity.loss=l1 needs .*layers is empty"),
    ],
)
def test_what_belongs_to_linear_layers_needs_some(changes, message):
    with pytest.raises(ValueError, match=message):
        SpikingConfig(**changes)
    for name in ("weight", "target"):
        with pytest.raises(ValueError, match=f"activity.{name} is -1"):
            ActivityConfig(**{name: -1})
