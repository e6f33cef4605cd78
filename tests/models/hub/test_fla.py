"""flash-linear-attention's models and SpikingBrain-7B: names and shapes, and a plain forward pass with FLA's naive ops.

Names and shapes are those of FLA 0.6.0's classes, and of the published code of SpikingBrain-7B.
"""

import importlib
import json
import sys
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.hub.registry import from_hub, to_hub
from tests.helpers import tiny_model_config
from tests.models.hub.test_llama_family import assert_close, assert_same_tensors, loaded
from trainer.errors import ConfigError
from trainer.stored.export import export, import_weights
from trainer.stored.opening import open_weights

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="fla-core needs Triton, which is for Linux")

D, ROWS, TIME = 32, 50, 21
HYBRID = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "rope_theta": 500.0}
# Each as its authors write it: keys that have defaults are left out here and there.
CONFIGS: dict[str, dict[str, Any]] = {
    "gla": {"num_heads": 2, "expand_k": 0.5, "expand_v": 1, "hidden_ratio": 4, "fuse_norm": True},
    "retnet": {"num_heads": 2, "expand_v": 1.5, "intermediate_size": 48, "attn": HYBRID},
    "hgrn": {"expand_ratio": 1, "intermediate_size": 48},
    "hgrn2": {"expand_ratio": 8, "intermediate_size": 48, "attn": HYBRID | {"window_size": 5}},
    "delta_net": {"num_heads": 2, "expand_k": 0.5, "expand_v": 1.0, "use_gate": True, "hidden_ratio": 2},
    "gated_deltanet": {"num_heads": 2, "num_v_heads": 4, "head_dim": 8, "expand_v": 1.5, "intermediate_size": 48},
    "kda": {"num_heads": 2, "head_dim": 8, "lower_bound": -5.0, "safe_gate": True, "intermediate_size": 48},
    "gla_swa": {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 6, "intermediate_size": 48},
}
CLASSES = {
    "gla": "GLA",
    "retnet": "RetNet",
    "hgrn": "HGRN",
    "hgrn2": "HGRN2",
    "delta_net": "DeltaNet",
    "gated_deltanet": "GatedDeltaNet",
    "kda": "KDA",
    "gla_swa": "GLAswa",
}


def config_of(kind: str, **changes: Any) -> dict[str, Any]:
    shared = {"model_type": kind, "architectures": [f"{CLASSES[kind]}ForCausalLM"], "vocab_size": ROWS}
    shared |= {"hidden_size": D, "num_hidden_layers": 3, "max_position_embeddings": 64, "attn_mode": "chunk"}
    return shared | CONFIGS[kind] | changes


def ffn_size(config: dict[str, Any]) -> int:
    return config.get("intermediate_size") or 256 * -(-int(D * config["hidden_ratio"] * 2 / 3) // 256)


def attention_shapes(heads: int, kv_heads: int, bias: bool) -> dict[str, tuple[int, ...]]:
    rows = {"q_proj": D, "k_proj": D // heads * kv_heads, "v_proj": D // heads * kv_heads}
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (size, D) for name, size in rows.items()}
    shapes |= {f"{name}.bias": (size,) for name, size in rows.items() if bias}
    return shapes | {"o_proj.weight": (D, D)}


def linear_shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a linear layer, as FLA's classes and SpikingBrain's have them."""
    match kind:
        case "gla":
            return {
                "q_proj.weight": (16, D),
                "k_proj.weight": (16, D),
                "v_proj.weight": (D, D),
                "g_proj.weight": (D, D),
                "gk_proj.0.weight": (16, D),
                "gk_proj.1.weight": (16, 16),
                "gk_proj.1.bias": (16,),
                "g_norm_swish_gate.weight": (16,),
                "o_proj.weight": (D, D),
            }
        case "retnet":
            return {
                "q_proj.weight": (D, D),
                "k_proj.weight": (D, D),
                "v_proj.weight": (48, D),
                "g_proj.weight": (48, D),
                "g_norm_swish_gate.weight": (24,),
                "o_proj.weight": (D, 48),
            }
        case "hgrn":
            names = ("i_proj", "f_proj", "g_proj", "o_proj")
            return {f"{name}.weight": (D, D) for name in names} | {"g_norm.weight": (D,)}
        case "hgrn2":
            names = ("q_proj", "f_proj", "i_proj", "o_proj")
            return {f"{name}.weight": (D, D) for name in names} | {"g_norm.weight": (D,)}
        case "delta_net":
            shapes = delta_shapes(keys=16, values=D, heads=2)
            return shapes | {"g_proj.weight": (D, D), "o_norm.weight": (16,)}
        case "gated_deltanet":
            shapes = delta_shapes(keys=16, values=48, heads=4)
            shapes |= {"a_proj.weight": (4, D), "A_log": (4,), "dt_bias": (4,), "g_proj.weight": (48, D)}
            return shapes | {"o_norm.weight": (12,)}
        case "kda":
            shapes = delta_shapes(keys=16, values=16, heads=2)
            shapes |= {"f_proj.0.weight": (8, D), "f_proj.1.weight": (16, 8), "A_log": (2,), "dt_bias": (16,)}
            shapes |= {"g_proj.0.weight": (8, D), "g_proj.1.weight": (16, 8), "g_proj.1.bias": (16,)}
            return shapes | {"o_norm.weight": (8,)}
    gate: dict[str, tuple[int, ...]] = {"gk_proj.0.weight": (16, D), "gk_proj.1.weight": (16, 16)}
    return attention_shapes(4, 2, True) | gate | {"gk_proj.1.bias": (16,), "g_norm.weight": (8,)}


def delta_shapes(keys: int, values: int, heads: int) -> dict[str, tuple[int, ...]]:
    sizes = {"q": keys, "k": keys, "v": values}
    shapes: dict[str, tuple[int, ...]] = {f"{name}_proj.weight": (size, D) for name, size in sizes.items()}
    shapes |= {f"{name}_conv1d.weight": (size, 1, 4) for name, size in sizes.items()}
    return shapes | {"b_proj.weight": (heads, D), "o_proj.weight": (D, values)}


def softmax_layers(config: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The softmax layers' settings; of SpikingBrain every second one's."""
    if config["model_type"] == "gla_swa":
        heads = {"num_heads": config["num_attention_heads"], "num_kv_heads": config["num_key_value_heads"]}
        # flash-attn's window of (6, 0): the query's own key and six before it.
        settings = heads | {"qkv_bias": True, "window_size": config["sliding_window"] + 1, "rope_theta": 1e6}
        return dict.fromkeys(range(1, config["num_hidden_layers"], 2), settings)
    attn = config.get("attn")
    return {} if attn is None else dict.fromkeys(attn["layers"], attn)


def stored_model(config: dict[str, Any], folder: Any, seed: int = 0) -> dict[str, Tensor]:
    """Write a directory as FLA would, with drawn tensors; returns them."""
    kind, ffn = config["model_type"], ffn_size(config)
    shapes: dict[str, tuple[int, ...]] = {"model.embeddings.weight": (ROWS, D), "model.norm.weight": (D,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (ROWS, D)
    if kind in ("hgrn", "hgrn2"):
        shapes["model.lower_bounds"] = (config["num_hidden_layers"], D)
    softmax = softmax_layers(config)
    for i in range(config["num_hidden_layers"]):
        spec = softmax.get(i)
        mixer = (
            linear_shapes(kind)
            if spec is None
            else attention_shapes(spec["num_heads"], spec["num_kv_heads"], spec["qkv_bias"])
        )
        prefix = f"model.layers.{i}"
        shapes |= {f"{prefix}.attn.{name}": shape for name, shape in mixer.items()}
        shapes |= {f"{prefix}.attn_norm.weight": (D,), f"{prefix}.mlp_norm.weight": (D,)}
        shapes |= {f"{prefix}.mlp.gate_proj.weight": (ffn, D), f"{prefix}.mlp.up_proj.weight": (ffn, D)}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (D, ffn)
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in tensors:
        if "norm" in name:
            tensors[name] += 1
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return tensors


def naive(module: str, name: str, *inputs: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that there is no GPU
        function = getattr(importlib.import_module(f"fla.ops.{module}.naive"), name)
    output = function(*inputs)
    return output if isinstance(output, Tensor) else output[0]


def rms(x: Tensor, weight: Tensor, gate: Tensor | None = None, activation: Any = F.silu) -> Tensor:
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight
    return normed if gate is None else normed * activation(gate)


def heads(x: Tensor, number: int) -> Tensor:
    return x.unflatten(-1, (number, -1))


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotate x [B, T, H, K] in halves."""
    size = x.shape[-1]
    angles = torch.arange(x.shape[1])[:, None] * theta ** (-torch.arange(0, size, 2) / size)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def softmax_layer(x: Tensor, w: dict[str, Tensor], spec: dict[str, Any]) -> Tensor:
    names = (("q", spec["num_heads"]), ("k", spec["num_kv_heads"]), ("v", spec["num_kv_heads"]))
    q, k, v = (heads(F.linear(x, w[f"{n}_proj.weight"], w.get(f"{n}_proj.bias")), number) for n, number in names)
    q, k = rotate(q, spec["rope_theta"]), rotate(k, spec["rope_theta"])
    k, v = (y.repeat_interleave(q.shape[2] // y.shape[2], 2) for y in (k, v))
    distance = torch.arange(TIME)[:, None] - torch.arange(TIME)
    seen = (distance >= 0) & (distance < (spec.get("window_size") or TIME))
    scores = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    o = torch.einsum("bhts,bshv->bthv", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
    return F.linear(o.flatten(2), w["o_proj.weight"])


def convolved(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    y, weight = F.linear(x, w[f"{name}_proj.weight"]).transpose(1, 2), w[f"{name}_conv1d.weight"]
    return F.silu(F.conv1d(F.pad(y, (3, 0)), weight, groups=len(weight))).transpose(1, 2)


def delta_inputs(x: Tensor, w: dict[str, Tensor], number: int, values: int) -> tuple[Tensor, ...]:
    q, k = (heads(convolved(x, w, name), number) for name in ("q", "k"))
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    q, k = (y.repeat_interleave(values // number, 2) for y in (q, k))
    return q, k, heads(convolved(x, w, "v"), values), F.linear(x, w["b_proj.weight"]).sigmoid()


def linear_layer(kind: str, x: Tensor, w: dict[str, Tensor], bound: Tensor | None) -> Tensor:
    """A linear layer as FLA's layers/*.py and SpikingBrain's gla_attention.py compute it."""

    def project(name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def low_rank(name: str) -> Tensor:
        inner = F.linear(x, w[f"{name}.0.weight"])
        return F.linear(inner, w[f"{name}.1.weight"], w.get(f"{name}.1.bias"))

    match kind:
        case "gla":
            q, k, v, g = (heads(project(f"{name}_proj"), 2) for name in ("q", "k", "v", "g"))
            decay = heads(F.logsigmoid(low_rank("gk_proj")) / 16, 2)
            o = rms(naive("gla", "naive_recurrent_gla", q, k, v, decay), w["g_norm_swish_gate.weight"], g)
        case "retnet":
            q, k, v, g = (heads(project(f"{name}_proj"), 2) for name in ("q", "k", "v", "g"))
            first = (y.transpose(1, 2) for y in (rotate(q, 1e4), rotate(k, 1e4), v))
            o = naive("retention", "naive_retention", *first).transpose(1, 2)
            o = rms(o, w["g_norm_swish_gate.weight"], g)
        case "hgrn" | "hgrn2":
            decay = F.logsigmoid(project("f_proj"))
            if bound is not None:
                decay = torch.logaddexp(bound.log(), torch.log1p(-bound) + decay)
            if kind == "hgrn":
                h = naive("hgrn", "naive_recurrent_hgrn", F.silu(project("i_proj")) * (1 - decay.exp()), decay)
                o = rms(h, w["g_norm.weight"], project("g_proj"))[:, :, None]
            else:
                q, k, v = F.silu(project("q_proj")), 1 - decay.exp(), project("i_proj")
                o = naive("gla", "naive_recurrent_gla", *(heads(y, 4) for y in (q, k, v, decay)))
                o = rms(o.flatten(2), w["g_norm.weight"])[:, :, None]
        case "delta_net":
            first = (y.transpose(1, 2) for y in delta_inputs(x, w, 2, 2))
            o = naive("delta_rule", "delta_rule_recurrence", *first).transpose(1, 2)
            o = rms(o, w["o_norm.weight"], heads(project("g_proj"), 2))
        case "gated_deltanet":
            q, k, v, beta = delta_inputs(x, w, 2, 4)
            decay = -w["A_log"].exp() * F.softplus(project("a_proj") + w["dt_bias"])
            o = naive("gated_delta_rule", "naive_recurrent_gated_delta_rule", q, k, v, beta, decay)
            o = rms(o, w["o_norm.weight"], heads(project("g_proj"), 4))
        case "kda":
            q, k, v, beta = delta_inputs(x, w, 2, 2)
            rates = heads(low_rank("f_proj") + w["dt_bias"], 2)
            decay = -5.0 * torch.sigmoid(w["A_log"].exp()[:, None] * rates)
            o = naive("kda", "naive_recurrent_kda", q, k, v, decay, beta)
            o = rms(o, w["o_norm.weight"], heads(low_rank("g_proj"), 2), torch.sigmoid)
        case _:
            q, k, v = F.relu(project("q_proj")), F.relu(project("k_proj")), project("v_proj")
            decay = F.logsigmoid(low_rank("gk_proj")) / 16
            k, v, decay = (heads(y, 2).repeat_interleave(2, 2) for y in (k, v, decay))
            o = rms(naive("gla", "naive_recurrent_gla", heads(q, 4), k, v, decay), w["g_norm.weight"])
    return F.linear(o.flatten(2), w["o_proj.weight"])


def reference(config: dict[str, Any], tensors: dict[str, Tensor], tokens: Tensor) -> Tensor:
    kind, softmax = config["model_type"], softmax_layers(config)
    bounds = tensors.get("model.lower_bounds")
    if bounds is not None:
        shares = bounds.softmax(0)
        bounds = shares.cumsum(0) - shares[0]
    x = tensors["model.embeddings.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        layer = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        mixer = {name.removeprefix("attn."): t for name, t in layer.items() if name.startswith("attn.")}
        h = rms(x, layer["attn_norm.weight"])
        bound = None if bounds is None or i == 0 else bounds[i]
        x = x + (softmax_layer(h, mixer, softmax[i]) if i in softmax else linear_layer(kind, h, mixer, bound))
        h = rms(x, layer["mlp_norm.weight"])
        gate, up = F.linear(h, layer["mlp.gate_proj.weight"]), F.linear(h, layer["mlp.up_proj.weight"])
        x = x + F.linear(F.silu(gate) * up, layer["mlp.down_proj.weight"])
    head = tensors.get("lm_head.weight", tensors["model.embeddings.weight"])
    return F.linear(rms(x, tensors["model.norm.weight"]), head)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_computes_what_fla_s_naive_operators_do(tmp_path, kind, tied):
    config = config_of(kind, tie_word_embeddings=tied)
    tensors = stored_model(config, tmp_path / "hub")
    tokens = torch.randint(ROWS, (2, TIME), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = loaded(tmp_path / "hub")(tokens, torch.arange(TIME).expand(2, TIME))
    assert_close(ours, reference(config, tensors, tokens))


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_imported_is_exported_again(tmp_path, kind):
    tensors = stored_model(config_of(kind), tmp_path / "hub")
    import_weights(tmp_path / "hub", tmp_path / "weights", "fp32", 1e9, print)
    export(tmp_path / "weights", tmp_path / "again", None, 1e9, print, hugging_face=True)
    assert_same_tensors(load_file(tmp_path / "again" / "model.safetensors"), tensors)
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["model_type"] == kind and again["max_position_embeddings"] == 64
    assert from_hub(again) == from_hub(config_of(kind))


PATTERNS = {
    "gla": "gated_linear_attention*2, full_attention",
    "retnet": "retention, sliding_window_attention",
    "hgrn": "full_attention, hgrn, sliding_window_attention",
    "hgrn2": "hgrn2",
    "delta_net": "delta_net, full_attention, delta_net",
    "gated_deltanet": "gated_delta_net, sliding_window_attention*2",
    "kda": "kimi_delta_attention",
    "gla_swa": "spikingbrain_gla, sliding_window_attention",
}


@pytest.mark.parametrize("kind", PATTERNS)
def test_a_configuration_comes_back(kind):
    """All that this model uses; sections of other mixers have their defaults."""
    changes = {"gated_linear_attention__gate_low_rank": 16, "attention__qkv_bias": True, "attention__rope_theta": 1e3}
    model = tiny_model_config(PATTERNS[kind], num_layers=3, vocab_size=ROWS, vocab_multiple=1, **changes)
    config = to_hub(model, ROWS, "float32", 64)
    again = from_hub(config)
    assert config["model_type"] == kind and to_hub(again, ROWS, "float32", 64) == config
    assert again.layer_mixers() == model.layer_mixers()
    # The head size, which is None in ours, is written out.
    if {"full_attention", "sliding_window_attention"} & set(model.used_mixers()):
        again.attention.head_dim = None
        assert again.attention == model.attention or "sliding_window_attention" not in model.used_mixers()
    own = again.used_mixers()[0 if kind != "hgrn" else 1]
    assert getattr(again, own, None) == getattr(model, own, None)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gla", {"use_gv": True}, "use_gv=True is not supported; gla with use_gv=False is"),
        ("gla", {"use_output_gate": False}, "use_output_gate=False is not supported"),
        ("gla", {"feature_map": "relu"}, "feature_map='relu' is not supported"),
        ("gla", {"clamp_min": -3.0}, "clamp_min=-3.0 is not supported"),
        ("gla", {"use_short_conv": True}, "use_short_conv=True is not supported"),
        ("gla", {"attnres_block_size": 4}, "attnres_block_size=4 is not supported"),
        ("gla", {"hidden_act": "relu"}, "hidden_act='relu' is not supported"),
        ("retnet", {"num_kv_heads": 1}, "num_kv_heads=1 is not supported"),
        ("retnet", {"attn": HYBRID | {"qk_norm": True}}, "attn: qk_norm=True is not supported"),
        (
            "retnet",
            {"attn": [HYBRID, HYBRID | {"layers": [2], "rope_theta": 1e3}]},
            "softmax layers with equal settings",
        ),
        ("retnet", {"attn": [HYBRID, HYBRID | {"window_size": 3}]}, "names layer 1 twice"),
        ("retnet", {"attn": {"layers": [1]}}, "an object with layers and num_heads is"),
        ("retnet", {"attn": HYBRID | {"layers": [3]}}, "attn: layers=[3] is not a list of layers, 0 to 2"),
        ("hgrn", {"use_lower_bound": False}, "use_lower_bound=False is not supported"),
        ("hgrn", {"expand_ratio": 2}, "expand_ratio=2 is not supported"),
        ("hgrn2", {"num_heads": 5}, "expand_ratio=8 is not hidden_size=32 over num_heads=5"),
        ("delta_net", {"qk_norm": "sum"}, "qk_norm='sum' is not supported"),
        ("delta_net", {"expand_k": 0.35}, "expand_k gives 11 channels, which num_heads=2 does not divide"),
        ("delta_net", {"use_short_conv": False}, "use_short_conv=False is not supported"),
        ("gated_deltanet", {"output_gate_activation": "sigmoid"}, "output_gate_activation='sigmoid' is not supported"),
        ("gated_deltanet", {"use_gate": False}, "use_gate=False is not supported"),
        ("kda", {"lower_bound": 5.0}, "-lower_bound=-5.0 is not a positive number"),
        ("gla_swa", {"rope_scaling": {"type": "yarn"}}, "rope_scaling={'type': 'yarn'} is not supported"),
        ("gla_swa", {"auto_map": {"AutoModel": "evil.Model"}}, "auto_map={'AutoModel': 'evil.Model'} is not supported"),
    ],
)
def test_what_models_here_do_not_compute_is_refused(tmp_path, kind, changes, message):
    (tmp_path / "config.json").write_text(json.dumps(config_of(kind, **changes)))
    with pytest.raises(ConfigError) as error:
        open_weights(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("pattern", "changes", "message"),
    [
        ("hgrn, gated_delta_net", {}, "hgrn and gated_delta_net in one model have no Hugging Face layout"),
        ("hgrn2 + full_attention", {}, "layers with hgrn2 . full_attention in parallel have no Hugging Face layout"),
        ("spikingbrain_tied_gla", {}, "layers with spikingbrain_tied_gla have no Hugging Face layout"),
        ("gated_linear_attention", {}, "gated_linear_attention.gate_low_rank=4 has no place in gla"),
        ("retention", {"retention__rope_theta": 500.0}, "model.retention.rope_theta=500.0 has no place in retnet"),
        ("hgrn, full_attention", {}, "hgrn in layer 0 alone has no place in hgrn"),
        ("delta_net, full_attention", {"attention__qk_norm": True}, "attention.qk_norm=true has no place in delta_net"),
        ("delta_net, full_attention", {"attention__head_dim": 6}, "not hidden_size / num_heads, has no place in"),
        ("spikingbrain_gla", {}, "layers other than spikingbrain_gla and sliding_window_attention in turns has"),
        ("spikingbrain_gla, sliding_window_attention", {}, "qkv_bias=false has no place in gla_swa"),
    ],
)
def test_a_model_that_fla_does_not_have_is_refused(pattern, changes, message):
    with pytest.raises(ValueError, match=message):
        to_hub(tiny_model_config(pattern, **changes), ROWS, "float32", 64)


def test_what_published_files_hold_besides(tmp_path):
    """The unused D of early Gated DeltaNets; g_norm where FLA does not fuse the gate; another SpikingBrain's scales."""
    tensors = stored_model(config_of("gated_deltanet"), tmp_path / "gdn")
    save_file(tensors | {"model.layers.0.attn.D": torch.ones(4)}, tmp_path / "gdn" / "model.safetensors")
    lines: list[str] = []
    import_weights(tmp_path / "gdn", tmp_path / "weights", "fp32", 1e9, lines.append)
    assert "left out, for they are redundant: model.layers.0.attn.D" in lines
    plain = stored_model(config_of("gla", fuse_norm=False), tmp_path / "gla")
    renamed = {name.replace("g_norm_swish_gate", "g_norm"): tensor for name, tensor in plain.items()}
    save_file(renamed, tmp_path / "gla" / "model.safetensors")
    loaded(tmp_path / "gla")
    spikes = stored_model(config_of("gla_swa"), tmp_path / "spikes")
    scales = {"model.layers.0.attn.q_proj.weight_quantizer.scales": torch.ones(4)}
    save_file(spikes | scales, tmp_path / "spikes" / "model.safetensors")
    with pytest.raises(ConfigError, match="the tensors are those of W8ASpike"):
        open_weights(tmp_path / "spikes")


def test_spikingbrain_s_own_code_is_no_custom_code(tmp_path):
    code = {"AutoConfig": "configuration_gla_swa.GLAswaConfig", "AutoModelForCausalLM": "a.GLAswaForCausalLM"}
    stored_model(config_of("gla_swa", auto_map=code), tmp_path / "hub")
    assert open_weights(tmp_path / "hub").model.attention.window == 7
