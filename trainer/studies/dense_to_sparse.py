"""Study: does a gate that starts dense and becomes sparse train a better model than top-k? On the laptop recipe.

Every gate ends with `top_k` experts per token. Every run costs the same training FLOPs (flops_per_token of
models.decoder, with each step's experts), so a dense start costs steps. All schedules are fractions of a run's length.

In the table and the JSON file, `ours` is a gate's validation loss in bits per byte, averaged over seeds. `peer` is that
of top-k, and `ratio` the peer's over ours: above 1 if the gate is better.

Each run is a separate spiketrain pretrain. Finished runs are reused, and a stopped one resumes.
"""

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from models.config import DenseToSparseConfig, ModelConfig, RouterConfig
from trainer.benchmarks.report import Comparison, report, say
from trainer.cli import fail, from_mapping
from trainer.curves import read_metrics, smooth
from trainer.errors import ConfigError

DESCRIPTION = "Dense-to-sparse gates against top-k at equal active parameters and equal training FLOPs."
ROOT = Path(__file__).resolve().parents[2]

# By gate: the activation before its softmax, or None for top-k from the start.
GATES: dict[str, Literal["none", "tanh"] | None] = {"top-k": None, "linear": "none", "tanh": "tanh"}
# Fractions of a run: first all experts, then fewer and fewer, and after both top-k.
_PLATEAU, _DECAY = 0.1, 0.3
# Metrics that the table reports for the last fifth of a run.
_LATE = {
    "experts_per_token": "experts a token",
    "load_cv": "variation of the load",
    "max_load": "largest load over the mean",
    "dead_experts": "experts without a token",
}
# Two-sided 95 % quantiles of Student's t, by degrees of freedom.
_STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass
class Config:
    """Sizes. The defaults are the whole experiment.

    Attributes:
        json: Write the comparisons to this file.
        plot: Draw validation loss, experts per token and the variation of the load into this file.
        output: Directory of the runs. A rerun continues from its contents.
        recipe: The configuration that all runs share.
        steps: Optimizer steps of the top-k runs. The other runs take as many as cost the same.
        top_k: Experts per token at the end of every run.
        seeds: Seeds of weights, batches and noise. Two to ten.
        parallel_runs: Number of concurrent runs, each with one thread.
        quick: Two seeds of a few steps. They only show that the command works.
    """

    json: str | None = None
    plot: str | None = None
    output: str = "runs/dense_to_sparse"
    recipe: str = "configs/pretrain/laptop.yaml"
    steps: int = 800
    top_k: int = 2
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    parallel_runs: int = 2
    quick: bool = False

    def __post_init__(self) -> None:
        if self.quick:
            self.steps, self.seeds = 10, self.seeds[:2]
        if not 2 <= len(set(self.seeds)) == len(self.seeds) <= 10:
            raise ConfigError(f"seeds is {self.seeds}: an interval takes two to ten different ones")
        for name in ("steps", "top_k", "parallel_runs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be positive")
        if not Path(self.recipe).is_file():
            raise ConfigError(f"recipe: {self.recipe} does not exist; name a configuration of spiketrain pretrain")


class Cost(NamedTuple):
    """FLOPs of a training token: without routed experts, and per routed expert."""

    base: float
    expert: float

    def of(self, experts_per_token: float) -> float:
        """Return the FLOPs of a token that activates this many experts."""
        return self.base + experts_per_token * self.expert


class Run(NamedTuple):
    """A finished run: its steps, the cumulative FLOPs at each, and its validations."""

    gate: str
    seed: int
    steps: list[dict[str, Any]]
    flops: list[float]
    validations: list[dict[str, Any]]

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the whole validation split after the last step."""
        return float(self.validations[-1]["bits_per_byte"])

    def late(self, name: str) -> float:
        """Return the mean of a metric over the last fifth of the steps."""
        return statistics.fmean(line[name] for line in self.steps[-max(len(self.steps) // 5, 1) :])


def schedule(steps: int) -> DenseToSparseConfig:
    """Return the gate's schedule for a run. Without a threshold a token keeps exactly the step's number of experts."""
    return DenseToSparseConfig(
        gumbel_noise=True,
        threshold=0.0,
        plateau_steps=round(_PLATEAU * steps),
        decay_steps=max(round(_DECAY * steps), 1),
    )


def steps_within(budget: float, cost: Cost, experts: int, top_k: int) -> int:
    """Return the most steps of a dense-to-sparse run within the FLOPs budget. A step counts as a single token."""

    def total(steps: int) -> float:
        gate = schedule(steps)
        return sum(cost.of(gate.max_experts(step, experts, top_k)) for step in range(steps))

    steps = int(budget / cost.of(top_k))
    # A dense start costs more than top-k throughout, so the first estimate is an upper bound.
    while steps > 1 and total(steps) > budget:
        steps -= 1
    return steps


def _recipe(config: Config) -> dict[str, Any]:
    """Return all values of the recipe."""
    command = [sys.executable, "launch/pretrain.py", "--config", str(Path(config.recipe).resolve()), "--print_config"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if shown.returncode:
        raise ConfigError(f"recipe: {shown.stderr.strip().splitlines()[-1]}")
    import yaml

    values: dict[str, Any] = yaml.safe_load(shown.stdout)
    if values["model"]["moe"]["num_experts"] <= config.top_k:
        raise ConfigError(f"recipe: {config.recipe} must have more than top_k={config.top_k} experts a layer")
    return values


def _cost(values: dict[str, Any]) -> Cost:
    from models.decoder import flops_per_token, shapes

    model = shapes(from_mapping(ModelConfig, values["model"]), values["data"]["vocab_size"])
    base, one = (flops_per_token(model, values["train"]["seq_len"], experts) for experts in (0.0, 1.0))
    return Cost(base, one - base)


def _command(config: Config, values: dict[str, Any], gate: str, seed: int, steps: int) -> list[str]:
    # Pass every key, because an omitted one would keep the recipe's value.
    router = RouterConfig(top_k=config.top_k, normalize="after")
    if activation := GATES[gate]:
        sparse = replace(schedule(steps), activation=activation)
        router = replace(router, gate="dense_to_sparse", dense_to_sparse=sparse)
    warmup = round(values["optim"]["warmup_steps"] * steps / values["train"]["steps"])
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"),
        *("launch/pretrain.py", "--config", str(Path(config.recipe).resolve())),
        *("--run.dir", str(_directory(config, gate, seed)), "--run.threads", "1"),
        *("--model.moe.router", json.dumps(asdict(router))),
        *("--train.steps", str(steps), "--train.seed", str(seed), "--optim.warmup_steps", str(warmup)),
        *("--checkpoint.every", str(max(steps // 4, 1)), "--evaluation.every", str(max(steps // 10, 1))),
        *("--evaluation.samples", "0", "--evaluation.compare_compressors", "false"),
    ]


def _directory(config: Config, gate: str, seed: int) -> Path:
    return Path(config.output).resolve() / f"{gate}-{config.steps}-steps-seed-{seed}"


def _train(config: Config, values: dict[str, Any], gate: str, seed: int, steps: int) -> None:
    """Train, unless that run is done. A failed run ends the study and names its log."""
    directory = _directory(config, gate, seed)
    status = directory / "status.json"
    if not status.is_file() or json.loads(status.read_text())["state"] != "done":
        say(f"{gate}, seed {seed}: {steps} steps")
        directory.mkdir(parents=True, exist_ok=True)
        log = directory.with_suffix(".log")
        with log.open("a") as sink:
            command = _command(config, values, gate, seed, steps)
            result = subprocess.run(command, cwd=ROOT, stdout=sink, stderr=subprocess.STDOUT)
        if result.returncode:
            raise RuntimeError(f"{gate}, seed {seed} ended with {result.returncode}: see {log}")
    say(f"{gate}, seed {seed}: done")


def _read(config: Config, values: dict[str, Any], cost: Cost, gate: str, seed: int) -> Run:
    steps, validations = read_metrics(_directory(config, gate, seed))
    tokens = values["train"]["global_batch_size"] * values["train"]["seq_len"]
    flops, total = [], 0.0
    for line in steps:
        total += tokens * cost.of(line["moe/experts_per_token"])
        flops.append(total)
    return Run(gate, seed, steps, flops, validations)


def run(config: Config) -> list[Run]:
    """Train the missing runs, several at a time, and read all runs."""
    values = _recipe(config)
    cost, experts = _cost(values), values["model"]["moe"]["num_experts"]
    sparse = steps_within(config.steps * cost.of(config.top_k), cost, experts, config.top_k)
    jobs = [(gate, seed, config.steps if GATES[gate] is None else sparse) for seed in config.seeds for gate in GATES]
    say(f"{len(jobs)} runs of {config.steps} (top-k) and {sparse} steps, {config.parallel_runs} at a time")
    # The first run learns the tokenizer and writes the data, which all runs share.
    _train(config, values, *jobs[0])
    with ThreadPoolExecutor(config.parallel_runs) as pool:
        for finished in [pool.submit(_train, config, values, *job) for job in jobs[1:]]:
            finished.result()
    return [_read(config, values, cost, gate, seed) for gate, seed, _ in jobs]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean, and half the width of Student's 95 % interval."""
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), _STUDENT[len(values) - 1] * spread


def comparisons(runs: Sequence[Run]) -> list[Comparison]:
    """Return a line per gate, with each seed compared with the same seed of top-k."""

    def of(gate: str) -> list[Run]:
        return [run for run in runs if run.gate == gate]

    peers = of("top-k")
    peer, _ = interval([run.bits_per_byte for run in peers])
    lines = []
    for gate in GATES:
        mean, half = interval([run.bits_per_byte for run in of(gate)])
        note = f"{mean:.4f} ± {half:.4f} bits per byte; "
        if GATES[gate] is not None:
            pairs = zip(of(gate), peers, strict=True)
            difference, half = interval([ours.bits_per_byte - other.bits_per_byte for ours, other in pairs])
            note += f"less top-k's, seed by seed, {difference:+.4f} ± {half:.4f}; "
        late = {name: statistics.fmean(run.late(f"moe/{name}") for run in of(gate)) for name in _LATE}
        note += f"{len(of(gate)[0].steps)} steps, {of(gate)[0].flops[-1] / 1e12:.2f} TFLOP; in the last fifth "
        note += ", ".join(f"{words} {late[name]:.3f}" for name, words in _LATE.items())
        lines.append(Comparison(f"validation, {gate}", mean, peer, peer / mean, "bits/byte", note))
    return lines


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw validation loss, experts per token and variation of the load against FLOPs."""
    try:
        import matplotlib
    except ImportError as missing:
        raise ConfigError("matplotlib is not installed; pip install 'spiketrain[dev]'") from missing
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4), constrained_layout=True)
    colors = dict(zip(GATES, ("tab:gray", "tab:orange", "tab:blue"), strict=True))
    for run in runs:
        style: dict[str, Any] = {"color": colors[run.gate], "alpha": 0.8, "linewidth": 1.2}
        label = run.gate if run.seed == runs[0].seed else None
        teraflops = [flops / 1e12 for flops in run.flops]
        points = [(teraflops[line["step"] - 1], line["bits_per_byte"]) for line in run.validations]
        left.plot(*zip(*points, strict=True), marker="o", markersize=2.5, label=label, **style)
        for axes, name in ((middle, "experts_per_token"), (right, "load_cv")):
            axes.plot(teraflops, smooth([line[f"moe/{name}"] for line in run.steps]), label=label, **style)
    # Starting near 4 bits per byte, the curves' beginnings would flatten their ends.
    ends = [line["bits_per_byte"] for run in runs for line in run.validations[len(run.validations) // 4 :]]
    left.set_ylim(min(ends) - 0.02, max(ends) + 0.02)
    titles = ("validation, bits per byte", "experts per token", "variation of the load over experts")
    for axes, title in zip((left, middle, right), titles, strict=True):
        axes.set_title(title)
        axes.set_xlabel("training, TFLOP (a line for each seed)")
        axes.grid(alpha=0.2)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    say(f"drawn: {path}")


def main(config: Config) -> None:
    """Train, print the table and draw."""
    try:
        runs = run(config)
    except RuntimeError as failed:
        fail(str(failed))
    report("validation loss of each gate (ours) and of top-k (peer)", comparisons(runs), config.json)
    if config.plot:
        draw(runs, Path(config.plot))
