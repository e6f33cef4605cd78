"""Benchmarks of the fused spike against eager torch, and of event-driven products against dense ones."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from trainer.benchmarks.report import Comparison, report, time_by_turns
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

DESCRIPTION = "Time of the spike, forward and backward, fused and in eager torch; of event-driven and dense products."

Dtype = Literal["fp32", "bf16"]

# (gradient, range of counts, k). "learned" is one number, "per channel" one number per channel.
_CASES: dict[str, tuple[Literal["plain", "clipped", "surrogate"], tuple[int, int] | None, str]] = {
    "plain, fixed k": ("plain", None, "fixed"),
    "clipped, learned k": ("clipped", (-15, 15), "learned"),
    "surrogate, k per channel": ("surrogate", (-15, 15), "per channel"),
}
# Limit of ‖a − b‖ / ‖b‖ for every result and gradient. The two sides sum the mean in different orders, so a count may
# differ by one where x / V is within rounding of a half. That is rare.
_LARGEST_DIFFERENCE = {"fp32": 1e-3, "bf16": 1e-2}


@dataclass
class Config:
    """Sizes and rounds.

    Attributes:
        json: Write the comparisons to this file.
        dtypes: Dtypes of the spike's inputs.
        tokens: Rows of the spike's inputs.
        hidden_size: Channels of the spike, and inputs and outputs of the product.
        product_tokens: Numbers of rows of the products. Each is compared at every sparsity.
        sparsities: Shares of silent channels in the products' inputs.
        rounds: Timed calls per side.
        warmup: Untimed calls per side before the timed ones.
        threads: CPU threads; 0 uses every core.
        clock: wall, or cpu for this process's CPU time, which is fair on a shared machine but needs --threads 1.
    """

    json: str | None = None
    dtypes: list[Dtype] = field(default_factory=lambda: ["fp32", "bf16"])
    tokens: int = 4096
    hidden_size: int = 2048
    product_tokens: list[int] = field(default_factory=lambda: [1, 8, 64])
    sparsities: list[float] = field(default_factory=lambda: [0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
    rounds: int = 15
    warmup: int = 2
    threads: int = 0
    clock: Literal["wall", "cpu"] = "wall"

    def __post_init__(self) -> None:
        for name in ("tokens", "hidden_size", "rounds", *(("product_tokens",) if self.product_tokens else ())):
            value = getattr(self, name)
            if min(value) < 1 if isinstance(value, list) else value < 1:
                raise ConfigError(f"{name} is {value}: it must be at least 1")
        if not all(0 <= sparsity <= 1 for sparsity in self.sparsities):
            raise ConfigError(f"sparsities are {self.sparsities}: they must be from 0 to 1")
        if self.clock == "cpu" and self.threads != 1:
            raise ConfigError("clock=cpu adds up the threads' time; use it with --threads 1")


def main(config: Config) -> None:
    """Measure and print the table."""
    from trainer.device import configure_threads, keep_freed_memory

    keep_freed_memory()
    threads = configure_threads(config.threads)
    lines = [_spike(config, case, dtype) for dtype in config.dtypes for case in _CASES]
    for tokens in config.product_tokens:
        lines += _products(config, tokens)
    shape = f"{config.tokens} tokens of {config.hidden_size} channels"
    report(f"spikes, {shape}, {threads} threads, {config.clock} time", lines, config.json)


def _median_times(config: Config, ours: Callable[[], object], peer: Callable[[], object]) -> tuple[float, float]:
    """Return the median milliseconds of both sides, called in turns."""
    clock = time.process_time if config.clock == "cpu" else time.perf_counter
    taken = time_by_turns({"ours": ours, "peer": peer}, config.rounds, config.warmup, clock)
    return 1e3 * statistics.median(taken["ours"]), 1e3 * statistics.median(taken["peer"])


def _spike(config: Config, case: str, dtype: Dtype) -> Comparison:
    """Compare forward and backward of one case.

    Raises:
        RuntimeError: the results of the two sides differ too much.
    """
    import torch

    from kernels.spiking import spike

    gradient, count_range, kind = _CASES[case]
    generator = torch.Generator().manual_seed(0)
    shape = config.tokens, config.hidden_size
    x, grad = (
        torch.randn(shape, generator=generator).to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
        for _ in range(2)
    )
    x.requires_grad_()
    k: float | torch.Tensor = 3.0
    if kind != "fixed":
        k = torch.full((config.hidden_size,) if kind == "per channel" else (), 3.0, requires_grad=True)
    leaves = [x, k] if isinstance(k, torch.Tensor) else [x]

    def call(function: Callable[..., "Tensor"]) -> "list[Tensor]":
        out = function(x, k=k, count_range=count_range, gradient=gradient)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    pairs = zip(call(spike), call(_eager), strict=True)
    difference = max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)
    if not difference <= _LARGEST_DIFFERENCE[dtype]:
        raise RuntimeError(f"{case}, {dtype}: fused and eager differ by {difference:.0e}")
    ours, peer = _median_times(config, lambda: call(spike), lambda: call(_eager))
    note = f"forward and backward, against eager torch; results and gradients agree to {difference:.0e}"
    return Comparison(f"spike {dtype}, {case}", ours, peer, peer / ours, "ms", note)


def _eager(x: "Tensor", *, k: "float | Tensor", count_range: tuple[int, int] | None, gradient: str) -> "Tensor":
    """The spike in plain torch, with only the operations that the case needs."""
    import torch

    wide = x.float()
    thresholds = (wide.detach().abs().mean(-1, keepdim=True) / k).clamp(1e-5, 1e4)
    with torch.no_grad():
        ratio = wide / thresholds
        rounded = ratio.round()
        counts = rounded if count_range is None else rounded.clamp(*count_range)
        factor = (rounded == counts).float() if gradient != "plain" else None
        if factor is not None and gradient == "surrogate":
            factor = 4 * (ratio - counts).abs() * factor
    through = wide - wide.detach()
    return (counts * thresholds + (through if factor is None else through * factor)).to(x.dtype)


def _products(config: Config, tokens: int) -> list[Comparison]:
    """Compare event-driven and dense products at each sparsity. The note states where the event-driven ones win."""
    import torch
    import torch.nn.functional as F

    from kernels.spiking import event_linear

    generator = torch.Generator().manual_seed(0)
    size = config.hidden_size
    weight_OD = torch.randn(size, size, generator=generator)
    weight_DO = weight_OD.T.contiguous()
    found: list[tuple[float, float, float]] = []
    for sparsity in sorted(config.sparsities):
        counts = torch.randint(1, 8, (tokens, size), generator=generator).to(torch.int8)
        counts[torch.rand(tokens, size, generator=generator) < sparsity] = 0
        dense = counts.float()

        def events(counts: "Tensor" = counts) -> "Tensor":
            return event_linear(counts, weight_DO)

        def whole(dense: "Tensor" = dense) -> "Tensor":
            return F.linear(dense, weight_OD)

        torch.testing.assert_close(events(), whole(), rtol=1e-4, atol=1e-2)
        found.append((sparsity, *_median_times(config, events, whole)))
    # A win counts only if dense was not faster at any higher sparsity.
    lost = [sparsity for sparsity, ours, peer in found if ours >= peer]
    wins = [sparsity for sparsity, _, _ in found if sparsity > max(lost, default=-1.0)]
    where = f"event-driven is faster from {wins[0]:.0%} silent on" if wins else "dense is always faster"
    note = f"event-driven against dense, fp32; of the sparsities measured, {where}"
    return [
        Comparison(f"{tokens} x {size} x {size}, {sparsity:.0%} silent", ours, peer, peer / ours, "ms", note)
        for sparsity, ours, peer in found
    ]
