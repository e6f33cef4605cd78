"""The settings of `spiketrain evaluate`. Imports no torch, so that invalid ones are refused at once."""

import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from models.config import SpikingConfig
from models.config.checks import require
from trainer.errors import ConfigError
from trainer.evaluation.data import is_indexed, text_files
from trainer.evaluation.harness_run import check_tasks
from trainer.evaluation.recall.tasks import TASKS
from trainer.posttraining.config import RowsConfig
from trainer.posttraining.data.rows import read_rows
from trainer.posttraining.rewards.registry import RewardConfig
from trainer.posttraining.rewards.registry import check as check_rewards

# Options that only one kind of evaluation has.
_KINDS = {
    "by_position": "data",
    "spiking": "data",
    "depth": "recall",
    "haystack": "recall",
    "task_dir": "tasks",
    "fewshot": "tasks",
}


@dataclass
class AnswersConfig:
    """How prompts are answered.

    Attributes:
        samples: Answers to each prompt; the largest k.
        temperature: Of the answers.
        max_new_tokens: Longest answer.
        prompts: Number of prompts, the first of each file; 0 takes all.
        right: An answer is right if its reward is at least this.
        slots: Answers that are continued at once.
        output: Write all answers to this file as lines of JSON, and take from it those that it has.
    """

    samples: int = 16
    temperature: float = 1.0
    max_new_tokens: int = 256
    prompts: int = 0
    right: float = 1.0
    slots: int = 64
    output: str | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", "slots"):
            value = getattr(self, name)
            require(value > 0, f"pass_at_k.{name} is {value}: it must be positive")
        for name in ("temperature", "prompts"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"pass_at_k.{name} is {value}: it must be 0 or a positive number")
        if self.output is not None and not Path(self.output).absolute().parent.is_dir():
            raise ConfigError(f"pass_at_k.output: the directory of {self.output} does not exist; make it first")


@dataclass
class EvaluateConfig:
    """Settings of an evaluation: of data, unless tasks or rows are named.

    Attributes:
        checkpoint: A run directory (its newest complete checkpoint), one checkpoint, weights, a Hugging Face directory,
            or a GGUF file.
        data: A directory made by spiketrain prepare_data, the prefix of a Megatron .bin/.idx pair, or a text file or
            glob of UTF-8 files, one document per file.
        split: Split of a prepared directory.
        seq_len: Tokens in a window, and the most of a text of the harness; null takes the run's train.seq_len, for
            weights its default.
        stride: New tokens in each window, the rest being context; null takes seq_len (no overlap).
        batch_size: Windows computed at a time.
        compare_compressors: Also print the bits per byte of gzip -9 and xz -9 on the same text.
        by_position: Also print loss and bits per byte by position in the context (docs/evaluation.md).
        recall: Tasks of recall to evaluate instead of data: needle, needle_keys, needle_values, needle_queries, mqar,
            mqar_text, variables, common_words, frequent_words (docs/evaluation.md).
        lengths: Lengths of their examples, in tokens.
        examples: Examples of each task; null takes 50 of recall at each length, and all of a task of the harness.
        candidates: Answers among which the right one is ranked, itself included.
        depth: Where a needle is hidden, the first one of several, from 0, the beginning, to 1; null spreads the
            examples over all depths.
        haystack: A text file to hide them in; null draws sentences.
        rows: Rows with prompts to answer instead of data, in rows.validation, as in post-training
            (docs/evaluation.md).
        rewards: What an answer is worth, as in post-training.
        pass_at_k: How the prompts are answered.
        seed: Seed of the examples, and of what tasks and answers draw.
        tasks: Tasks of the lm-eval harness to evaluate instead of data, as in 'one,two' (docs/evaluation.md).
        task_dir: A directory with YAML files of tasks.
        fewshot: Solved examples in front of each example; null takes the task's own number.
        tokenizer: Use this tokenizer instead of the checkpoint's.
        device: cpu or cuda; auto takes CUDA if available.
        json: Write the figures to this file.
        spiking: Compare the model with spikes to the same weights without: loss, sparsity and energy, by layer
            (docs/spiking.md). The figures of the model are then those with spikes.
        neurons: Neurons to evaluate in place of the checkpoint's; a checkpoint without takes those of the report.
        raster: Draw spikes of the first windows into this file, .png or .svg.
    """

    checkpoint: str = "runs/laptop"
    data: str = "data/stdlib-bpe4096"
    split: Literal["train", "validation", "test"] = "validation"
    seq_len: int | None = None
    stride: int | None = None
    batch_size: int = 8
    compare_compressors: bool = True
    by_position: bool = False
    recall: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=lambda: [512, 1024])
    examples: int | None = None
    candidates: int = 4
    depth: float | None = None
    haystack: str | None = None
    rows: RowsConfig = field(default_factory=RowsConfig)
    rewards: list[RewardConfig] = field(default_factory=list)
    pass_at_k: AnswersConfig = field(default_factory=AnswersConfig)
    seed: int = 1234
    tasks: str = ""
    task_dir: str | None = None
    fewshot: int | None = None
    tokenizer: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    json: str | None = None
    spiking: bool = False
    neurons: SpikingConfig = field(default_factory=SpikingConfig)
    raster: str | None = None

    def __post_init__(self) -> None:
        if not Path(self.checkpoint).exists():
            raise ConfigError(f"checkpoint: {self.checkpoint} does not exist; give a run directory")
        for name in ("seq_len", "stride", "batch_size", "examples", "candidates"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}: it must be at least 1")
        if self.json is not None and not Path(self.json).absolute().parent.is_dir():
            raise ConfigError(f"json: the directory of {self.json} does not exist; make it first")
        self._check_spiking()
        self._check_kind()
        if self.recall:
            self._check_recall()
        elif self.rows.validation:
            self._check_rows()
        elif self.tasks:
            check_tasks(self.tasks, self.task_dir)
        else:
            self._check_data()

    def _check_spiking(self) -> None:
        if self.raster is not None and Path(self.raster).suffix not in (".png", ".svg"):
            raise ConfigError(f"raster: {self.raster} must end in .png or .svg")
        if not self.spiking and (self.raster is not None or self.neurons != SpikingConfig()):
            raise ConfigError("raster and neurons need an evaluation with spikes; add --spiking true")

    def _check_kind(self) -> None:
        """Refuse options of another kind of evaluation."""
        named = {"recall": self.recall, "tasks": self.tasks, "rows": self.rows.validation}
        kinds = [kind for kind, value in named.items() if value]
        if len(kinds) > 1:
            raise ConfigError(f"{' and '.join(kinds)} are two evaluations; leave one of them out")
        kind = kinds[0] if kinds else "data"
        if kind != "rows":
            for name, default in (("rows", RowsConfig()), ("rewards", []), ("pass_at_k", AnswersConfig())):
                if getattr(self, name) != default:
                    raise ConfigError(f"{name} needs prompts to answer; name files of rows in rows.validation")
        for name, own in _KINDS.items():
            if getattr(self, name) not in (None, False) and kind != own:
                raise ConfigError(f"{name} is of an evaluation of {own}, and this is one of {kind}; leave it out")
        if self.fewshot is not None and self.fewshot < 0:
            raise ConfigError(f"fewshot is {self.fewshot}: it must not be negative")

    def _check_rows(self) -> None:
        if self.rows.train or self.rows.weights:
            raise ConfigError("rows.train is of training; name the files to evaluate in rows.validation")
        read_rows(self.rows.validation, self.rows.options)
        check_rewards(self.rewards)

    def _check_recall(self) -> None:
        for name in self.recall:
            if name not in TASKS:
                near = difflib.get_close_matches(name, TASKS, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(TASKS)}"
                raise ConfigError(f"recall: there is no task {name!r}; {hint}")
        if not self.lengths or min(self.lengths) < 1:
            raise ConfigError(f"lengths is {self.lengths}: give numbers of tokens, each at least 1")
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ConfigError(f"depth is {self.depth}: it must be from 0, the beginning, to 1, the end")
        if self.haystack is not None and not Path(self.haystack).is_file():
            raise ConfigError(f"haystack: {self.haystack} is not a file; name a text file")

    def _check_data(self) -> None:
        if is_indexed(self.data):
            return
        files = text_files(self.data)
        if not files:
            raise ConfigError(
                f"data: {self.data} is neither prepared data, nor a .bin/.idx prefix, nor an existing file"
            )
        if not any(path.stat().st_size for path in files):
            raise ConfigError(f"data: {self.data} holds no text; name files that are not empty")
