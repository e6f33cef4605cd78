"""Study: what converting a trained softmax model to a hybrid, to experts and to spikes costs, at a tenth of its tokens.

For each seed a softmax model is trained, the base. Then the same small budget of tokens, a tenth of the base's, goes
to each of these, and all are evaluated on the test split and on recall:

    more       the base, trained further: what more tokens alone give
    hybrid     half of the layers linear, chosen by damage; aligned, distilled and trained
    fixed      the same with every other layer linear
    hybrid_3   three quarters of the layers linear, chosen by damage
    scratch    the model of `hybrid`, drawn anew and trained
    experts    the base, upcycled and trained
    spiking    the base with spikes and int8 weights, calibrated without training
    all        `hybrid`, upcycled and trained on another tenth, then spiking

Training on a budget goes through three lengths (1, 2 and 4 times the base's), with as many tokens a step throughout, on
the same batches for all. What choosing the layers reads is a part of the budget, so all train on what it leaves.

Every model is a job: a recipe of `spiketrain convert run`, written beside its outputs, which repeats it by hand. Steps
that have ended are skipped, and a stopped one resumes. Tables follow each seed.
"""

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from trainer.benchmarks.report import say
from trainer.cli import fail
from trainer.data.prepare_config import stdlib_config
from trainer.errors import ConfigError
from trainer.json_files import read_object
from trainer.planning.report import table
from trainer.recipe import Record
from trainer.studies.runs import ROOT, changes, check_settings, interval, recipe_values, run_logged

DESCRIPTION = "A softmax model converted to hybrids, experts and spikes at a tenth of its tokens: loss and recall."

MODELS = {
    "base": "base: softmax",
    "more": "base, trained further",
    "hybrid": "1:1, by damage",
    "fixed": "1:1, fixed pattern",
    "hybrid_3": "3:1, by damage",
    "scratch": "1:1, from scratch",
    "experts": "experts",
    "spiking": "spiking, int8",
    "all": "1:1, experts, spiking, int8",
}
LINEAR = "gated_delta_net"
# The budget over the base's tokens, and the part of it that the choice of layers reads for alignment.
BUDGET, _CHOICE = 0.1, 0.1
# The largest loss of a hybrid, over the base's.
MOST_LOSS = 0.02
# Where the parts of training on a budget begin, as in configs/convert/laptop.yaml: alignment comes first, and next
# tokens begin at the base's length.
DISTILL, NEXT_TOKEN, TWICE, FOUR_TIMES = 150 / 800, 400 / 800, 600 / 800, 700 / 800
_TASKS = ("mqar", "needle")
# Measures of recall (trainer.evaluation.recall.measures) with the titles of their tables.
_MEASURES = {"tokens": "share of right tokens", "nats": "nats a token of the answers"}
# Of the base and of what begins anew; of aligned mixers; of models that are trained further; of upcycled experts. The
# third was chosen on seed 0 among 1e-3, 5e-4 and 2e-4: `hybrid` is 3.4, 1.9 and 1.0 % above the base at its length.
_LR, _ALIGN_LR, _FURTHER_LR, _EXPERTS_LR = 3e-3, 3e-3, 2e-4, 3e-4


@dataclass
class Config:
    """Settings of the study. The defaults run the whole experiment.

    Attributes:
        json: Write the figures and the claims to this file.
        output: Directory of the jobs. A rerun continues from its contents.
        recipe: The configuration that all runs share: data, tokenizer, precision, batches and schedule of the base.
        model: The base's model section, with softmax attention in every layer.
        experts: The model.moe section that upcycling takes; its decay is fitted to the length of the run.
        layers: Layers of the base, a multiple of four.
        steps: Optimizer steps of the base.
        seeds: Seeds of weights and batches; two to ten seeds.
        lengths: Lengths of the tasks of recall, in tokens.
        examples: Examples of each task at each length.
        threads: Threads of every command; one runs at a time.
        quick: Two seeds of a few steps. They only show that the command works.
    """

    json: str | None = None
    output: str = "runs/conversion"
    recipe: str = "configs/pretrain/laptop.yaml"
    model: str = "configs/models/laptop-dense.yaml"
    experts: str = "configs/experts/laptop-upcycled.yaml"
    layers: int = 4
    steps: int = 1500
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    lengths: list[int] = field(default_factory=lambda: [128, 256, 512, 1024])
    examples: int = 50
    threads: int = 2
    quick: bool = False

    def __post_init__(self) -> None:
        if self.quick:
            self.steps, self.seeds, self.lengths, self.examples = 50, self.seeds[:2], [128], 2
        check_settings(
            self.seeds, self.recipe, layers=self.layers, steps=self.steps, examples=self.examples, threads=self.threads
        )
        for name in ("model", "experts"):
            if not Path(getattr(self, name)).is_file():
                raise ConfigError(f"{name}: {getattr(self, name)} does not exist; name a YAML file of this section")
        if self.layers % 4:
            raise ConfigError(f"layers is {self.layers}: a quarter of them stays softmax, so give a multiple of four")
        if not self.lengths or min(self.lengths) < 1:
            raise ConfigError(f"lengths is {self.lengths}: give numbers of tokens, each at least 1")


@dataclass(frozen=True)
class Budget:
    """The tokens of a conversion.

    Attributes:
        seq_len: The base's sequence length.
        base: The base's tokens.
        choice: Steps in which the choice of layers aligns.
        steps: Steps of training, of as many tokens.
    """

    seq_len: int
    base: int
    choice: int
    steps: int

    @classmethod
    def of(cls, config: Config, values: Mapping[str, Any]) -> "Budget":
        """Divide the budget.

        Raises:
            ConfigError: it is too small for its parts.
        """
        seq_len = int(values["train"]["seq_len"])
        base = config.steps * int(values["train"]["global_batch_size"]) * seq_len
        # A step has one sequence of the greatest length.
        steps = int(BUDGET * base) // (4 * seq_len)
        choice = max(round(_CHOICE * steps), 1)
        if steps - choice < 8:
            raise ConfigError(f"steps is {config.steps}: a tenth of its tokens is too few to convert; give more steps")
        return cls(seq_len, base, choice, steps - choice)

    @property
    def tokens(self) -> int:
        """Tokens that training reads."""
        return self.steps * 4 * self.seq_len

    def at(self, share: float) -> int:
        """The step at which a part begins."""
        return round(share * self.steps)


class Kind(NamedTuple):
    """What a step is, as far as its duration goes: the name of its output, and how many steps it trains."""

    output: str
    trained: int


class Job(NamedTuple):
    """A model of a seed: the steps that make and evaluate it, in a directory of its own."""

    name: str
    seed: int
    directory: Path
    steps: list[dict[str, Any]]

    def seconds(self) -> dict[Kind, float]:
        """How long each kind of step took, of those that have ended."""
        entries = Record(self.directory).read()
        return {
            kind: entries[output]["seconds"]
            for output, kind in self.kinds().items()
            if entries.get(output, {}).get("state") == "done"
        }

    def kinds(self) -> dict[str, Kind]:
        """What each step is by its output."""
        options = [next(iter(step.values())) for step in self.steps]
        outputs = [values.get("run.dir") or values.get("output") or values["json"] for values in options]
        return {
            output: Kind(Path(output).name, values.get("train.steps", 0))
            for output, values in zip(outputs, options, strict=True)
        }


class Plan:
    """The jobs of the study.

    Args:
        config: The study's settings.
        values: All values of the recipe.
    """

    def __init__(self, config: Config, values: Mapping[str, Any]) -> None:
        if values["phases"] or values["data"]["blend"]:
            raise ConfigError(f"recipe: {config.recipe} has phases or a blend of data; name one without")
        self.config, self.values = config, values
        self.budget = Budget.of(config, values)
        data = values["data"]
        path = stdlib_config(data["cache_dir"], data["vocab_size"]).output if data["path"] == "stdlib" else data["path"]
        self._data = str(ROOT / path)

    def folder(self, name: str, seed: int) -> Path:
        """The directory of a model."""
        return Path(self.config.output).resolve() / f"{self.config.steps}-steps-seed-{seed}" / name

    def jobs(self, seed: int) -> list[Job]:
        """The jobs of a seed. Later ones read what earlier ones have written."""
        builders = {
            "base": self._base,
            "more": self._more,
            "hybrid": lambda seed: self._hybrid("hybrid", seed, self._choice("hybrid", seed, self.config.layers // 2)),
            "fixed": lambda seed: self._hybrid("fixed", seed, []),
            "hybrid_3": lambda seed: self._hybrid(
                "hybrid_3", seed, self._choice("hybrid_3", seed, self.config.layers // 4)
            ),
            "scratch": self._scratch,
            "experts": lambda seed: self._experts("experts", seed, "base"),
            "spiking": lambda seed: self._spiking("spiking", seed, self.folder("base", seed) / "weights"),
            "all": self._all,
        }
        jobs = []
        for name in MODELS:
            steps, trained = builders[name](seed)
            jobs.append(Job(name, seed, self.folder(name, seed), steps + self._evaluations(name, seed, trained)))
        return jobs

    def base_options(self) -> dict[str, Any]:
        """Options of all training steps."""
        return {
            "config": str(Path(self.config.recipe).resolve()),
            "run.threads": self.config.threads,
            "evaluation.samples": 0,
            "evaluation.compare_compressors": False,
        }

    def _base(self, seed: int) -> tuple[list[dict[str, Any]], Path]:
        steps, folder = self.config.steps, self.folder("base", seed)
        warmup = round(self.values["optim"]["warmup_steps"] * steps / self.values["train"]["steps"])
        train = {
            "run.dir": str(folder / "run"),
            "model": str(Path(self.config.model).resolve()),
            "model.num_layers": self.config.layers,
            "train.seed": seed,
            "train.steps": steps,
            "optim.lr": _LR,
            "optim.warmup_steps": warmup,
            **_rarely(steps),
        }
        export = {"checkpoint": str(folder / "run"), "output": str(folder / "weights")}
        return [{"train": train}, {"export": export}], folder / "weights"

    def _more(self, seed: int) -> tuple[list[dict[str, Any]], Path]:
        weights, run = self.folder("base", seed) / "weights", self.folder("more", seed) / "run"
        return [self._train(run, seed, _FURTHER_LR, init=weights)], run

    def _choice(self, name: str, seed: int, keep: int) -> list[dict[str, Any]]:
        folder = self.folder(name, seed)
        choice = {
            "source": str(self.folder("base", seed) / "weights"),
            "data": self._data,
            "keep": keep,
            "linear": LINEAR,
            "seq_len": self.budget.seq_len,
            "align_steps": self.budget.choice,
            "align_batch_size": 4,
            "seed": seed,
            "output": str(folder / "layers.yaml"),
            "json": str(folder / "layers.json"),
        }
        return [{"layers": choice}]

    def _hybrid(self, name: str, seed: int, choice: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Path]:
        """Convert, align, distil and train; the layers are those of a choice, or every other one."""
        folder, base = self.folder(name, seed), self.folder("base", seed) / "weights"
        layers = {"layers_file": str(folder / "layers.yaml")} if choice else {"pattern": f"{LINEAR}, full_attention"}
        hybrid = {"source": str(base), "output": str(folder / "weights"), "seed": seed} | layers
        train = self._train(folder / "run", seed, _ALIGN_LR, init=folder / "weights", teacher=base)
        return [*choice, {"hybrid": hybrid}, train], folder / "run"

    def _scratch(self, seed: int) -> tuple[list[dict[str, Any]], Path]:
        run = self.folder("scratch", seed) / "run"
        model = self.folder("hybrid", seed) / "weights" / "config.json"
        return [self._train(run, seed, _LR, model=model)], run

    def _experts(self, name: str, seed: int, source: str) -> tuple[list[dict[str, Any]], Path]:
        folder = self.folder(name, seed)
        upcycle = {
            "source": str(self.folder(source, seed) / ("weights" if source == "base" else "run")),
            "output": str(folder / "weights"),
            "moe": str(Path(self.config.experts).resolve()),
            # As in configs/convert/laptop.yaml: one expert a token from three eighths of the run on.
            "moe.router.dense_to_sparse.decay_steps": max(self.budget.at(75 / 200), 1),
            "seed": seed,
        }
        return [{"upcycle": upcycle}, self._train(folder / "run", seed, _EXPERTS_LR, init=folder / "weights")], (
            folder / "run"
        )

    def _spiking(self, name: str, seed: int, source: Path) -> tuple[list[dict[str, Any]], Path]:
        output = self.folder(name, seed) / "spiking"
        spike = {"checkpoint": str(source), "data": self._data, "seq_len": self.budget.seq_len, "output": str(output)}
        return [{"spike": spike}], output

    def _all(self, seed: int) -> tuple[list[dict[str, Any]], Path]:
        experts, run = self._experts("all", seed, "hybrid")
        spiking, output = self._spiking("all", seed, run)
        return experts + spiking, output

    def _train(
        self,
        run: Path,
        seed: int,
        lr: float,
        *,
        init: Path | None = None,
        model: Path | None = None,
        teacher: Path | None = None,
    ) -> dict[str, Any]:
        """A training step on the budget; with a teacher it aligns and distils before."""
        budget, seq_len = self.budget, self.budget.seq_len
        phases: list[dict[str, Any]] = []
        options: dict[str, Any] = {"run.dir": str(run)}
        options |= {"init": str(init)} if init is not None else {"model": str(model)}
        if teacher is not None:
            options["train.objective"] = {"name": "align", "teacher": str(teacher)}
            distill = {"train": {"objective": {"name": "distill"}}, "optim": {"lr": _FURTHER_LR}}
            phases.append({"from_step": budget.at(DISTILL)} | distill)
            phases.append({"from_step": budget.at(NEXT_TOKEN), "train": {"objective": {"name": "next_token"}}})
        for share, times in ((TWICE, 2), (FOUR_TIMES, 4)):
            sizes = {"seq_len": times * seq_len, "micro_batch_size": 4 // times, "global_batch_size": 4 // times}
            phases.append({"from_step": budget.at(share), "train": sizes})
        options |= {
            "train.steps": budget.steps,
            # Other batches than the base has read first, the same for all models of a seed.
            "train.seed": 1000 + seed,
            "train.micro_batch_size": 4,
            "train.global_batch_size": 4,
            "optim.lr": lr,
            "optim.schedule": "wsd",
            "optim.warmup_steps": budget.at(1 / 40),
            "optim.decay_fraction": 0.5,
            "phases": phases,
        }
        return {"train": options | _rarely(budget.steps)}

    def _evaluations(self, name: str, seed: int, checkpoint: Path) -> list[dict[str, Any]]:
        folder = self.folder(name, seed)
        common = {"checkpoint": str(checkpoint)}
        steps: list[dict[str, Any]] = []
        for length in self.test_lengths:
            data = {"data": self._data, "split": "test", "seq_len": length, "compare_compressors": False}
            steps.append({"evaluate": common | data | {"json": str(folder / f"test-{length}.json")}})
        recall = {"recall": list(_TASKS), "lengths": self.config.lengths, "examples": self.config.examples}
        # Windows of the longest task; wrong candidates are not scored.
        recall |= {"seq_len": max(self.config.lengths), "batch_size": 2, "candidates": 1}
        return [*steps, {"evaluate": common | recall | {"json": str(folder / "recall.json")}}]

    @property
    def test_lengths(self) -> tuple[int, int]:
        """The lengths at which the test split is evaluated: the base's, and the last one of training."""
        return self.budget.seq_len, 4 * self.budget.seq_len


def _rarely(steps: int) -> dict[str, int]:
    """Checkpoints now and then, and one validation, at the end."""
    return {"checkpoint.every": max(steps // 4, 1), "evaluation.every": steps}


class Figures(NamedTuple):
    """The figures of a model of a seed.

    Attributes:
        loss: Nats a token of the test split by length.
        bits_per_byte: The same in bits per byte.
        recall: Of the answers' tokens after the right ones before them, by task and length: the share that are the most
            likely ones (`tokens`), and their negative log-likelihood (`nats`).
    """

    loss: dict[int, float]
    bits_per_byte: dict[int, float]
    recall: dict[tuple[str, int], dict[str, float]]


def read(plan: Plan, name: str, seed: int) -> Figures:
    """Read the figures of a finished job."""
    folder = plan.folder(name, seed)
    tests = {length: _read(folder / f"test-{length}.json") for length in plan.test_lengths}
    rows = _read(folder / "recall.json")["recall"]
    return Figures(
        {length: values["loss"] for length, values in tests.items()},
        {length: values["bits_per_byte"] for length, values in tests.items()},
        {(row["task"], row["length"]): {name: row[name] for name in _MEASURES} for row in rows},
    )


def _read(path: Path) -> dict[str, Any]:
    return read_object(path, "remove it to evaluate again")


def run_job(plan: Plan, job: Job) -> None:
    """Run or resume a job.

    Raises:
        RuntimeError: a step failed; the message names the log.
    """
    job.directory.mkdir(parents=True, exist_ok=True)
    # YAML reads JSON.
    recipe = {"dir": str(job.directory), "base": plan.base_options(), "steps": job.steps}
    (job.directory / "recipe.yaml").write_text(json.dumps(recipe, indent=1) + "\n")
    words = [sys.executable, "launch/convert.py", "run", "--config", str(job.directory / "recipe.yaml")]
    run_logged(f"{job.name}, seed {job.seed}", words, job.directory)


def remaining(jobs: Sequence[Job]) -> float:
    """Estimate how many seconds the steps that have not ended take, from those that have.

    A step takes as long as those of its kind. Where none has ended, training takes as long a step as any training, and
    everything else as long as the mean of the rest.
    """
    ended: dict[Kind, list[float]] = {}
    left: list[Kind] = []
    for job in jobs:
        taken = job.seconds()
        left += [kind for kind in job.kinds().values() if kind not in taken]
        for kind, seconds in taken.items():
            ended.setdefault(kind, []).append(seconds)

    def expected(kind: Kind) -> float:
        if kind in ended:
            return statistics.fmean(ended[kind])
        alike = [
            (other, seconds)
            for other, each in ended.items()
            for seconds in each
            if bool(other.trained) == bool(kind.trained)
        ]
        units = sum(max(other.trained, 1) for other, _ in alike)
        return max(kind.trained, 1) * sum(seconds for _, seconds in alike) / max(units, 1)

    return sum(map(expected, left))


def run(config: Config) -> None:
    """Run all jobs, seed by seed, and report after each seed."""
    plan = Plan(config, recipe_values(config.recipe))
    jobs = [job for seed in config.seeds for job in plan.jobs(seed)]
    budget = plan.budget
    say(
        f"{len(jobs)} jobs; the base reads {budget.base:,} tokens, the choice of layers {budget.choice} steps and "
        f"training {budget.steps} of {4 * budget.seq_len:,} tokens"
    )
    found: dict[str, list[Figures]] = {name: [] for name in MODELS}
    for number, job in enumerate(jobs, 1):
        say(f"{job.name}, seed {job.seed} ({number} of {len(jobs)})")
        run_job(plan, job)
        found[job.name].append(read(plan, job.name, job.seed))
        left = remaining(jobs)
        taken = sum(job.seconds().values())
        say(f"{job.name}, seed {job.seed}: done in {taken:.0f} s; some {left / 60:.0f} minutes left")
        if len(found["all"]) == len(found["base"]):
            report(plan, found)


class Claim(NamedTuple):
    """A claim about the relative change of the loss between two models of the same seed.

    Attributes:
        words: What is claimed.
        ours: The model.
        peer: What it is compared with.
        most: The largest change for which the claim holds.
    """

    words: str
    ours: str
    peer: str
    most: float

    def judge(self, found: Mapping[str, Sequence[Figures]], length: int) -> dict[str, Any]:
        """Whether the claim holds of the mean over seeds, and whether the interval leaves a doubt."""
        ours, peer = ([one.loss[length] for one in found[name]] for name in (self.ours, self.peer))
        mean, half = interval(changes(ours, peer))
        holds = mean <= self.most
        doubt = math.isnan(half) or abs(mean - self.most) <= half
        return {"claim": self.words, "holds": holds, "change": mean, "half": half, "certain": not doubt}


CLAIMS = (
    Claim(f"1:1 is within {MOST_LOSS:.0%} of the base after a tenth of its tokens", "hybrid", "base", MOST_LOSS),
    Claim(f"3:1 is within {MOST_LOSS:.0%} of the base after a tenth of its tokens", "hybrid_3", "base", MOST_LOSS),
    Claim("converted beats from scratch at equal tokens", "hybrid", "scratch", 0.0),
    Claim("layers chosen by damage beat the fixed pattern at 1:1", "hybrid", "fixed", 0.0),
)


def report(plan: Plan, found: Mapping[str, Sequence[Figures]]) -> None:
    """Print the tables and the claims of the seeds that are complete, and write the JSON file."""
    seeds = plan.config.seeds[: len(found["base"])]
    short = plan.test_lengths[0]
    claims = [claim.judge(found, short) for claim in CLAIMS]
    parts = [f"seeds {', '.join(map(str, seeds))}", losses(plan, found)]
    parts += [recalls(plan, found, measure) for measure in _MEASURES]
    parts += ["\n".join(kept_layers(plan, seed) for seed in seeds), "\n".join(map(_verdict, claims))]
    print("\n\n".join(parts), flush=True)
    if plan.config.json:
        path = Path(plan.config.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_values(plan, seeds, found, claims), indent=1) + "\n")


def losses(plan: Plan, found: Mapping[str, Sequence[Figures]]) -> str:
    """The table of the test split: loss, bits per byte and change to the base, at both lengths."""
    header = ["model", "tokens of training"]
    for length in plan.test_lengths:
        header += [f"nats at {length}", f"bits per byte at {length}", "to the base"]
    rows = []
    for name, own in found.items():
        row = [MODELS[name], _tokens(plan, name)]
        for length in plan.test_lengths:
            values, base = ([one.loss[length] for one in models] for models in (own, found["base"]))
            row += [_figure(values, ".4f"), _figure([one.bits_per_byte[length] for one in own], ".4f")]
            row.append(
                "" if name == "base" else _figure([100 * change for change in changes(values, base)], "+.2f", " %")
            )
        rows.append(row)
    return table(header, rows)


def recalls(plan: Plan, found: Mapping[str, Sequence[Figures]], measure: str) -> str:
    """The table of a measure of recall, by task and length."""
    cells = [(task, length) for task in _TASKS for length in plan.config.lengths]
    rows = [
        [MODELS[name], *(_figure([one.recall[cell][measure] for one in own], ".3f") for cell in cells)]
        for name, own in found.items()
    ]
    return table([_MEASURES[measure], *(f"{task} {length}" for task, length in cells)], rows)


def kept_layers(plan: Plan, seed: int) -> str:
    """The layers that stay softmax attention, counted from 0."""
    kept = {}
    for name in ("hybrid", "hybrid_3"):
        replaced = _read(plan.folder(name, seed) / "layers.json")["replaced"]
        kept[name] = [layer for layer in range(plan.config.layers) if layer not in replaced]
    return f"seed {seed}: 1:1 keeps the layers {kept['hybrid']}, 3:1 {kept['hybrid_3']}"


def _tokens(plan: Plan, name: str) -> str:
    base, more = plan.budget.base, plan.budget.tokens
    further = {"base": 0, "spiking": 0, "all": 2 * more}.get(name, more)
    return f"{more:,}" if name == "scratch" else f"{base:,}" + (f" + {further:,}" if further else "")


def _figure(values: Sequence[float], form: str, unit: str = "") -> str:
    mean, half = interval(values)
    return f"{mean:{form}}" + ("" if math.isnan(half) else f" ± {half:{form.replace('+', '')}}") + unit


def _verdict(claim: Mapping[str, Any]) -> str:
    half = "" if math.isnan(claim["half"]) else f" ± {claim['half']:.2%}"
    doubt = "" if claim["certain"] else ", not certain"
    held = "holds" if claim["holds"] else "does not hold"
    return f"{claim['claim']}: {held}{doubt} ({claim['change']:+.2%}{half})"


def _values(
    plan: Plan, seeds: Sequence[int], found: Mapping[str, Sequence[Figures]], claims: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """All figures by model and seed, as JSON has them."""
    models = {
        name: {
            str(seed): {
                "loss": {str(length): loss for length, loss in one.loss.items()},
                "bits_per_byte": {str(length): bits for length, bits in one.bits_per_byte.items()},
                "recall": [
                    {"task": task, "length": length, **measures} for (task, length), measures in one.recall.items()
                ],
            }
            for seed, one in zip(seeds, own, strict=True)
        }
        for name, own in found.items()
    }
    finite = [claim | {"half": None if math.isnan(claim["half"]) else claim["half"]} for claim in map(dict, claims)]
    return {"seeds": list(seeds), "base_tokens": plan.budget.base, "models": models, "claims": finite}


def main(config: Config) -> None:
    """Run the jobs and print the tables."""
    try:
        run(config)
    except RuntimeError as failed:
        fail(str(failed))
