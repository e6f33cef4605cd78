"""Configuration of spiking neurons (models.spiking). Imports no torch, like all of models.config."""

import math
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from models.config.checks import require, require_positive

# SpikingBrain's report has spikes at the inputs of all projections (arXiv 2509.05276, section 3.3). Its published code
# (W8ASpike) fuses down_proj with the activation function and gives it floating-point inputs.
_PRESETS = {"all": lambda name: True, "released": lambda name: not name.endswith(".down_proj")}


@dataclass
class ActivityConfig:
    """An auxiliary loss on spike counts. It only affects the gradient; the reported loss is the language model's.

    Attributes:
        loss: none; l1, the mean count |s| over the channels of each token and input; or rate, the squared difference
            between that mean and `target`.
        weight: Coefficient of the loss. A step's loss is divided by its number of tokens, like the language model's.
        target: Target of the mean count |s| for loss=rate.
    """

    loss: Literal["none", "rate", "l1"] = "none"
    weight: float = 0.01
    target: float = 1.0

    def __post_init__(self) -> None:
        for name in ("weight", "target"):
            value = getattr(self, name)
            require(
                0 <= value < math.inf, f"model.spiking.activity.{name} is {value}: it must be 0 or more, and finite"
            )


@dataclass
class SpikingConfig:
    """Spiking neurons in front of linear layers: activations as integer counts of spikes (arXiv 2509.05276).

    Attributes:
        layers: Name patterns of the linear layers whose inputs are spikes, such as "layers.*.mixer.q_proj"; * matches
            any characters. The preset all selects every linear layer in a block; released selects those of the authors'
            code, which are all but down_proj. An empty list means no spikes. The embedding, the head and the routers
            never have spikes.
        k: Number of spikes of a channel with mean magnitude, V = mean|x| / k; 3 in the report.
        k_start: Value of k at start_step, from which it falls linearly to k. A larger k is finer. null uses k
            throughout.
        anneal_steps: Number of steps in which k falls from k_start to k.
        start_step: First training step with spikes. Before it, activations are floating-point numbers.
        threshold: adaptive computes V from each token's mean; learned does the same with a learned k; running uses one
            V for all tokens, from a running average; per_channel uses one V per channel, from running averages.
        momentum: Momentum of the running averages: the share of the old value that a step keeps.
        count_range: Smallest and largest count, to which counts are clipped. null does not clip.
        code: What a channel sends for each token: counts, its count; delta, the change of its count since the previous
            token of the document. delta needs a threshold shared by all tokens (kernels.spiking.delta).
        dead_zone: For code=delta, the deviation in counts up to which a channel sends no change: 0, or 1/2 or more.
        gradient: Gradient of the rounding: plain passes the gradient through; clipped makes it 0 where a count was
            clipped; surrogate peaks where the count changes (kernels.spiking.neuron).
        queries: Softmax attention reads spikes of its rotated queries, with one threshold per token and head.
        int8_keys_values: Softmax attention reads keys and values rounded to int8, with one scale per token and head.
        weights: int8 rounds the weights of the selected linear layers, with one scale per output and group of 128
            inputs.
        activity: Auxiliary loss on the counts.
    """

    layers: list[str] = field(default_factory=list)
    k: float = 3.0
    k_start: float | None = None
    anneal_steps: int = 0
    start_step: int = 0
    threshold: Literal["adaptive", "learned", "running", "per_channel"] = "adaptive"
    momentum: float = 0.99
    count_range: list[int] | None = None
    code: Literal["counts", "delta"] = "counts"
    dead_zone: float = 0.0
    gradient: Literal["plain", "clipped", "surrogate"] = "plain"
    queries: bool = False
    int8_keys_values: bool = False
    weights: Literal["float", "int8"] = "float"
    activity: ActivityConfig = field(default_factory=ActivityConfig)

    def __post_init__(self) -> None:
        prefix = "model.spiking"
        require_positive(prefix, self, "k")
        require(self.k < math.inf, f"{prefix}.k is {self.k}: it must be finite")
        for name in ("start_step", "anneal_steps"):
            require(getattr(self, name) >= 0, f"{prefix}.{name} is {getattr(self, name)}: it must not be negative")
        require(0 <= self.momentum < 1, f"{prefix}.momentum is {self.momentum}: it must be in [0, 1)")
        self._check_annealing(prefix)
        self._check_delta(prefix)
        bounds = self.count_range
        require(
            bounds is None or (len(bounds) == 2 and bounds[0] < bounds[1] and max(map(abs, bounds)) <= 1 << 24),
            f"{prefix}.count_range is {bounds}: it must be [least, largest] within 2^24 of 0, or null",
        )
        require(
            self.gradient != "clipped" or bounds is not None,
            f"{prefix}.gradient=clipped needs a range to clip to; set {prefix}.count_range, or use gradient=plain",
        )
        for name, value, default in (("weights", self.weights, "float"), ("activity.loss", self.activity.loss, "none")):
            require(
                value == default or bool(self.layers),
                f"{prefix}.{name}={value} needs linear layers with spikes, but {prefix}.layers is empty; set layers, "
                f"such as [all], or use {name}={default}",
            )

    def _check_annealing(self, prefix: str) -> None:
        start = self.k_start
        require(
            start is None or self.k <= start < math.inf,
            f"{prefix}.k_start is {start}: it must be finite and at least k={self.k}, as k falls from k_start to k",
        )
        require(
            (start is None) == (self.anneal_steps == 0),
            f"{prefix}.k_start={start} with anneal_steps={self.anneal_steps}: annealing k needs both; set k_start and "
            "anneal_steps, or k_start=null and anneal_steps=0",
        )
        require(
            start is None or self.threshold != "learned",
            f"{prefix}.k_start={start} schedules k, but threshold=learned trains k; use k_start=null and "
            "anneal_steps=0, or another threshold",
        )

    def _check_delta(self, prefix: str) -> None:
        zone = self.dead_zone
        require(
            zone == 0 or 0.5 <= zone < math.inf,
            f"{prefix}.dead_zone is {zone}: it must be 0, or 1/2 or more, as rounding alone is off by up to 1/2",
        )
        require(
            zone == 0 or self.code == "delta",
            f"{prefix}.dead_zone={zone} needs temporal-delta spikes; set {prefix}.code=delta, or use dead_zone=0",
        )
        require(
            self.code != "delta" or self.threshold in ("running", "per_channel"),
            f"{prefix}.code=delta needs a threshold that all tokens share, but threshold={self.threshold} computes one "
            "for each token; use threshold=running or threshold=per_channel",
        )
        require(
            self.code != "delta" or not self.queries,
            f"{prefix}.queries=true computes a threshold for each token, but code=delta needs one that all tokens "
            "share; use queries=false or code=counts",
        )
        require(
            zone == 0 or self.gradient != "surrogate",
            f"{prefix}.gradient=surrogate needs each token's own count, but dead_zone={zone} may keep an earlier "
            "token's; use gradient=plain or gradient=clipped, or dead_zone=0",
        )

    @property
    def is_used(self) -> bool:
        """Whether the model has spikes or int8 keys and values anywhere."""
        return bool(self.layers) or self.queries or self.int8_keys_values

    def picks(self, name: str) -> bool:
        """Return whether the linear layer with this name in the decoder reads spikes."""
        return any(self._picks(pattern, name) for pattern in self.layers)

    @staticmethod
    def _picks(pattern: str, name: str) -> bool:
        preset = _PRESETS.get(pattern)
        return fnmatchcase(name, pattern) if preset is None else preset(name)

    def unmatched(self, names: list[str]) -> list[str]:
        """Return the patterns that match none of these names."""
        return [pattern for pattern in self.layers if not any(self._picks(pattern, name) for name in names)]

    def is_on(self, step: int | None) -> bool:
        """Return whether there are spikes at a training step; None means after the last step."""
        return step is None or step >= self.start_step

    def k_at(self, step: int | None) -> float:
        """Return k at a training step; None means after the annealing."""
        if self.k_start is None or step is None:
            return self.k
        left = 1 - min(max((step - self.start_step) / self.anneal_steps, 0.0), 1.0)
        return self.k + (self.k_start - self.k) * left
