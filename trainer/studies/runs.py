"""The jobs of a study, each a separate command: finished ones are kept, and a stopped one resumes."""

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from trainer.benchmarks.report import say
from trainer.curves import read_metrics
from trainer.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
# Two-sided 95 % quantiles of Student's t, by degrees of freedom.
_STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

R = TypeVar("R")


@dataclass(frozen=True)
class Job:
    """A run to train.

    Attributes:
        name: What it is called in messages.
        directory: Its run directory, as an absolute path. The log is beside it.
        steps: Optimizer steps.
        seed: Seed of weights, batches and noise.
        options: Options of `spiketrain pretrain` that set it apart.
    """

    name: str
    directory: Path
    steps: int
    seed: int
    options: tuple[str, ...]

    @classmethod
    def of_variant(
        cls, output: str, name: str, values: dict[str, Any], steps: int | None, seed: int, options: tuple[str, ...] = ()
    ) -> "Job":
        """The run of a variant: OUTPUT/NAME-STEPS-steps-seed-SEED. Without `steps` it has the recipe's number."""
        steps = values["train"]["steps"] if steps is None else steps
        return cls(name, Path(output).resolve() / f"{name}-{steps}-steps-seed-{seed}", steps, seed, options)


def check_settings(seeds: Sequence[int], recipe: str, **positive: int) -> None:
    """Check what the configurations of all studies of runs have in common.

    Raises:
        ConfigError: seeds that give no interval, a number that must be positive, or a recipe that does not exist.
    """
    if not 2 <= len(set(seeds)) == len(seeds) <= 10:
        raise ConfigError(f"seeds is {list(seeds)}: an interval takes two to ten different ones")
    for name, value in positive.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}: it must be positive")
    if not Path(recipe).is_file():
        raise ConfigError(f"recipe: {recipe} does not exist; name a configuration of spiketrain pretrain")


def recipe_values(recipe: str) -> dict[str, Any]:
    """All values of a recipe.

    Raises:
        ConfigError: it is not one.
    """
    command = [sys.executable, "launch/pretrain.py", "--config", str(Path(recipe).resolve()), "--print_config"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if shown.returncode:
        raise ConfigError(f"recipe: {shown.stderr.strip().splitlines()[-1]}")
    import yaml

    values: dict[str, Any] = yaml.safe_load(shown.stdout)
    return values


def command(recipe: str, values: dict[str, Any], job: Job) -> list[str]:
    """The command of a run: the recipe with the job's options, in one thread, its warm-up scaled to its length."""
    warmup = round(values["optim"]["warmup_steps"] * job.steps / values["train"]["steps"])
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"),
        *("launch/pretrain.py", "--config", str(Path(recipe).resolve())),
        *("--run.dir", str(job.directory), "--run.threads", "1"),
        *job.options,
        *("--train.steps", str(job.steps), "--train.seed", str(job.seed), "--optim.warmup_steps", str(warmup)),
        *("--checkpoint.every", str(max(job.steps // 4, 1)), "--evaluation.every", str(max(job.steps // 10, 1))),
        *("--evaluation.samples", "0", "--evaluation.compare_compressors", "false"),
    ]


def train_all(recipe: str, values: dict[str, Any], jobs: Sequence[Job], parallel_runs: int) -> None:
    """Train the jobs that are not done, several at a time.

    Raises:
        RuntimeError: a run failed; the message names its log.
    """
    say(f"{len(jobs)} runs, {parallel_runs} at a time")
    # The first run learns the tokenizer and writes the data, which all runs share.
    _train(recipe, values, jobs[0])
    with ThreadPoolExecutor(parallel_runs) as pool:
        for finished in [pool.submit(_train, recipe, values, job) for job in jobs[1:]]:
            finished.result()


def _train(recipe: str, values: dict[str, Any], job: Job) -> None:
    status = job.directory / "status.json"
    if not status.is_file() or json.loads(status.read_text())["state"] != "done":
        say(f"{job.name}, seed {job.seed}: {job.steps} steps")
        run_logged(f"{job.name}, seed {job.seed}", command(recipe, values, job), job.directory)
    say(f"{job.name}, seed {job.seed}: done")


def run_logged(name: str, words: Sequence[str], directory: Path) -> None:
    """Run a job's command, from the repository's root. What it prints goes to a log beside its directory.

    Raises:
        RuntimeError: it failed; the message names the log.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # Not with_suffix, which would take a part of a name such as k2.5 for one.
    log = directory.parent / f"{directory.name}.log"
    with log.open("a") as sink:
        result = subprocess.run(words, cwd=ROOT, stdout=sink, stderr=subprocess.STDOUT)
    if result.returncode:
        raise RuntimeError(f"{name} ended with {result.returncode}: see {log}")


@dataclass(frozen=True)
class Curves:
    """The metrics of a finished run.

    Attributes:
        steps: The lines of its training steps.
        validations: Those of its validations; the last one is of the whole split.
    """

    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]

    @classmethod
    def read(cls, directory: Path) -> "Curves":
        """Read a run directory."""
        return cls(*read_metrics(directory))

    def late(self, name: str) -> float:
        """The mean of a metric over the last fifth of the steps, of those that have it."""
        last = self.steps[-max(len(self.steps) // 5, 1) :]
        values = [line[name] for line in last if name in line] or [line[name] for line in self.steps if name in line][
            -1:
        ]
        return statistics.fmean(values)


def grouped(runs: Sequence[R], name: Callable[[R], str]) -> dict[str, list[R]]:
    """The runs of each variant, in the order of the seeds."""
    found: dict[str, list[R]] = {}
    for one in runs:
        found.setdefault(name(one), []).append(one)
    return found


def changes(own: Sequence[float], peers: Sequence[float]) -> list[float]:
    """The relative change of each figure to the peer's with the same seed."""
    return [ours / other - 1 for ours, other in zip(own, peers, strict=True)]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of Student's 95 % interval, which is NaN for a single value."""
    if len(values) < 2:
        return values[0], math.nan
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), _STUDENT[len(values) - 1] * spread
