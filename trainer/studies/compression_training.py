"""Study: final validation loss with compressed activations, against the same runs without compression at equal steps.

All runs use the laptop recipe. A variant is a setting of train.compression: a number of bits, or a YAML file of the
section, such as `spiketrain compression` writes. In the table and the JSON file, `ours` is a variant's validation loss
in nats per token, averaged over seeds, `peer` is that of the runs that keep everything, and `ratio` is peer / ours. The
note states the relative difference, paired by seed, with Student's 95 % interval, and whether it is within half a
percent.

Forward is exact, so all runs with the same seed start with the same loss. Each run is a separate `spiketrain pretrain`
process with one thread. Finished runs are reused, and a stopped run resumes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.benchmarks.report import Comparison, report
from trainer.cli import fail
from trainer.errors import ConfigError
from trainer.studies.runs import Curves, Job, changes, check_settings, grouped, interval, recipe_values, train_all

DESCRIPTION = "Final validation loss with compressed activations against keeping everything, at equal steps."

KEPT = "kept"
# Largest change of the loss, up or down, relative to keeping everything.
MOST_CHANGE = 0.005


@dataclass
class Config:
    """Settings of the study. The defaults run the whole experiment.

    Attributes:
        json: Write the comparisons to this file.
        output: Directory of the runs. A rerun continues from its contents.
        recipe: The configuration that all runs share. It must not compress activations itself.
        steps: Optimizer steps of every run; null takes the recipe's number.
        seeds: Seeds of weights, batches and noise; two to ten seeds.
        variants: Variants to train in addition to keeping everything: bits (4, 8, 16), or YAML files of
            train.compression.
        jobs: Number of concurrent runs, each with one thread.
        quick: Two seeds and one variant of a few steps. They only show that the command works.
    """

    json: str | None = None
    output: str = "runs/compression_training"
    recipe: str = "configs/pretrain/laptop.yaml"
    steps: int | None = None
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    variants: list[str] = field(default_factory=lambda: ["8", "4"])
    jobs: int = 2
    quick: bool = False

    def __post_init__(self) -> None:
        if self.quick:
            self.steps, self.seeds, self.variants = 10, self.seeds[:2], ["8"]
        self.variants = list(dict.fromkeys(name for name in self.variants if name != KEPT))
        check_settings(self.seeds, self.recipe, jobs=self.jobs, steps=1 if self.steps is None else self.steps)
        for name in self.variants:
            if name not in ("4", "8", "16") and not Path(name).is_file():
                raise ConfigError(f"variants has {name!r}: use 4, 8 or 16, or name a YAML file of train.compression")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        variant: Name of the variant.
        seed: Seed of the run.
        loss: Nats per token on the whole validation split after the last step.
    """

    variant: str
    seed: int
    loss: float


def job(config: Config, values: dict[str, Any], variant: str, seed: int) -> Job:
    """Return the job that trains a variant with a seed."""
    name = variant if variant == KEPT else f"{variant}-bits" if variant.isdigit() else Path(variant).stem
    options: tuple[str, ...] = ()
    if variant.isdigit():
        options = ("--train.compression.bits", variant)
    elif variant != KEPT:
        options = ("--train.compression", str(Path(variant).resolve()))
    return Job.of_variant(config.output, name, values, config.steps, seed, options)


def run(config: Config) -> list[Run]:
    """Train the missing runs, several at a time, and read the results of all."""
    values = recipe_values(config.recipe)
    if values["train"]["compression"]["bits"]:
        raise ConfigError(f"recipe: {config.recipe} compresses; name one without train.compression.bits")
    # Order by seed, so that a study that is stopped early has complete seeds.
    jobs = [job(config, values, variant, seed) for seed in config.seeds for variant in (KEPT, *config.variants)]
    train_all(config.recipe, values, jobs, config.jobs)
    losses = (float(Curves.read(finished.directory).validations[-1]["loss"]) for finished in jobs)
    return [Run(finished.name, finished.seed, loss) for finished, loss in zip(jobs, losses, strict=True)]


def comparisons(runs: Sequence[Run]) -> list[Comparison]:
    """Return one line per variant. Each seed is compared with the same seed of the run that keeps everything."""
    losses = {name: [one.loss for one in own] for name, own in grouped(runs, lambda one: one.variant).items()}
    kept = losses[KEPT]
    peer, _ = interval(kept)
    lines = []
    for variant, own in losses.items():
        mean, half = interval(own)
        note = f"{mean:.4f} ± {half:.4f} nats"
        if variant != KEPT:
            change, spread = interval(changes(own, kept))
            held = "within" if abs(change) <= MOST_CHANGE else "beyond"
            note += f"; seed by seed {change:+.3%} ± {spread:.3%}, {held} {MOST_CHANGE:.1%}"
        lines.append(Comparison(f"validation, {variant}", mean, peer, peer / mean, "nats", note))
    return lines


def main(config: Config) -> None:
    """Train all variants and print the table."""
    try:
        runs = run(config)
    except RuntimeError as failed:
        fail(str(failed))
    report("validation loss, compressed (ours) and keeping everything (peer)", comparisons(runs), config.json)
