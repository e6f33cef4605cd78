"""Shared code of the mixture-of-experts measurements: sizes, layer, inputs, and the comparison of sides."""

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from models.config import ModelConfig, MoEConfig, RouterConfig, RouterLossConfig
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from models.moe.layer import MoELayer


@dataclass
class Config:
    """Sizes and parts to measure.

    Attributes:
        json: Write the comparisons to this file.
        parts: Parts to measure. All by default.
        tokens: Tokens of the comparisons. The first number also applies to the growth with the number of experts, and
            to each rank of the part systems.
        scaling_tokens: Tokens over which the growth of time is fitted.
        scaling_experts: Numbers of experts over which the growth of time is fitted.
        experts: Number of experts.
        top_k: Experts per token.
        hidden_size: Width of the residual stream.
        expert_hidden_size: Inner width of an expert.
        skew: Imbalance of the load in the part systems. The n-th expert's logit is lowered by skew times log(n).
        rounds: Timed calls of each side.
        warmup: Untimed calls of each side before.
        threads: CPU threads. 0 takes every core.
        clock: wall, or cpu: this process's CPU time, which is fair on a shared machine. cpu needs one thread.
        keep_freed_memory: Make the C library keep freed memory for all sides, as in training.
    """

    json: str | None = None
    parts: list[Literal["peers", "tokens", "experts", "systems"]] = field(
        default_factory=lambda: ["peers", "tokens", "experts", "systems"]
    )
    tokens: list[int] = field(default_factory=lambda: [4096, 1024, 16384])
    scaling_tokens: list[int] = field(default_factory=lambda: [1 << n for n in range(10, 15)])
    scaling_experts: list[int] = field(default_factory=lambda: [8, 16, 32, 64])
    experts: int = 16
    top_k: int = 2
    hidden_size: int = 512
    expert_hidden_size: int = 1408
    skew: float = 0.65
    rounds: int = 5
    warmup: int = 1
    threads: int = 0
    clock: Literal["wall", "cpu"] = "wall"
    keep_freed_memory: bool = True

    def __post_init__(self) -> None:
        for name in ("experts", "top_k", "hidden_size", "expert_hidden_size", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("tokens", "scaling_tokens", "scaling_experts"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: name at least one number, each at least 1")
        for part, name in (("tokens", "scaling_tokens"), ("experts", "scaling_experts")):
            if part in self.parts and len(set(getattr(self, name))) < 2:
                raise ConfigError(f"{name} needs two numbers to fit a growth to")
        if self.top_k > min(self.experts, *self.scaling_experts):
            raise ConfigError(f"top_k={self.top_k} exceeds the smallest number of experts")
        if not (math.isfinite(self.skew) and self.skew >= 0):
            raise ConfigError(f"skew is {self.skew}: it must be a number from 0 on")
        if "systems" in self.parts and self.experts % 2:
            raise ConfigError(f"experts is {self.experts}: the two ranks of part systems must share them evenly")
        if self.clock == "cpu" and self.threads != 1:
            raise ConfigError("clock=cpu adds up the threads' time; use it with --threads 1")
        if "peers" in self.parts and importlib.util.find_spec("transformers") is None:
            raise ConfigError("the peer of part peers is missing: pip install '.[dev]', or leave it out of parts")


def build_layer(config: Config, experts: int, **keys: Any) -> "MoELayer":
    """Build a layer whose weights spread the tokens about evenly. It has no auxiliary losses, as the peers have none.

    `keys` are further keys of model.moe.
    """
    import torch

    from models.moe.layer import MoELayer

    moe = MoEConfig(
        num_experts=experts,
        expert_hidden_size=config.expert_hidden_size,
        # As in Mixtral: the selected gates add up to 1.
        router=RouterConfig(top_k=config.top_k, normalize="after"),
        losses=RouterLossConfig(balance=0.0, z=0.0),
        **keys,
    )
    layer = MoELayer(ModelConfig(num_layers=1, hidden_size=config.hidden_size, moe=moe))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # Unit-variance logits for unit-variance inputs.
        for weight in layer.parameters():
            weight.normal_(std=weight.shape[-1] ** -0.5, generator=generator)
    return layer


def make_inputs(config: Config, tokens: int, seed: int = 1) -> "Tensor":
    """Draw normal inputs [tokens, 1, hidden_size] that require a gradient."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, 1, config.hidden_size, generator=generator).requires_grad_()


def largest_difference(results: "Sequence[Sequence[Tensor]]") -> float:
    """Return the largest relative difference of any side's tensors from the first side's.

    Raises:
        RuntimeError: it exceeds 1e-4.
    """
    first, *others = results
    largest = max(float((b - a).norm() / a.norm()) for other in others for a, b in zip(first, other, strict=True))
    # `not <` also refuses NaN.
    if not largest < 1e-4:
        raise RuntimeError(f"the sides differ by {largest:.1e} on the same weights")
    return largest
