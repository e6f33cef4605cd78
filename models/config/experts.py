"""Configuration of mixtures of experts: the experts, their router, its losses and its schedules.

Imports no torch, like all of models.config.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from models.config.checks import require, require_positive

# For a positively homogeneous activation, scaling the router and the temperature together changes nothing, so the
# temperature cannot be identified (arXiv 2401.13875).
_HOMOGENEOUS_ACTIVATIONS = ("none", "relu")


@dataclass
class DenseToSparseConfig:
    """The dense-to-sparse gate (EvoMoE, arXiv 2112.14397) with an activation (arXiv 2401.13875).

    The gate starts with all experts and ends with few. It computes p = softmax((activation(W x) + noise) /
    temperature). Each token keeps its largest expert and those whose p reaches the threshold, up to a maximum number
    that shrinks. Temperature and maximum follow one schedule over training steps: a plateau, then a decay, then
    constant.

    Attributes:
        activation: Activation between router product and softmax. Only with sigmoid, tanh, gelu or silu can a learned
            temperature be told from the scale of the router weights.
        gumbel_noise: Add Gumbel noise in training; it depends only on seed, layer, step and token.
        schedule: Shape of the decay; learned makes the temperature a parameter that starts at temperature_start.
        temperature_start: Temperature on the plateau.
        temperature_end: Temperature after the decay.
        plateau_steps: Steps before the decay.
        decay_steps: Steps of the decay.
        threshold: A token keeps the experts whose p reaches this, and always the one with the largest p.
        max_experts_start: Maximum number of experts per token on the plateau; null means all.
        max_experts_end: Maximum after the decay, linear in the step in between; null takes the router's top_k.
        hard_top_k_after: From this step on every token keeps the router's top_k experts regardless of the threshold;
            null means never.
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
        require_positive(prefix, self, "temperature_start", "temperature_end", "decay_steps")
        require(0 <= self.threshold < 1, f"{prefix}.threshold is {self.threshold}: it must be in [0, 1)")
        for name in ("plateau_steps", "hard_top_k_after"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"{prefix}.{name} is {value}: it must not be negative")
        for name in ("max_experts_start", "max_experts_end"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{prefix}.{name} is {value}: it must be at least 1")

    def warning(self) -> str | None:
        """A warning about a setting that is legal but likely a mistake; None if there is none."""
        if self.schedule != "learned" or self.activation not in _HOMOGENEOUS_ACTIVATIONS:
            return None
        return (
            f"model.moe.router.dense_to_sparse: a learned temperature cannot be told from the scale of the router with "
            f"activation={self.activation}; use sigmoid, tanh, gelu or silu, or a schedule"
        )

    def temperature(self, step: int | None) -> float:
        """Temperature at a training step; None means after the decay."""
        start, end, done = self.temperature_start, self.temperature_end, self._decayed(step)
        match self.schedule:
            case "exponential":
                return start * (end / start) ** done
            case "cosine":
                return end + (start - end) * (1 + math.cos(math.pi * done)) / 2
        return start + (end - start) * done

    def max_experts(self, step: int | None, num_experts: int, top_k: int) -> int:
        """Maximum number of experts per token at a training step; None means after the decay."""
        start = min(self.max_experts_start or num_experts, num_experts)
        end = min(self.max_experts_end or top_k, num_experts)
        return round(start + (end - start) * self._decayed(step))

    def is_hard(self, step: int | None) -> bool:
        """Whether tokens keep exactly top_k experts at a training step; None means after the last step."""
        return self.hard_top_k_after is not None and (step is None or step >= self.hard_top_k_after)

    def _decayed(self, step: int | None) -> float:
        """Fraction of the decay that has passed, in [0, 1]."""
        return 1.0 if step is None else min(max((step - self.plateau_steps) / self.decay_steps, 0.0), 1.0)


@dataclass
class RouterConfig:
    """Expert selection and gate weights. The router computes in float32.

    Attributes:
        gate: top_k takes the k largest scores; dense_to_sparse takes a number that varies by token.
        score: Activation that turns router logits into scores; top_k only.
        top_k: Experts per token; for dense_to_sparse the number at the end of its schedule.
        normalize: before normalises the scores of all experts to sum to one (as softmax does), after those of the
            chosen experts, none leaves them unchanged.
        num_groups: Groups of consecutive experts; top_k first selects groups (DeepSeek-V3, arXiv 2412.19437).
        group_top_k: Number of selected groups, by the sum of the top_k / group_top_k largest scores in each.
        bias_update_rate: After each step, add this to the selection bias of experts below the mean load and subtract it
            above (arXiv 2408.15664); top_k only; 0 means no bias.
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
        require_positive(prefix, self, "top_k", "num_groups", "group_top_k")
        require(self.bias_update_rate >= 0, f"{prefix}.bias_update_rate={self.bias_update_rate} must not be negative")
        require(
            self.group_top_k <= self.num_groups and self.top_k % self.group_top_k == 0,
            f"{prefix}.group_top_k={self.group_top_k} must be at most num_groups={self.num_groups}, and divide "
            f"top_k={self.top_k}",
        )
        # These settings act on top_k only, so with another gate they would silently do nothing.
        for name, unused in (("bias_update_rate", 0.0), ("num_groups", 1), ("score", "softmax")):
            require(
                self.gate == "top_k" or getattr(self, name) == unused,
                f"{prefix}.{name}={getattr(self, name)} is for gate=top_k; leave it out, or use gate=top_k",
            )


@dataclass
class RouterLossConfig:
    """Auxiliary router losses, per token. They affect only the gradient; the reported loss is the language model's.

    Attributes:
        balance: Coefficient of E sum_e p_e f_e, where p_e is a token's probability of expert e of E, and f_e the
            expert's share of the load (arXiv 2101.03961; a share of the kept assignments, however many experts a token
            keeps).
        scope: Scope of the load: micro_batch, sequence, or global for the whole batch (arXiv 2501.11873). global uses
            the previous step's load, so that it does not depend on how the batch is divided.
        z: Coefficient of the squared log-sum-exp of the router logits (arXiv 2202.08906).
    """

    balance: float = 0.01
    scope: Literal["micro_batch", "sequence", "global"] = "global"
    z: float = 0.0

    def __post_init__(self) -> None:
        for name in ("balance", "z"):
            value = getattr(self, name)
            require(value >= 0, f"model.moe.losses.{name} is {value}: it must not be negative")


@dataclass
class MoEConfig:
    """A mixture of experts in place of the feed-forward.

    Attributes:
        num_experts: Routed experts per layer; 0 means dense feed-forwards everywhere.
        shared_experts: Experts that process every token, in addition to the routed ones.
        shared_expert_gate: Multiply the shared experts' output by sigmoid of a learned projection of the token.
        expert_hidden_size: Inner width of an expert; null takes model.ffn_hidden_size.
        dense_layers: Indices, from 0, of layers that keep a dense feed-forward.
        activation: Activation of the experts; those that end in glu have a gate.
        capacity_factor: In training, drop assignments beyond this factor times the mean load of an expert, least
            probable first (each rank for its own tokens); null drops nothing.
        pad_to_capacity: Pad the experts' rows to the capacity, so that shapes are static.
        recompute_above: Backward recomputes the activations of an expert whose rows exceed this factor times the mean
            of the rank's experts in a micro-batch; null keeps all activations.
        replicated_experts: With expert parallelism, replicate at most this many of the busiest experts to every rank in
            a step, so that their tokens stay local; 0 replicates none.
        replicate_above: Replicate an expert only if it got more than this factor times the mean load in the previous
            step.
        spawn_step: Before this training step every token uses only the first expert. At this step the others are
            created as copies of it, and the gate's schedules start (EvoMoE, arXiv 2112.14397). null starts with all
            experts.
        spawn_diversify: Fraction of the weights of each spawned expert that is set to zero, drawn for each; the rest is
            scaled by 1 / (1 - fraction), as in dropout.
        router: Expert selection and gate weights.
        losses: Auxiliary router losses.
    """

    num_experts: int = 0
    shared_experts: int = 0
    shared_expert_gate: bool = False
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
            require(getattr(self, name) >= 0, f"model.moe.{name} is {getattr(self, name)}: it must not be negative")
        for name in ("expert_hidden_size", "capacity_factor", "recompute_above"):
            value = getattr(self, name)
            require(value is None or value > 0, f"model.moe.{name} is {value}: it must be positive")
        require(
            self.shared_experts > 0 or not self.shared_expert_gate,
            "model.moe.shared_expert_gate needs shared experts; set model.moe.shared_experts",
        )
        require(
            self.capacity_factor is not None or not self.pad_to_capacity,
            "model.moe.pad_to_capacity needs a capacity; set model.moe.capacity_factor",
        )
        require(
            self.replicate_above >= 1,
            f"model.moe.replicate_above is {self.replicate_above}: it must be at least 1, the mean load",
        )
        require(
            self.spawn_step is None or self.spawn_step >= 1,
            f"model.moe.spawn_step is {self.spawn_step}: it must be at least 1, or null for all experts from the start",
        )
        require(
            0 <= self.spawn_diversify < 1, f"model.moe.spawn_diversify is {self.spawn_diversify}: it must be in [0, 1)"
        )
        # A dense model ignores the remaining settings, so their combination does not matter.
        if self.num_experts == 0:
            return
        router = self.router
        require(
            router.top_k <= self.num_experts,
            f"model.moe.router.top_k={router.top_k} exceeds model.moe.num_experts={self.num_experts}",
        )
        require(
            self.replicated_experts <= self.num_experts,
            f"model.moe.replicated_experts={self.replicated_experts} exceeds model.moe.num_experts={self.num_experts}",
        )
        # The selected groups must contain enough experts for top_k.
        require(
            self.num_experts % router.num_groups == 0
            and router.top_k <= router.group_top_k * (self.num_experts // router.num_groups),
            f"model.moe.router.num_groups={router.num_groups} must divide num_experts={self.num_experts} into groups, "
            f"of which group_top_k={router.group_top_k} hold top_k={router.top_k} experts",
        )

    def experts_at(self, step: int | None) -> int:
        """Maximum number of routed experts per token at a training step; None means after all schedules."""
        if not self.is_spawned(step):
            return 1
        router, step = self.router, self.gate_step(step)
        if router.gate == "top_k" or router.dense_to_sparse.is_hard(step):
            return router.top_k
        return router.dense_to_sparse.max_experts(step, self.num_experts, router.top_k)

    def is_spawned(self, step: int | None) -> bool:
        """Whether the experts beyond the first exist at a training step; None means after the last step."""
        return self.spawn_step is None or step is None or step >= self.spawn_step

    def spawns_at(self, step: int) -> bool:
        """Whether the other experts are spawned just before a training step."""
        return self.num_experts > 0 and self.spawn_step == step

    def gate_step(self, step: int | None) -> int | None:
        """Steps since the gate started, before a training step."""
        return step if step is None else step - (self.spawn_step or 0)
