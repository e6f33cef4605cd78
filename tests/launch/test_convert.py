"""The command that takes weights out of checkpoints, and Hugging Face models in."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from kernels.spiking import spike_reference
from models.config import MoEConfig, RouterConfig, SpikingConfig
from models.decoder import Decoder, initialize
from models.hub.llama_family import stored_name
from models.hub.registry import to_hub
from tests.helpers import VOCABULARY, draw_tokens, tiny_decoder, tiny_model_config
from trainer.data.batch import make_batch
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ConfigError
from trainer.stored.calibration import round_weights, second_moments, spiking_model
from trainer.stored.inference import load_model
from trainer.stored.opening import open_weights

HYBRID = ("hybrid", "--source", "RUN", "--pattern", "gated_delta_net")
LAYERS = ("layers", "--source", "RUN", "--data", "RUN")
UPCYCLE = ("upcycle", "--source", "RUN", "--moe.num_experts", "4")


def test_an_export_is_the_checkpoint_and_its_tokenizer(launch, trained, tmp_path):
    checkpoint = trained / "checkpoints" / "step_00000003"
    arguments = ("export", "--checkpoint", str(checkpoint), "--output", "deep/weights", "--max_file_gb", "5e-5")
    code, out, errors, imported = launch("convert", *arguments)
    assert code == 0, errors
    assert out.strip() == f"deep/weights: the parameters of {checkpoint}"
    assert "model-00001-of-00003.safetensors (1 of 3): 1 tensors, 0.000 GB" in errors
    assert imported == ["torch"], "neither megatron nor deepspeed is needed"
    weights = tmp_path / "deep" / "weights"
    stored = {name: tensor for file in weights.glob("*.safetensors") for name, tensor in load_file(file).items()}
    loaded = load_model(checkpoint, torch.device("cpu"))
    parameters = dict(loaded.model.named_parameters())
    assert stored.keys() == parameters.keys()
    assert all(torch.equal(stored[name], parameters[name]) for name in stored)
    assert Tokenizer.load(weights).encode("import json") == loaded.require_tokenizer().encode("import json")
    code, _, errors, imported = launch("convert", *arguments)
    assert code == 2 and "output: deep/weights exists and is not an empty directory; name another" in errors
    assert imported == []


def test_bfloat16_on_request_keeps_decays(launch, trained, tmp_path):
    (tmp_path / "weights").mkdir()
    arguments = ("--checkpoint", str(trained), "--output", "weights", "--dtype", "bf16")
    code, _, errors, _ = launch("convert", "export", *arguments, forked=True)
    assert code == 0, errors
    stored = load_file(tmp_path / "weights" / "model.safetensors")
    parameters = dict(load_model(trained, torch.device("cpu")).model.named_parameters())
    for name, tensor in stored.items():
        assert tensor.dtype == (torch.float32 if name.endswith(("A_log", "dt_bias")) else torch.bfloat16), name
        assert torch.equal(tensor, parameters[name].to(tensor.dtype)), name


def test_a_hugging_face_model_becomes_weights(launch, tmp_path):
    hub = tmp_path / "hub"
    hub.mkdir()
    config = to_hub(tiny_model_config("full_attention"), VOCABULARY, "float32", 64)
    (hub / "config.json").write_text(json.dumps(config))
    parameters = {name: tensor.detach() for name, tensor in tiny_decoder("full_attention").named_parameters()}
    save_file({stored_name(name): tensor for name, tensor in parameters.items()}, hub / "model.safetensors")
    code, out, errors, imported = launch("convert", "import", "--source", "hub", "--output", "weights", forked=True)
    assert code == 0 and out.strip() == "weights: the parameters of hub", errors
    assert imported == ["torch"]
    stored = load_file(tmp_path / "weights" / "model.safetensors")
    assert stored.keys() == parameters.keys()
    assert all(torch.equal(stored[name], tensor.bfloat16()) for name, tensor in parameters.items())


def test_a_dense_run_becomes_experts_that_a_run_starts_from(launch, trained, tmp_path):
    (tmp_path / "experts.yaml").write_text("num_experts: 4\nshared_experts: 1\nrouter: {top_k: 1}\n")
    arguments = ("--source", str(trained), "--output", "weights", "--moe", "experts.yaml", "--max_file_gb", "5e-5")
    code, out, errors, imported = launch("convert", "upcycle", *arguments, forked=True)
    assert code == 0, errors
    assert out.strip() == f"weights: {trained / 'checkpoints/step_00000006'} with 4 + 1 experts a layer"
    assert "gates add up to 0.25: the experts' matrices are 0.9283 of the dense ones" in errors
    assert imported == ["torch"]
    run = ("--config", str(trained / "config.yaml"), "--run.dir", "run", "--model.moe", "experts.yaml")
    code, _, errors, _ = launch("pretrain", *run, "--checkpoint.init", "weights", "--check", forked=True)
    assert code == 0, errors


def test_a_run_becomes_a_hybrid_that_a_run_starts_from(launch, trained, tmp_path):
    layers = ["gated_delta_net", "retention"]
    (tmp_path / "choice.yaml").write_text(f"pattern: {', '.join(layers)}\n")
    arguments = ("--source", str(trained), "--output", "weights", "--layers_file", "choice.yaml")
    code, out, errors, imported = launch("convert", "hybrid", *arguments, forked=True)
    assert code == 0, errors
    assert out.strip() == f"weights: {trained / 'checkpoints/step_00000006'} with the layers {', '.join(layers)}"
    assert "retention: q_proj (q_proj, 1,024), k_proj (k_proj, 1,024), v_proj (v_proj, 1,024), g_proj (new: " in errors
    assert re.search(r"[\d,]+ of [\d,]+ parameters are new, \d+\.\d\d%", errors)
    assert imported == ["torch"]
    arguments = ("--config", str(trained / "config.yaml"), "--init", "weights", "--run.dir", "run")
    code, _, errors, _ = launch("pretrain", *arguments, "--check", forked=True)
    assert code == 0, errors


def test_layers_are_chosen_and_a_hybrid_made_of_them(launch, trained, tiny_data, tmp_path):
    base = ("hybrid", "--source", str(trained), "--pattern", "gated_delta_net, sliding_window_attention")
    assert launch("convert", *base, "--output", "weights", forked=True)[0] == 0
    arguments = ("--source", "weights", "--data", str(tiny_data), "--keep", "0", "--linear", "retention")
    sizes = ("--sequences", "4", "--seq_len", "32", "--align_steps", "2", "--align_batch_size", "2")
    options = (*arguments, *sizes, "--output", "choice.yaml", "--json", "choice.json")
    code, out, errors, imported = launch("convert", "layers", *options, forked=True)
    assert code == 0, errors
    assert imported == ["torch"]
    lines = out.strip().splitlines()
    assert lines[0].split("|")[1:3] == [" layer ", " error of its output after alignment, % "]
    assert re.fullmatch(r"all 1 replaced: [\d.e-]+ ± [\d.e-]+ nats a token", lines[-2])
    assert lines[-1] == "written: choice.yaml; use it with spiketrain convert hybrid --layers_file choice.yaml"
    assert yaml.safe_load((tmp_path / "choice.yaml").read_text()) == {"pattern": "gated_delta_net, retention"}
    figures = json.loads((tmp_path / "choice.json").read_text())
    assert figures["replaced"] == [1] and figures["measured"][0]["1"] == figures["damage"]
    assert figures["alignment_error"]["1"] > 0 and figures["evenly_spaced"] is None
    chosen = ("--source", "weights", "--layers_file", "choice.yaml", "--output", "hybrid")
    code, out, errors, _ = launch("convert", "hybrid", *chosen, forked=True)
    assert code == 0 and out.strip() == "hybrid: weights with the layers gated_delta_net, retention", errors
    code, _, errors, _ = launch("convert", "layers", *options)
    assert code == 2 and "output: choice.yaml exists; name another file, or remove it" in errors


def test_a_hybrid_becomes_flash_linear_attention_s(launch, trained, tmp_path):
    arguments = ("export", "--checkpoint", str(trained), "--output", "hub", "--layout", "hf")
    code, _, errors, _ = launch("convert", *arguments, forked=True)
    assert code == 0, errors
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["model_type"] == "gated_deltanet" and config["attn"]["layers"] == [1]
    again = open_weights(tmp_path / "hub")
    parameters = dict(load_model(trained, torch.device("cpu")).model.named_parameters())
    read = {name: torch.empty_like(tensor) for name, tensor in parameters.items()}
    again.read(read)
    assert all(torch.equal(read[name], tensor) for name, tensor in parameters.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("exports",), "no command 'exports'; choose from export, import, layers, hybrid"),
        (("export", "--checkpoint", "nowhere"), "checkpoint: nowhere does not exist; give a run directory"),
        (("export", "--checkpoint", "RUN", "--output", "RUN"), "exists and is not an empty directory; name another"),
        (("export", "--checkpoint", "RUN", "--max_file_gb", "0"), "max_file_gb is 0.0: it must be positive"),
        (("export", "--checkpoint", "RUN", "--dtype", "fp8"), "dtype: "),
        (("export", "--outptu", "x"), "did you mean 'output'"),
        (("import", "--source", "nowhere"), "source: nowhere is neither a directory nor a .gguf file; download"),
        (("import", "--source", "RUN", "--output", "RUN"), "exists and is not an empty directory; name another"),
        (("upcycle", "--source", "nowhere"), "source: nowhere does not exist; give weights or a run directory"),
        (("upcycle", "--source", "RUN", "--output", "RUN"), "exists and is not an empty directory; name another"),
        (("upcycle", "--source", "RUN"), "moe.num_experts is 0: say how many experts each layer gets"),
        (("hybrid", "--source", "nowhere"), "source: nowhere does not exist; give weights or a run directory"),
        (("hybrid", "--source", "RUN"), "give one of pattern, preset and layers_file, not 0 of them"),
        ((*HYBRID, "--preset", "spikingbrain-7b"), "give one of pattern, preset and layers_file, not 2 of them"),
        (("layers", "--source", "nowhere"), "source: nowhere does not exist; give weights or a run directory"),
        ((*LAYERS, "--linear", "hgrn*2"), "linear: 'hgrn*2' names several layers; name one mixer, or NAME + NAME"),
        ((*LAYERS, "--sequences", "1"), "sequences is 1: it must be at least 2"),
        ((*LAYERS, "--align_lr", "0"), "align_lr is 0.0: it must be positive"),
        ((*LAYERS, "--method", "random"), "method: "),
        ((*LAYERS, "--data", __file__), "has no train split; name data to align on, or align_steps=0"),
        ((*LAYERS, "--output", "no/choice.yaml"), "output: the directory of no/choice.yaml does not exist; make it"),
        ((*HYBRID, "--window", "0"), "window is 0: it must be at least 1"),
        (("hybrid", "--source", "RUN", "--pattern", "nets"), "pattern: no mixer 'nets'; choose from full_attention"),
        (("hybrid", "--source", "RUN", "--layers_file", "x.yaml"), "layers_file: x.yaml does not exist; "),
        (("hybrid", "--source", "RUN", "--preset", "spikingbrain-8b"), "preset: "),
        ((*HYBRID, "--gated_delta_net.expand_v", "0"), "model.gated_delta_net.expand_v is 0.0: it must be positive"),
        ((*UPCYCLE, "--moe.activation", "geglu"), "moe.activation is geglu: the dense feed-forward is swiglu; leave"),
        ((*UPCYCLE, "--moe.spawn_step", "5"), "moe.spawn_step is 5: upcycling spawns them all; leave it out"),
        ((*UPCYCLE, "--router_std", "0"), "router_std is 0.0: it must be positive, or all experts stay alike"),
        ((*UPCYCLE, "--diversify", "1"), "diversify is 1.0: it must be in [0, 1)"),
        ((*UPCYCLE, "--moe.router.top_k", "5"), "model.moe.router.top_k=5 exceeds model.moe.num_experts=4"),
        ((*UPCYCLE, "--moe.num_expert", "5"), "did you mean 'moe.num_experts'"),
    ],
)
def test_bad_input_is_one_line_before_torch(launch, trained, arguments, message):
    code, _, errors, imported = launch("convert", *(str(trained) if word == "RUN" else word for word in arguments))
    assert code == 2
    assert len(errors.strip().splitlines()) == 1 and message in errors
    assert imported == []


def test_help_lists_the_commands(launch):
    code, out, _, imported = launch("convert", "--help")
    assert code == 0 and "export     Write the parameters of a checkpoint or of weights as safetensors." in out
    assert imported == []


SPIKE = ("spike", "--sequences", "6", "--batch_size", "4", "--checkpoint")


@pytest.mark.slow
def test_a_trained_run_becomes_a_spiking_model_with_int8_weights(launch, trained, tiny_data, tmp_path):
    """It is evaluated and sampled from as a checkpoint is, and its weights stay what they are in int8."""
    calibrated = (*SPIKE, str(trained), "--data", str(tiny_data), "--output", "w8a", "--layers", "[released]")
    code, out, errors, imported = launch("convert", *calibrated, "--int8_keys_values", "true", forked=True)
    assert code == 0 and imported == ["torch"], errors
    assert re.fullmatch(
        r"w8a: .*step_00000006 with spikes and \d+ int8 weights, whose products are off by 0\.\d+% \(0\.\d+% .*\)",
        out.strip(),
    )
    error, unclipped = map(float, re.findall(r"(0\.\d+)%", out))
    assert 0.05 < error <= unclipped < 2
    before = dict(load_model(trained, torch.device("cpu")).model.named_parameters())
    loaded = load_model(tmp_path / "w8a", torch.device("cpu"))
    spiking = loaded.model.model_config.spiking
    assert (spiking.layers, spiking.weights, spiking.int8_keys_values) == (["released"], "int8", True)
    changed = {name for name, parameter in loaded.model.named_parameters() if not torch.equal(parameter, before[name])}
    linear = {name for name in before if re.search(r"_proj\.weight$", name) and not name.endswith("down_proj.weight")}
    assert changed == linear
    for name, module in loaded.model.named_modules():
        if f"{name}.weight" in linear:
            torch.testing.assert_close(module.factor, module.weight, rtol=1e-6, atol=0)
    data = ("--data", str(tiny_data), "--seq_len", "32", "--compare_compressors", "false")
    bits = {}
    for source in (str(trained), "w8a"):
        code, _, errors, _ = launch("evaluate", "--checkpoint", source, *data, "--json", "out.json", forked=True)
        assert code == 0, errors
        bits[source] = json.loads((tmp_path / "out.json").read_text())["bits_per_byte"]
    assert 0 < abs(bits["w8a"] - bits[str(trained)]) < 0.2 * bits[str(trained)]
    with_spikes = ("--checkpoint", "w8a", *data, "--spiking", "true", "--json", "out.json")
    code, _, errors, _ = launch("evaluate", *with_spikes, forked=True)
    assert code == 0, errors
    assert json.loads((tmp_path / "out.json").read_text())["bits_per_byte"] == bits["w8a"]
    sample = ("--prompt", "import", "--max_new_tokens", "4", "--temperature", "0")
    code, out, errors, _ = launch("generate", "--checkpoint", "w8a", *sample, forked=True)
    assert code == 0 and out.startswith("import"), errors
    # From weights to weights, with what they do already.
    again = (*SPIKE, "w8a", "--data", str(tiny_data), "--seq_len", "32", "--output", "again")
    code, _, errors, _ = launch("convert", *again, forked=True)
    assert code == 0, errors
    stored, twice = (load_file(tmp_path / name / "model.safetensors") for name in ("w8a", "again"))
    assert (tmp_path / "again/config.json").read_text() == (tmp_path / "w8a/config.json").read_text()
    assert all(torch.allclose(twice[name], stored[name], rtol=1e-5, atol=1e-3) for name in stored)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sequences", "0"), "sequences is 0: it must be at least 1"),
        (("--k", "-1"), "model.spiking.k is -1.0: it must be positive"),
        (("--data", "nowhere"), "data: nowhere is neither prepared data"),
        (("--layers", "[layers.9.*]"), "'layers.9.*' matches no linear layer"),
        (("--checkpoint", "nowhere"), "checkpoint: nowhere does not exist"),
    ],
)
def test_a_conversion_that_cannot_be_meant_is_refused(launch, trained, tiny_data, arguments, message):
    given = ("--data", str(tiny_data), "--output", "w8a", *arguments)
    code, _, errors, _ = launch("convert", *SPIKE, str(trained), *given, forked="layers" in arguments[0])
    assert code == 2 and message in errors, errors


PRODUCTS = [
    "mixer.o_proj",
    *(f"ffn.{part}.{name}" for part in ("experts", "shared_experts") for name in ("gate_proj", "up_proj", "down_proj")),
]


def test_moments_are_those_of_the_spikes_that_enter_and_experts_have_their_own():
    experts = MoEConfig(num_experts=4, shared_experts=1, expert_hidden_size=16, router=RouterConfig(top_k=1))
    model = tiny_decoder(moe=experts, spiking=SpikingConfig(["*.ffn.*", "*.o_proj"], k=2.0)).eval()
    tokens = draw_tokens(2, 9)
    seen = {}
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "experts.up_proj")):
            module.register_forward_pre_hook(lambda module, inputs, name=name: seen.update({name: inputs}))
    batch = make_batch(tokens.numpy(), 0, False, np.ones((2, 8), np.float32))
    moments = second_moments(model, [batch])
    assert moments.keys() == {f"layers.{i}.{name}" for i in range(2) for name in PRODUCTS}
    spikes = spike_reference(seen["layers.1.mixer.o_proj"][0], k=2.0).flatten(0, -2).double()
    torch.testing.assert_close(moments["layers.1.mixer.o_proj"], spikes.square().mean(0))
    rows, counts = seen["layers.1.ffn.experts.up_proj"]
    for expert, part in enumerate(spike_reference(rows, k=2.0).double().split(counts.tolist())):
        expected = part.square().mean(0) if len(part) else torch.zeros(32, dtype=torch.float64)
        torch.testing.assert_close(moments["layers.1.ffn.experts.up_proj"][expert, 0], expected)
    assert round_weights(model, moments, lambda line: None).tensors == len(moments)


def test_what_neurons_learned_is_not_lost(trained):
    loaded = load_model(trained, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"threshold=learned: .* that the checkpoint lacks: .*log_k"):
        spiking_model(loaded, SpikingConfig(["all"], threshold="learned"))
    learned = Decoder(replace(loaded.model.model_config, spiking=SpikingConfig(["all"], threshold="learned")), 512)
    initialize(learned, 0)
    with pytest.raises(ConfigError, match=r"would drop trained tensors: .*log_k"):
        spiking_model(replace(loaded, model=learned), SpikingConfig(["*.ffn.*"], threshold="learned"))
