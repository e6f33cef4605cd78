"""Hybrids from softmax attention: which matrices they hold, what is new, and that runs start from them."""

import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from kernels.norms import rms_norm
from models import conversion
from models.config import (
    LINEAR_MIXERS,
    DeltaNetConfig,
    GatedDeltaNetConfig,
    GatedLinearAttentionConfig,
    KimiDeltaAttentionConfig,
    ModelConfig,
    RetentionConfig,
    SpikingBrainGLAConfig,
    SpikingConfig,
)
from models.config.conversion import PRESETS, hybrid_config
from models.decoder import Decoder, initialize, shapes
from tests.helpers import VOCABULARY, draw_tokens, rows, tiny_decoder, tiny_model_config
from trainer.errors import ConfigError
from trainer.stored import weights
from trainer.stored.hybrid import convert
from trainer.stored.opening import open_weights
from trainer.stored.upcycle import upcycle

LAYERS = 3


def write(model, folder):
    """Weights of a model."""
    stored = model.state_dict()

    def read(tensors):
        for name, tensor in tensors.items():
            tensor.copy_(stored[name])

    meta = shapes(model.model_config, VOCABULARY)
    weights.write(folder, meta, read, tokenizer=None, max_file_bytes=1e9, report=lambda line: None)
    return model


def softmax(folder, seed=0, **changes):
    """Weights of a model of softmax attention; returns the model, with norms and biases that are not neutral."""
    model = tiny_decoder("full_attention", seed=seed, num_layers=LAYERS, **changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 2, generator=generator)
    return write(model, folder)


def load(folder):
    """The model that weights hold."""
    opened = open_weights(folder)
    model = Decoder(opened.model, opened.vocab_size)
    weights.fill(model, opened)
    return model


def converted(folder, pattern, given=None, source="source", name="hybrid", **changes):
    """The hybrid that the weights in `folder` become, and the account of it."""
    options = {
        "window": None,
        "sink_tokens": None,
        "drop_biases": False,
        "seed": 0,
        "precision": "fp32",
        "max_file_bytes": 1e9,
    }
    hybrid = convert(
        folder / source, folder / name, pattern, given or {}, report=lambda line: None, **options | changes
    )
    return load(folder / name), hybrid


def logits(model, tokens):
    with torch.no_grad():
        return model(*rows(tokens))


def test_every_linear_mixer_says_where_its_parameters_come_from():
    assert conversion.ORIGINS.keys() == set(LINEAR_MIXERS)
    for mixer in LINEAR_MIXERS:
        every = tiny_model_config(mixer, delta_net__output_gate=True, spikingbrain_gla__qkv_bias=True)
        names = [name for name, _ in shapes(every, 1).named_parameters() if ".mixer." in name]
        assert {name.split(".")[3] for name in names} == conversion.ORIGINS[mixer].keys(), mixer


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("mixer", LINEAR_MIXERS)
def test_a_linear_mixer_has_the_matrices_of_the_attention(tmp_path, mixer, kv_heads):
    old = dict(softmax(tmp_path / "source", attention__num_kv_heads=kv_heads).named_parameters())
    model, hybrid = converted(tmp_path, f"full_attention, {mixer}")
    new = dict(model.named_parameters())
    assert model.model_config.layer_mixers() == ["full_attention", mixer, "full_attention"]
    for name in new:
        if ".1.mixer." not in name and name != "lower_bounds":
            assert torch.equal(new[name], old[name]), "everything else is as it was"
    grouped = mixer.startswith("spikingbrain")
    own, theirs = "layers.1.mixer.{}.weight".format, "layers.1.mixer.{}.weight".format

    def rows_of(name):
        heads = old[theirs(name)].unflatten(0, (-1, 8))
        return (heads if grouped else heads.repeat_interleave(4 // kv_heads, 0)).flatten(0, 1)

    value, key = ("i_proj" if mixer.startswith("hgrn") else "v_proj"), "k_proj"
    assert torch.equal(new[own("o_proj")], old[theirs("o_proj")])
    assert torch.equal(new[own(value)], rows_of("v_proj"))
    if mixer == "hgrn2":
        assert torch.equal(new[own("f_proj")], -rows_of("k_proj"))
    elif mixer != "hgrn":
        assert torch.equal(new[own(key)], rows_of("k_proj"))
    if mixer != "hgrn":
        assert torch.equal(new[own("q_proj")], old[theirs("q_proj")])
    reused = sum(new[own(part)].numel() for part, (words, _) in hybrid.origins[mixer].items() if "new" not in words)
    assert reused == sum(
        new[own(p)].numel()
        for p in ("q_proj", "k_proj", "v_proj", "i_proj", "f_proj", "o_proj")
        if own(p) in new and not (p == "f_proj" and mixer != "hgrn2")
    )
    assert hybrid.parameters == sum(parameter.numel() for parameter in model.parameters())
    count = sum(p.numel() for name, p in new.items() if ".1.mixer." in name) + (
        new["lower_bounds"].numel() if "lower_bounds" in new else 0
    )
    assert hybrid.new == count - reused
    assert logits(model, draw_tokens(2, 9)).isfinite().all()


def test_new_parameters_begin_where_they_do_least(tmp_path):
    softmax(tmp_path / "source")
    for mixer in ("gated_delta_net", "kimi_delta_attention"):
        model, _ = converted(tmp_path, mixer, name=mixer)
        own = model.layers["0"].mixer
        for part in "qkv":
            taps = getattr(own, f"{part}_conv1d").weight
            assert torch.equal(taps, torch.tensor([0.0, 0, 0, 1]).expand_as(taps))
        assert torch.equal(own.o_norm.weight, torch.ones(8))
        assert not own.A_log.any()
        dt = torch.nn.functional.softplus(own.dt_bias)
        assert dt.min() >= 1e-4 and dt.max() <= 0.1 + 1e-6


def test_new_parameters_are_those_of_a_new_model(tmp_path):
    softmax(tmp_path / "source")
    model, _ = converted(tmp_path, "gated_linear_attention", seed=3)
    new = Decoder(model.model_config, VOCABULARY)
    initialize(new, 3)
    theirs = dict(new.named_parameters())
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("gk_proj", "g_proj", "g_norm")):
            assert torch.equal(parameter, theirs[name]), name
    other, _ = converted(tmp_path, "gated_linear_attention", name="other", seed=4)
    assert not torch.equal(other.layers["0"].mixer.g_proj.weight, model.layers["0"].mixer.g_proj.weight)


@pytest.mark.parametrize(
    "changes", [{}, {"attention__qk_norm": True, "attention__qkv_bias": True, "attention__output_gate": True}]
)
def test_a_wide_window_is_full_attention(tmp_path, changes):
    old = softmax(tmp_path / "source", **changes)
    model, hybrid = converted(tmp_path, "sliding_window_attention", window=12)
    tokens = draw_tokens(2, 12)
    assert hybrid.new == 0 and model.model_config.attention.window == 12
    torch.testing.assert_close(logits(model, tokens), logits(old, tokens))
    narrow, _ = converted(tmp_path, "sliding_window_attention", window=3, name="narrow")
    assert not torch.allclose(logits(narrow, tokens), logits(old, tokens), atol=1e-3)


@pytest.mark.parametrize("zero_centered", [False, True])
def test_norms_of_queries_and_keys_go_into_the_rows(tmp_path, zero_centered):
    old = softmax(tmp_path / "source", attention__qk_norm=True, zero_centered_norms=zero_centered)
    model, _ = converted(tmp_path, "gated_delta_net")
    before, after = old.layers["0"].mixer, model.layers["0"].mixer
    x = torch.randn(5, 1, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        normed = rms_norm(before.q_proj(x).unflatten(-1, (4, 8)), before.q_norm.weight + zero_centered, 1e-6)
        direction = after.q_proj(x).unflatten(-1, (4, 8))
    assert torch.allclose(torch.cosine_similarity(normed, direction, -1), torch.ones(5, 1, 4), atol=1e-6)


def test_repeated_values_change_nothing(tmp_path):
    """A head's values twice, and half of each column of W_o, give the same output at the same gate."""
    softmax(tmp_path / "source")
    once, _ = converted(tmp_path, "retention", name="once")
    twice, _ = converted(tmp_path, "retention", {"retention": RetentionConfig(expand_v=2.0)}, name="twice")
    assert twice.model_config.state_shape("retention") == (4, 8, 16)
    with torch.no_grad():
        for layer in range(LAYERS):
            gate = once.layers[str(layer)].mixer.g_proj.weight.unflatten(0, (4, 8))
            twice.layers[str(layer)].mixer.g_proj.weight.copy_(gate.repeat(1, 2, 1).flatten(0, 1))
    tokens = draw_tokens(2, 9)
    torch.testing.assert_close(logits(twice, tokens), logits(once, tokens))


def test_biases_stay_or_are_refused_by_name(tmp_path):
    old = softmax(tmp_path / "source", attention__qkv_bias=True)
    model, _ = converted(tmp_path, "spikingbrain_gla")
    for part in "qkv":
        ours, theirs = (getattr(m.layers["2"].mixer, f"{part}_proj").bias for m in (model, old))
        assert torch.equal(ours, theirs)
    with pytest.raises(ConfigError, match=r"gated_delta_net has no biases, and layers.0.mixer.q_proj.bias of .* not 0"):
        converted(tmp_path, "gated_delta_net", name="refused")
    converted(tmp_path, "gated_delta_net", name="dropped", drop_biases=True)
    with torch.no_grad():
        for name, parameter in old.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    write(old, tmp_path / "zero")
    converted(tmp_path, "gated_delta_net", source="zero", name="nothing lost")


def test_parallel_branches_both_take_copies(tmp_path):
    old = softmax(tmp_path / "source", attention__qkv_bias=True).layers["0"].mixer
    preset = PRESETS["spikingbrain-76b"]
    model, hybrid = converted(tmp_path, preset.pattern, window=preset.window, sink_tokens=preset.sink_tokens)
    assert model.model_config.layer_mixers() == ["spikingbrain_tied_gla + sliding_window_attention"] * LAYERS
    linear, attention = model.layers["0"].mixer.branches
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        for branch in (linear, attention):
            assert torch.equal(getattr(branch, part).weight, getattr(old, part).weight)
    assert torch.equal(model.layers["0"].mixer.merge.weight, torch.full((2,), 0.5))
    # Norms of both branches, two weights and the norm of the heads; and the sinks.
    assert hybrid.new == LAYERS * (2 * 32 + 2 + 8) + 128 * 32


def test_the_presets_give_the_published_models():
    """From Qwen2.5-7B's shape: the models of configs/models, but for what they need for a start from scratch."""
    from trainer.cli import make_parser, parse
    from trainer.config import PretrainConfig

    for name, pattern in (("7b", "spikingbrain-7b"), ("76b", "spikingbrain-76b")):
        arguments = ["--model", f"configs/models/spikingbrain-{name}.yaml"]
        config = parse(PretrainConfig, make_parser(PretrainConfig, ""), arguments)[0].model
        unlike = {"mixers": ModelConfig().mixers, "spikingbrain_gla": SpikingBrainGLAConfig(), "sink_tokens": 0}
        preset = PRESETS[pattern]
        hybrid = hybrid_config(replace(config, **unlike), preset.pattern, {}, preset.window, preset.sink_tokens)
        assert hybrid.layer_mixers() == config.layer_mixers()
        assert replace(hybrid, mixers=config.mixers) == config
    full = [i for i, layer in enumerate(hybrid.layer_mixers(), 1) if layer.endswith("full_attention")]
    assert full == [7, 14, 21, 28]


def test_a_hybrid_is_converted_further(tmp_path):
    """Layers that are linear stay, and experts come afterwards."""
    from models.config import MoEConfig

    softmax(tmp_path / "source")
    first, _ = converted(tmp_path, "gated_delta_net, full_attention*2", name="first")
    second, _ = converted(tmp_path, "gated_delta_net*2, full_attention", source="first", name="second")
    assert torch.equal(second.layers["0"].mixer.b_proj.weight, first.layers["0"].mixer.b_proj.weight)
    assert torch.equal(second.layers["1"].mixer.q_proj.weight, first.layers["1"].mixer.q_proj.weight)
    options = {"router_std": 1e-3, "diversify": 0.0, "seed": 0, "precision": "fp32", "max_file_bytes": 1e9}
    upcycle(tmp_path / "second", tmp_path / "experts", MoEConfig(num_experts=2), report=lambda line: None, **options)
    experts = load(tmp_path / "experts")
    assert torch.equal(experts.layers["0"].mixer.b_proj.weight, first.layers["0"].mixer.b_proj.weight)


def test_bfloat16_and_several_files(tmp_path):
    old = dict(softmax(tmp_path / "source").named_parameters())
    lines = []
    options = {
        "window": None,
        "sink_tokens": None,
        "drop_biases": False,
        "seed": 0,
        "precision": "bf16",
        "max_file_bytes": 5e3,
    }
    convert(tmp_path / "source", tmp_path / "out", "gated_delta_net", {}, report=lines.append, **options)
    stored = {name: x for file in (tmp_path / "out").glob("*.safetensors") for name, x in load_file(file).items()}
    assert {name for name, x in stored.items() if x.dtype == torch.float32} == {
        f"layers.{layer}.mixer.{name}" for layer in range(LAYERS) for name in ("A_log", "dt_bias")
    }
    name = "layers.1.mixer.o_proj.weight"
    assert torch.equal(stored[name], old[name].bfloat16())
    assert lines[0] == "layers: 3 gated_delta_net"
    assert lines[1].startswith("gated_delta_net: A_log (new: 0, 4), dt_bias (new: drawn, 4), q_proj (q_proj, 1,024),")
    assert re.fullmatch(r"[\d,]+ of [\d,]+ parameters are new, \d+\.\d\d%", lines[2])


@pytest.mark.parametrize(
    ("pattern", "given", "changes", "message"),
    [
        ("full_attention", {}, {}, "pattern: every layer is what 'full_attention' makes it already"),
        ("nothing", {}, {}, "pattern: no mixer 'nothing'; choose from full_attention"),
        ("gated_delta_net", {"gated_delta_net": GatedDeltaNetConfig(num_heads=8)}, {},
         "gated_delta_net.num_heads=8: the attention has 4, and its matrices are taken over; leave it out"),
        ("kimi_delta_attention", {"kimi_delta_attention": KimiDeltaAttentionConfig(expand_v=1.5)}, {},
         "expand_v=1.5: it says how often each of the attention's values is repeated; give a whole number"),
        ("delta_net", {"delta_net": DeltaNetConfig(expand_v=2.0)}, {}, "set delta_net.output_gate"),
        ("gated_linear_attention", {"gated_linear_attention": GatedLinearAttentionConfig(expand_v=1.5)}, {},
         "expand_v=1.5 times hidden_size=32 must be a multiple of the attention's values, 32"),
        ("hgrn2", {}, {"attention__head_dim": 16}, "hgrn2 is as wide as hidden_size=32, and the attention 64"),
        ("hgrn", {}, {"attention__head_dim": 16}, "hgrn is as wide as hidden_size=32, and the attention 64"),
        ("retention", {}, {"hidden_size": 88, "attention__num_heads": 5, "attention__num_kv_heads": 1,
         "attention__head_dim": 12}, "no number times hidden_size=88 is the attention's 60 exactly"),
        ("full_attention, hgrn2", {}, {"attention__output_gate": True}, "layer 1 would lose its attention's gate"),
        ("gated_delta_net", {}, {"spiking": SpikingConfig(layers=["all"])}, "has spikes, which its training fitted"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted(tmp_path, pattern, given, changes, message):
    softmax(tmp_path / "source", **changes)
    with pytest.raises(ConfigError, match=re.escape(message)):
        converted(tmp_path, pattern, given)


def test_a_linear_layer_cannot_be_converted(tmp_path):
    write(tiny_decoder("retention, full_attention", num_layers=LAYERS), tmp_path / "source")
    with pytest.raises(ConfigError, match="layer 0 is 'retention' and would become 'gated_delta_net'"):
        converted(tmp_path, "gated_delta_net, full_attention")
    with pytest.raises(ConfigError, match="retention: layers that stay have other settings than the attention"):
        converted(tmp_path, "retention", name="other")


@pytest.mark.parametrize(("hidden", "heads", "size"), [(48, 4, 8), (24, 6, 4), (104, 28, 8)])
def test_heads_that_are_not_as_wide_as_the_model(tmp_path, hidden, heads, size):
    changes = {"hidden_size": hidden, "attention__num_heads": heads, "attention__head_dim": size}
    old = softmax(tmp_path / "source", attention__num_kv_heads=2, **changes)
    for mixer in ("gated_linear_attention", "retention"):
        model, _ = converted(tmp_path, mixer, name=mixer)
        assert model.model_config.state_shape(mixer) == (heads, size, size)
        assert torch.equal(model.layers["0"].mixer.q_proj.weight, old.layers["0"].mixer.q_proj.weight)
