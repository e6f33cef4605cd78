"""Evaluates a checkpoint on tasks of the lm-eval harness. Imports neither torch nor lm_eval before it computes."""

import difflib
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.evaluation.config import EvaluateConfig

# What of the harness's results goes into the file.
_KEPT = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")
# Larger numbers are written with an exponent.
_LARGEST = 1e6
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


def check_tasks(tasks: str, task_dir: str | None) -> None:
    """Check what can be checked without the harness.

    Raises:
        ConfigError: the harness is not installed, a name is of no task, or the directory has no tasks.
    """
    names = names_in(tasks)
    if not names:
        raise ConfigError("tasks names none; give names separated by commas, as in --tasks 'one,two'")
    found = find_spec("lm_eval")
    if found is None:
        raise ConfigError("tasks needs the lm-eval harness; pip install 'spiketrain[evaluate]'")
    if task_dir is not None and not Path(task_dir).is_dir():
        raise ConfigError(f"task_dir: {task_dir} does not exist; name a directory with YAML files of tasks")
    local = set() if task_dir is None else local_names(Path(task_dir))
    if task_dir is not None and not local:
        raise ConfigError(f"task_dir: {task_dir} holds no YAML file with a task; name another directory")
    others = set(names) - local
    # Whether a name occurs in any of the harness's 14,000 files takes a second, reading them as YAML twenty.
    for folder in found.submodule_search_locations or () if others else ():
        for path in Path(folder, "tasks").rglob("*.yaml"):
            text = path.read_text(encoding="utf-8", errors="replace")
            others = {name for name in others if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text)}
    for name in names:
        if name in others:
            near = difflib.get_close_matches(name, local, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "name one of --task_dir, or of the lm-eval harness"
            raise ConfigError(f"tasks: there is no task {name!r}; {hint}")


def names_in(tasks: str) -> list[str]:
    """The names in a list that is separated by commas."""
    return [name.strip() for name in tasks.split(",") if name.strip()]


class _Loader(yaml.SafeLoader):
    """Reads the harness's files without running the functions that they name."""


_Loader.add_multi_constructor("!", lambda *_: None)


def local_names(directory: Path) -> set[str]:
    """Names of the tasks, groups and tags that the YAML files in a directory define."""
    found: set[str] = set()
    for path in sorted(directory.rglob("*.yaml")):
        try:
            values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"task_dir: {path} is not a YAML file that can be read ({error})") from error
        if isinstance(values, dict):
            tags = values.get("tag") or []
            own = [values.get("group") or values.get("task"), *([tags] if isinstance(tags, str) else tags)]
            found |= {name for name in own if isinstance(name, str)}
    return found


def evaluate_tasks(config: "EvaluateConfig") -> dict[str, Any]:
    """Have the harness evaluate the model, print a table, and return its figures as plain values."""
    # Before the first import of these libraries, which read it once. The user may set it to 0.
    for variable in _OFFLINE:
        os.environ.setdefault(variable, "1")
    from lm_eval.evaluator import evaluate

    from trainer.device import choose_device, keep_freed_memory
    from trainer.evaluation.harness import HarnessModel
    from trainer.evaluation.loading import load_scorer

    keep_freed_memory()
    opened = open_tasks(names_in(config.tasks), config.task_dir)
    _set_solved_examples(opened["tasks"].values(), config.fewshot, config.seed)
    loaded, scorer = load_scorer(config, choose_device(config.device))
    max_length = config.seq_len or loaded.settings["train"]["seq_len"]
    model = HarnessModel(scorer, loaded.require_tokenizer(), max_length, config.batch_size, config.seed)
    # Not simple_evaluate, which also reads all files of the harness, lists all installed packages, and asks git.
    results = evaluate(model, opened, limit=config.examples, log_samples=False)
    assert results is not None, "this is the only rank"
    _print_table(results)
    plain = {name: results[name] for name in _KEPT if name in results}
    # What is no plain value, such as a metric's function, is written by its name.
    return {"checkpoint": str(loaded.path), "tasks": json.loads(json.dumps(plain, default=str))}


def _set_solved_examples(tasks: Iterable[Any], count: int | None, seed: int) -> None:
    """Have tasks put `count` solved examples in front of each example, except those that are never to have any.

    None leaves each task its own number.
    """
    for task in tasks:
        own = task.get_config("num_fewshot")
        if own != 0:
            task.set_config("num_fewshot", (own or 0) if count is None else count)
        task.set_fewshot_seed(seed)


def _print_table(results: dict[str, Any]) -> None:
    """Print a line for each metric of each task.

    The harness has such a table too, whose headings are lost with some versions of the library that draws it, and which
    fails at numbers above some 1e60, as perplexities may be.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "metric", "filter")
    for title in ("value", "± standard error", "examples", "solved examples"):
        table.add_column(title, justify="right")
    for task, row in results["results"].items():
        counted = results["n-samples"].get(task, {}).get("effective", "")
        for key, value in row.items():
            metric, _, chosen = key.partition(",")
            if chosen and not metric.endswith("_stderr"):
                error = _number(row.get(f"{metric}_stderr,{chosen}"))
                cells = (row.get("alias", task), metric, chosen, _number(value), error)
                table.add_row(*cells, str(counted), str(results["n-shot"].get(task, "")))
    # rich assumes 80 columns for files and pipes.
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _number(value: Any) -> str:
    """A figure in a table; a standard error that is not known is left out."""
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < _LARGEST else f"{value:.4g}"
    return "" if value in (None, "N/A") else str(value)


def open_tasks(names: Sequence[str], task_dir: str | None) -> dict[str, Any]:
    """Open tasks with their data, as the harness takes them: tasks, groups, and what is in these, by name.

    Args:
        names: Names of tasks, groups or tags, in the directory or of the harness.
        task_dir: A directory with YAML files; None for none.

    Raises:
        ConfigError: there is no such task, its data are not on this machine, or it is not valid.
    """
    from lm_eval.tasks import TaskManager

    # The harness brings some 14,000 files, whose reading takes twenty seconds.
    is_local = task_dir is not None and set(names) <= local_names(Path(task_dir))
    manager = TaskManager(include_path=task_dir, include_defaults=not is_local)
    opened: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        for part, found in _open(manager, name).items():
            opened[part] |= found
    return opened


def _open(manager: Any, name: str) -> dict[str, Any]:
    if name not in manager.task_index:
        near = difflib.get_close_matches(name, manager.all_tasks, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "name one of --task_dir, or of the lm-eval harness"
        raise ConfigError(f"tasks: there is no task {name!r}; {hint}")
    try:
        return manager.load([name])
    except Exception as error:  # each kind of data, and each task's own code, raises its own
        raise ConfigError(f"tasks: {name} {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Why a task could not be opened, and what to do."""
    if isinstance(error, ConnectionError) or "Offline" in f"{type(error).__name__} {error}":
        return (
            f"wants data from the network, which is off ({error}); write a task that reads files, or set "
            "HF_HUB_OFFLINE=0 and HF_DATASETS_OFFLINE=0"
        )
    return f"cannot be opened ({type(error).__name__}: {error}); mend its file, or name another task"
