"""Models that go to transformers and come back: the same logits, the same numbers."""

import json
from dataclasses import asdict, replace

import pytest
import torch
import yaml

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM

from models.config import AttentionConfig, MixerLayoutConfig, ModelConfig
from models.decoder import Decoder
from models.hub.dense import from_hub, to_hub
from tests.trainer.conftest import in_process_config
from trainer import pretrain
from trainer.cli import ConfigError
from trainer.export import export, import_weights
from trainer.inference import load_model
from trainer.weights import fill, open_weights

KINDS = {
    "llama": {"qkv_bias": False, "qk_norm": False},
    "qwen2": {"qkv_bias": True, "qk_norm": False},
    "qwen3": {"qkv_bias": False, "qk_norm": True},
}
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
    ours = load_model(tmp_path / "run", torch.device("cpu")).model
    assert_close(logits(ours, ours=True, vocab_size=512), logits(theirs, ours=False, vocab_size=512))
    import_weights(tmp_path / "hub", tmp_path / "weights", "fp32", 1e9, print)
    again = Decoder(config.model, 512)
    fill(again, open_weights(tmp_path / "weights"))
    theirs_again = dict(again.named_parameters())
    assert all(torch.equal(parameter, theirs_again[name]) for name, parameter in ours.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_comes_back(kind):
    model = shape(kind, vocab_size=100, vocab_multiple=1, mixers=MixerLayoutConfig(pattern="full_attention"))
    assert from_hub(to_hub(model, 100, "bfloat16", 64)) == model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type='mamba' is not known here; llama, qwen2, qwen3 are"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling="),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_type='yarn' is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types other than full_attention"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
    ],
)
def test_what_is_not_the_same_function_is_refused(tmp_path, changes, message):
    config = to_hub(shape("llama"), 128, "float32", 64) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError) as error:
        import_weights(tmp_path, tmp_path / "weights", "fp32", 1e9, print)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (replace(SHAPE, mixers=MixerLayoutConfig(pattern="hgrn, full_attention")), "layers with hgrn have no"),
        (replace(SHAPE, attention=AttentionConfig(rope_theta=None)), "rope_theta=null has no"),
        (replace(SHAPE, attention=AttentionConfig(qkv_bias=True, qk_norm=True)), "both qkv_bias and qk_norm has no"),
    ],
)
def test_a_model_that_transformers_does_not_have_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        to_hub(model, 128, "float32", 64)
