"""Memory and time of the fused linear head and cross entropy against F.cross_entropy on the full logits."""

import multiprocessing
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.benchmarks.report import Comparison, report, say, time_by_turns
from trainer.cli import ConfigError

DESCRIPTION = "Peak memory and time of linear + cross entropy, fused and on full logits."

Side = Literal["ours", "full logits"]


@dataclass
class Config:
    """Sizes and rounds.

    Attributes:
        json: Write the comparisons to this file.
        tokens: Rows of the hidden states.
        hidden_size: Their width.
        vocab_size: Rows of the head.
        rounds: Timed calls of each side.
        warmup: Untimed calls of each side before.
        threads: CPU threads; 0 takes every core.
    """

    json: str | None = None
    tokens: int = 4096
    hidden_size: int = 512
    vocab_size: int = 152064
    rounds: int = 3
    warmup: int = 1
    threads: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "hidden_size", "vocab_size", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if sys.platform != "linux":
            raise ConfigError("peak memory is read from /proc, which Linux alone has; run this benchmark there")


def main(config: Config) -> None:
    """Measure memory, each side in a process of its own, then time by turns."""
    from trainer.device import configure_threads, keep_freed_memory

    keep_freed_memory()
    threads = configure_threads(config.threads)
    sides: tuple[Side, ...] = ("ours", "full logits")
    peaks = []
    for side in sides:
        say(f"memory of {side}")
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks.append(pool.apply(_peak_memory, (config, side, threads)))
    say("time")
    calls: dict[str, Callable[[], object]] = {side: _call(config, side) for side in sides}
    seconds = {
        side: statistics.median(taken) for side, taken in time_by_turns(calls, config.rounds, config.warmup).items()
    }
    ours, peer = peaks
    shape = f"{config.tokens} tokens, width {config.hidden_size}, vocabulary {config.vocab_size}"
    gradients = (config.tokens + config.vocab_size) * config.hidden_size * 4
    note = (
        f"over the inputs; both gradients, {gradients / 1e6:.0f} MB, are in it; ours is {ours / peer:.3f} of the peer's"
    )
    lines = [
        Comparison("peak memory", ours / 1e6, peer / 1e6, peer / ours, "MB", note),
        Comparison(
            "time", seconds["ours"], seconds["full logits"], seconds["full logits"] / seconds["ours"], "s", shape
        ),
    ]
    report(f"linear + cross entropy, forward and backward, {shape}, float32, {threads} threads", lines, config.json)


def _call(config: Config, side: Side) -> Callable[[], object]:
    import torch
    import torch.nn.functional as F

    from kernels.losses.linear_cross_entropy import linear_cross_entropy

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(config.tokens, config.hidden_size, generator=generator).requires_grad_()
    weight = torch.randn(config.vocab_size, config.hidden_size, generator=generator).mul_(0.02).requires_grad_()
    labels = torch.randint(0, config.vocab_size, (config.tokens,), generator=generator)

    def fused() -> None:
        torch.autograd.grad(linear_cross_entropy(hidden, weight, labels)[0], (hidden, weight))

    def full() -> None:
        loss = F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum")
        torch.autograd.grad(loss, (hidden, weight))

    return fused if side == "ours" else full


def _peak_memory(config: Config, side: Side, threads: int) -> int:
    """Bytes by which a first call raises this process's resident memory, at its highest."""
    import torch

    torch.set_num_threads(threads)
    call = _call(config, side)
    # The libraries' own memory, which a small product makes them take, is no part of the loss.
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    before = _memory("VmRSS")
    call()
    return _memory("VmHWM") - before


def _memory(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {name}")
