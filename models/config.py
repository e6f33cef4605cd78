"""The shape of a model, as nested dataclasses that validate themselves.

Nothing here imports torch: a bad configuration must be reported before torch is loaded.
"""

import re
from dataclasses import dataclass, field
from typing import Literal

SOFTMAX_MIXERS = ("full_attention", "sliding_window_attention")
LINEAR_MIXERS = ("gated_delta_net", "gated_linear_attention")
MIXERS = SOFTMAX_MIXERS + LINEAR_MIXERS


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_positive(prefix: str, owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        _require(value > 0, f"{prefix}.{name} is {value}: it must be positive")


def parse_pattern(pattern: str, prefix: str = "model.mixers.pattern") -> list[str]:
    """Expand `gated_delta_net*3, full_attention` into one mixer name per layer of the period.

    Raises:
        ValueError: an entry is not `NAME` or `NAME*COUNT`, or the name is not a mixer.
    """
    expanded: list[str] = []
    for entry in pattern.split(","):
        match = re.fullmatch(r"\s*([a-z_0-9]+)\s*(?:\*\s*([0-9]+))?\s*", entry)
        _require(
            match is not None, f"{prefix}: cannot read {entry.strip()!r}; write NAME or NAME*COUNT, comma-separated"
        )
        assert match is not None
        name, count = match.group(1), int(match.group(2) or 1)
        _require(name in MIXERS, f"{prefix}: no mixer {name!r}; choose from {', '.join(MIXERS)}")
        _require(count > 0, f"{prefix}: {entry.strip()!r} repeats zero times")
        expanded += [name] * count
    return expanded


@dataclass
class MixerLayoutConfig:
    """Which mixer each layer has: a pattern repeated over the layers, or a ratio. Set exactly one.

    Attributes:
        pattern: One period, such as "gated_delta_net*3, full_attention", repeated until every layer has a mixer.
        linear_per_full: r linear layers, then one softmax layer, repeated.
        full_attention_every: Every N-th layer, the last of each group of N, is a softmax layer.
        linear: The linear mixer that the two ratios use.
        softmax: The softmax mixer that the two ratios use.
    """

    pattern: str | None = None
    linear_per_full: int | None = None
    full_attention_every: int | None = None
    linear: Literal["gated_delta_net", "gated_linear_attention"] = "gated_delta_net"
    softmax: Literal["full_attention", "sliding_window_attention"] = "full_attention"

    def __post_init__(self) -> None:
        given = [n for n in ("pattern", "linear_per_full", "full_attention_every") if getattr(self, n) is not None]
        _require(
            len(given) <= 1,
            f"model.mixers: {' and '.join(given)} are both set; keep one and set the others to null",
        )
        if self.pattern is not None:
            parse_pattern(self.pattern)
        for name in ("linear_per_full", "full_attention_every"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"model.mixers.{name} is {value}: it must be at least 1")

    def period(self) -> list[str]:
        """One period of mixer names; full attention everywhere when nothing was asked for."""
        if self.pattern is not None:
            return parse_pattern(self.pattern)
        if self.linear_per_full is not None:
            return [self.linear] * self.linear_per_full + [self.softmax]
        if self.full_attention_every is not None:
            return [self.linear] * (self.full_attention_every - 1) + [self.softmax]
        return ["full_attention"]


@dataclass
class AttentionConfig:
    """Softmax attention, full and sliding-window.

    Attributes:
        num_heads: Query heads.
        num_kv_heads: Key and value heads; a divisor of num_heads (grouped-query attention).
        head_dim: Size of a head; hidden_size / num_heads when null.
        rope_theta: Base of the rotary embedding; null for no positional encoding (NoPE).
        qk_norm: RMS-normalise queries and keys per head before the rotation.
        qkv_bias: Biases on the query, key and value projections.
        window: Keys that a query of a sliding-window layer sees, its own included.
    """

    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int | None = None
    rope_theta: float | None = 10000.0
    qk_norm: bool = False
    qkv_bias: bool = False
    window: int = 1024

    def __post_init__(self) -> None:
        _require_positive("model.attention", self, "num_heads", "num_kv_heads", "window")
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"model.attention.num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}",
        )
        _require(
            self.rope_theta is None or self.rope_theta > 0,
            f"model.attention.rope_theta is {self.rope_theta}: it must be positive, or null for NoPE",
        )
        if self.head_dim is not None:
            _require_positive("model.attention", self, "head_dim")
            _require(self.head_dim % 2 == 0, f"model.attention.head_dim={self.head_dim} must be even (rotary pairs)")


@dataclass
class GatedDeltaNetConfig:
    """Gated delta net (arXiv 2412.06464).

    Attributes:
        num_heads: Query and key heads.
        num_v_heads: Value heads, a multiple of num_heads; equal to it when null.
        head_dim: Key size of a head.
        expand_v: Value size of a head over its key size.
        conv_size: Width of the causal short convolution on q, k and v.
        allow_negative_eigenvalues: Double beta, so that the transition's eigenvalues reach -1.
    """

    num_heads: int = 4
    num_v_heads: int | None = None
    head_dim: int = 64
    expand_v: float = 1.0
    conv_size: int = 4
    allow_negative_eigenvalues: bool = False

    def __post_init__(self) -> None:
        _require_positive("model.gated_delta_net", self, "num_heads", "head_dim", "expand_v", "conv_size")
        v_heads = self.value_heads
        _require(
            v_heads > 0 and v_heads % self.num_heads == 0,
            f"model.gated_delta_net.num_v_heads={v_heads} must be a multiple of num_heads={self.num_heads}",
        )
        _require(
            (self.head_dim * self.expand_v).is_integer(),
            f"model.gated_delta_net: head_dim={self.head_dim} times expand_v={self.expand_v} is not a whole number",
        )

    @property
    def value_heads(self) -> int:
        """Value heads, the default resolved."""
        return self.num_heads if self.num_v_heads is None else self.num_v_heads

    @property
    def head_v_dim(self) -> int:
        """Value size of a head."""
        return int(self.head_dim * self.expand_v)


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
        _require_positive("model.gated_linear_attention", self, *names)


@dataclass
class ModelConfig:
    """A decoder: embedding, pre-norm blocks of a mixer and a SwiGLU feed-forward, final norm, head.

    Attributes:
        num_layers: Blocks.
        hidden_size: Width of the residual stream.
        ffn_hidden_size: Inner width of the SwiGLU feed-forward.
        vocab_size: Rows of the embedding; null takes the tokenizer's size, rounded up to vocab_multiple.
        vocab_multiple: The embedding's rows are rounded up to a multiple of this.
        tie_embeddings: Share the embedding with the output head.
        norm_eps: Epsilon of every RMSNorm.
        init_std: Standard deviation of the normal initialisation of matrices.
        scale_residual_init: Divide init_std of the projections into the residual stream by sqrt(2 * num_layers).
        mixers: Which mixer each layer has.
        attention: Softmax attention.
        gated_delta_net: Gated delta net.
        gated_linear_attention: Gated linear attention.
    """

    num_layers: int = 8
    hidden_size: int = 256
    ffn_hidden_size: int = 768
    vocab_size: int | None = None
    vocab_multiple: int = 64
    tie_embeddings: bool = True
    norm_eps: float = 1e-6
    init_std: float = 0.02
    scale_residual_init: bool = True
    mixers: MixerLayoutConfig = field(default_factory=MixerLayoutConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    gated_delta_net: GatedDeltaNetConfig = field(default_factory=GatedDeltaNetConfig)
    gated_linear_attention: GatedLinearAttentionConfig = field(default_factory=GatedLinearAttentionConfig)

    def __post_init__(self) -> None:
        names = ("num_layers", "hidden_size", "ffn_hidden_size", "vocab_multiple", "norm_eps", "init_std")
        _require_positive("model", self, *names)
        _require(self.vocab_size is None or self.vocab_size > 0, f"model.vocab_size={self.vocab_size} must be positive")
        used = set(self.layer_mixers())
        if used & set(SOFTMAX_MIXERS) and self.attention.head_dim is None:
            _require(
                self.hidden_size % (2 * self.attention.num_heads) == 0,
                f"model.hidden_size={self.hidden_size} gives no even head size over "
                f"model.attention.num_heads={self.attention.num_heads}; set model.attention.head_dim",
            )
        if "gated_linear_attention" in used:
            gla = self.gated_linear_attention
            for name, expand in (("expand_k", gla.expand_k), ("expand_v", gla.expand_v)):
                _require(
                    (self.hidden_size * expand / gla.num_heads).is_integer(),
                    f"model.gated_linear_attention.{name}={expand} times model.hidden_size={self.hidden_size} "
                    f"does not divide over num_heads={gla.num_heads}",
                )

    def layer_mixers(self) -> list[str]:
        """The mixer's name for each layer."""
        period = self.mixers.period()
        return [period[i % len(period)] for i in range(self.num_layers)]

    @property
    def attention_head_dim(self) -> int:
        """Head size of the softmax mixers, the default resolved."""
        return self.attention.head_dim or self.hidden_size // self.attention.num_heads

    def padded_vocab_size(self, tokenizer_vocab_size: int) -> int:
        """Rows of the embedding for a tokenizer.

        Raises:
            ValueError: model.vocab_size is smaller than the tokenizer's vocabulary.
        """
        wanted = self.vocab_size or tokenizer_vocab_size
        _require(
            wanted >= tokenizer_vocab_size,
            f"model.vocab_size={self.vocab_size} is smaller than the tokenizer's {tokenizer_vocab_size}; "
            "raise it or set it to null",
        )
        return -(-wanted // self.vocab_multiple) * self.vocab_multiple
