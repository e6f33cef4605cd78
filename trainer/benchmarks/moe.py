"""A mixture-of-experts layer, forward and backward, against a loop over experts and transformers' Mixtral block.

All sides have the same weights and select the same experts. They must agree before any is timed. The part `systems`
times nothing: it counts the cost and savings of recomputation and expert replication (trainer.benchmarks.moe_systems).
"""

import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trainer.benchmarks.moe_layers import Config, build_layer, largest_difference, make_inputs
from trainer.benchmarks.report import Comparison, report, say, time_by_turns

if TYPE_CHECKING:
    from torch import Tensor

    from models.moe.layer import MoELayer

DESCRIPTION = "A mixture-of-experts layer, forward and backward, against a loop over experts and Mixtral's block."

Step = Callable[[], object]


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


def _mixtral(config: Config, layer: "MoELayer", implementation: str) -> Any:
    """Build transformers' block with our weights: `eager` loops over experts, `grouped_mm` is its models' default."""
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
    """Compute the layer in plain operations, one expert at a time, with index_add."""
    import torch
    import torch.nn.functional as F

    weights, chosen = F.linear(x_ND, layer.router.weight).softmax(-1).topk(top_k, dim=-1)
    # Mixtral normalises the selected gates, after the softmax over all experts.
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
    """Return a step: forward and backward of sum(y²). The gradients are discarded."""
    import torch

    return lambda: torch.autograd.grad(forward(x).square().sum(), [x, *weights])


def _medians(config: Config, sides: Mapping[str, Step]) -> dict[str, float]:
    clock = time.process_time if config.clock == "cpu" else time.perf_counter
    seconds = time_by_turns(sides, config.rounds, config.warmup, clock)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def _require_equal(forwards: "Mapping[str, Callable[[Tensor], Tensor]]", x: "Tensor") -> float:
    """Return the `largest_difference` of outputs and of gradients of x. Raises if the sides disagree."""
    import torch

    results = []
    for forward in forwards.values():
        y = forward(x)
        results.append((y.detach(), torch.autograd.grad(y.square().sum(), x)[0]))
    return largest_difference(results)


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
        # Three matrix products per expert, 2 FLOPs per weight, and backward twice the forward: 18.
        flops = 18.0 * tokens * config.top_k * config.hidden_size * config.expert_hidden_size
        peak = measure_matmul(torch.float32)
        note = f"outputs and gradients agree to {difference:.0e}; ours at {flops / mine / peak:.2f} of the matmul peak"
        for name, taken in seconds.items():
            lines.append(Comparison(f"{name}, {tokens} tokens", mine, taken, taken / mine, "s", note))
    return lines


def _growth(name: str, sizes: Sequence[int], seconds: Sequence[float], expected: float) -> Comparison:
    """Fit a power law to seconds, and compare its exponent with that of the layer's operations."""
    slope = statistics.linear_regression([math.log(n) for n in sizes], [math.log(t) for t in seconds]).slope
    note = ", ".join(f"{taken:.3g} s at {size}" for size, taken in zip(sizes, seconds, strict=True))
    case = f"growth with {name} from {sizes[0]} to {sizes[-1]}"
    # The expected exponent may be zero, so both count from one power less: the ratio of 1 + exponent.
    return Comparison(case, slope, expected, (1 + expected) / (1 + slope), f"exponent of {name}", note)


def _growth_with_tokens(config: Config) -> list[Comparison]:
    # All sizes take turns, so that drift of the machine's speed affects them equally.
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
