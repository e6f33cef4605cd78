"""Configuration of low-rank adapters (models.lora). Imports no torch, like all of models.config."""

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from models.config.checks import require

# Pattern of the names of adapters' parameters.
ADAPTERS = "*.lora.*"
_PREFIX = "model.lora"


@dataclass
class LoraConfig:
    """Low-rank adapters beside linear layers, y = W x + s B A x (LoRA, arXiv 2106.09685). Only A and B are trained.

    Attributes:
        rank: Rows of A and columns of B; 0 for no adapters.
        alpha: Numerator of the scale s.
        targets: Name patterns of the linear layers that get adapters, such as "layers.*.mixer.q_proj"; * matches any
            characters. null selects every linear layer of mixers, feed-forwards and experts. The embedding, the head
            and the routers never have adapters.
        scaling: Scale s: lora, alpha / rank; rslora, alpha / sqrt(rank) (arXiv 2312.03732).
        init: Initial A: uniform within 1 / sqrt(inputs), or normal with standard deviation 1 / rank. B is zero, so that
            the model is unchanged at first.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: list[str] | None = None
    scaling: Literal["lora", "rslora"] = "lora"
    init: Literal["uniform", "normal"] = "uniform"

    def __post_init__(self) -> None:
        require(self.rank >= 0, f"{_PREFIX}.rank is {self.rank}: it must be positive, or 0 for no adapters")
        require(
            self.rank > 0 or self.targets is None,
            f"{_PREFIX}.targets={self.targets} with {_PREFIX}.rank=0 would add no adapters; set rank, such as 8, or "
            "leave targets out",
        )
        require(
            self.targets != [], f"{_PREFIX}.targets is empty; name a pattern, or leave it out for all linear layers"
        )
        require(0 < self.alpha < math.inf, f"{_PREFIX}.alpha is {self.alpha}: it must be positive and finite")

    @property
    def is_on(self) -> bool:
        """Whether there are adapters."""
        return self.rank > 0

    @property
    def scale(self) -> float:
        """The factor s of B A."""
        return self.alpha / (self.rank if self.scaling == "lora" else math.sqrt(self.rank))

    def picks(self, name: str) -> bool:
        """Whether the linear layer with this name in the decoder gets an adapter."""
        return self.is_on and (self.targets is None or any(fnmatchcase(name, pattern) for pattern in self.targets))

    def unmatched(self, names: list[str]) -> list[str]:
        """The patterns that match none of these names."""
        return [pattern for pattern in self.targets or () if not any(fnmatchcase(name, pattern) for name in names)]
