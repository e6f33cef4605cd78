"""Tasks with answers that a program can check, to generate rows of. Imports no torch."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.errors import ConfigError
from trainer.posttraining import countdown, queries
from trainer.posttraining.rewards.base import Answer

_GYM = "reasoning_gym:"


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        rows: Yields rows without end, given a source of random numbers: `prompt`, `answer` (the ground truth), a
            `completion` that is right, and one that is `wrong`. Rows of two levels have a `level`, easy or hard.
        check: Name of the reward that checks answers.
        description: What it asks for.
    """

    rows: Callable[[random.Random], Iterator[dict[str, Any]]]
    check: str
    description: str


def _sums(draw: random.Random) -> Iterator[dict[str, Any]]:
    while True:
        total = draw.randint(10, 99)
        first = draw.randint(1, total - 1)
        wrong = total - first + draw.choice((-1, 1, 10))
        yield {
            "prompt": f"{total} =",
            "answer": str(total),
            "completion": f" {first} + {total - first}",
            "wrong": f" {first} + {wrong}",
        }


def _products(draw: random.Random) -> Iterator[dict[str, Any]]:
    while True:
        a, b = draw.randint(2, 12), draw.randint(2, 12)
        yield {
            "prompt": f"{a * b} =",
            "answer": str(a * b),
            "completion": f" {a} * {b}",
            "wrong": f" {a} * {b + 1}",
        }


TASKS = {
    "sums": Task(_sums, f"{__name__}:check_sum", "write a number as a sum of two positive ones: many right answers"),
    "products": Task(_products, f"{__name__}:check_product", "write a number as a product of two from 2 to 12"),
    "countdown": Task(countdown.rows, f"{countdown.__name__}:check", "reach a number from three others; easy and hard"),
    "text_to_sql": Task(queries.rows, "sql", "write a query for a question about a small database; easy and hard"),
}
_SUM = re.compile(r" ?([1-9][0-9]*) \+ ([1-9][0-9]*)")
_PRODUCT = re.compile(r" ?([1-9][0-9]*) \* ([1-9][0-9]*)")


def check_sum(answer: Answer) -> float:
    """1 for two positive numbers whose sum is the ground truth, as in ` 12 + 25`; else 0."""
    found = _SUM.fullmatch(answer.completion)
    return float(found is not None and int(found[1]) + int(found[2]) == int(answer.ground_truth))


def check_product(answer: Answer) -> float:
    """1 for two numbers from 2 to 12 whose product is the ground truth, as in ` 3 * 12`; else 0."""
    found = _PRODUCT.fullmatch(answer.completion)
    if found is None:
        return 0.0
    a, b = int(found[1]), int(found[2])
    return float(2 <= a <= 12 and 2 <= b <= 12 and a * b == int(answer.ground_truth))


def rows(name: str, seed: int, options: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a task, without end or until its data set is exhausted.

    Args:
        name: One of TASKS, or reasoning_gym:NAME for a data set of that package.
        seed: Seed of the rows.
        options: Settings of the data set.

    Raises:
        ConfigError: there is no such task, or it has no such settings.
    """
    if name.startswith(_GYM):
        return _of_gym(name.removeprefix(_GYM), seed, options or {})
    if name not in TASKS:
        raise ConfigError(f"task: there is no {name!r}; choose from {', '.join(TASKS)}, or {_GYM}NAME")
    if options:
        raise ConfigError(f"options: {name} has none; leave them out, or name a task {_GYM}NAME")
    return TASKS[name].rows(random.Random(seed))


def _of_gym(name: str, seed: int, options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ConfigError("task: reasoning-gym is not installed: pip install 'spiketrain[rewards]'") from error
    if name not in DATASETS:
        raise ConfigError(f"task: reasoning-gym has no data set {name!r}; one is basic_arithmetic")
    try:
        data = reasoning_gym.create_dataset(name, seed=seed, size=1 << 20, **options)
    except (TypeError, AssertionError) as error:
        raise ConfigError(f"options: reasoning-gym's {name} does not take {dict(options)} ({error})") from error
    for number in range(len(data)):
        yield dict(data[number])
