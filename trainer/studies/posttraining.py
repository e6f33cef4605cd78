"""Study: what papers on diversity and on demonstrations in reinforcement learning claim, with small models.

Two tasks with several right answers to a question, each with easy and hard questions: reaching a number from three
others, and SQL for questions about a generated database. For each task and seed a small model, the initial policy, is
trained from random weights on answers, many of them wrong and few to hard questions. These start from it, and learn
from as many answers each:

    sft           fine-tuning on a demonstration of each question
    grpo          GRPO: rewards alone
    sft_grpo      fine-tuning for half of the answers, then GRPO
    luffy         a demonstration among the answers of each group (LUFFY)
    dph_forward   GRPO with rehearsal of mastered questions (DPH-RL), forward KL
    dph_js        the same with the Jensen-Shannon divergence
    dph_alpha     the same with an alpha-divergence
    hpt           a demonstration in place of the answers where all are wrong (HPT)
    hpt_dph       both: demonstrations, and rehearsal by forward KL
    failed_only   GRPO on questions that the initial policy fails

Each model answers held-out questions as often as pass@k needs. Claims (trainer/studies/posttraining_claims.py) are
judged by the differences between two models of the same seed.

Every model is a job in a directory of its own: recipes of `spiketrain posttrain`, which repeat it by hand, and
figures.json. Finished jobs are kept, and a stopped one resumes. Tables follow each seed.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from trainer.benchmarks.report import say
from trainer.cli import fail
from trainer.data.tokenizer import EOD_PIECE
from trainer.durable import write_atomically
from trainer.errors import ConfigError
from trainer.json_files import read_object
from trainer.posttraining.prepare_rows import PrepareRowsConfig, prepare
from trainer.posttraining.tasks import TASKS, rows
from trainer.studies import forked
from trainer.studies.posttraining_claims import MODELS, Figures, draw, report

DESCRIPTION = "GRPO, DPH-RL, HPT and their rivals on two tasks with several right answers: pass@k over seeds."

_SEQ_LEN, _SAMPLES, _BATCH = 48, 16, 256
# Words with the space before them; count(*) and 'rome' are one each.
_WORD = r" ?[a-z]+\([a-z*]*\)| ?'?[a-z0-9]+'?| ?[<>=]+| ?[^a-z0-9 ]"
# Rows of which the initial policy learns from those that are easy, and some hard ones.
_STREAM = 8000
# Rows to learn from after that.
_ROWS = 400


class Settings(NamedTuple):
    """What sets a task apart.

    Attributes:
        max_new_tokens: Longest answer.
        wrong: Share of wrong answers among those that the initial policy learns from.
        hard: Share of hard questions among them.
        steps: Steps of its training, of 128 answers.
        lr: Learning rate of what starts from it.
    """

    max_new_tokens: int
    wrong: float
    hard: float
    steps: int
    lr: float


# Chosen on seeds that are none of the study's so that the initial policy is neither hopeless nor perfect.
SETTINGS = {
    "countdown": Settings(8, 0.5, 0.05, 300, 5e-4),
    "text_to_sql": Settings(24, 0.5, 0.05, 300, 5e-4),
}


@dataclass
class Config:
    """Settings of the study. The defaults run the whole experiment.

    Attributes:
        json: Write the figures and the claims to this file.
        plot: Draw pass@k into this file.
        output: Directory of the jobs. A rerun continues from its contents.
        tasks: Tasks of trainer.posttraining.tasks that have levels.
        models: Models to train, in this order.
        layers: Layers of the model.
        width: Its width, a multiple of 16.
        steps: Steps of each model after the initial one, of 128 answers.
        base_steps: Steps of the initial policy; null takes the task's.
        prompts: Held-out questions.
        samples: Answers to each of them; pass@k goes to 64 of them, or to all if they are fewer.
        seeds: Seeds of rows, weights and answers; two to ten seeds.
        quick: Two seeds of a few steps. They only show that the command works.
    """

    json: str | None = None
    plot: str | None = None
    output: str = "runs/posttraining"
    tasks: list[str] = field(default_factory=lambda: list(SETTINGS))
    models: list[str] = field(default_factory=lambda: list(MODELS))
    layers: int = 2
    width: int = 64
    steps: int = 32
    base_steps: int | None = None
    prompts: int = 64
    samples: int = 64
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    quick: bool = False

    def __post_init__(self) -> None:
        if self.quick:
            self.steps, self.base_steps, self.prompts, self.samples, self.seeds = 2, 4, 8, 4, self.seeds[:2]
        if not 2 <= len(set(self.seeds)) == len(self.seeds) <= 10:
            raise ConfigError(f"seeds is {self.seeds}: an interval takes two to ten different ones")
        for name in ("layers", "steps", "base_steps", "prompts", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}: it must be positive")
        if self.width < 16 or self.width % 16:
            raise ConfigError(f"width is {self.width}: heads have 16 channels, so give a multiple of 16")
        for name, known in (("tasks", SETTINGS), ("models", MODELS)):
            for value in getattr(self, name):
                if value not in known:
                    raise ConfigError(f"{name}: there is no {value!r}; choose from {', '.join(known)}")
        if self.models[:1] != ["initial"]:
            raise ConfigError("models: the first is initial, from which the others start")


class Job:
    """The models of a task and a seed.

    Args:
        config: The study's settings.
        task: The task.
        seed: The seed.
    """

    def __init__(self, config: Config, task: str, seed: int) -> None:
        self.config, self.task, self.seed, self.settings = config, task, seed, SETTINGS[task]
        self.folder = Path(config.output).resolve() / f"{task}-{config.steps}-steps-seed-{seed}"
        self._rows, self._initial = self.folder / "rows", self.folder / "initial" / "weights"

    def run(self, model: str) -> Figures:
        """Train a model and evaluate it, unless that is done."""
        folder = self.folder / model
        figures = folder / "figures.json"
        if not figures.is_file():
            start = time.perf_counter()
            folder.mkdir(parents=True, exist_ok=True)
            trained = self._train_initial() if model == "initial" else self._train(model, folder)
            checked = (trained, self.folder / "held-out.jsonl", TASKS[self.task].check, self.config.samples)
            forked.call(
                "trainer.studies.posttraining_models:evaluate",
                (*checked, self.settings.max_new_tokens, figures),
                folder / "log",
            )
            say(f"{self.task}, seed {self.seed}, {model}: {time.perf_counter() - start:.0f} s")
        return Figures.of(read_object(figures, "remove it to evaluate again"))

    def _train_initial(self) -> Path:
        """Train the initial policy; returns its weights."""
        folder, settings = self.folder / "initial", self.settings
        if not (folder / "rows.jsonl").is_file():
            self._write_rows(folder)
        drawn = folder / "drawn"
        if not drawn.exists():
            sizes = (self.config.layers, self.config.width, self.seed)
            forked.call(
                "trainer.studies.posttraining_models:draw", (folder / "tokenizer", drawn, *sizes), folder / "log"
            )
        steps = self.config.base_steps or settings.steps
        recipe = self._recipe(folder / "run", steps, 3e-3, folder / "rows.jsonl")
        recipe["optim"] |= {"schedule": "cosine", "min_lr_ratio": 0.1}
        self._posttrain(recipe, drawn, folder)
        return self._export(folder / "run", self._initial, folder)

    def _write_rows(self, folder: Path) -> None:
        """Write the tokenizer and the rows: of the initial policy, to learn from, and held-out ones."""
        config, settings = self.config, self.settings
        paths = prepare(PrepareRowsConfig(self.task, str(self._rows), _ROWS, config.prompts, self.seed))
        held_out = [
            json.loads(line) for path in paths if path.stem == "validation" for line in path.read_text().splitlines()
        ]
        write_lines(self.folder / "held-out.jsonl", held_out)
        chance = random.Random(self.seed)
        known = {row["prompt"] for row in held_out}
        # The stream of the rows above, so that questions are about the same database.
        stream = list(islice(rows(self.task, self.seed), _STREAM))
        texts = [row["prompt"] + row[answer] for row in stream for answer in ("completion", "wrong")]
        write_tokenizer(folder / "tokenizer", texts)
        read = [
            {"prompt": row["prompt"], "completion": row["wrong" if chance.random() < settings.wrong else "completion"]}
            for row in stream[::-1]
            if row["prompt"] not in known and (row["level"] == "easy" or chance.random() < settings.hard)
        ]
        write_lines(folder / "rows.jsonl", read)

    def _train(self, model: str, folder: Path) -> Path:
        """Train a model that starts from the initial policy; returns its run."""
        steps, demonstrations = self.config.steps, self._rows / "demonstrations.jsonl"
        init = self._initial
        if model in ("sft", "sft_grpo"):
            run = folder / "sft"
            count = steps if model == "sft" else steps // 2
            self._posttrain(self._recipe(run, count, self.settings.lr, demonstrations), init, folder)
            if model == "sft":
                return run
            init, steps = self._export(run, folder / "weights", folder), steps - count
        run = folder / "run"
        recipe = self._recipe(run, steps, self.settings.lr, demonstrations)
        recipe |= {
            "stage": "rl",
            "rewards": [{"name": TASKS[self.task].check, "label": "right"}],
            "rl": {
                "objective": "grpo",
                "samples": _SAMPLES,
                "max_new_tokens": self.settings.max_new_tokens,
                "slots": recipe["train"]["global_batch_size"],
            },
            **MODELS[model].options,
        }
        self._posttrain(recipe, init, folder)
        return run

    def _recipe(self, run: Path, steps: int, lr: float, train: Path) -> dict[str, Any]:
        """A recipe of `spiketrain posttrain` for fine-tuning."""
        return {
            "stage": "sft",
            "run": {"dir": str(run), "threads": 1, "device": "cpu"},
            "rows": {"train": [str(train)]},
            "train": {
                "precision": "fp32",
                "steps": steps,
                "seq_len": _SEQ_LEN,
                "micro_batch_size": _BATCH,
                "global_batch_size": _BATCH,
                "seed": self.seed,
            },
            "optim": {"lr": lr, "warmup_steps": min(10, steps - 1)},
            "logging": {"tensorboard": False, "progress": False},
            "checkpoint": {"every": steps, "keep": 1},
        }

    def _posttrain(self, recipe: Mapping[str, Any], init: Path, folder: Path) -> None:
        # YAML reads JSON.
        path = folder / f"{Path(recipe['run']['dir']).name}.yaml"
        path.write_text(json.dumps(recipe, indent=1) + "\n")
        forked.run_script("posttrain", ("--init", str(init), "--config", str(path)), folder / "log")

    def _export(self, run: Path, output: Path, folder: Path) -> Path:
        if not output.exists():
            words = ("export", "--checkpoint", str(run), "--output", str(output))
            forked.run_script("convert", words, folder / "log")
        return output


def write_tokenizer(folder: Path, texts: list[str]) -> None:
    """Write a tokenizer.json with a token for every word of the texts, and a space in front of it."""
    words = sorted({word for text in texts for word in re.findall(_WORD, text)})
    vocabulary = {word: number for number, word in enumerate([EOD_PIECE, *words])}
    special = {"id": 0, "content": EOD_PIECE, "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    values = {
        "version": "1.0",
        "added_tokens": [special | flags],
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": _WORD}, "behavior": "Isolated", "invert": False},
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": EOD_PIECE},
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "tokenizer.json", json.dumps(values).encode())


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Write a file of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def run(config: Config) -> None:
    """Run all jobs, seed by seed, and report after each seed."""
    found: dict[str, dict[str, list[Figures]]] = {task: {name: [] for name in config.models} for task in config.tasks}
    for number, seed in enumerate(config.seeds, 1):
        for task in config.tasks:
            job = Job(config, task, seed)
            for name in config.models:
                found[task][name].append(job.run(name))
        report(found, config.seeds[:number], config.json)
    if config.plot:
        draw(found, Path(config.plot))
        say(f"drawn: {config.plot}")


def main(config: Config) -> None:
    """Run the jobs and print the tables."""
    try:
        run(config)
    except RuntimeError as failed:
        fail(str(failed))
