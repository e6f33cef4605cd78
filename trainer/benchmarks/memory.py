"""What backward keeps of a model under each policy: bytes, peak memory, time of a step and the gradient's error.

The policies are those of train.recompute and train.compression. Bytes are counted by storage, in the saved-tensor hooks
around all blocks. Peak memory is that of a process of its own, above what it had before the step. The gradient's error
is its cosine with the gradient that keeps everything, over all parameters.
"""

import multiprocessing
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import yaml

from models.config import ModelConfig, SpikingConfig
from trainer.benchmarks.report import Comparison, report, say
from trainer.cli import from_mapping
from trainer.config import CompressionConfig, PretrainConfig, TrainConfig
from trainer.errors import ConfigError
from trainer.memory import resident_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from models.decoder import Decoder

DESCRIPTION = "Saved activations by policy: bytes, peak memory, time of a step, error of the gradient."


@dataclass(frozen=True)
class Setting:
    """A policy: train.recompute, train.compression.bits, and whether the model spikes.

    Spikes are those of the preset `all` with counts within ±7, which compression keeps exactly in 4 bits.
    """

    recompute: Literal["none", "selective", "full"] = "none"
    bits: Literal[0, 4, 8, 16] = 0
    spikes: bool = False


POLICIES = {
    "selective": Setting("selective"),
    "full": Setting("full"),
    "16 bits": Setting(bits=16),
    "8 bits": Setting(bits=8),
    "4 bits": Setting(bits=4),
    "8 bits, selective": Setting("selective", 8),
    "8 bits, full": Setting("full", 8),
    "spiking counts": Setting(bits=16, spikes=True),
    "spiking counts, 8 bits": Setting(bits=8, spikes=True),
}


@dataclass
class Config:
    """Models and sizes to measure.

    Attributes:
        json: Write the comparisons to this file.
        models: Model files (YAML).
        precisions: fp32 or bf16, for parameters and activations.
        policies: Policies to measure, each against the same model keeping everything. All by default.
        tokens: Tokens of a micro-batch, one document.
        rounds: Timed steps; the median counts.
        threads: CPU threads.
    """

    json: str | None = None
    models: list[str] = field(
        default_factory=lambda: ["configs/models/laptop.yaml", "configs/models/laptop-dense.yaml"]
    )
    precisions: list[Literal["fp32", "bf16"]] = field(default_factory=lambda: ["fp32", "bf16"])
    policies: list[str] = field(default_factory=lambda: list(POLICIES))
    tokens: int = 1024
    rounds: int = 5
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("tokens", "rounds", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if unknown := [name for name in self.policies if name not in POLICIES]:
            raise ConfigError(f"policies has {', '.join(unknown)}; choose from {', '.join(POLICIES)}")
        if missing := [path for path in self.models if not Path(path).is_file()]:
            raise ConfigError(f"models: {', '.join(missing)} not found; name YAML files of models")
        if sys.platform != "linux":
            raise ConfigError("peak memory is read from /proc, which only Linux has; run this benchmark there")


@dataclass(frozen=True)
class Measured:
    """One policy.

    Attributes:
        kept: Bytes that the blocks keep from forward to backward.
        peak: Rise of the resident memory over a step, bytes.
        seconds: Median time of forward and backward; of one thread, processor time.
        seconds_kept: That of the same model keeping everything, step by step in turn.
        gradient: All gradients, flat, float32.
    """

    kept: int
    peak: int
    seconds: float
    seconds_kept: float
    gradient: "Tensor"


def main(config: Config) -> None:
    """Measure every policy in a process of its own, and print the table."""
    lines: list[Comparison] = []
    for path in config.models:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        model = from_mapping(PretrainConfig, {"model": values}).model
        for precision in config.precisions:
            kept: dict[bool, Measured] = {}
            for name in config.policies:
                spikes = POLICIES[name].spikes
                if spikes not in kept:
                    say(f"{path} {precision}: everything kept{', spiking' if spikes else ''}")
                    kept[spikes] = _in_process(config, model, precision, Setting(spikes=spikes))
                say(f"{path} {precision}: {name}")
                found = _in_process(config, model, precision, POLICIES[name])
                lines += _compare(f"{Path(path).stem} {precision}, {name}", found, kept[spikes])
    report(f"a step of {config.tokens} tokens; the peer keeps everything", lines, config.json)


def _compare(case: str, found: Measured, whole: Measured) -> list[Comparison]:
    # In float64: a float32 sum over millions of elements is off in the third digit.
    ours, all_kept = found.gradient.double(), whole.gradient.double()
    cosine = float(ours @ all_kept / (ours.norm() * all_kept.norm()))
    note = f"{1 - found.kept / whole.kept:.1%} fewer bytes kept; cosine of the gradients {cosine:.6f}"
    figures = {
        "kept": (found.kept / 1e6, whole.kept / 1e6, "MB"),
        "peak": (found.peak / 1e6, whole.peak / 1e6, "MB"),
        "step": (found.seconds, found.seconds_kept, "s"),
    }
    return [
        Comparison(
            f"{case}: {what}", value, peer, peer / value, unit, note if what == "kept" else f"{value / peer:.0%}"
        )
        for what, (value, peer, unit) in figures.items()
    ]


def _in_process(config: Config, model: ModelConfig, precision: str, setting: Setting) -> Measured:
    # A new process for each, because a process's peak memory never falls.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        train = TrainConfig(recompute=setting.recompute, compression=CompressionConfig(setting.bits))
        if setting.spikes:
            model = replace(model, spiking=SpikingConfig(layers=["all"], count_range=[-7, 7]))
        return pool.apply(_measure, (config, PretrainConfig(model=model, train=train), precision))


def _measure(config: Config, run: PretrainConfig, precision: str) -> Measured:
    import torch

    from models.decoder import build, initialize
    from models.saved_activations import Policy
    from trainer.compression import block_policy
    from trainer.device import keep_freed_memory

    # As in a run.
    keep_freed_memory()
    torch.set_num_threads(config.threads)
    decoder = build(run.model, 512, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    initialize(decoder, 0)
    decoder.keep(Policy(block_policy(run)))
    tokens = torch.randint(0, 512, (1, config.tokens), generator=torch.Generator().manual_seed(0))
    # A short step first: libraries allocate memory of their own, which is not the policy's.
    _step(decoder, tokens[:, :64])
    before = resident_bytes()
    kept = _step(decoder, tokens)
    peak = resident_bytes(peak=True) - before
    gradient = torch.cat([p.grad.flatten().float() for p in decoder.parameters() if p.grad is not None])
    # Other processes of a shared machine do not count; of several threads there is only the wall clock.
    clock = time.process_time if config.threads == 1 else time.perf_counter
    policies = {"seconds": Policy(block_policy(run)), "seconds_kept": Policy()}
    seconds: dict[str, list[float]] = {name: [] for name in policies}
    for _ in range(config.rounds):
        for name, policy in policies.items():
            decoder.keep(policy)
            start = clock()
            _step(decoder, tokens)
            seconds[name].append(clock() - start)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    return Measured(kept, peak, gradient=gradient, **medians)


def _step(decoder: "Decoder", tokens: "Tensor") -> int:
    """Forward and backward of a mean next-token loss. Return the bytes that the blocks keep in between."""
    import torch

    from models.parallel import vocabulary_loss

    decoder.zero_grad()
    positions = torch.arange(tokens.shape[1])[None]
    sizes = {parameter.untyped_storage().data_ptr(): 0 for parameter in decoder.parameters()}

    def count(x: "Tensor") -> "Tensor":
        sizes.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        hidden = decoder.hidden_states(tokens, positions)
    kept = sum(sizes.values())
    mask = torch.ones(tokens.shape)
    total, _ = vocabulary_loss(hidden, decoder.head_weight, tokens, mask, decoder.groups)
    (total / tokens.numel()).backward()
    return kept
