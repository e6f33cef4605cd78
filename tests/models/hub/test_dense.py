"""Models that go to transformers and come back: the same logits, the same numbers."""

import json
from dataclasses import asdict, replace

import pytest
import torch
import yaml

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM

from models.config import AttentionConfig, MixerLayoutConfig, ModelConfig, MoEConfig, RopeScalingConfig
from models.decoder import Decoder
from models.hub.dense import from_hub, to_hub
from tests.trainer.conftest import in_process_config
from trainer import pretrain
from trainer.errors import ConfigError
from trainer.stored.export import export, import_weights
from trainer.stored.inference import load_model
from trainer.stored.weights import fill, open_weights

KINDS = {
    "llama": {"qkv_bias": False, "qk_norm": False},
    "qwen2": {"qkv_bias": True, "qk_norm": False},
    "qwen3": {"qkv_bias": False, "qk_norm": True},
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 32
SHAPE = ModelConfig(num_layers=2, hidden_size=32, ffn_hidden_size=48, tie_embeddings=False, norm_eps=1e-5)


def shape(kind, **changes):
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=12, rope_theta=500.0, **KINDS[kind])
    return replace(SHAPE, attention=attention, **changes)


def theirs_of(kind, seed=0, **changes):
    """A model of transformers in which norms and biases are drawn, too."""
    config = to_hub(shape(kind, **changes), 128, "float32", 64)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def logits(model, ours, vocab_size=128):
    tokens = torch.randint(vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        if ours:
            return model(tokens, torch.arange(40).expand(2, 40))
        return model(input_ids=tokens).logits


def assert_close(ours, theirs):
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_an_imported_model_computes_what_transformers_does(tmp_path, kind, tied):
    theirs = theirs_of(kind, tie_embeddings=tied)
    theirs.save_pretrained(tmp_path / "hub", max_shard_size="20KB")
    import_weights(tmp_path / "hub", tmp_path / "weights", "fp32", 1e9, print)
    opened = open_weights(tmp_path / "weights")
    ours = Decoder(opened.model, opened.vocab_size)
    fill(ours, opened)
    assert_close(logits(ours, ours=True), logits(theirs, ours=False))


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_opens_an_exported_run(tiny_data, tmp_path, kind):
    config = replace(in_process_config(tiny_data, tmp_path / "run", steps=2), model=shape(kind))
    assert pretrain.run(config, yaml.safe_dump(asdict(config))) == 0
    export(tmp_path / "run", tmp_path / "hub", None, 20_000, print, hugging_face=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hub").eval()
    assert theirs.config.model_type == kind and theirs.dtype == torch.float32
    assert theirs.generation_config.eos_token_id == theirs.config.eos_token_id == 0, "what ended documents"
    ours = load_model(tmp_path / "run", torch.device("cpu")).model
    assert_close(logits(ours, ours=True, vocab_size=512), logits(theirs, ours=False, vocab_size=512))
    import_weights(tmp_path / "hub", tmp_path / "weights", "fp32", 1e9, print)
    again = Decoder(config.model, 512)
    fill(again, open_weights(tmp_path / "weights"))
    theirs_again = dict(again.named_parameters())
    assert all(torch.equal(parameter, theirs_again[name]) for name, parameter in ours.named_parameters())


SCALINGS = {
    "none": {},
    "linear": {"factor": 2.0},
    "llama3": {"factor": 8.0, "original_length": 32, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 4.0, "original_length": 16, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.2},
}


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_comes_back(kind, scaling):
    model = shape(kind, vocab_size=100, vocab_multiple=1, mixers=MixerLayoutConfig(pattern="full_attention"))
    model.attention.rope_scaling = RopeScalingConfig(scaling, **SCALINGS[scaling])
    assert from_hub(to_hub(model, 100, "bfloat16", 64)) == model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type='mamba' is not known here; llama, qwen2, qwen3 are"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling: factor=2.0 is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling: rope_type='dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling: low_freq_factor is missing"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, "rope_scaling: factor=-1 is not a positive number"),
        ({"rope_scaling": YARN | {"mscale": 0.7}}, "rope_scaling: mscale=0.7 is not supported with rope_type='yarn'"),
        ({"rope_scaling": YARN | {"truncate": False}}, "rope_scaling: truncate=False is not supported"),
        ({"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 3.0}}, "scale the rotation differently"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 500.0}}}, "rope_parameters of full_attention alone"),
        ({"rope_parameters": {"rope_theta": 500.0, "mrope_section": [1, 2]}}, "mrope_section=[1, 2] is not"),
        ({"rope_parameters": {"rope_theta": 600.0}}, "given differently (rope_theta=500, rope_parameters.rope_theta"),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": "big"}}, "rope_theta='big' is not a positive number"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor=0.25 is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types=['full_attention', 'sliding_attention'",
        ),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"sliding_window": 16}, "sliding_window=16 is not supported; llama with null is"),
        ({"model_type": "qwen2", "architectures": None, "use_sliding_window": True}, "use_sliding_window=True is not"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not supported"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config={'quant_method': 'fp8'} is not"),
        ({"auto_map": {"AutoModelForCausalLM": "a.B"}}, "auto_map={'AutoModelForCausalLM': 'a.B'} is not supported"),
        ({"num_local_experts": 8}, "num_local_experts=8 is not supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures=['LlamaForSequenceClassification'] is"),
        ({"hidden_size": "32"}, "hidden_size='32' is not a positive whole number"),
    ],
)
def test_what_is_not_the_same_function_is_refused(tmp_path, changes, message):
    config = to_hub(shape("llama"), 128, "float32", 64) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError) as error:
        import_weights(tmp_path, tmp_path / "weights", "fp32", 1e9, print)
    assert message in str(error.value)


def config_of(kind, **changes):
    """A config.json as it is published: without what has to be said twice."""
    config = to_hub(shape(kind), 128, "float32", 64)
    del config["rope_theta"], config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]
    return config | changes


@pytest.mark.parametrize(
    ("kind", "changes", "absent"),
    [
        ("llama", {"rope_parameters": None, "rope_theta": 700.0}, ()),
        ("llama", {"rope_parameters": {"rope_theta": 700.0}}, ()),
        ("llama", {"rope_parameters": {"type": "default"}, "rope_theta": 700.0}, ()),
        ("qwen3", {"rope_parameters": None, "rope_scaling": {"rope_type": "default", "rope_theta": 700.0}}, ()),
        ("llama", {}, ("rope_parameters",)),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}}, ()),
        ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}}, ()),
        ("llama", {"rope_parameters": None, "rope_theta": 500.0, "rope_scaling": LLAMA3}, ()),
        ("qwen2", {"rope_parameters": YARN | {"rope_theta": 500.0}}, ()),
        ("qwen3", {"rope_parameters": YARN | {"rope_theta": 500.0, "attention_factor": 1.5, "beta_fast": 8.0}}, ()),
        ("qwen2", {"rope_parameters": None, "rope_theta": 500.0, "rope_scaling": YARN}, ()),
        ("llama", {"pretraining_tp": 2, "attention_dropout": 0.1, "hidden_act": "silu"}, ()),
        ("llama", {"head_dim": None}, ("num_key_value_heads",)),
        ("qwen2", {"sliding_window": 4, "use_sliding_window": False, "max_window_layers": 1}, ("head_dim",)),
        ("qwen2", {"num_attention_heads": 64, "hidden_size": 128}, ("num_key_value_heads", "head_dim")),
        ("qwen3", {"hidden_act": "swish", "layer_types": ["full_attention", "full_attention"]}, ("head_dim",)),
        ("qwen3", {}, ("rms_norm_eps", "tie_word_embeddings")),
    ],
)
def test_what_can_be_represented_computes_the_same(tmp_path, kind, changes, absent):
    """Through config.json as it is written, with what is missing at transformers' own defaults."""
    config = {key: value for key, value in config_of(kind, **changes).items() if key not in absent}
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(json.dumps(config)))).eval()
    theirs.save_pretrained(tmp_path / "hub")
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    import_weights(tmp_path / "hub", tmp_path / "weights", "fp32", 1e9, print)
    opened = open_weights(tmp_path / "weights")
    ours = Decoder(opened.model, opened.vocab_size)
    fill(ours, opened)
    assert_close(logits(ours, ours=True), logits(theirs, ours=False))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (replace(SHAPE, mixers=MixerLayoutConfig(pattern="hgrn, full_attention")), "layers with hgrn have no"),
        (replace(SHAPE, attention=AttentionConfig(rope_theta=None)), "rope_theta=null has no"),
        (replace(SHAPE, attention=AttentionConfig(qkv_bias=True, qk_norm=True)), "both qkv_bias and qk_norm has no"),
        (replace(SHAPE, moe=MoEConfig(num_experts=2)), "model.moe.num_experts=2 has no Hugging Face layout"),
        (replace(SHAPE, mixers=MixerLayoutConfig(pattern="sliding_window_attention")), "sliding_window_attention have"),
        (replace(SHAPE, attention=AttentionConfig(3, 3, head_dim=8)), "model.hidden_size=32 is no multiple of"),
    ],
)
def test_a_model_that_transformers_does_not_have_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        to_hub(model, 128, "float32", 64)
