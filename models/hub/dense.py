"""Llama, Qwen2 and Qwen3: dense decoders whose parameters differ from ours in name alone. Imports no torch."""

from typing import Any

from models.config import AttentionConfig, MixerLayoutConfig, ModelConfig

# By (biases on queries, keys and values; norms on queries and keys).
_TYPES = {(False, False): "llama", (True, False): "qwen2", (False, True): "qwen3"}
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_OUTER = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head"}
_INNER = {
    "mixer_norm": "input_layernorm",
    "mixer": "self_attn",
    "ffn_norm": "post_attention_layernorm",
    "ffn": "mlp",
}
# What these configurations can ask for and a model here cannot do, and the values that ask for nothing.
_WITHOUT: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "rope_scaling": (None,),
    "pretraining_tp": (1,),
}


def hub_name(name: str) -> str:
    """The name there of a parameter of Decoder."""
    module, _, rest = name.partition(".")
    if module != "layers":
        return f"{_OUTER[module]}.{rest}"
    layer, part, rest = rest.split(".", 2)
    return f"model.layers.{layer}.{_INNER[part]}.{rest}"


def to_hub(model: ModelConfig, vocab_size: int, dtype: str, max_positions: int) -> dict[str, Any]:
    """The config.json of a model.

    Args:
        model: Its shape.
        vocab_size: Rows of its embedding.
        dtype: As torch names it.
        max_positions: Tokens of the longest sequence it was trained on.

    Raises:
        ValueError: no architecture here computes what it does.
    """
    attention = model.attention
    other = sorted(set(model.layer_mixers()) - {"full_attention"})
    if other:
        raise ValueError(f"layers with {', '.join(other)} have no Hugging Face layout; only full_attention has")
    if attention.rope_theta is None:
        raise ValueError("model.attention.rope_theta=null has no Hugging Face layout; Llama and Qwen rotate")
    kind = _TYPES.get((attention.qkv_bias, attention.qk_norm))
    if kind is None:
        raise ValueError("model.attention with both qkv_bias and qk_norm has no Hugging Face layout")
    return {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "dtype": dtype,
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": model.attention_head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "max_position_embeddings": max_positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": attention.rope_theta},
        # What transformers read before rope_parameters.
        "rope_theta": attention.rope_theta,
    }


def from_hub(config: dict[str, Any]) -> ModelConfig:
    """The shape of a model from its config.json.

    Raises:
        ValueError: it is of another architecture, or asks for something that a model here cannot do.
    """
    kind = config.get("model_type")
    if kind not in _ARCHITECTURES:
        raise ValueError(f"model_type={kind!r} is not known here; {', '.join(_ARCHITECTURES)} are")
    for name, values in _WITHOUT.items():
        if name in config and config[name] not in values:
            raise ValueError(f"{name}={config[name]!r} is not supported; {kind} with {name}={values[0]!r} is")
    if set(config.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError("layer_types other than full_attention are not supported")
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type={rope['rope_type']!r} is not supported; rope_type='default' is")
    heads = config["num_attention_heads"]
    biased, normed = next(key for key, value in _TYPES.items() if value == kind)
    return ModelConfig(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        vocab_multiple=64 if config["vocab_size"] % 64 == 0 else 1,
        tie_embeddings=config.get("tie_word_embeddings", False),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        mixers=MixerLayoutConfig(pattern="full_attention"),
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            rope_theta=float(rope["rope_theta"]),
            qk_norm=normed,
            qkv_bias=biased,
        ),
    )
