"""Evaluates a checkpoint on tasks of recall. Imports torch only when it computes."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.data.text import read_utf8
from trainer.errors import ConfigError
from trainer.evaluation.recall.examples import Writer
from trainer.evaluation.recall.haystack import Haystack
from trainer.evaluation.recall.setting import Setting
from trainer.evaluation.recall.tasks import example

if TYPE_CHECKING:
    from trainer.evaluation.config import EvaluateConfig
    from trainer.stored.inference import LoadedModel

_EXAMPLES = 50


def evaluate_recall(config: "EvaluateConfig") -> dict[str, Any]:
    """Have the model answer every task at every length, print tables, and return the figures as plain values."""
    haystack = _open_haystack(config.haystack)
    from trainer.device import choose_device, keep_freed_memory
    from trainer.evaluation.loading import load_scorer
    from trainer.evaluation.recall.measures import measure, summary

    keep_freed_memory()
    loaded, scorer = load_scorer(config, choose_device(config.device))
    writer = None if loaded.tokenizer is None else Writer(loaded.tokenizer)
    setting = Setting(_text_ids(loaded), writer, haystack, config.candidates, config.depth)
    count = config.examples or _EXAMPLES
    # All tasks before any computation: a length may be too short for one.
    for task in config.recall:
        example(task, setting, config.seed, 0, min(config.lengths))
    rows = []
    for task in config.recall:
        for length in config.lengths:
            examples = [example(task, setting, config.seed, number, length) for number in range(count)]
            outcomes = measure(scorer, examples, f"{task} {length}")
            mean_length = sum(len(each.tokens) for each in examples) / count
            found = summary(outcomes) | {"mean_length": mean_length}
            rows.append({"task": task, "length": length, **found, "outcomes": [asdict(each) for each in outcomes]})
    _print_tables(rows, config)
    return {"checkpoint": str(loaded.path), "seed": config.seed, "haystack": config.haystack, "recall": rows}


def _open_haystack(path: str | None) -> Haystack:
    if path is None:
        return Haystack()
    text = read_utf8("haystack", Path(path))
    if not text.split():
        raise ConfigError(f"haystack: {path} holds no words; name another text")
    return Haystack(text)


def _text_ids(loaded: "LoadedModel") -> list[int]:
    """The token ids that stand for text; without a tokenizer all but the end-of-document token."""
    if loaded.tokenizer is None:
        eod_id = loaded.settings["data"]["eod_id"]
        return [token for token in range(loaded.model.vocab_size) if token != eod_id]
    return [token for token, size in enumerate(loaded.tokenizer.token_bytes().tolist()) if size]


def _print_tables(rows: Sequence[dict[str, Any]], config: "EvaluateConfig") -> None:
    """Print a table, task by length, for each measure."""
    from rich.console import Console
    from rich.table import Table

    titles = {"exact": "answers that greedy decoding gives, with 95 % intervals"}
    titles["tokens"] = "tokens of answers that are the most likely ones after the right tokens before them"
    if config.candidates > 1:
        guess = 1 / max(row["candidates"] for row in rows)
        titles["first"] = f"answers more likely than all wrong candidates (guessing: {guess:.2f}), with 95 % intervals"
    # rich assumes 80 columns for files and pipes.
    console = Console(width=None if sys.stdout.isatty() else 140)
    for measure, title in titles.items():
        table = Table("task")
        for length in config.lengths:
            table.add_column(f"{length:,} tokens", justify="right")
        for task in config.recall:
            own = [row for row in rows if row["task"] == task]
            table.add_row(task, *(_cell(row, measure) for row in own))
        print(title)
        console.print(table)


def _cell(row: dict[str, Any], measure: str) -> str:
    interval = row.get(f"{measure}_interval")
    return f"{row[measure]:.2f}" + ("" if interval is None else f" ({interval[0]:.2f}-{interval[1]:.2f})")
