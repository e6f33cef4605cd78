"""Models that go to transformers and come back: the same logits, the same numbers."""

import importlib
import json
from dataclasses import asdict, replace

import pytest
import torch
import yaml

pytest.importorskip("transformers")

from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from models.config import (
    AttentionConfig,
    GatedDeltaNetConfig,
    MixerLayoutConfig,
    ModelConfig,
    MoEConfig,
    RopeScalingConfig,
    RouterConfig,
)
from models.decoder import Decoder
from models.hub.registry import from_hub, to_hub
from tests.trainer.conftest import in_process_config
from trainer import pretrain
from trainer.benchmarks.transformers_peer import without_kernels
from trainer.errors import ConfigError
from trainer.stored.export import export, import_weights
from trainer.stored.inference import load_model
from trainer.stored.opening import open_weights
from trainer.stored.weights import fill

with without_kernels():
    # Qwen3-Next would take FLA's kernels, which need a GPU.
    importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")

# By model_type: settings of the attention, the layers, and the experts.
EXPERTS = MoEConfig(num_experts=4, router=RouterConfig(top_k=2, normalize="after"))
SOME_EXPERTS = replace(EXPERTS, num_experts=5, expert_hidden_size=24, dense_layers=[1])
NEXT = {"qk_norm": True, "output_gate": True, "partial_rotary_factor": 0.5}
SHARED_EXPERTS = replace(EXPERTS, expert_hidden_size=24, shared_experts=2, shared_expert_gate=True)
GDN = GatedDeltaNetConfig(num_heads=2, num_v_heads=4, head_dim=8, expand_v=1.5)
KINDS = {
    "llama": ({}, "full_attention", MoEConfig()),
    "qwen2": ({"qkv_bias": True}, "full_attention", MoEConfig()),
    "qwen3": ({"qk_norm": True}, "full_attention", MoEConfig()),
    "mistral": ({"window": 7}, "sliding_window_attention", MoEConfig()),
    "mixtral": ({}, "full_attention", EXPERTS),
    "qwen3_moe": ({"qk_norm": True}, "full_attention", SOME_EXPERTS),
    "qwen3_next": (NEXT, "gated_delta_net, full_attention", SHARED_EXPERTS),
}
# The same with windows in other layers than a kind has them above, and with gates that are not normalised.
UNNORMALIZED = replace(SOME_EXPERTS, router=RouterConfig(top_k=3, normalize="before"))
VARIANTS = {
    "qwen2": ({"qkv_bias": True, "window": 5}, "full_attention, sliding_window_attention", MoEConfig()),
    "qwen3": ({"qk_norm": True, "window": 5}, "sliding_window_attention, full_attention", MoEConfig()),
    "mixtral": ({"window": 6}, "sliding_window_attention", EXPERTS),
    "qwen3_moe": ({"qk_norm": True, "window": 6}, "sliding_window_attention", UNNORMALIZED),
    "qwen3_next": (NEXT | {"partial_rotary_factor": 1.0}, "full_attention, gated_delta_net", MoEConfig()),
}
ALL = [*KINDS.items(), *VARIANTS.items()]
NAMES = [*KINDS, *(f"{kind}, other" for kind in VARIANTS)]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 32
MIXTRAL = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
QWEN3_MOE = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
SHAPE = ModelConfig(num_layers=2, hidden_size=32, ffn_hidden_size=48, tie_embeddings=False, norm_eps=1e-5)


def shape(kind, parts=None, **changes):
    settings, pattern, moe = parts or KINDS[kind]
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=12, rope_theta=500.0, **settings)
    fields = {"attention": attention, "mixers": MixerLayoutConfig(pattern=pattern), "moe": moe}
    if kind == "qwen3_next":
        fields |= {"zero_centered_norms": True, "gated_delta_net": GDN}
    return replace(SHAPE, **fields | changes)


def theirs_of(kind, seed=0, parts=None, **changes):
    """A model of transformers in which norms and biases are drawn, too."""
    config = to_hub(shape(kind, parts, **changes), 128, "float32", 64)
    assert config["model_type"] == kind
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


def loaded(folder):
    opened = open_weights(folder)
    ours = Decoder(opened.model, opened.vocab_size).eval()
    opened.require(ours)
    fill(ours, opened)
    return ours


def stored(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_tensors(one, other):
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8))]
    assert not different


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("kind", "parts"), ALL, ids=NAMES)
def test_an_imported_model_computes_what_transformers_does(tmp_path, kind, parts, tied):
    """The same from the directory itself; and what is exported again is the same to the last bit."""
    theirs = theirs_of(kind, parts=parts, tie_embeddings=tied)
    theirs.save_pretrained(tmp_path / "hub", max_shard_size="20KB")
    import_weights(tmp_path / "hub", tmp_path / "weights", "fp32", 1e9, print)
    for folder in (tmp_path / "weights", tmp_path / "hub"):
        assert_close(logits(loaded(folder), ours=True), logits(theirs, ours=False))
    export(tmp_path / "weights", tmp_path / "again", None, 20_000, print, hugging_face=True)
    assert_same_tensors(stored(tmp_path / "again"), stored(tmp_path / "hub"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert again.config.max_position_embeddings == 64 and again.config.model_type == kind
    assert torch.equal(logits(again, ours=False), logits(theirs, ours=False))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_that_are_stored_together_are_read(tmp_path, kind):
    theirs = theirs_of(kind)
    theirs.save_pretrained(tmp_path / "hub", save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in stored(tmp_path / "hub"))
    assert_close(logits(loaded(tmp_path / "hub"), ours=True), logits(theirs, ours=False))


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_a_model_in_bfloat16_comes_back(tmp_path, kind):
    """Also its routers, which training keeps in float32."""
    theirs_of(kind).bfloat16().save_pretrained(tmp_path / "hub")
    import_weights(tmp_path / "hub", tmp_path / "weights", "bf16", 1e9, print)
    export(tmp_path / "weights", tmp_path / "again", None, 1e9, print, hugging_face=True)
    assert_same_tensors(stored(tmp_path / "again"), stored(tmp_path / "hub"))


# Other kinds differ from these two in what the tests above see.
QUICK = ("llama", "qwen3_next")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in KINDS]
)
def test_transformers_opens_an_exported_run(tiny_data, tmp_path, kind):
    config = replace(in_process_config(tiny_data, tmp_path / "run", steps=2), model=shape(kind))
    assert pretrain.run(config, yaml.safe_dump(asdict(config))) == 0
    export(tmp_path / "run", tmp_path / "hub", None, 20_000, print, hugging_face=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hub").eval()
    assert theirs.config.model_type == kind and theirs.dtype == torch.float32
    assert theirs.generation_config.eos_token_id == theirs.config.eos_token_id == 0, "what ended documents"
    ours = load_model(tmp_path / "run", torch.device("cpu")).model
    assert theirs.config.max_position_embeddings == config.train.seq_len
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
@pytest.mark.parametrize(("kind", "parts"), ALL, ids=NAMES)
def test_a_configuration_comes_back(kind, parts, scaling):
    model = shape(kind, parts, vocab_size=100, vocab_multiple=1)
    model.attention.rope_scaling = RopeScalingConfig(scaling, **SCALINGS[scaling])
    assert from_hub(to_hub(model, 100, "bfloat16", 64)) == model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type='mamba' is not known here; llama, qwen2, "),
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
            "layer_types=['full_attention', 'sliding_attention'] is not supported; with the other keys",
        ),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"sliding_window": 16}, "sliding_window=16 is not supported; llama with sliding_window=None is"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        (MIXTRAL | {"num_experts_per_tok": 0}, "num_experts_per_tok=0 is not a positive whole number"),
        (QWEN3_MOE | {"mlp_only_layers": [2]}, "mlp_only_layers=[2] is not a list of layers, 0 to 1"),
        (QWEN3_MOE | {"norm_topk_prob": "yes"}, "norm_topk_prob='yes' is neither true nor false"),
        ({"model_type": "sse_swa_moba"}, "SpikingBrain 2 needs sparse state expansion (SSE) and mixture of block"),
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
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, ()),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}, ()),
        ("mistral", {"num_attention_heads": 16, "head_dim": 12}, ("num_key_value_heads", "sliding_window")),
        ("mistral", {"sliding_window": None}, ()),
        ("mixtral", {"rope_parameters": None}, ("rms_norm_eps", "num_experts_per_tok", "sliding_window")),
        ("mixtral", {"num_attention_heads": 8, "head_dim": 4}, ("num_key_value_heads", "num_local_experts")),
        ("qwen3_moe", {"num_experts": 8, "mlp_only_layers": None, "decoder_sparse_step": 2}, ()),
        ("qwen3_moe", {"num_experts": 9}, ("norm_topk_prob", "num_experts_per_tok", "decoder_sparse_step")),
        ("qwen3_moe", {"mlp_only_layers": [0, 1]}, ("moe_intermediate_size", "num_key_value_heads")),
    ],
)
def test_what_can_be_represented_computes_the_same(tmp_path, kind, changes, absent):
    """Through config.json as it is written, with what is missing at transformers' own defaults."""
    config = {key: value for key, value in config_of(kind, **changes).items() if key not in absent}
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(json.dumps(config)))).eval()
    theirs.save_pretrained(tmp_path / "hub")
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    assert_close(logits(loaded(tmp_path / "hub"), ours=True), logits(theirs, ours=False))


def with_experts(**changes):
    router = {name: changes.pop(name) for name in list(changes) if hasattr(RouterConfig(), name)}
    return replace(SHAPE, moe=MoEConfig(num_experts=4, router=RouterConfig(**router), **changes))


WINDOW = MixerLayoutConfig(pattern="full_attention, sliding_window_attention")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (replace(SHAPE, attention=AttentionConfig(rope_theta=None)), "rope_theta=null has no place in llama"),
        (replace(SHAPE, attention=AttentionConfig(qkv_bias=True, qk_norm=True)), "qkv_bias=true has no place in qwen3"),
        (replace(SHAPE, attention=AttentionConfig(3, 3, head_dim=8)), "model.hidden_size=32, no multiple of"),
        (replace(SHAPE, mixers=WINDOW), "both full_attention and sliding_window_attention has no place in mistral"),
        (with_experts(shared_experts=1), "shared_experts=1 has no place in mixtral"),
        (with_experts(score="sigmoid"), "router.score=sigmoid has no place in mixtral"),
        (with_experts(normalize="before"), "router.normalize=before has no place in mixtral"),
        (with_experts(gate="dense_to_sparse"), "router.gate=dense_to_sparse has no place in mixtral"),
        (with_experts(num_groups=2), "router.num_groups=2 has no place in mixtral"),
        (with_experts(bias_update_rate=0.1), "router.bias_update_rate=0.1 has no place in mixtral"),
        (with_experts(activation="gelu"), "moe.activation=gelu has no place in mixtral"),
        (with_experts(dense_layers=[0]), r"dense_layers=\[0\] has no place in mixtral"),
    ],
)
def test_a_model_that_transformers_does_not_have_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        to_hub(model, 128, "float32", 64)
