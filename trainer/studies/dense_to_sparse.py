"""Study: does a gate that starts dense and becomes sparse train a better model than top-k? On the laptop recipe.

Every gate ends with `top_k` experts per token. Every run costs the same training FLOPs (flops_per_token of
models.decoder, with each step's experts), so a dense start costs steps. All schedules are fractions of a run's length.

In the table and the JSON file, `ours` is a gate's validation loss in bits per byte, averaged over seeds. `peer` is that
of top-k, and `ratio` the peer's over ours: above 1 if the gate is better.

Each run is a separate spiketrain pretrain. Finished runs are reused, and a stopped one resumes.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from models.config import DenseToSparseConfig, ModelConfig, RouterConfig
from trainer.benchmarks.report import Comparison, report, say
from trainer.cli import fail, from_mapping
from trainer.curves import smooth
from trainer.errors import ConfigError
from trainer.figures import pyplot, save
from trainer.studies.runs import Curves, Job, check_settings, interval, recipe_values, train_all

DESCRIPTION = "Dense-to-sparse gates against top-k at equal active parameters and equal training FLOPs."

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
        check_settings(self.seeds, self.recipe, steps=self.steps, top_k=self.top_k, parallel_runs=self.parallel_runs)


class Cost(NamedTuple):
    """FLOPs of a training token: without routed experts, and per routed expert."""

    base: float
    expert: float

    def of(self, experts_per_token: float) -> float:
        """Return the FLOPs of a token that activates this many experts."""
        return self.base + experts_per_token * self.expert


class Run(NamedTuple):
    """A finished run: its curves, and the cumulative FLOPs at each step."""

    gate: str
    seed: int
    curves: Curves
    flops: list[float]

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the whole validation split after the last step."""
        return float(self.curves.validations[-1]["bits_per_byte"])


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
    values = recipe_values(config.recipe)
    if values["model"]["moe"]["num_experts"] <= config.top_k:
        raise ConfigError(f"recipe: {config.recipe} must have more than top_k={config.top_k} experts a layer")
    return values


def _cost(values: dict[str, Any]) -> Cost:
    from models.decoder import flops_per_token, shapes

    model = shapes(from_mapping(ModelConfig, values["model"]), values["data"]["vocab_size"])
    base, one = (flops_per_token(model, values["train"]["seq_len"], experts) for experts in (0.0, 1.0))
    return Cost(base, one - base)


def job(config: Config, gate: str, seed: int, steps: int) -> Job:
    """Return the run of a gate and a seed."""
    # Pass every key, because an omitted one would keep the recipe's value.
    router = RouterConfig(top_k=config.top_k, normalize="after")
    if activation := GATES[gate]:
        sparse = replace(schedule(steps), activation=activation)
        router = replace(router, gate="dense_to_sparse", dense_to_sparse=sparse)
    directory = Path(config.output).resolve() / f"{gate}-{config.steps}-steps-seed-{seed}"
    return Job(gate, directory, steps, seed, ("--model.moe.router", json.dumps(asdict(router))))


def read(values: dict[str, Any], cost: Cost, finished: Job) -> Run:
    """Read a finished run."""
    curves = Curves.read(finished.directory)
    tokens = values["train"]["global_batch_size"] * values["train"]["seq_len"]
    flops, total = [], 0.0
    for line in curves.steps:
        total += tokens * cost.of(line["moe/experts_per_token"])
        flops.append(total)
    return Run(finished.name, finished.seed, curves, flops)


def run(config: Config) -> list[Run]:
    """Train the missing runs, several at a time, and read all runs."""
    values = _recipe(config)
    cost, experts = _cost(values), values["model"]["moe"]["num_experts"]
    sparse = steps_within(config.steps * cost.of(config.top_k), cost, experts, config.top_k)
    jobs = [
        job(config, gate, seed, config.steps if GATES[gate] is None else sparse)
        for seed in config.seeds
        for gate in GATES
    ]
    say(f"top-k takes {config.steps} steps, dense-to-sparse as many FLOPs in {sparse}")
    train_all(config.recipe, values, jobs, config.parallel_runs)
    return [read(values, cost, finished) for finished in jobs]


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
        late = {name: statistics.fmean(run.curves.late(f"moe/{name}") for run in of(gate)) for name in _LATE}
        note += f"{len(of(gate)[0].curves.steps)} steps, {of(gate)[0].flops[-1] / 1e12:.2f} TFLOP; in the last fifth "
        note += ", ".join(f"{words} {late[name]:.3f}" for name, words in _LATE.items())
        lines.append(Comparison(f"validation, {gate}", mean, peer, peer / mean, "bits/byte", note))
    return lines


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw validation loss, experts per token and variation of the load against FLOPs."""
    figure, (left, middle, right) = pyplot().subplots(1, 3, figsize=(14, 4), constrained_layout=True)
    colors = dict(zip(GATES, ("tab:gray", "tab:orange", "tab:blue"), strict=True))
    for run in runs:
        style: dict[str, Any] = {"color": colors[run.gate], "alpha": 0.8, "linewidth": 1.2}
        label = run.gate if run.seed == runs[0].seed else None
        teraflops = [flops / 1e12 for flops in run.flops]
        points = [(teraflops[line["step"] - 1], line["bits_per_byte"]) for line in run.curves.validations]
        left.plot(*zip(*points, strict=True), marker="o", markersize=2.5, label=label, **style)
        for axes, name in ((middle, "experts_per_token"), (right, "load_cv")):
            axes.plot(teraflops, smooth([line[f"moe/{name}"] for line in run.curves.steps]), label=label, **style)
    # Starting near 4 bits per byte, the curves' beginnings would flatten their ends.
    ends = [
        line["bits_per_byte"] for run in runs for line in run.curves.validations[len(run.curves.validations) // 4 :]
    ]
    left.set_ylim(min(ends) - 0.02, max(ends) + 0.02)
    titles = ("validation, bits per byte", "experts per token", "variation of the load over experts")
    for axes, title in zip((left, middle, right), titles, strict=True):
        axes.set_title(title)
        axes.set_xlabel("training, TFLOP (a line for each seed)")
        axes.grid(alpha=0.2)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)
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
