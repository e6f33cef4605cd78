"""Mixtures of experts: the experts, their router, its losses and its schedules.

Nothing here imports torch, as in all of models.config.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from models.config.checks import require, require_positive

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
        require_positive(prefix, self, "temperature_start", "temperature_end", "decay_steps")
        require(0 <= self.threshold < 1, f"{prefix}.threshold is {self.threshold}: it must be in [0, 1)")
        for name in ("plateau_steps", "hard_top_k_after"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"{prefix}.{name} is {value}: it must not be negative")
        for name in ("max_experts_start", "max_experts_end"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{prefix}.{name} is {value}: it must be at least 1")

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
        require_positive(prefix, self, "top_k", "num_groups", "group_top_k")
        require(self.bias_update_rate >= 0, f"{prefix}.bias_update_rate={self.bias_update_rate} must not be negative")
        require(
            self.group_top_k <= self.num_groups and self.top_k % self.group_top_k == 0,
            f"{prefix}.group_top_k={self.group_top_k} must be at most num_groups={self.num_groups}, and divide "
            f"top_k={self.top_k}",
        )
        for name, unused in (("bias_update_rate", 0.0), ("num_groups", 1), ("score", "softmax")):
            require(
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
            require(value >= 0, f"model.moe.losses.{name} is {value}: it must not be negative")


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
            require(getattr(self, name) >= 0, f"model.moe.{name} is {getattr(self, name)}: it must not be negative")
        for name in ("expert_hidden_size", "capacity_factor", "recompute_above"):
            value = getattr(self, name)
            require(value is None or value > 0, f"model.moe.{name} is {value}: it must be positive")
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
        require(
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
