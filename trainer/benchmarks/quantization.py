"""Benchmarks of the quantizer's time per element, against a bfloat16 copy and torch's own quantizer."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from trainer.benchmarks.report import Comparison, report, time_by_turns
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

DESCRIPTION = "Time to quantize and dequantize activations, against a bfloat16 copy and torch.quantize_per_channel."

Dtype = Literal["fp32", "bf16"]


@dataclass
class Config:
    """Sizes and rounds.

    Attributes:
        json: Write the comparisons to this file.
        dtypes: Dtypes of the tensor.
        bits: Bits per element: 8, 4 or both.
        group: Channels per group.
        tokens: Rows of the tensor.
        hidden_size: Channels of the tensor.
        rounds: Timed calls per side.
        warmup: Untimed calls per side before the timed ones.
        threads: CPU threads; 0 uses every core.
        clock: wall, or cpu for this process's CPU time, which is fair on a shared machine but needs --threads 1.
    """

    json: str | None = None
    dtypes: list[Dtype] = field(default_factory=lambda: ["fp32", "bf16"])
    bits: list[int] = field(default_factory=lambda: [8, 4])
    group: int = 128
    tokens: int = 2048
    hidden_size: int = 2048
    rounds: int = 15
    warmup: int = 2
    threads: int = 0
    clock: Literal["wall", "cpu"] = "wall"

    def __post_init__(self) -> None:
        for name in ("group", "tokens", "hidden_size", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not set(self.bits) <= {8, 4}:
            raise ConfigError(f"bits are {self.bits}: they must be 8 or 4")
        if self.hidden_size % self.group:
            raise ConfigError(
                f"hidden_size is {self.hidden_size}: it must be a multiple of group, {self.group}, because "
                "torch.quantize_per_channel, the peer, needs whole groups"
            )
        if self.clock == "cpu" and self.threads != 1:
            raise ConfigError("clock=cpu adds up the threads' time; use it with --threads 1")


def main(config: Config) -> None:
    """Measure and print the table."""
    from trainer.device import configure_threads, keep_freed_memory

    keep_freed_memory()
    threads = configure_threads(config.threads)
    lines = [line for dtype in config.dtypes for bits in config.bits for line in _against_copy(config, dtype, bits)]
    if "fp32" in config.dtypes and 8 in config.bits:
        lines += _against_torch(config)
    shape = f"{config.tokens} tokens of {config.hidden_size} channels in groups of {config.group}"
    report(f"quantization, {shape}, {threads} threads, {config.clock} time", lines, config.json)


def _against_copy(config: Config, dtype: Dtype, bits: int) -> list[Comparison]:
    """Compare both directions with the copy to or from bfloat16 that storing in bfloat16 would need."""
    import torch

    from kernels.quantization import Noise, dequantize, noise_key, quantize

    x = _random(config, dtype)
    noise = Noise(noise_key(0, 0, "x", 0))
    q = quantize(x, bits=bits, group=config.group, noise=noise)
    back = dequantize(q)
    error = float((back.double() - x.double()).norm() / x.double().norm())
    kept = 8 * q.bytes / x.numel()
    note = f"against a copy to or from bfloat16; {kept:.3f} bits stored per element, relative error {error:.1e}"
    narrow = x.to(torch.bfloat16, copy=True)
    return [
        _compare(
            config,
            f"quantize {dtype}, {bits} bits",
            lambda: quantize(x, bits=bits, group=config.group, noise=noise),
            lambda: x.to(torch.bfloat16, copy=True),
            note,
        ),
        _compare(
            config,
            f"dequantize {dtype}, {bits} bits",
            lambda: dequantize(q),
            lambda: narrow.to(x.dtype, copy=True),
            note,
        ),
    ]


def _against_torch(config: Config) -> list[Comparison]:
    """Compare both directions with torch's quantizer, which rounds to nearest and is given the scales.

    Raises:
        RuntimeError: the results of the two sides differ by more than a quantization step.
    """
    import torch

    from kernels.quantization import dequantize, quantize

    x = _random(config, "fp32")
    groups_MC = x.view(-1, config.group)
    q = quantize(x, bits=8, group=config.group)
    scales_M, lows_M = q.scale.double().flatten(), groups_MC.amin(1).double()
    zeros_M = (-lows_M / scales_M).round().long().clamp(0, 255)

    def peer() -> "Tensor":
        return torch.quantize_per_channel(groups_MC, scales_M, zeros_M, 0, torch.quint8)

    kept = peer()
    apart = (kept.dequantize().view(x.shape) - dequantize(q)).abs().amax() / scales_M.amax()
    if not apart <= 1:
        raise RuntimeError(
            f"our quantizer and torch's differ by {float(apart):.1f} quantization steps, more than 1: they do not "
            "compute the same, so their times cannot be compared"
        )
    note = "round to nearest, against torch.quantize_per_channel with given scales; ours computes its scales as well"
    return [
        _compare(config, "quantize fp32, nearest", lambda: quantize(x, bits=8, group=config.group), peer, note),
        _compare(config, "dequantize fp32, nearest", lambda: dequantize(q), kept.dequantize, note),
    ]


def _random(config: Config, dtype: Dtype) -> "Tensor":
    import torch

    shape = config.tokens, config.hidden_size
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return drawn.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])


def _compare(
    config: Config, case: str, ours: Callable[[], object], peer: Callable[[], object], note: str
) -> Comparison:
    """Compare the median times of both sides in nanoseconds per element, called in turns."""
    clock = time.process_time if config.clock == "cpu" else time.perf_counter
    taken = time_by_turns({"ours": ours, "peer": peer}, config.rounds, config.warmup, clock)
    elements = config.tokens * config.hidden_size
    ours_ns, peer_ns = (1e9 * statistics.median(taken[side]) / elements for side in ("ours", "peer"))
    return Comparison(case, ours_ns, peer_ns, peer_ns / ours_ns, "ns/element", note)
