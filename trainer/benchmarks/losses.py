"""Memory and time of losses fused with the linear head, against torch's functions on full logits.

Cross entropy is compared with F.cross_entropy, the tokens' log-probabilities and entropies with log_softmax, and the
divergence from a teacher with log_softmax and F.kl_div.
"""

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from trainer.benchmarks.report import Comparison, report, say, time_by_turns
from trainer.errors import ConfigError
from trainer.memory import resident_bytes

if TYPE_CHECKING:
    from torch import Tensor

DESCRIPTION = "Peak memory and time of a linear head's losses (see --parts), fused and on full logits."

Part = Literal["cross_entropy", "log_probs", "scoring", "distillation"]
Side = Literal["ours", "full logits"]

_TITLES: dict[Part, str] = {
    "cross_entropy": "linear + cross entropy, forward and backward",
    "log_probs": "linear + log-probabilities and entropies, forward and backward",
    "scoring": "linear + log-probabilities, forward alone",
    "distillation": "linear of student and teacher + divergence, forward and backward",
}
# Required agreement of both sides, ‖a − b‖ / ‖b‖ of every result and gradient, on this many tokens.
_LARGEST_DIFFERENCE = 1e-5
_COMPARED_TOKENS = 256


@dataclass
class Config:
    """Sizes and rounds.

    Attributes:
        json: Write the comparisons to this file.
        parts: Parts to measure. On full logits of 4096 tokens log_probs takes 13 GB or more, and distillation 15 GB.
        tokens: Rows of the hidden states.
        hidden_size: Width of the hidden states.
        teacher_hidden_size: Width of the teacher's hidden states, for distillation.
        vocab_size: Rows of the head.
        rounds: Timed calls of each side.
        warmup: Untimed calls of each side before.
        threads: CPU threads. 0 takes every core.
        clock: wall, or cpu: this process's CPU time, which is fair on a shared machine. cpu needs one thread.
    """

    json: str | None = None
    parts: list[Part] = field(default_factory=lambda: ["cross_entropy"])
    tokens: int = 4096
    hidden_size: int = 512
    teacher_hidden_size: int = 1024
    vocab_size: int = 152064
    rounds: int = 3
    warmup: int = 1
    threads: int = 0
    clock: Literal["wall", "cpu"] = "wall"

    def __post_init__(self) -> None:
        for name in ("tokens", "hidden_size", "teacher_hidden_size", "vocab_size", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.clock == "cpu" and self.threads != 1:
            raise ConfigError("clock=cpu adds up the threads' time; use it with --threads 1")
        if sys.platform != "linux":
            raise ConfigError("peak memory is read from /proc, which Linux alone has; run this benchmark there")


def main(config: Config) -> None:
    """Measure the parts and print the table."""
    from trainer.device import configure_threads, keep_freed_memory

    keep_freed_memory()
    threads = configure_threads(config.threads)
    lines = [line for part in config.parts for line in _measure(config, part, threads)]
    shape = f"{config.tokens} tokens, width {config.hidden_size}, vocabulary {config.vocab_size}"
    report(f"linear head, {shape}, float32, {threads} threads, {config.clock} time", lines, config.json)


def _measure(config: Config, part: Part, threads: int) -> list[Comparison]:
    """Measure memory, each side in its own process, then time, the sides alternating."""
    # Before timing: the figures mean nothing if the sides compute different functions.
    difference = _difference(config, part)
    sides: tuple[Side, ...] = ("ours", "full logits")
    peaks = []
    for side in sides:
        say(f"{part}: memory of {side}")
        # A new process per side: memory that the first side freed would hide the second side's peak.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks.append(pool.apply(_peak_memory, (config, part, side, threads)))
    say(f"{part}: time")
    calls: dict[str, Callable[[], object]] = {side: _call(config, part, side) for side in sides}
    clock = time.process_time if config.clock == "cpu" else time.perf_counter
    taken = time_by_turns(calls, config.rounds, config.warmup, clock)
    seconds = {side: statistics.median(taken[side]) for side in sides}
    ours, peer = peaks
    gradients = 0 if part == "scoring" else (config.tokens + config.vocab_size) * config.hidden_size * 4
    note = (
        f"over the inputs; both gradients, {gradients / 1e6:.0f} MB, are in it; ours is {ours / peer:.3f} of the peer's"
    )
    agreement = f"{_TITLES[part]}; results and gradients agree to {difference:.0e}"
    ratio = seconds["full logits"] / seconds["ours"]
    return [
        Comparison(f"{part}, peak memory", ours / 1e6, peer / 1e6, peer / ours, "MB", note),
        Comparison(f"{part}, time", seconds["ours"], seconds["full logits"], ratio, "s", agreement),
    ]


def _difference(config: Config, part: Part) -> float:
    """Return the largest difference between both sides' results and gradients, on some of the tokens.

    Raises:
        RuntimeError: it is too large, so a comparison of times would mean nothing.
    """
    tokens = min(config.tokens, _COMPARED_TOKENS)
    both = (_call(config, part, side, tokens)() for side in ("ours", "full logits"))
    largest = max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(*both, strict=True))
    # `not <=` also refuses NaN.
    if not largest <= _LARGEST_DIFFERENCE:
        raise RuntimeError(f"{part}: fused and full logits differ by {largest:.0e}")
    return largest


def _call(config: Config, part: Part, side: Side, tokens: int | None = None) -> Callable[[], "list[Tensor]"]:
    """Return a call that computes a side's results and the gradients of their weighted sum, on all or some tokens."""
    import torch

    generator = torch.Generator().manual_seed(0)
    rows = tokens or config.tokens
    hidden = torch.randn(rows, config.hidden_size, generator=generator).requires_grad_()
    weight = torch.randn(config.vocab_size, config.hidden_size, generator=generator).mul_(0.02).requires_grad_()
    labels = torch.randint(0, config.vocab_size, (rows,), generator=generator)
    advantages = torch.randn(rows, generator=generator)
    teacher: list[Tensor] = []
    if part == "distillation":
        width = config.teacher_hidden_size
        teacher = [torch.randn(size, width, generator=generator) for size in (rows, config.vocab_size)]
        teacher[1].mul_(0.02)

    def results() -> "list[Tensor]":
        return (_fused if side == "ours" else _on_full_logits)(part, hidden, weight, labels, teacher)

    def call() -> "list[Tensor]":
        if part == "scoring":
            with torch.no_grad():
                return results()
        found = results()
        # For log_probs: a policy gradient with an entropy bonus.
        loss = (found[0] * advantages).sum() + 0.01 * found[1].sum() if part == "log_probs" else found[0]
        return [*(x.detach() for x in found), *torch.autograd.grad(loss, (hidden, weight))]

    return call


def _fused(part: Part, hidden: "Tensor", weight: "Tensor", labels: "Tensor", teacher: "list[Tensor]") -> "list[Tensor]":
    from kernels.losses.distillation import distillation_kl
    from kernels.losses.linear_cross_entropy import linear_cross_entropy
    from kernels.losses.token_log_probs import token_log_probs

    if part == "cross_entropy":
        return [linear_cross_entropy(hidden, weight, labels)[0]]
    if part == "distillation":
        return [distillation_kl(hidden, weight, *teacher)[0]]
    found = token_log_probs(hidden, weight, labels, entropy=part == "log_probs")
    return [x for x in found if x is not None]


def _on_full_logits(
    part: Part, hidden: "Tensor", weight: "Tensor", labels: "Tensor", teacher: "list[Tensor]"
) -> "list[Tensor]":
    import torch.nn.functional as F

    logits = F.linear(hidden, weight)
    if part == "cross_entropy":
        return [F.cross_entropy(logits, labels, reduction="sum")]
    log_p = logits.log_softmax(-1)
    if part == "distillation":
        return [F.kl_div(log_p, F.linear(*teacher).log_softmax(-1), reduction="sum", log_target=True)]
    log_probs = log_p.gather(1, labels[:, None])[:, 0]
    return [log_probs, -(log_p.exp() * log_p).sum(-1)] if part == "log_probs" else [log_probs]


def _peak_memory(config: Config, part: Part, side: Side, threads: int) -> int:
    """Return the bytes by which a first call raises this process's peak resident memory."""
    import torch

    torch.set_num_threads(threads)
    call = _call(config, part, side)
    # A small product makes the libraries allocate their own memory, which is not part of the loss.
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    before = resident_bytes()
    call()
    return resident_bytes(peak=True) - before
