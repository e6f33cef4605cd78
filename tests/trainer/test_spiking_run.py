"""Spiking models in runs: weights, checkpoints, plans, resuming across the start, recomputation, both engines."""

import json
from dataclasses import replace

import pytest
import torch

from models.config import ActivityConfig, MixerLayoutConfig, MoEConfig, RouterConfig, SpikingConfig
from models.decoder import Decoder
from models.saved_activations import EVERYTHING, RECOMPUTE, BlockPolicy
from models.spiking import Neuron, neurons, set_step
from tests.helpers import VOCABULARY, tiny_model_config
from tests.trainer.conftest import finish, in_process_config, trajectory
from tests.trainer.test_plan import kept_by_block
from tests.trainer.test_weights import write
from trainer.config import CheckpointConfig
from trainer.errors import ConfigError
from trainer.planning.dry_run import Cut, DryRun
from trainer.stored.export import export
from trainer.stored.inference import load_model
from trainer.stored.opening import open_weights
from trainer.stored.weights import check, check_layers, check_tensors, start

EXPERTS = MoEConfig(num_experts=4, shared_experts=1, expert_hidden_size=32, router=RouterConfig(top_k=4))
POLICIES = {
    "keep": EVERYTHING,
    "mixer": BlockPolicy(mixer=RECOMPUTE),
    "activation": BlockPolicy(moe_activation=RECOMPUTE),
    "experts": BlockPolicy(moe_experts=RECOMPUTE),
    "block": BlockPolicy(block=RECOMPUTE),
}


def config_of(**settings):
    return SpikingConfig(layers=["all"], **settings)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"threshold": "learned"},
        {"threshold": "per_channel"},
        {"gradient": "surrogate"},
        {"queries": True, "int8_keys_values": True, "weights": "int8"},
        {"threshold": "learned", "activity": ActivityConfig("rate")},
    ],
    ids=str,
)
def test_what_neurons_keep_is_planned_to_the_byte(policy, settings):
    """Of experts all tokens go to all; one tensor of spikes for all layers that read it."""
    model = tiny_model_config("full_attention", num_layers=1, moe=EXPERTS, spiking=config_of(**settings))
    planned = DryRun(model, VOCABULARY, torch.float32).kept(0, Cut(), 64, POLICIES[policy])
    assert planned == kept_by_block(model, POLICIES[policy], 64)


def test_spikes_of_fixed_thresholds_cost_no_memory():
    """The projections keep x̂ in the place of x; a learned k keeps x, too."""

    def kept(**settings):
        model = tiny_model_config("full_attention", num_layers=1, **settings)
        return DryRun(model, VOCABULARY, torch.float32).kept(0, Cut(), 64, EVERYTHING)

    floats = kept()
    assert kept(spiking=config_of()) == floats
    # What enters mixer, feed-forward and output projection, 32 channels each, and the hidden ones.
    per_token = 3 * 32 + 48
    assert kept(spiking=config_of(threshold="learned")) >= floats + 64 * per_token * 4


def test_layers_with_and_without_spikes_are_planned_apart():
    model = tiny_model_config("full_attention", num_layers=4, spiking=SpikingConfig(layers=["layers.[13].*"]))
    assert DryRun(model, VOCABULARY, torch.float32).kinds == [0, 1, 0, 1]


@pytest.mark.parametrize("threshold", ["adaptive", "learned", "per_channel"])
def test_a_model_of_floats_learns_to_spike(tiny_data, tmp_path, threshold):
    """Its weights are taken, and what neurons need is drawn."""
    run = in_process_config(tiny_data, tmp_path / "run")
    drawn = write(tmp_path / "weights", run.model, 512)
    init = replace(run, checkpoint=CheckpointConfig(init=str(tmp_path / "weights")))
    spiking = replace(init, model=replace(run.model, spiking=config_of(threshold=threshold, k=4.0)))
    check(spiking)
    check_tensors(spiking)
    decoder = Decoder(spiking.model, 512)
    start(decoder, str(tmp_path / "weights"), seed=0)
    for name, parameter in decoder.named_parameters():
        expected = torch.tensor([4.0]).log() if name.endswith("log_k") else drawn[name]
        torch.testing.assert_close(parameter.detach(), expected, msg=name)
    assert all(not neuron.average.any() for neuron in neurons([decoder]) if neuron.average is not None)


def test_weights_that_spike_are_no_model_of_floats(tiny_data, tmp_path):
    """Nor of other thresholds; when they began to spike does not matter."""
    run = in_process_config(tiny_data, tmp_path / "run")
    write(tmp_path / "weights", replace(run.model, spiking=config_of(threshold="learned")), 512)
    init = replace(run, checkpoint=CheckpointConfig(init=str(tmp_path / "weights")))
    with pytest.raises(ConfigError, match=r"model.spiking.layers: \['all'\] -> \[\]"):
        check(init)
    with pytest.raises(ConfigError, match=r"model.spiking.threshold: learned -> running"):
        check(replace(init, model=replace(run.model, spiking=config_of(threshold="running"))))
    for changes in ({"start_step": 5}, {"weights": "int8"}, {"int8_keys_values": True}, {"gradient": "surrogate"}):
        check(replace(init, model=replace(run.model, spiking=config_of(threshold="learned", **changes))))


def test_a_pattern_that_matches_nothing_is_refused_before_a_run(tiny_data, tmp_path):
    run = in_process_config(tiny_data, tmp_path / "run")
    check_layers(run)
    with pytest.raises(ConfigError, match=r"'layers\.7' matches no linear layer"):
        check_layers(replace(run, model=replace(run.model, spiking=SpikingConfig(layers=["layers.7"]))))


SPIKING = ("--model.spiking.layers=[all]", "--model.spiking.k=2.5")
KINDS = {
    "learned": ("--model.spiking.threshold=learned",),
    "per_channel": ("--model.spiking.threshold=per_channel", "--model.spiking.momentum=0.5"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "engine"),
    [
        ("per_channel", "megatron"),
        ("learned", "megatron"),
        ("per_channel", "deepspeed"),
        ("learned", "deepspeed"),
    ],
)
def test_a_run_resumes_before_and_after_the_start_to_the_last_bit(tiny_run, tmp_path, kind, engine):
    """Spikes begin at step 4, k ends at step 7; checkpoints are of steps 3 and 6."""
    annealed = () if kind == "learned" else ("--model.spiking.k_start=12", "--model.spiking.anneal_steps=3")
    options = (*SPIKING, *KINDS[kind], *annealed, "--model.spiking.start_step=4", f"--engine.name={engine}")
    code, output = finish(tiny_run(tmp_path / "whole", *options))
    assert code == 0, output
    whole, model = trajectory(tmp_path / "whole")[0], load_model(tmp_path / "whole", torch.device("cpu")).model
    for step in (3, 6):
        part = tmp_path / f"from {step}"
        source = f"--checkpoint.resume={tmp_path}/whole/checkpoints/step_{step:08d}"
        code, output = finish(tiny_run(part, *options, source))
        assert code == 0, output
        assert trajectory(part)[0] == whole[step:]
        again = load_model(part, torch.device("cpu")).model.state_dict()
        assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    code, output = finish(tiny_run(tmp_path / "plain", f"--engine.name={engine}"))
    assert code == 0, output
    plain = trajectory(tmp_path / "plain")[0]
    # The fifth step is the first whose loss is of spikes.
    assert whole[:4] == plain[:4] and whole[4][1] != plain[4][1]


@pytest.mark.slow
def test_what_a_run_learned_is_exported_and_named_for_others(tiny_run, tmp_path):
    code, output = finish(tiny_run(tmp_path / "run", *SPIKING, "--model.spiking.threshold=per_channel"))
    assert code == 0, output
    model = load_model(tmp_path / "run", torch.device("cpu")).model
    assert all(neuron.is_ready and neuron.step == 7 for neuron in neurons([model]))
    export(tmp_path / "run", tmp_path / "weights", None, 1e9, print)
    again = Decoder(open_weights(tmp_path / "weights").model, model.vocab_size)
    start(again, str(tmp_path / "weights"), seed=0)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert json.loads((tmp_path / "weights" / "config.json").read_text())["model"]["spiking"]["layers"] == ["all"]


def test_transformers_has_no_spikes(tmp_path):
    from models.hub.registry import to_hub

    model = replace(tiny_model_config(spiking=config_of()), mixers=MixerLayoutConfig(pattern="full_attention"))
    with pytest.raises(ValueError, match=r"model\.spiking has no Hugging Face layout"):
        to_hub(model, 64, "float32", 32)
    to_hub(replace(model, spiking=SpikingConfig()), 64, "float32", 32)


def test_generation_without_training_uses_thresholds_of_the_averages():
    neuron = Neuron(config_of(threshold="running"), 4)
    neuron.magnitude.fill_(6.0)
    set_step([neuron], 3)
    assert neuron.is_ready
    torch.testing.assert_close(neuron(torch.tensor([[3.2, -0.9, 0.0, 40.0]])), torch.tensor([[4.0, 0.0, 0.0, 40.0]]))
