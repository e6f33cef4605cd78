"""Configuration of a hybrid that is made from a model of softmax attention (models.conversion). Imports no torch.

The heads of softmax attention determine the sizes of the linear mixers that take over its matrices: a matrix of H heads
of K channels stays one. What the attention does not determine (value expansion, gates, convolutions) can be set.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from models.config.checks import require
from models.config.mixers import (
    MIXERS,
    SOFTMAX_MIXERS,
    DeltaNetConfig,
    GatedDeltaNetConfig,
    GatedLinearAttentionConfig,
    KimiDeltaAttentionConfig,
    MixerLayoutConfig,
    RetentionConfig,
    branches,
    parse_pattern,
)
from models.config.model import ModelConfig


@dataclass(frozen=True)
class Preset:
    """The layers of a published hybrid.

    Attributes:
        pattern: One period of its layers, as in model.mixers.pattern.
        window: Keys that a sliding-window layer sees.
        sink_tokens: Learned tokens in front of every sequence.
    """

    pattern: str
    window: int
    sink_tokens: int = 0


# arXiv 2509.05276, section 2.2. A window of 4097 is what the released code of the 7B model computes: 4096 keys and the
# query's own. The report does not give the 76B model's.
PRESETS = {
    "spikingbrain-7b": Preset("spikingbrain_gla, sliding_window_attention", 4097),
    "spikingbrain-76b": Preset(
        "spikingbrain_tied_gla + sliding_window_attention*6, spikingbrain_tied_gla + full_attention", 4097, 128
    ),
}

# Mixers whose projections can have the biases of softmax attention.
_WITH_BIASES = (*SOFTMAX_MIXERS, "spikingbrain_gla", "spikingbrain_tied_gla")


def retention() -> RetentionConfig:
    """Retention as conversions begin with it: they repeat values only where they are told to."""
    return RetentionConfig(expand_v=1.0)


def hybrid_config(
    source: ModelConfig,
    pattern: str,
    given: Mapping[str, Any],
    window: int | None = None,
    sink_tokens: int | None = None,
) -> ModelConfig:
    """Return the configuration of a hybrid with a model's matrices.

    Args:
        source: Configuration of the model.
        pattern: Mixers of the hybrid's layers, repeated over all of them, as in model.mixers.pattern. Layers of softmax
            attention can become any others; all others stay what they are.
        given: Settings of the linear mixers by section. Sizes that follow from the attention keep their default.
        window: Keys that a sliding-window layer sees; None keeps the model's.
        sink_tokens: Learned tokens in front of every sequence, where the model has none; None keeps the model's.

    Raises:
        ValueError: the pattern changes no layer, or one that cannot be converted; or a size does not follow from the
            attention.
    """
    period, before = parse_pattern(pattern, "pattern"), source.layer_mixers()
    after = [period[layer % len(period)] for layer in range(source.num_layers)]
    _check_layers(source, before, after)
    require(before != after, f"pattern: every layer is what {pattern!r} makes it already; name another mixer")
    used = {mixer for old, new in zip(before, after, strict=True) if old != new for mixer in branches(new)}
    sections = {MIXERS[mixer].section for mixer in used - set(SOFTMAX_MIXERS)}
    values: dict[str, Any] = {name: _sized(source, name, given) for name in sections if name is not None}
    stays = {mixer for old, new in zip(before, after, strict=True) if old == new for mixer in branches(old)}
    for name in sorted(MIXERS[mixer].section or "" for mixer in stays):
        require(
            name not in values or getattr(source, name) == values[name],
            f"{name}: layers that stay have other settings than the attention would give new ones; choose another "
            "linear mixer",
        )
    if "hgrn" in used:
        _require_width(source, "hgrn")
    if window is not None:
        values["attention"] = replace(source.attention, window=window)
    if sink_tokens is not None:
        require(
            source.sink_tokens in (0, sink_tokens),
            f"sink_tokens={sink_tokens}: the model has learned {source.sink_tokens} of them; leave it out",
        )
        values["sink_tokens"] = sink_tokens
    return replace(source, mixers=MixerLayoutConfig(pattern=_compact(after)), **values)


def _check_layers(source: ModelConfig, before: list[str], after: list[str]) -> None:
    for layer, (old, new) in enumerate(zip(before, after, strict=True)):
        require(
            old == new or old in SOFTMAX_MIXERS,
            f"pattern: layer {layer} is {old!r} and would become {new!r}: only softmax attention can be converted",
        )
        is_softmax = set(branches(new)) <= set(SOFTMAX_MIXERS)
        require(
            old == new or is_softmax or not source.attention.output_gate,
            f"pattern: layer {layer} would lose its attention's gate (model.attention.output_gate), which no linear "
            "mixer has in this form; only softmax attention can take it over",
        )


def drops_biases(source: ModelConfig, hybrid: ModelConfig) -> list[int]:
    """Return the layers in which a mixer of the hybrid cannot have the biases of the attention that it replaces."""
    if not source.attention.qkv_bias:
        return []
    pairs = enumerate(zip(source.layer_mixers(), hybrid.layer_mixers(), strict=True))
    return [
        layer for layer, (old, new) in pairs if old != new and any(name not in _WITH_BIASES for name in branches(new))
    ]


def _compact(layers: list[str]) -> str:
    """The pattern of these layers, with equal neighbours counted."""
    runs: list[list[Any]] = []
    for layer in layers:
        if runs and runs[-1][0] == layer:
            runs[-1][1] += 1
        else:
            runs.append([layer, 1])
    return ", ".join(name if count == 1 else f"{name}*{count}" for name, count in runs)


def _sized(source: ModelConfig, section: str, given: Mapping[str, Any]) -> Any:
    """The settings of a linear mixer with the sizes that follow from the attention."""
    own = given.get(section, retention() if section == "retention" else getattr(ModelConfig(), section))
    default = type(own)()
    sizes = _SIZES[section](source, own, section)
    for name, size in sizes.items():
        value = getattr(own, name)
        # A default cannot be told from a wish, and gives way. expand_v is a wish, which `_SIZES` has checked.
        require(
            name == "expand_v" or value in (size, getattr(default, name)),
            f"{section}.{name}={value}: the attention has {size}, and its matrices are taken over; leave it out",
        )
    return replace(own, **sizes)


def _delta_sizes(
    source: ModelConfig, own: DeltaNetConfig | GatedDeltaNetConfig | KimiDeltaAttentionConfig, section: str
) -> dict[str, Any]:
    require(
        float(own.expand_v).is_integer(),
        f"{section}.expand_v={own.expand_v}: it says how often each of the attention's values is repeated; give a "
        "whole number",
    )
    # Without gates nothing would ever tell the copies of a value apart.
    require(
        own.expand_v == 1 or not isinstance(own, DeltaNetConfig) or own.output_gate,
        f"delta_net.expand_v={own.expand_v} would train copies of values alike; set delta_net.output_gate",
    )
    sizes = {"num_heads": source.attention.num_heads, "head_dim": source.attention_head_dim}
    return sizes if isinstance(own, DeltaNetConfig) else sizes | {"num_v_heads": None}


def _expanded_sizes(
    source: ModelConfig, own: GatedLinearAttentionConfig | RetentionConfig, section: str
) -> dict[str, Any]:
    size = source.attention.num_heads * source.attention_head_dim
    copies = 1.0 if own.expand_v == 1 else source.hidden_size * own.expand_v / size
    require(
        copies.is_integer(),
        f"{section}.expand_v={own.expand_v} times hidden_size={source.hidden_size} must be a multiple of the "
        f"attention's values, {size}; or leave it out",
    )
    sizes = {
        "num_heads": source.attention.num_heads,
        "expand_k": _ratio(size, source.hidden_size),
        "expand_v": _ratio(int(copies) * size, source.hidden_size),
    }
    if isinstance(own, RetentionConfig) and source.attention.rope_theta is not None:
        sizes["rope_theta"] = source.attention.rope_theta
    return sizes


def _ratio(size: int, hidden_size: int) -> float:
    """The number that gives `size` exactly when it is multiplied with `hidden_size`."""
    quotient = size / hidden_size
    near = (quotient, math.nextafter(quotient, math.inf), math.nextafter(quotient, 0))
    exact = [ratio for ratio in near if hidden_size * ratio == size]
    require(
        bool(exact),
        f"no number times hidden_size={hidden_size} is the attention's {size} exactly, as expand_k and expand_v must "
        "be; choose another mixer",
    )
    return exact[0]


def _hgrn2_sizes(source: ModelConfig, own: Any, section: str) -> dict[str, Any]:
    _require_width(source, "hgrn2")
    return {"head_dim": source.attention_head_dim}


def _spikingbrain_sizes(source: ModelConfig, own: Any, section: str) -> dict[str, Any]:
    attention = source.attention
    return {
        "num_heads": attention.num_heads,
        "num_kv_heads": attention.num_kv_heads,
        "head_dim": source.attention_head_dim,
        "qkv_bias": attention.qkv_bias,
    }


def _require_width(source: ModelConfig, mixer: str) -> None:
    size = source.attention.num_heads * source.attention_head_dim
    require(
        size == source.hidden_size,
        f"{mixer} is as wide as hidden_size={source.hidden_size}, and the attention {size}; choose another mixer",
    )


_SIZES: dict[str, Callable[[ModelConfig, Any, str], dict[str, Any]]] = {
    "gated_delta_net": _delta_sizes,
    "delta_net": _delta_sizes,
    "kimi_delta_attention": _delta_sizes,
    "gated_linear_attention": _expanded_sizes,
    "retention": _expanded_sizes,
    "hgrn2": _hgrn2_sizes,
    "spikingbrain_gla": _spikingbrain_sizes,
}
