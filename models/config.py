"""The shape of a model, as nested dataclasses that validate themselves.

Nothing here imports torch: a bad configuration must be reported before torch is loaded.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Literal, get_args

SoftmaxMixer = Literal["full_attention", "sliding_window_attention"]
LinearMixer = Literal[
    "gated_delta_net",
    "gated_linear_attention",
    "retention",
    "hgrn",
    "hgrn2",
    "delta_net",
    "kimi_delta_attention",
    "spikingbrain_gla",
    "spikingbrain_tied_gla",
]
SOFTMAX_MIXERS: tuple[str, ...] = get_args(SoftmaxMixer)
LINEAR_MIXERS: tuple[str, ...] = get_args(LinearMixer)
MIXERS = SOFTMAX_MIXERS + LINEAR_MIXERS
# Their decays are bounded from below, more so the higher the layer.
LOWER_BOUNDED_MIXERS = ("hgrn", "hgrn2")
# The part of the configuration that a mixer reads, where it does not bear the mixer's name.
_SECTIONS = dict.fromkeys(SOFTMAX_MIXERS, "attention") | {"spikingbrain_tied_gla": "spikingbrain_gla"}


def mixer_section(mixer: str) -> str:
    """The part of the configuration that a mixer reads; HGRN's name, which has none, for HGRN."""
    return _SECTIONS.get(mixer, mixer)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_positive(prefix: str, owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        _require(value > 0, f"{prefix}.{name} is {value}: it must be positive")


def _whole_value_size(prefix: str, head_dim: int, expand_v: float) -> None:
    _require(
        (head_dim * expand_v).is_integer(),
        f"{prefix}: head_dim={head_dim} times expand_v={expand_v} is not a whole number",
    )


def branches(layer: str) -> list[str]:
    """The mixers of a layer: its name, or those that it runs side by side, written `NAME + NAME`."""
    return layer.split(" + ")


def parse_pattern(pattern: str, prefix: str = "model.mixers.pattern") -> list[str]:
    """Expand `gated_delta_net*3, full_attention` into one layer's name per layer of the period.

    `gated_delta_net + full_attention` is the name of one layer (see `branches`), which a count repeats as a whole.

    Raises:
        ValueError: an entry is not `LAYER` or `LAYER*COUNT`, or a name is not a mixer.
    """
    expanded: list[str] = []
    for entry in pattern.split(","):
        match = re.fullmatch(r"([a-z_0-9]+(?:\s*\+\s*[a-z_0-9]+)*)(?:\s*\*\s*([0-9]+))?", entry.strip())
        _require(
            match is not None,
            f"{prefix}: cannot read {entry.strip()!r}; write NAME or NAME*COUNT, comma-separated, "
            "and NAME + NAME for two mixers in one layer",
        )
        assert match is not None
        names, count = re.split(r"\s*\+\s*", match.group(1)), int(match.group(2) or 1)
        for name in names:
            _require(name in MIXERS, f"{prefix}: no mixer {name!r}; choose from {', '.join(MIXERS)}")
        _require(count > 0, f"{prefix}: {entry.strip()!r} repeats zero times")
        expanded += [" + ".join(names)] * count
    return expanded


@dataclass
class MixerLayoutConfig:
    """Which mixer each layer has: a pattern repeated over the layers, or a ratio. Set exactly one.

    Attributes:
        pattern: One period, such as "gated_delta_net*3, full_attention", repeated until every layer has a mixer. A
            layer "hgrn2 + full_attention" has both, side by side; a count after it repeats the layer.
        linear_per_full: r linear layers, then one softmax layer, repeated.
        full_attention_every: Every N-th layer, the last of each group of N, is a softmax layer.
        linear: The linear mixer that the two ratios use.
        softmax: The softmax mixer that the two ratios use.
    """

    pattern: str | None = None
    linear_per_full: int | None = None
    full_attention_every: int | None = None
    linear: LinearMixer = "gated_delta_net"
    softmax: SoftmaxMixer = "full_attention"

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
        """One period of layers' names; full attention everywhere when nothing was asked for."""
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
class _GroupedDeltaConfig:
    """What delta-rule mixers share whose value heads are a multiple of their query and key heads."""

    num_heads: int = 4
    num_v_heads: int | None = None
    head_dim: int = 64
    expand_v: float = 1.0
    conv_size: int = 4
    allow_negative_eigenvalues: bool = False

    def _check_heads(self, prefix: str) -> None:
        _require_positive(prefix, self, "num_heads", "head_dim", "expand_v", "conv_size")
        _require(
            self.value_heads > 0 and self.value_heads % self.num_heads == 0,
            f"{prefix}.num_v_heads={self.value_heads} must be a multiple of num_heads={self.num_heads}",
        )
        _whole_value_size(prefix, self.head_dim, self.expand_v)

    @property
    def value_heads(self) -> int:
        """Value heads, the default resolved."""
        return self.num_heads if self.num_v_heads is None else self.num_v_heads

    @property
    def head_v_dim(self) -> int:
        """Value size of a head."""
        return int(self.head_dim * self.expand_v)


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
        _require_positive("model.gated_linear_attention", self, *names)


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
        _require_positive("model.retention", self, "num_heads", "expand_k", "expand_v", "rope_theta")


@dataclass
class HGRN2Config:
    """HGRN2 (arXiv 2404.07904).

    Attributes:
        head_dim: Size of a head, of its keys and of its values: the factor by which the state outgrows HGRN's.
    """

    head_dim: int = 128

    def __post_init__(self) -> None:
        _require_positive("model.hgrn2", self, "head_dim")


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
        _require_positive("model.delta_net", self, "num_heads", "head_dim", "expand_v", "conv_size")
        _whole_value_size("model.delta_net", self.head_dim, self.expand_v)

    @property
    def head_v_dim(self) -> int:
        """Value size of a head."""
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
        gate: How the decay is made: "softplus" is unbounded, "bounded" keeps its logarithm above min_log_decay.
        min_log_decay: Log decay of one token that the bounded gate cannot reach.
    """

    gate: Literal["softplus", "bounded"] = "softplus"
    min_log_decay: float = -5.0

    def __post_init__(self) -> None:
        prefix = "model.kimi_delta_attention"
        self._check_heads(prefix)
        _require(self.gate in ("softplus", "bounded"), f"{prefix}.gate={self.gate!r} must be softplus or bounded")
        _require(self.min_log_decay < 0, f"{prefix}.min_log_decay is {self.min_log_decay}: it must be negative")


@dataclass
class SpikingBrainGLAConfig:
    """SpikingBrain's linear attention (arXiv 2509.05276), of the 7B and, with a tied gate, of the 76B model.

    Attributes:
        num_heads: Query heads.
        num_kv_heads: Key and value heads; a divisor of num_heads (grouped-query attention).
        head_dim: Size of a head.
        qkv_bias: Biases on the query, key and value projections.
        gate_low_rank: Rank of the projection that makes the per-channel decay; the tied gate has none.
        gate_normalizer: The decay is sigmoid(a) ** (1 / gate_normalizer); not so for the tied gate.
    """

    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    qkv_bias: bool = True
    gate_low_rank: int = 16
    gate_normalizer: float = 16.0

    def __post_init__(self) -> None:
        names = ("num_heads", "num_kv_heads", "head_dim", "gate_low_rank", "gate_normalizer")
        _require_positive("model.spikingbrain_gla", self, *names)
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"model.spikingbrain_gla.num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}",
        )


# Where an activation is positively homogeneous, scaling the router and the temperature alike changes nothing.
_HOMOGENEOUS_ACTIVATIONS = ("none", "relu")


@dataclass
class DenseToSparseConfig:
    """The dense-to-sparse gate (EvoMoE, arXiv 2112.14397), with an activation (arXiv 2401.13875).

    It starts with every expert and ends with few: p = softmax((activation(W x) + noise) / temperature), of which a
    token keeps the largest, and those that reach the threshold, up to a number that shrinks. Temperature and number
    follow one schedule in the training step: a plateau, then a decay; past it they stay.

    Attributes:
        activation: Between the router's product and the softmax. A learned temperature can be told from the router's
            weights only with sigmoid, tanh, gelu or silu.
        gumbel_noise: Add Gumbel noise in training; the same for the same seed, layer, step and token.
        schedule: The course of the decay; learned makes the temperature a parameter that starts at temperature_start.
        temperature_start: Temperature on the plateau.
        temperature_end: Temperature after the decay.
        plateau_steps: Steps before the decay.
        decay_steps: Steps of the decay.
        threshold: A token keeps the experts whose p reaches this, and always that of the largest.
        max_experts_start: Experts that a token keeps at most, on the plateau; null for all.
        max_experts_end: The same after the decay, linear in the step between; null takes the router's top_k.
        hard_top_k_after: From this step on a token keeps the router's top_k, whatever the threshold; null for never.
    """

    activation: Literal["none", "relu", "sigmoid", "tanh", "gelu", "silu"] = "tanh"
    gumbel_noise: bool = False
    schedule: Literal["linear", "exponential", "cosine", "learned"] = "linear"
    temperature_start: float = 1.0
    temperature_end: float = 0.3
    plateau_steps: int = 0
    decay_steps: int = 1000
    threshold: float = 0.01
    max_experts_start: int | None = None
    max_experts_end: int | None = None
    hard_top_k_after: int | None = None

    def __post_init__(self) -> None:
        prefix = "model.moe.router.dense_to_sparse"
        _require_positive(prefix, self, "temperature_start", "temperature_end", "decay_steps")
        _require(0 <= self.threshold < 1, f"{prefix}.threshold is {self.threshold}: it must be in [0, 1)")
        for name in ("plateau_steps", "hard_top_k_after"):
            value = getattr(self, name)
            _require(value is None or value >= 0, f"{prefix}.{name} is {value}: it must not be negative")
        for name in ("max_experts_start", "max_experts_end"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{prefix}.{name} is {value}: it must be at least 1")

    def warning(self) -> str | None:
        """What to think twice about, if anything."""
        if self.schedule != "learned" or self.activation not in _HOMOGENEOUS_ACTIVATIONS:
            return None
        return (
            f"model.moe.router.dense_to_sparse: a learned temperature cannot be told from the scale of the router with "
            f"activation={self.activation}; use sigmoid, tanh, gelu or silu, or a schedule"
        )

    def temperature(self, step: int | None) -> float:
        """Temperature at a training step, by schedule; None for after the decay."""
        start, end, done = self.temperature_start, self.temperature_end, self._decayed(step)
        match self.schedule:
            case "exponential":
                return start * (end / start) ** done
            case "cosine":
                return end + (start - end) * (1 + math.cos(math.pi * done)) / 2
        return start + (end - start) * done

    def max_experts(self, step: int | None, num_experts: int, top_k: int) -> int:
        """Experts that a token keeps at most at a training step; None for after the decay."""
        start = min(self.max_experts_start or num_experts, num_experts)
        end = min(self.max_experts_end or top_k, num_experts)
        return round(start + (end - start) * self._decayed(step))

    def is_hard(self, step: int | None) -> bool:
        """Whether a token keeps exactly top_k experts at a training step; None for after all of them."""
        return self.hard_top_k_after is not None and (step is None or step >= self.hard_top_k_after)

    def _decayed(self, step: int | None) -> float:
        """The part of the decay that lies behind, in [0, 1]."""
        return 1.0 if step is None else min(max((step - self.plateau_steps) / self.decay_steps, 0.0), 1.0)


@dataclass
class RouterConfig:
    """Which experts a token goes to, and with what weight. The router computes in float32.

    Attributes:
        gate: top_k takes the k largest scores; dense_to_sparse a number that varies from token to token.
        score: How top_k makes scores of the router's product.
        top_k: Experts of a token; for dense_to_sparse those of its end, see there.
        normalize: before makes the scores of all experts add up to one (softmax has it so), after those of the chosen
            ones, none leaves them.
        num_groups: Groups of consecutive experts, of which top_k first takes the best (DeepSeek-V3, arXiv 2412.19437).
        group_top_k: Groups that it takes, by the sum of the top_k / group_top_k largest scores in each.
        bias_update_rate: After each step, add this to the selection bias of the experts with less than the mean load,
            and take it from those with more (arXiv 2408.15664); top_k only; 0 for no bias.
        dense_to_sparse: The dense-to-sparse gate.
    """

    gate: Literal["top_k", "dense_to_sparse"] = "top_k"
    score: Literal["softmax", "sigmoid"] = "softmax"
    top_k: int = 2
    normalize: Literal["before", "after", "none"] = "before"
    num_groups: int = 1
    group_top_k: int = 1
    bias_update_rate: float = 0.0
    dense_to_sparse: DenseToSparseConfig = field(default_factory=DenseToSparseConfig)

    def __post_init__(self) -> None:
        prefix = "model.moe.router"
        _require_positive(prefix, self, "top_k", "num_groups", "group_top_k")
        _require(self.bias_update_rate >= 0, f"{prefix}.bias_update_rate={self.bias_update_rate} must not be negative")
        _require(
            self.group_top_k <= self.num_groups and self.top_k % self.group_top_k == 0,
            f"{prefix}.group_top_k={self.group_top_k} must be at most num_groups={self.num_groups}, and divide "
            f"top_k={self.top_k}",
        )
        for name, unused in (("bias_update_rate", 0.0), ("num_groups", 1), ("score", "softmax")):
            _require(
                self.gate == "top_k" or getattr(self, name) == unused,
                f"{prefix}.{name}={getattr(self, name)} is for gate=top_k; leave it out, or use gate=top_k",
            )


@dataclass
class RouterLossConfig:
    """What is added to the gradient of the router, per token; the reported loss is that of the language model alone.

    Attributes:
        balance: Coefficient of E sum_e p_e f_e, with p_e a token's probability of expert e of E, and f_e the expert's
            share of the load (arXiv 2101.03961; a share of what was kept, however many experts a token keeps).
        scope: Whose load: that of the micro-batch, of each sequence, or of the whole batch (global; arXiv 2501.11873).
            The last is that of the step before, so that it is the same however the batch is cut up.
        z: Coefficient of the squared log-sum-exp of the router's product (arXiv 2202.08906).
    """

    balance: float = 0.01
    scope: Literal["micro_batch", "sequence", "global"] = "global"
    z: float = 0.0

    def __post_init__(self) -> None:
        for name in ("balance", "z"):
            value = getattr(self, name)
            _require(value >= 0, f"model.moe.losses.{name} is {value}: it must not be negative")


@dataclass
class MoEConfig:
    """Mixture of experts in place of the feed-forward.

    Attributes:
        num_experts: Routed experts of a layer; 0 for dense feed-forwards everywhere.
        shared_experts: Experts that every token goes to, beside the routed ones.
        expert_hidden_size: Inner width of an expert; null takes model.ffn_hidden_size.
        dense_layers: Layers, from 0, that keep a dense feed-forward.
        activation: Of the experts; those that end in glu have a gate.
        capacity_factor: Drop, in training, what goes to an expert beyond this times the mean, the least probable first
            (on each rank, of its own tokens); null drops nothing.
        pad_to_capacity: Fill up the experts' rows to the capacity, so that all shapes stay the same.
        recompute_above: An expert that gets more than this times the mean of a micro-batch, over a rank's own experts,
            computes its activations again in backward in place of keeping them; null keeps those of all.
        replicated_experts: Where ranks share the experts, copy at most so many of them, the busiest, to every rank in a
            step; their tokens then stay on their ranks. 0 copies none.
        replicate_above: Copy an expert only while it got more than this times the mean load in the step before.
        spawn_step: Until this training step every token goes to the first expert alone. Then the others start as copies
            of it, and the gate with them: its schedules count from there (EvoMoE, arXiv 2112.14397). null starts all
            experts at once.
        spawn_diversify: Share of the weights of each spawned expert that is set to zero, another for each; the others
            grow by 1 / (1 - share), as in dropout.
        router: Which experts a token goes to.
        losses: What balances the experts.
    """

    num_experts: int = 0
    shared_experts: int = 0
    expert_hidden_size: int | None = None
    dense_layers: list[int] = field(default_factory=list)
    activation: Literal["swiglu", "geglu", "gelu", "relu_squared"] = "swiglu"
    capacity_factor: float | None = None
    pad_to_capacity: bool = False
    recompute_above: float | None = None
    replicated_experts: int = 0
    replicate_above: float = 2.0
    spawn_step: int | None = None
    spawn_diversify: float = 0.01
    router: RouterConfig = field(default_factory=RouterConfig)
    losses: RouterLossConfig = field(default_factory=RouterLossConfig)

    def __post_init__(self) -> None:
        for name in ("num_experts", "shared_experts", "replicated_experts"):
            _require(getattr(self, name) >= 0, f"model.moe.{name} is {getattr(self, name)}: it must not be negative")
        for name in ("expert_hidden_size", "capacity_factor", "recompute_above"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"model.moe.{name} is {value}: it must be positive")
        _require(
            self.capacity_factor is not None or not self.pad_to_capacity,
            "model.moe.pad_to_capacity needs a capacity; set model.moe.capacity_factor",
        )
        _require(
            self.replicate_above >= 1,
            f"model.moe.replicate_above is {self.replicate_above}: it must be at least 1, the mean load",
        )
        _require(
            self.spawn_step is None or self.spawn_step >= 1,
            f"model.moe.spawn_step is {self.spawn_step}: it must be at least 1, or null for all experts from the start",
        )
        _require(
            0 <= self.spawn_diversify < 1, f"model.moe.spawn_diversify is {self.spawn_diversify}: it must be in [0, 1)"
        )
        if self.num_experts == 0:
            return
        router = self.router
        _require(
            router.top_k <= self.num_experts,
            f"model.moe.router.top_k={router.top_k} exceeds model.moe.num_experts={self.num_experts}",
        )
        _require(
            self.replicated_experts <= self.num_experts,
            f"model.moe.replicated_experts={self.replicated_experts} exceeds model.moe.num_experts={self.num_experts}",
        )
        _require(
            self.num_experts % router.num_groups == 0
            and router.top_k <= router.group_top_k * (self.num_experts // router.num_groups),
            f"model.moe.router.num_groups={router.num_groups} must divide num_experts={self.num_experts} into groups, "
            f"of which group_top_k={router.group_top_k} hold top_k={router.top_k} experts",
        )

    def experts_at(self, step: int | None) -> int:
        """Routed experts that a token keeps at most at a training step; None for the end of all schedules."""
        if not self.is_spawned(step):
            return 1
        router, step = self.router, self.gate_step(step)
        if router.gate == "top_k" or router.dense_to_sparse.is_hard(step):
            return router.top_k
        return router.dense_to_sparse.max_experts(step, self.num_experts, router.top_k)

    def is_spawned(self, step: int | None) -> bool:
        """Whether there is more than the first expert at a training step; None for after all of them."""
        return self.spawn_step is None or step is None or step >= self.spawn_step

    def spawns_at(self, step: int) -> bool:
        """Whether the others are spawned before a training step."""
        return self.num_experts > 0 and self.spawn_step == step

    def gate_step(self, step: int | None) -> int | None:
        """Steps since the gate began, before a training step."""
        return step if step is None else step - (self.spawn_step or 0)


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
        retention: Retention.
        hgrn2: HGRN2; HGRN has nothing to set.
        delta_net: Delta net.
        kimi_delta_attention: Kimi delta attention.
        spikingbrain_gla: SpikingBrain's linear attention, with its own gate or the tied one.
        moe: Mixture of experts in place of the feed-forward.
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
    retention: RetentionConfig = field(default_factory=RetentionConfig)
    hgrn2: HGRN2Config = field(default_factory=HGRN2Config)
    delta_net: DeltaNetConfig = field(default_factory=DeltaNetConfig)
    kimi_delta_attention: KimiDeltaAttentionConfig = field(default_factory=KimiDeltaAttentionConfig)
    spikingbrain_gla: SpikingBrainGLAConfig = field(default_factory=SpikingBrainGLAConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)

    def __post_init__(self) -> None:
        names = ("num_layers", "hidden_size", "ffn_hidden_size", "vocab_multiple", "norm_eps", "init_std")
        _require_positive("model", self, *names)
        _require(self.vocab_size is None or self.vocab_size > 0, f"model.vocab_size={self.vocab_size} must be positive")
        used = {mixer for layer in self.layer_mixers() for mixer in branches(layer)}
        if used & set(SOFTMAX_MIXERS) and self.attention.head_dim is None:
            _require(
                self.hidden_size % (2 * self.attention.num_heads) == 0,
                f"model.hidden_size={self.hidden_size} gives no even head size over "
                f"model.attention.num_heads={self.attention.num_heads}; set model.attention.head_dim",
            )
        if "gated_linear_attention" in used:
            self._require_whole_heads("gated_linear_attention", self.gated_linear_attention)
        if "retention" in used:
            self._require_whole_heads("retention", self.retention)
            key_dim = self.state_shape("retention")[1]
            _require(
                key_dim % 2 == 0,
                f"model.retention: expand_k={self.retention.expand_k} times model.hidden_size={self.hidden_size} over "
                f"num_heads={self.retention.num_heads} gives an odd head size, {key_dim} (rotary pairs)",
            )
        if "hgrn2" in used:
            _require(
                self.hidden_size % self.hgrn2.head_dim == 0,
                f"model.hgrn2.head_dim={self.hgrn2.head_dim} does not divide model.hidden_size={self.hidden_size}",
            )
        for layer in self.layer_mixers():
            rotations = {rotary for mixer in branches(layer) if (rotary := self.rotary(mixer)) is not None}
            _require(
                len(rotations) <= 1,
                f"model.mixers: {layer!r} rotates by different (head size, base), "
                f"{' and '.join(map(str, sorted(rotations)))}; make them alike, or model.attention.rope_theta null",
            )
        if self.moe.num_experts:
            dense = self.moe.dense_layers
            _require(
                set(dense) < set(range(self.num_layers)),
                f"model.moe.dense_layers={dense} must be some, not all, of the layers 0 to {self.num_layers - 1}",
            )

    def _require_whole_heads(self, mixer: str, config: GatedLinearAttentionConfig | RetentionConfig) -> None:
        for name, expand in (("expand_k", config.expand_k), ("expand_v", config.expand_v)):
            _require(
                (self.hidden_size * expand / config.num_heads).is_integer(),
                f"model.{mixer}.{name}={expand} times model.hidden_size={self.hidden_size} "
                f"does not divide over num_heads={config.num_heads}",
            )

    def layer_mixers(self) -> list[str]:
        """Each layer's name: its mixer's, or its branches' (see `branches`)."""
        period = self.mixers.period()
        return [period[i % len(period)] for i in range(self.num_layers)]

    def bounded_layers(self) -> list[int]:
        """The layers whose decays have a lower bound: those of HGRN and HGRN2, but for the first layer."""
        layers = self.layer_mixers()
        return [i for i in range(1, self.num_layers) if set(branches(layers[i])) & set(LOWER_BOUNDED_MIXERS)]

    def rotary(self, mixer: str) -> tuple[int, float] | None:
        """(head size, base) of the rotary embedding that a mixer applies; None where it applies none."""
        if mixer == "retention":
            return self.state_shape(mixer)[1], self.retention.rope_theta
        if mixer in SOFTMAX_MIXERS and self.attention.rope_theta is not None:
            return self.attention_head_dim, self.attention.rope_theta
        return None

    def moe_layers(self) -> list[int]:
        """The layers, from 0, whose feed-forward is a mixture of experts."""
        layers = range(self.num_layers) if self.moe.num_experts else ()
        return [layer for layer in layers if layer not in self.moe.dense_layers]

    @property
    def expert_hidden_size(self) -> int:
        """Inner width of an expert, the default resolved."""
        return self.moe.expert_hidden_size or self.ffn_hidden_size

    def tensor_parallel_sizes(self) -> dict[str, int]:
        """What tensor-parallel ranks share evenly, by its key: heads, channels and rows of the embedding."""
        sizes = {"vocab_multiple": self.vocab_multiple}
        if len(self.moe_layers()) < self.num_layers:
            sizes["ffn_hidden_size"] = self.ffn_hidden_size
        if self.moe_layers() and self.moe.shared_experts:
            sizes["moe.shared_experts * expert_hidden_size"] = self.moe.shared_experts * self.expert_hidden_size
        for mixer in (mixer for layer in self.layer_mixers() for mixer in branches(layer)):
            match mixer:
                case "hgrn":
                    sizes["hidden_size"] = self.hidden_size
                case "hgrn2":
                    sizes["hidden_size / model.hgrn2.head_dim"] = self.state_shape(mixer)[0]
                case _:
                    section = mixer_section(mixer)
                    config = getattr(self, section)
                    sizes[f"{section}.num_heads"] = config.num_heads
                    if hasattr(config, "num_kv_heads"):
                        sizes[f"{section}.num_kv_heads"] = config.num_kv_heads
        return {f"model.{name}": size for name, size in sizes.items()}

    def state_shape(self, mixer: str) -> tuple[int, int, int]:
        """(heads, key size, value size) of the state that a linear mixer carries; HGRN's is a vector, (1, 1, size)."""
        match mixer:
            case "gated_linear_attention" | "retention":
                wide = self.gated_linear_attention if mixer == "gated_linear_attention" else self.retention
                heads, size = wide.num_heads, self.hidden_size
                return heads, int(size * wide.expand_k) // heads, int(size * wide.expand_v) // heads
            case "hgrn":
                return 1, 1, self.hidden_size
            case "hgrn2":
                return self.hidden_size // self.hgrn2.head_dim, self.hgrn2.head_dim, self.hgrn2.head_dim
            case "delta_net":
                return self.delta_net.num_heads, self.delta_net.head_dim, self.delta_net.head_v_dim
            case "gated_delta_net" | "kimi_delta_attention":
                delta = self.gated_delta_net if mixer == "gated_delta_net" else self.kimi_delta_attention
                return delta.value_heads, delta.head_dim, delta.head_v_dim
            case "spikingbrain_gla" | "spikingbrain_tied_gla":
                spiking = self.spikingbrain_gla
                return spiking.num_heads, spiking.head_dim, spiking.head_dim
        raise ValueError(f"{mixer!r} carries no state; choose from {', '.join(LINEAR_MIXERS)}")

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
