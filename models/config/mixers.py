"""Configuration of the mixers: their settings, their properties, and their assignment to layers.

Imports no torch, like all of models.config.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from kernels.rotary_scaling import RotaryScaling, yarn_attention_factor
from models.config.checks import require, require_positive

if TYPE_CHECKING:
    from models.config.model import ModelConfig


def _whole_value_size(prefix: str, head_dim: int, expand_v: float) -> None:
    require(
        (head_dim * expand_v).is_integer(),
        f"{prefix}: head_dim={head_dim} times expand_v={expand_v} is not a whole number",
    )


@dataclass
class RopeScalingConfig:
    """Rotary frequencies for contexts longer than those of training (kernels.rotary_scaling).

    Attributes:
        kind: none, linear (position interpolation), llama3 (Llama 3.1's rule) or yarn.
        factor: By how much slow pairs of channels are slowed down: the new length over the original one.
        original_length: Tokens of the longest sequences that the model was trained with before; of llama3 and yarn.
        low_freq_factor: llama3: pairs that turn less often than this within original_length are slowed down.
        high_freq_factor: llama3: pairs that turn more often than this are left alone.
        beta_slow: The same as low_freq_factor, of yarn.
        beta_fast: The same as high_freq_factor, of yarn.
        attention_factor: yarn: factor of queries and keys; null takes 0.1 ln(factor) + 1.
    """

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_length: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_slow: float = 1.0
    beta_fast: float = 32.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        name = "model.attention.rope_scaling"
        require(self.factor >= 1, f"{name}.factor is {self.factor}: it must be at least 1, and 1 changes nothing")
        if self.kind in ("llama3", "yarn"):
            require(
                self.original_length is not None and self.original_length > 0,
                f"{name}.kind={self.kind} needs original_length, the tokens of a sequence in earlier training",
            )
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            require(
                0 < getattr(self, low) < getattr(self, high),
                f"{name}.{low}={getattr(self, low)} must be positive and less than {high}={getattr(self, high)}",
            )
        require(
            self.attention_factor is None or self.attention_factor > 0,
            f"{name}.attention_factor is {self.attention_factor}: it must be positive, or null",
        )

    def rotary(self) -> RotaryScaling | None:
        """The rule for kernels.rotary; None for none."""
        if self.kind == "none":
            return None
        if self.kind == "linear":
            return RotaryScaling("linear", self.factor)
        length = self.original_length or 0
        if self.kind == "llama3":
            return RotaryScaling("llama3", self.factor, length, self.low_freq_factor, self.high_freq_factor)
        attention = yarn_attention_factor(self.factor) if self.attention_factor is None else self.attention_factor
        return RotaryScaling("yarn", self.factor, length, self.beta_slow, self.beta_fast, attention)


@dataclass
class AttentionConfig:
    """Softmax attention, full and sliding-window.

    Attributes:
        num_heads: Query heads.
        num_kv_heads: Key and value heads; a divisor of num_heads (grouped-query attention).
        head_dim: Head size; null takes hidden_size / num_heads.
        rope_theta: Base of the rotary embedding; null for no positional encoding (NoPE).
        rope_scaling: Frequencies for contexts longer than those of training.
        partial_rotary_factor: Share of each head's channels, its first ones, that are rotated.
        qk_norm: RMS-normalise queries and keys per head before the rotation.
        qkv_bias: Biases on the query, key and value projections.
        output_gate: Multiply each head's output by sigmoid of a projection of the input (arXiv 2505.06708).
        window: Number of keys that a query of a sliding-window layer sees, including its own.
    """

    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int | None = None
    rope_theta: float | None = 10000.0
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    partial_rotary_factor: float = 1.0
    qk_norm: bool = False
    qkv_bias: bool = False
    output_gate: bool = False
    window: int = 1024

    def __post_init__(self) -> None:
        require_positive("model.attention", self, "num_heads", "num_kv_heads", "window")
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"model.attention.num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}",
        )
        require(
            self.rope_theta is None or self.rope_theta > 0,
            f"model.attention.rope_theta is {self.rope_theta}: it must be positive, or null for NoPE",
        )
        require(
            self.rope_theta is not None or self.rope_scaling.kind == "none",
            f"model.attention.rope_scaling.kind={self.rope_scaling.kind} scales nothing with "
            "model.attention.rope_theta=null; set the base, or kind=none",
        )
        require(
            0 < self.partial_rotary_factor <= 1,
            f"model.attention.partial_rotary_factor is {self.partial_rotary_factor}: it must be in (0, 1]",
        )
        require(
            self.rope_theta is not None or self.partial_rotary_factor == 1,
            f"model.attention.partial_rotary_factor={self.partial_rotary_factor} rotates nothing with "
            "model.attention.rope_theta=null; set the base, or leave the factor out",
        )
        if self.head_dim is not None:
            require_positive("model.attention", self, "head_dim")
            require(self.head_dim % 2 == 0, f"model.attention.head_dim={self.head_dim} must be even (rotary pairs)")


@dataclass
class _GroupedDeltaConfig:
    """Settings of delta-rule mixers whose value heads are a multiple of their query and key heads."""

    num_heads: int = 4
    num_v_heads: int | None = None
    head_dim: int = 64
    expand_v: float = 1.0
    conv_size: int = 4
    allow_negative_eigenvalues: bool = False

    def _check_heads(self, prefix: str) -> None:
        require_positive(prefix, self, "num_heads", "head_dim", "expand_v", "conv_size")
        # Each query and key head serves a whole number of value heads.
        require(
            self.value_heads > 0 and self.value_heads % self.num_heads == 0,
            f"{prefix}.num_v_heads={self.value_heads} must be a multiple of num_heads={self.num_heads}",
        )
        _whole_value_size(prefix, self.head_dim, self.expand_v)

    @property
    def value_heads(self) -> int:
        """Number of value heads, with the default resolved."""
        return self.num_heads if self.num_v_heads is None else self.num_v_heads

    @property
    def head_v_dim(self) -> int:
        """Value size per head."""
        return int(self.head_dim * self.expand_v)

    @property
    def state(self) -> tuple[int, int, int]:
        """Heads, key size and value size of the recurrent state."""
        return self.value_heads, self.head_dim, self.head_v_dim


@dataclass
class GatedDeltaNetConfig(_GroupedDeltaConfig):
    """Gated delta net (arXiv 2412.06464).

    Attributes:
        num_heads: Query and key heads.
        num_v_heads: Value heads, a multiple of num_heads; equal to it when null.
        head_dim: Key size of a head.
        expand_v: Value size of a head over its key size.
        conv_size: Width of the causal short convolution on q, k and v.
        allow_negative_eigenvalues: Double beta, so that the transition's eigenvalues reach -1.
    """

    def __post_init__(self) -> None:
        self._check_heads("model.gated_delta_net")


@dataclass
class GatedLinearAttentionConfig:
    """Gated linear attention (arXiv 2312.06635).

    Attributes:
        num_heads: Heads.
        expand_k: Total key size over hidden_size.
        expand_v: Total value size over hidden_size.
        gate_low_rank: Rank of the projection that makes the per-channel decay.
        gate_normalizer: The decay is sigmoid(a) ** (1 / gate_normalizer).
    """

    num_heads: int = 4
    expand_k: float = 0.5
    expand_v: float = 1.0
    gate_low_rank: int = 16
    gate_normalizer: float = 16.0

    def __post_init__(self) -> None:
        names = ("num_heads", "expand_k", "expand_v", "gate_low_rank", "gate_normalizer")
        require_positive("model.gated_linear_attention", self, *names)


@dataclass
class RetentionConfig:
    """Retention (arXiv 2307.08621).

    Attributes:
        num_heads: Heads; head h decays by 1 - 2 ** (-5 - h) a token.
        expand_k: Total key size over hidden_size.
        expand_v: Total value size over hidden_size.
        rope_theta: Base of the rotary embedding of queries and keys.
    """

    num_heads: int = 4
    expand_k: float = 1.0
    expand_v: float = 2.0
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        require_positive("model.retention", self, "num_heads", "expand_k", "expand_v", "rope_theta")


@dataclass
class HGRN2Config:
    """HGRN2 (arXiv 2404.07904).

    Attributes:
        head_dim: Key and value size per head, which is the factor by which the state is larger than HGRN's.
    """

    head_dim: int = 128

    def __post_init__(self) -> None:
        require_positive("model.hgrn2", self, "head_dim")


@dataclass
class DeltaNetConfig:
    """Delta net (arXiv 2406.06484).

    Attributes:
        num_heads: Heads.
        head_dim: Key size of a head.
        expand_v: Value size of a head over its key size.
        conv_size: Width of the causal short convolution on q, k and v.
        allow_negative_eigenvalues: Double beta, so that the transition's eigenvalues reach -1.
        output_gate: Multiply the normalised output by silu of a projection of the input.
    """

    num_heads: int = 4
    head_dim: int = 64
    expand_v: float = 1.0
    conv_size: int = 4
    allow_negative_eigenvalues: bool = False
    output_gate: bool = False

    def __post_init__(self) -> None:
        require_positive("model.delta_net", self, "num_heads", "head_dim", "expand_v", "conv_size")
        _whole_value_size("model.delta_net", self.head_dim, self.expand_v)

    @property
    def head_v_dim(self) -> int:
        """Value size per head."""
        return int(self.head_dim * self.expand_v)


@dataclass
class KimiDeltaAttentionConfig(_GroupedDeltaConfig):
    """Kimi delta attention (arXiv 2510.26692): the gated delta net with a decay for every key channel.

    Attributes:
        num_heads: Query and key heads.
        num_v_heads: Value heads, a multiple of num_heads; equal to it when null.
        head_dim: Key size of a head.
        expand_v: Value size of a head over its key size.
        conv_size: Width of the causal short convolution on q, k and v.
        allow_negative_eigenvalues: Double beta, so that the transition's eigenvalues reach -1.
        gate: Form of the decay: "softplus" is unbounded, "bounded" keeps the log decay above min_log_decay.
        min_log_decay: Infimum of the bounded gate's log decay per token.
    """

    gate: Literal["softplus", "bounded"] = "softplus"
    min_log_decay: float = -5.0

    def __post_init__(self) -> None:
        prefix = "model.kimi_delta_attention"
        self._check_heads(prefix)
        require(self.gate in ("softplus", "bounded"), f"{prefix}.gate={self.gate!r} must be softplus or bounded")
        require(self.min_log_decay < 0, f"{prefix}.min_log_decay is {self.min_log_decay}: it must be negative")


@dataclass
class SpikingBrainGLAConfig:
    """SpikingBrain's linear attention (arXiv 2509.05276), of the 7B and, with a tied gate, of the 76B model.

    Attributes:
        num_heads: Query heads.
        num_kv_heads: Key and value heads; a divisor of num_heads (grouped-query attention).
        head_dim: Size of a head.
        qkv_bias: Biases on the query, key and value projections.
        gate_low_rank: Rank of the projection that makes the per-channel decay; not used by the tied gate.
        gate_normalizer: The decay is sigmoid(a) ** (1 / gate_normalizer); not used by the tied gate.
    """

    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    qkv_bias: bool = True
    gate_low_rank: int = 16
    gate_normalizer: float = 16.0

    def __post_init__(self) -> None:
        names = ("num_heads", "num_kv_heads", "head_dim", "gate_low_rank", "gate_normalizer")
        require_positive("model.spikingbrain_gla", self, *names)
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"model.spikingbrain_gla.num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}",
        )


Rotary = tuple[int, float, RotaryScaling | None]
"""(rotated channels of a head, base, scaling) of a rotary embedding: arguments of kernels.rotary.rotary_tables."""

State = tuple[int, int, int]
"""(heads, key size, value size) of the state that a linear mixer carries; of a vector (1, 1, size)."""


@dataclass(frozen=True)
class MixerType:
    """Properties of a kind of mixer that are known without building one.

    Attributes:
        implementation: Module and name of its class, which is imported when a model is built.
        section: Section of the model's configuration that it reads; None if it reads none.
        state: Shape of its recurrent state, given the model's configuration; None for softmax attention, which caches
            keys.
        state_products: Products with the state per token: it is written, and read for q; the delta rule also reads it
            for k. A vector state is only updated, and the rest is elementwise.
        rotary: (rotated channels, base, scaling) of its rotary embedding, given the configuration; None if it has none.
        shared: Sizes, by key, that must divide over tensor-parallel ranks; None means the head counts of the section.
        lower_bounded: Whether its decays have a lower bound that grows with the layer (models.mixers.hgrn).
        check: Raises ValueError if the model's configuration does not suit it.
    """

    implementation: str
    section: str | None
    state: "Callable[[ModelConfig], State] | None" = None
    state_products: int = 2
    rotary: "Callable[[ModelConfig], Rotary | None] | None" = None
    shared: "Callable[[ModelConfig], dict[str, int]] | None" = None
    lower_bounded: bool = False
    check: "Callable[[ModelConfig], None] | None" = None

    def shared_sizes(self, model: "ModelConfig") -> dict[str, int]:
        """Sizes that must divide over tensor-parallel ranks, by their key in the model's section."""
        if self.shared is not None:
            return self.shared(model)
        assert self.section is not None, "a mixer without a section says what ranks share"
        section = getattr(model, self.section)
        counts = ("num_heads", "num_kv_heads")
        return {f"{self.section}.{name}": getattr(section, name) for name in counts if hasattr(section, name)}


def _check_attention(model: "ModelConfig") -> None:
    require(
        model.attention.head_dim is not None or model.hidden_size % (2 * model.attention.num_heads) == 0,
        f"model.hidden_size={model.hidden_size} gives no even head size over "
        f"model.attention.num_heads={model.attention.num_heads}; set model.attention.head_dim",
    )
    channels = model.attention_head_dim * model.attention.partial_rotary_factor
    require(
        channels >= 2 and channels % 2 == 0,
        f"model.attention.partial_rotary_factor={model.attention.partial_rotary_factor} of the head size "
        f"{model.attention_head_dim} is {channels:g} channels: they must be an even number (rotary pairs)",
    )


def _attention_rotary(model: "ModelConfig") -> Rotary | None:
    attention = model.attention
    if attention.rope_theta is None:
        return None
    channels = int(model.attention_head_dim * attention.partial_rotary_factor)
    return channels, attention.rope_theta, attention.rope_scaling.rotary()


def _expanded_state(model: "ModelConfig", config: GatedLinearAttentionConfig | RetentionConfig) -> State:
    size, heads = model.hidden_size, config.num_heads
    return heads, int(size * config.expand_k) // heads, int(size * config.expand_v) // heads


def _check_expanded(model: "ModelConfig", config: GatedLinearAttentionConfig | RetentionConfig, section: str) -> None:
    for name, expand in (("expand_k", config.expand_k), ("expand_v", config.expand_v)):
        require(
            (model.hidden_size * expand / config.num_heads).is_integer(),
            f"model.{section}.{name}={expand} times model.hidden_size={model.hidden_size} "
            f"does not divide over num_heads={config.num_heads}",
        )


def _check_retention(model: "ModelConfig") -> None:
    retention = model.retention
    _check_expanded(model, retention, "retention")
    key_size = _expanded_state(model, retention)[1]
    require(
        key_size % 2 == 0,
        f"model.retention: expand_k={retention.expand_k} times model.hidden_size={model.hidden_size} over "
        f"num_heads={retention.num_heads} gives an odd head size, {key_size} (rotary pairs)",
    )


def _check_hgrn2(model: "ModelConfig") -> None:
    require(
        model.hidden_size % model.hgrn2.head_dim == 0,
        f"model.hgrn2.head_dim={model.hgrn2.head_dim} does not divide model.hidden_size={model.hidden_size}",
    )


def _hgrn2_heads(model: "ModelConfig") -> int:
    return model.hidden_size // model.hgrn2.head_dim


def _spikingbrain(implementation: str) -> MixerType:
    return MixerType(
        f"models.mixers.spikingbrain_gla.{implementation}",
        "spikingbrain_gla",
        state=lambda model: (
            model.spikingbrain_gla.num_heads,
            model.spikingbrain_gla.head_dim,
            model.spikingbrain_gla.head_dim,
        ),
    )


def _softmax(implementation: str) -> MixerType:
    name = f"models.mixers.softmax.{implementation}"
    return MixerType(name, "attention", rotary=_attention_rotary, check=_check_attention)


# To add a mixer: a row here, a section above and its field in ModelConfig, a class in models/mixers/.
MIXERS: dict[str, MixerType] = {
    "full_attention": _softmax("FullAttention"),
    "sliding_window_attention": _softmax("SlidingWindowAttention"),
    "gated_delta_net": MixerType(
        "models.mixers.gated_delta_net.GatedDeltaNet",
        "gated_delta_net",
        state=lambda model: model.gated_delta_net.state,
        state_products=3,
    ),
    "gated_linear_attention": MixerType(
        "models.mixers.gated_linear_attention.GatedLinearAttention",
        "gated_linear_attention",
        state=lambda model: _expanded_state(model, model.gated_linear_attention),
        check=lambda model: _check_expanded(model, model.gated_linear_attention, "gated_linear_attention"),
    ),
    "retention": MixerType(
        "models.mixers.retention.Retention",
        "retention",
        state=lambda model: _expanded_state(model, model.retention),
        rotary=lambda model: (_expanded_state(model, model.retention)[1], model.retention.rope_theta, None),
        check=_check_retention,
    ),
    "hgrn": MixerType(
        "models.mixers.hgrn.HGRN",
        None,
        state=lambda model: (1, 1, model.hidden_size),
        state_products=1,
        shared=lambda model: {"hidden_size": model.hidden_size},
        lower_bounded=True,
    ),
    "hgrn2": MixerType(
        "models.mixers.hgrn.HGRN2",
        "hgrn2",
        state=lambda model: (_hgrn2_heads(model), model.hgrn2.head_dim, model.hgrn2.head_dim),
        shared=lambda model: {"hidden_size / model.hgrn2.head_dim": _hgrn2_heads(model)},
        lower_bounded=True,
        check=_check_hgrn2,
    ),
    "delta_net": MixerType(
        "models.mixers.delta_net.DeltaNet",
        "delta_net",
        state=lambda model: (model.delta_net.num_heads, model.delta_net.head_dim, model.delta_net.head_v_dim),
        state_products=3,
    ),
    "kimi_delta_attention": MixerType(
        "models.mixers.kimi_delta_attention.KimiDeltaAttention",
        "kimi_delta_attention",
        state=lambda model: model.kimi_delta_attention.state,
        state_products=3,
    ),
    "spikingbrain_gla": _spikingbrain("SpikingBrainGLA"),
    "spikingbrain_tied_gla": _spikingbrain("SpikingBrainTiedGLA"),
}
# Softmax attention is the kind without a recurrent state.
SOFTMAX_MIXERS = tuple(name for name, mixer in MIXERS.items() if mixer.state is None)
LINEAR_MIXERS = tuple(name for name in MIXERS if name not in SOFTMAX_MIXERS)


def branches(layer: str) -> list[str]:
    """The mixers of a layer: a single name, or several that run in parallel, written `NAME + NAME`."""
    return layer.split(" + ")


def parse_pattern(pattern: str, prefix: str = "model.mixers.pattern") -> list[str]:
    """Expand `gated_delta_net*3, full_attention` into one name per layer of the period.

    `gated_delta_net + full_attention` names a single layer (see `branches`); a count repeats it as a whole.

    Raises:
        ValueError: an entry is not `LAYER` or `LAYER*COUNT`, or a name is not a mixer.
    """
    expanded: list[str] = []
    for entry in pattern.split(","):
        # NAME, or NAME + NAME, optionally followed by * COUNT.
        match = re.fullmatch(r"([a-z_0-9]+(?:\s*\+\s*[a-z_0-9]+)*)(?:\s*\*\s*([0-9]+))?", entry.strip())
        require(
            match is not None,
            f"{prefix}: cannot read {entry.strip()!r}; write NAME or NAME*COUNT, comma-separated, "
            "and NAME + NAME for two mixers in one layer",
        )
        assert match is not None
        names, count = re.split(r"\s*\+\s*", match.group(1)), int(match.group(2) or 1)
        for name in names:
            require(name in MIXERS, f"{prefix}: no mixer {name!r}; choose from {', '.join(MIXERS)}")
        require(count > 0, f"{prefix}: {entry.strip()!r} repeats zero times")
        expanded += [" + ".join(names)] * count
    return expanded


@dataclass
class MixerLayoutConfig:
    """Assignment of mixers to layers: a repeated pattern, or a ratio. At most one may be set.

    Attributes:
        pattern: One period, such as "gated_delta_net*3, full_attention", repeated over all layers. A layer "hgrn2 +
            full_attention" runs both in parallel; a count after it repeats that layer.
        linear_per_full: Repeat r linear layers followed by one softmax layer.
        full_attention_every: Every N-th layer, the last of each group of N, is a softmax layer.
        linear: Linear mixer that the two ratios use.
        softmax: Softmax mixer that the two ratios use.
    """

    pattern: str | None = None
    linear_per_full: int | None = None
    full_attention_every: int | None = None
    linear: str = "gated_delta_net"
    softmax: str = "full_attention"

    def __post_init__(self) -> None:
        given = [n for n in ("pattern", "linear_per_full", "full_attention_every") if getattr(self, n) is not None]
        require(
            len(given) <= 1,
            f"model.mixers: {' and '.join(given)} are both set; keep one and set the others to null",
        )
        if self.pattern is not None:
            parse_pattern(self.pattern)
        for name, choices in (("linear", LINEAR_MIXERS), ("softmax", SOFTMAX_MIXERS)):
            value = getattr(self, name)
            require(
                value in choices, f"model.mixers.{name}: no {name} mixer {value!r}; choose from {', '.join(choices)}"
            )
        for name in ("linear_per_full", "full_attention_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"model.mixers.{name} is {value}: it must be at least 1")

    def period(self) -> list[str]:
        """The layer names of one period; a single full_attention by default."""
        if self.pattern is not None:
            return parse_pattern(self.pattern)
        if self.linear_per_full is not None:
            return [self.linear] * self.linear_per_full + [self.softmax]
        if self.full_attention_every is not None:
            # N counts the softmax layer, while `linear_per_full` counts only the linear layers.
            return [self.linear] * (self.full_attention_every - 1) + [self.softmax]
        return ["full_attention"]
