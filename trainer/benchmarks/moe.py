"""Forward and backward of a mixture-of-experts layer against a loop over experts and transformers' Mixtral block.

All sides have the same weights and the same choice of experts, and must agree before any is timed. The part `systems`
times nothing: it counts what recomputation and copies of experts cost and save (trainer.benchmarks.moe_systems).
"""

import importlib.util
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from models.config import ModelConfig, MoEConfig, RouterConfig, RouterLossConfig
from trainer.benchmarks.report import Comparison, report, say, time_by_turns
from trainer.cli import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from models.moe.layer import MoELayer

DESCRIPTION = "A mixture-of-experts layer, forward and backward, against a loop over experts and Mixtral's block."

Step = Callable[[], object]


@dataclass
class Config:
    """Sizes and what to measure.

    Attributes:
        json: Write the comparisons to this file.
        parts: What to measure; all by default.
        tokens: Tokens of the comparisons; the growth with the number of experts is measured at the first, and each rank
            of the part systems has as many.
        scaling_tokens: Tokens over which the growth of time is fitted.
        scaling_experts: Numbers of experts over which it is.
        experts: Experts.
        top_k: Experts that a token goes to.
        hidden_size: Width of the residual stream.
        expert_hidden_size: Inner width of an expert.
        skew: How uneven the load of the part systems is: the n-th expert's logit is lowered by so many times log(n).
        rounds: Timed calls of each side.
        warmup: Untimed calls of each side before.
        threads: CPU threads; 0 takes every core.
        clock: wall, or cpu: this process's CPU time, which is fair on a shared machine; with one thread only.
        keep_freed_memory: Have the C library keep freed memory, as training does, for all sides.
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


def main(config: Config) -> None:
    """Measure the parts and print the table."""
    from trainer.device import configure_threads, keep_freed_memory

    warnings.filterwarnings("ignore")
    if config.keep_freed_memory:
        keep_freed_memory()
    threads = configure_threads(config.threads)
    parts = {
        "peers": _against_peers,
        "tokens": _growth_with_tokens,
        "experts": _growth_with_experts,
        "systems": _systems,
    }
    lines = [line for name, measure in parts.items() if name in config.parts for line in measure(config)]
    shape = f"{config.experts} experts of {config.expert_hidden_size}, top {config.top_k}, width {config.hidden_size}"
    report(
        f"mixture of experts, forward and backward, {shape}, float32, {threads} threads, {config.clock} time",
        lines,
        config.json,
    )


def build_layer(config: Config, experts: int, **keys: Any) -> "MoELayer":
    """A layer with weights that spread the tokens about evenly, and without auxiliary losses, which the peers lack.

    `keys` are more of those of model.moe.
    """
    import torch

    from models.moe.layer import MoELayer

    moe = MoEConfig(
        num_experts=experts,
        expert_hidden_size=config.expert_hidden_size,
        router=RouterConfig(top_k=config.top_k, normalize="after"),
        losses=RouterLossConfig(balance=0.0, z=0.0),
        **keys,
    )
    layer = MoELayer(ModelConfig(num_layers=1, hidden_size=config.hidden_size, moe=moe))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_(std=weight.shape[-1] ** -0.5, generator=generator)
    return layer


def make_inputs(config: Config, tokens: int, seed: int = 1) -> "Tensor":
    """Normal numbers [tokens, 1, hidden_size] that want a gradient."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, 1, config.hidden_size, generator=generator).requires_grad_()


def _mixtral(config: Config, layer: "MoELayer", implementation: str) -> Any:
    """Transformers' block with the weights of ours: `eager` is its own loop, `grouped_mm` what its models take."""
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    block = MixtralSparseMoeBlock(
        MixtralConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.expert_hidden_size,
            num_local_experts=config.experts,
            num_experts_per_tok=config.top_k,
            experts_implementation=implementation,
        )
    )
    experts: Any = layer.experts
    with torch.no_grad():
        block.gate.weight.copy_(layer.router.weight)
        block.experts.gate_up_proj.copy_(torch.cat([experts.gate_proj.weight, experts.up_proj.weight], 1))
        block.experts.down_proj.copy_(experts.down_proj.weight)
    return block


def _loop_over_experts(layer: "MoELayer", x_ND: "Tensor", top_k: int) -> "Tensor":
    """The layer in plain operations, one expert after another, with index_add."""
    import torch
    import torch.nn.functional as F

    weights, chosen = F.linear(x_ND, layer.router.weight).softmax(-1).topk(top_k, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    y_ND, experts = torch.zeros_like(x_ND), layer.experts
    assert experts.gate_proj is not None, "SwiGLU has a gate"
    for expert in range(len(experts.up_proj.weight)):
        tokens, slots = (chosen == expert).nonzero(as_tuple=True)
        rows = x_ND[tokens]
        hidden = F.silu(rows @ experts.gate_proj.weight[expert].T) * (rows @ experts.up_proj.weight[expert].T)
        down = hidden @ experts.down_proj.weight[expert].T
        y_ND = y_ND.index_add(0, tokens, down * weights[tokens, slots, None])
    return y_ND


def _step(forward: "Callable[[Tensor], Tensor]", x: "Tensor", weights: "Sequence[Tensor]") -> Step:
    """Forward and backward of sum(y²), the gradients thrown away."""
    import torch

    return lambda: torch.autograd.grad(forward(x).square().sum(), [x, *weights])


def _medians(config: Config, sides: Mapping[str, Step]) -> dict[str, float]:
    clock = time.process_time if config.clock == "cpu" else time.perf_counter
    seconds = time_by_turns(sides, config.rounds, config.warmup, clock)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def _require_equal(forwards: "Mapping[str, Callable[[Tensor], Tensor]]", x: "Tensor") -> float:
    """`largest_difference` of outputs and of gradients of x."""
    import torch

    results = []
    for forward in forwards.values():
        y = forward(x)
        results.append((y.detach(), torch.autograd.grad(y.square().sum(), x)[0]))
    return largest_difference(results)


def largest_difference(results: "Sequence[Sequence[Tensor]]") -> float:
    """The largest relative difference of any side's tensors from those of the first side.

    Raises:
        RuntimeError: it is above 1e-4.
    """
    first, *others = results
    largest = max(float((b - a).norm() / a.norm()) for other in others for a, b in zip(first, other, strict=True))
    if not largest < 1e-4:
        raise RuntimeError(f"the sides differ by {largest:.1e} on the same weights")
    return largest


def _against_peers(config: Config) -> list[Comparison]:
    import torch

    from trainer.device import measure_matmul

    layer = build_layer(config, config.experts)
    blocks = {f"Mixtral's block, {name}": _mixtral(config, layer, name) for name in ("eager", "grouped_mm")}
    forwards: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": layer,
        "a loop with index_add": lambda x: _loop_over_experts(layer, x.flatten(0, 1), config.top_k).view_as(x),
        **blocks,
    }
    lines = []
    for tokens in config.tokens:
        say(f"against the peers, {tokens} tokens")
        x = make_inputs(config, tokens)
        difference = _require_equal(forwards, x)
        weights = {name: list(blocks.get(name, layer).parameters()) for name in forwards}
        sides = {name: _step(forward, x, weights[name]) for name, forward in forwards.items()}
        seconds = _medians(config, sides)
        mine = seconds.pop("ours")
        flops = 18.0 * tokens * config.top_k * config.hidden_size * config.expert_hidden_size
        peak = measure_matmul(torch.float32)
        note = f"outputs and gradients agree to {difference:.0e}; ours at {flops / mine / peak:.2f} of the matmul peak"
        for name, taken in seconds.items():
            lines.append(Comparison(f"{name}, {tokens} tokens", mine, taken, taken / mine, "s", note))
    return lines


def _growth(name: str, sizes: Sequence[int], seconds: Sequence[float], expected: float) -> Comparison:
    """The exponent of a power law fitted to seconds, beside the one that the layer's operations have."""
    slope = statistics.linear_regression([math.log(n) for n in sizes], [math.log(t) for t in seconds]).slope
    note = ", ".join(f"{taken:.3g} s at {size}" for size, taken in zip(sizes, seconds, strict=True))
    case = f"growth with {name} from {sizes[0]} to {sizes[-1]}"
    # A ratio of exponents means nothing where the expected one is zero: both count from a growth of one power less.
    return Comparison(case, slope, expected, (1 + expected) / (1 + slope), f"exponent of {name}", note)


def _growth_with_tokens(config: Config) -> list[Comparison]:
    sizes = sorted(set(config.scaling_tokens))
    layer, sides = build_layer(config, config.experts), {}
    say("growth with the number of tokens")
    for tokens in sizes:
        sides[str(tokens)] = _step(layer, make_inputs(config, tokens), list(layer.parameters()))
    return [_growth("tokens", sizes, list(_medians(config, sides).values()), 1.0)]


def _growth_with_experts(config: Config) -> list[Comparison]:
    sizes, x = sorted(set(config.scaling_experts)), make_inputs(config, config.tokens[0])
    say(f"growth with the number of experts, {config.tokens[0]} tokens")
    sides = {}
    for experts in sizes:
        layer = build_layer(config, experts)
        sides[str(experts)] = _step(layer, x, list(layer.parameters()))
    return [_growth("experts", sizes, list(_medians(config, sides).values()), 0.0)]


def _systems(config: Config) -> list[Comparison]:
    from trainer.benchmarks.moe_systems import measure

    return measure(config)
