"""Llama, Qwen2 and Qwen3: dense decoders that differ from ours only in parameter names. Imports no torch.

Every key of a config.json falls into one of four classes: a number of our model (`from_hub`); a request for a different
function, which is refused (`_WITHOUT`, the rotary keys); no effect on the function (`_HARMLESS`); or unknown, and
reported as left out (`left_out`).
"""

import math
from typing import Any

from models.config import AttentionConfig, MixerLayoutConfig, ModelConfig, RopeScalingConfig

# Keys: (biases on queries, keys and values; norms on queries and keys).
_TYPES = {(False, False): "llama", (True, False): "qwen2", (False, True): "qwen3"}
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_OUTER = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head"}
_INNER = {
    "mixer_norm": "input_layernorm",
    "mixer": "self_attn",
    "ffn_norm": "post_attention_layernorm",
    "ffn": "mlp",
}
# The end-of-document token of tokenizers trained by launch/prepare_data.py.
LEARNED_EOD = 0
_DEFAULT_THETA = 10000.0

# Keys with a counterpart in ModelConfig, read by `from_hub`.
_REPRESENTED = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
)
# Features that these configurations can request and models here lack, with the values that request nothing.
# transformers itself ignores some of these keys for these types, but other programs read them, and copies of other
# models contain them.
_WITHOUT: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "layer_types": (None,),
    "partial_rotary_factor": (None, 1.0),
    "rotary_pct": (None, 1.0),
    "no_rope_layers": (None, []),
    "rope_interleaved": (None, False),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "attention_multiplier": (None,),
    "attention_chunk_size": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "n_routed_experts": (None, 0),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
    "compression_config": (None,),
    # Custom code, which may compute anything.
    "auto_map": (None, {}),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
}
# Keys that do not affect the computed function, or that other files hold, such as special token ids.
_HARMLESS = (
    "architectures",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "max_position_embeddings",
    "max_window_layers",
    "sliding_window",
    "original_max_position_embeddings",
    "initializer_range",
    # Computes the products in slices, with the same sum.
    "pretraining_tp",
    "use_cache",
    "chunk_size_feed_forward",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
    "is_decoder",
    "id2label",
    "label2id",
    "problem_type",
)
# Matter only in training; models here have no dropout.
_IN_TRAINING = {"attention_dropout": (0, None)}


def hub_name(name: str) -> str:
    """Hugging Face's name of a parameter of Decoder."""
    module, _, rest = name.partition(".")
    if module != "layers":
        return f"{_OUTER[module]}.{rest}"
    layer, part, rest = rest.split(".", 2)
    return f"model.layers.{layer}.{_INNER[part]}.{rest}"


def to_hub(
    model: ModelConfig, vocab_size: int, dtype: str, max_positions: int, eos_token_id: int | None = LEARNED_EOD
) -> dict[str, Any]:
    """The config.json of a model.

    The keys of special tokens are always present, null where unknown: transformers assumes 2 and 1 for missing ones.
    An export replaces them with its tokenizer's special tokens (trainer.stored.hub_files).

    Args:
        model: The model's configuration.
        vocab_size: Rows of its embedding.
        dtype: Dtype as named by torch.
        max_positions: Length of the longest sequence in training, in tokens.
        eos_token_id: The end-of-text token; by default that of tokenizers trained by prepare_data.

    Raises:
        ValueError: no supported architecture computes this model.
    """
    attention = model.attention
    kind = _require_layout(model)
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
        "rope_parameters": {**_rope_to_hub(attention.rope_scaling), "rope_theta": attention.rope_theta},
        # Read by versions of transformers that predate rope_parameters.
        "rope_theta": attention.rope_theta,
        "rope_scaling": None if attention.rope_scaling.kind == "none" else _rope_to_hub(attention.rope_scaling),
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
    }


def _require_layout(model: ModelConfig) -> str:
    """The architecture that computes this model.

    Raises:
        ValueError: there is none.
    """
    attention = model.attention
    other = sorted(set(model.layer_mixers()) - {"full_attention"})
    if other:
        raise ValueError(f"layers with {', '.join(other)} have no Hugging Face layout; only full_attention has")
    if model.moe.num_experts:
        raise ValueError(f"model.moe.num_experts={model.moe.num_experts} has no Hugging Face layout; dense models have")
    for name, plain in (("sink_tokens", 0), ("zero_centered_norms", False)):
        if getattr(model, name) != plain:
            raise ValueError(f"model.{name}={getattr(model, name)} has no Hugging Face layout here")
    for name, default in (("output_gate", False), ("partial_rotary_factor", 1.0)):
        if getattr(attention, name) != default:
            raise ValueError(f"model.attention.{name}={getattr(attention, name)} has no Hugging Face layout here")
    if model.spiking.is_used:
        raise ValueError("model.spiking has no Hugging Face layout: its architectures compute with floats")
    if attention.rope_theta is None:
        raise ValueError("model.attention.rope_theta=null has no Hugging Face layout; Llama and Qwen rotate")
    kind = _TYPES.get((attention.qkv_bias, attention.qk_norm))
    if kind is None:
        raise ValueError("model.attention with both qkv_bias and qk_norm has no Hugging Face layout")
    if kind == "llama" and model.hidden_size % attention.num_heads:
        raise ValueError(
            f"model.hidden_size={model.hidden_size} is no multiple of model.attention.num_heads={attention.num_heads}, "
            "which transformers' Llama asks for"
        )
    return kind


def from_hub(config: dict[str, Any]) -> ModelConfig:
    """Convert a config.json into a ModelConfig. Missing keys take transformers' defaults.

    Raises:
        ValueError: the architecture is unsupported, or the model needs an unsupported feature.
        KeyError: a number without a default is missing.
    """
    kind = config.get("model_type")
    if kind not in _ARCHITECTURES:
        raise ValueError(f"model_type={kind!r} is not known here; {', '.join(_ARCHITECTURES)} are")
    _refuse_other_functions(config, kind)
    heads, width, vocab_size = (_whole(config, name) for name in ("num_attention_heads", "hidden_size", "vocab_size"))
    # If the key is missing (not null), Qwen's classes have their own defaults.
    kv_heads = _whole(config, "num_key_value_heads", heads if kind == "llama" else 32) or heads
    head_dim = _whole(config, "head_dim", 128 if kind == "qwen3" else None) or width // heads
    biased, normed = next(key for key, value in _TYPES.items() if value == kind)
    return ModelConfig(
        num_layers=_whole(config, "num_hidden_layers"),
        hidden_size=width,
        ffn_hidden_size=_whole(config, "intermediate_size"),
        vocab_size=vocab_size,
        # Whole multiples of 64 keep tensor parallelism possible; otherwise the rows must not be padded.
        vocab_multiple=64 if vocab_size % 64 == 0 else 1,
        tie_embeddings=_flag(config, "tie_word_embeddings"),
        norm_eps=_positive("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
        mixers=MixerLayoutConfig(pattern="full_attention"),
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rope_theta=_rope_theta(config),
            rope_scaling=_rope_scaling(config),
            qk_norm=normed,
            qkv_bias=biased,
        ),
    )


def left_out(config: dict[str, Any]) -> list[str]:
    """Keys of a config.json that have no counterpart here, or that matter only in training, as `key=value`."""
    known = {*_REPRESENTED, *_WITHOUT, *_HARMLESS, *_IN_TRAINING}
    unknown = [key for key in config if key not in known and not key.startswith("_")]
    dropped = [key for key, values in _IN_TRAINING.items() if key in config and config[key] not in values]
    return [f"{key}={config[key]!r}" for key in sorted(unknown + dropped)]


def _refuse_other_functions(config: dict[str, Any], kind: str) -> None:
    for name, values in _WITHOUT.items():
        # layer_types lists the attention kind of each layer; all full attention is supported.
        value = None if name == "layer_types" and _all_full(config.get(name)) else config.get(name, values[0])
        if value not in values:
            raise ValueError(f"{name}={value!r} is not supported; {kind} with {name}={values[0]!r} is")
    # Qwen's classes use it only with use_sliding_window; for Llama some other programs use it regardless.
    if kind == "llama" and config.get("sliding_window") is not None:
        raise ValueError(f"sliding_window={config['sliding_window']!r} is not supported; llama with null is")
    named, wanted = config.get("architectures"), _ARCHITECTURES[kind]
    # The earliest conversions spelled it LLaMAForCausalLM.
    if named and [str(name).lower() for name in named] != [wanted.lower()]:
        raise ValueError(f"architectures={named!r} is not supported; {kind} with architectures={[wanted]!r} is")


def _all_full(layer_types: Any) -> bool:
    return isinstance(layer_types, list) and set(map(str, layer_types)) <= {"full_attention"}


# By rope_type: its numbers by Hugging Face's key and the field of RopeScalingConfig, besides `factor`.
_ROPE_TYPES: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
    },
}
# Further keys of a rotation, with the values that change nothing.
_ROPE_NEUTRAL: dict[str, tuple[Any, ...]] = {"partial_rotary_factor": (1.0, None), "truncate": (True, None)}


def _rope_to_hub(scaling: RopeScalingConfig) -> dict[str, Any]:
    kind = "default" if scaling.kind == "none" else scaling.kind
    values = {key: getattr(scaling, name) for key, name in _ROPE_TYPES[kind].items()}
    return {"rope_type": kind, **{key: value for key, value in values.items() if value is not None}}


def _rotations(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The places that describe the rotation, checked for keys that models here cannot represent.

    Raises:
        ValueError: a place is no object, or asks for a rotation that is not supported.
    """
    found = {}
    for name in ("rope_parameters", "rope_scaling"):
        rope = {} if config.get(name) is None else config[name]
        if not isinstance(rope, dict):
            raise ValueError(f"{name}={rope!r} is not supported; an object with rope_type and rope_theta is")
        for key, value in rope.items():
            if isinstance(value, dict):
                raise ValueError(f"{name} of {key} alone is not supported; one rotation for all layers is")
        kind = _rope_type(rope)
        if kind not in _ROPE_TYPES:
            raise ValueError(f"{name}: rope_type={kind!r} is not supported; {', '.join(_ROPE_TYPES)} are")
        known = {"rope_theta", "rope_type", "type", *_ROPE_TYPES[kind]}
        for key, value in rope.items():
            if key not in known and value not in _ROPE_NEUTRAL.get(key, (None,)):
                raise ValueError(f"{name}: {key}={value!r} is not supported with rope_type={kind!r}")
        found[name] = rope
    return found


def _rope_type(rope: dict[str, Any]) -> Any:
    return rope.get("rope_type") or rope.get("type") or "default"


def _rope_scaling(config: dict[str, Any]) -> RopeScalingConfig:
    """Scaling of the rotary frequencies.

    Raises:
        ValueError: a number is missing or wrong, or two places disagree.
    """
    scaled = {name: rope for name, rope in _rotations(config).items() if _rope_type(rope) != "default"}
    found = [_one_scaling(config, name, rope) for name, rope in scaled.items()]
    if any(scaling != found[0] for scaling in found):
        raise ValueError("rope_parameters and rope_scaling scale the rotation differently; keep the right one")
    return found[0] if found else RopeScalingConfig()


def _one_scaling(config: dict[str, Any], name: str, rope: dict[str, Any]) -> RopeScalingConfig:
    kind = _rope_type(rope)
    values: dict[str, Any] = {}
    for key, own in _ROPE_TYPES[kind].items():
        value = rope.get(key)
        if value is None and key == "original_max_position_embeddings":
            # Where older configurations have it.
            value = config.get(key) or config.get("max_position_embeddings")
        if value is not None:
            values[own] = _positive(f"{name}: {key}", value)
    # llama3 has no defaults in transformers, the others only for optional keys.
    needed = _ROPE_TYPES[kind] if kind == "llama3" else {"factor": "factor"}
    for key, own in needed.items():
        if own not in values:
            raise ValueError(f"{name}: {key} is missing, which rope_type={kind!r} needs")
    if "original_length" in values:
        values["original_length"] = int(values["original_length"])
    return RopeScalingConfig(kind, **values)


def _rope_theta(config: dict[str, Any]) -> float:
    """Base of the rotary embedding, from any of the places where it may be given.

    Raises:
        ValueError: the rotation is not supported, or two places disagree.
    """
    thetas = {"rope_theta": config.get("rope_theta")}
    for name, rope in _rotations(config).items():
        thetas[f"{name}.rope_theta"] = rope.get("rope_theta")
    given = {name: _positive(name, theta) for name, theta in thetas.items() if theta is not None}
    if len(set(given.values())) > 1:
        # Versions of transformers differ in which of them they read.
        values = ", ".join(f"{name}={theta:g}" for name, theta in given.items())
        raise ValueError(f"the rotary base is given differently ({values}); keep the right one")
    return next(iter(given.values()), _DEFAULT_THETA)


def _whole(config: dict[str, Any], name: str, default: Any = ...) -> Any:
    """A positive integer. If the key is missing or null and a default is given: the default, or None."""
    value = config[name] if default is ... else config.get(name, default)
    if value is None and default is not ...:
        return None
    # bool is a subclass of int.
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{name}={value!r} is not a positive whole number; correct it")
    return value


def _positive(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r} is not a positive number; correct it")
    return float(value)


def _flag(config: dict[str, Any], name: str) -> bool:
    value = config.get(name, False)
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is neither true nor false; correct it")
    return value
