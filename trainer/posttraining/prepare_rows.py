"""Files of rows of a generated task."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from models.config.checks import require
from trainer.durable import write_atomically
from trainer.errors import ConfigError
from trainer.json_files import read_object
from trainer.posttraining import tasks

Record = dict[str, Any]
_SETTINGS = "rows.json"


@dataclass
class PrepareRowsConfig:
    """Settings of generated rows.

    Attributes:
        task: sums, products, countdown or text_to_sql, small tasks with several right answers, the last two with easy
            and hard questions; or reasoning_gym:NAME, such as reasoning_gym:basic_arithmetic (needs the extra rewards).
        output: Directory of train.jsonl and validation.jsonl, the rows that reinforcement learning reads, and of
            sft.jsonl and sft-validation.jsonl, the same prompts with right answers, if every row has one. Of tasks
            other than reasoning-gym's also demonstrations.jsonl (rows of train with a demonstration each), and
            preferences.jsonl (pairs of a right and a wrong answer).
        train: Rows to learn from. Those of one prompt are one in train.jsonl and demonstrations.jsonl.
        validation: Held-out rows. No prompt is among both.
        seed: Seed of the rows.
        options: Settings of a data set of reasoning-gym, such as {max_terms: 2} of chain_sum.
    """

    task: str = "sums"
    output: str = "data/rows"
    train: int = 1000
    validation: int = 64
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("train", "validation"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}: it must be positive")
        require(self.seed >= 0, f"seed is {self.seed}: it must not be negative")


def prepare(config: PrepareRowsConfig) -> list[Path]:
    """Write the files, unless they are there already, and return their paths.

    Raises:
        ConfigError: there is no such task, it has too few prompts, or the directory has something else.
    """
    folder = Path(config.output)
    settings = {name: value for name, value in asdict(config).items() if name != "output" and value != {}}
    if folder.exists():
        return _those_of(folder, settings)
    stream = tasks.rows(config.task, config.seed, config.options)
    # A fifth of the prompts is held out, whatever the order in which they come.
    held_out: dict[str, Record] = {}
    train: list[Record] = []
    for count, row in enumerate(stream):
        prompt = _prompt(row)
        if _is_held_out(prompt, config.seed):
            if len(held_out) < config.validation:
                held_out[prompt] = row
        elif len(train) < config.train:
            train.append(row)
        enough = len(train) == config.train and len(held_out) == config.validation
        # Small tasks have fewer different prompts than are asked for.
        if enough or count > 100 * (config.train + config.validation):
            break
    if len(train) < config.train or not held_out:
        raise ConfigError(f"task: {config.task} has only {len(train)} and {len(held_out)} rows; ask for fewer")
    folder.mkdir(parents=True)
    # Reinforcement learning takes every prompt once; fine-tuning learns from several answers to one.
    prompts = list({_prompt(row): row for row in reversed(train)}.values())[::-1]
    files = {"train": map(_question, prompts), "validation": map(_question, held_out.values())}
    if all(isinstance(_completion(row), str) for row in (*train, *held_out.values())):
        files |= {"sft": map(_answered, train), "sft-validation": map(_answered, held_out.values())}
    if "completion" in train[0]:
        files |= {
            "demonstrations": map(_demonstrated, prompts),
            "preferences": map(_compared, train),
        }
    written = [_write(folder / f"{name}.jsonl", rows) for name, rows in files.items()]
    # Last: without it the others do not count.
    write_atomically(folder / _SETTINGS, (json.dumps(settings) + "\n").encode())
    return written


def _those_of(folder: Path, settings: Record) -> list[Path]:
    """The files of an earlier call with the same settings."""
    try:
        known = read_object(folder / _SETTINGS, f"remove {folder}")
    except FileNotFoundError:
        known = {}
    if known != settings:
        raise ConfigError(f"output: {folder} has something else; remove it, or name another directory")
    return sorted(folder.glob("*.jsonl"))


def _prompt(row: Record) -> str:
    return str(row.get("prompt", row.get("question")))


def _completion(row: Record) -> Any:
    """A right answer. The data sets of reasoning-gym have no other text than the answer itself, and some have none."""
    return row.get("completion", row["answer"])


def _question(row: Record) -> Record:
    return {key: value for key, value in row.items() if key not in ("completion", "wrong")}


def _answered(row: Record) -> Record:
    return {"prompt": _prompt(row), "completion": _completion(row)}


def _demonstrated(row: Record) -> Record:
    """In the form of HPT's and LUFFY's data."""
    return {
        "data_source": "task",
        "prompt": row["prompt"],
        "reward_model": {"style": "rule", "ground_truth": row["answer"]},
        "target": [{"role": "assistant", "content": row["completion"]}],
    }


def _compared(row: Record) -> Record:
    return {"prompt": row["prompt"], "chosen": row["completion"], "rejected": row["wrong"]}


def _is_held_out(prompt: str, seed: int) -> bool:
    return zlib.crc32(f"{seed}/{prompt}".encode()) % 5 == 0


def _write(path: Path, rows: Iterable[Record]) -> Path:
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return path
