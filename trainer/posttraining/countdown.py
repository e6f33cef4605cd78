"""The task of reaching a number from three others: several right answers, of two levels. Imports no torch."""

from __future__ import annotations

import itertools
import operator
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from trainer.posttraining.rewards.base import Answer

_LARGEST_NUMBER, _LARGEST_TARGET = 9, 40
_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_EXPRESSION = re.compile(r" ?(\d{1,3}) ([-+*]) (\d{1,3}) ([-+*]) (\d{1,3})")

Expression = tuple[int, str, int, str, int]


def value(expression: Expression) -> int:
    """Value of `a op b op c`; products come first."""
    a, first, b, second, c = expression
    if second == "*" and first != "*":
        return int(_OPERATORS[first](a, b * c))
    return int(_OPERATORS[second](_OPERATORS[first](a, b), c))


def expressions(numbers: Sequence[int], operators: str) -> dict[int, list[Expression]]:
    """All expressions of three numbers, each used once, by their values."""
    found: dict[int, list[Expression]] = {}
    for a, b, c in sorted(set(itertools.permutations(numbers))):
        for first, second in itertools.product(operators, repeat=2):
            expression = (a, first, b, second, c)
            found.setdefault(value(expression), []).append(expression)
    return found


def rows(draw: random.Random) -> Iterator[dict[str, Any]]:
    """Rows without end. Of `level` easy are those that sums and differences solve; hard ones need a product."""
    while True:
        numbers = [draw.randint(1, _LARGEST_NUMBER) for _ in range(3)]
        sums, everything = expressions(numbers, "+-"), expressions(numbers, "+-*")
        is_easy = draw.random() < 0.5
        targets = [target for target in everything if 0 < target <= _LARGEST_TARGET and (target in sums) == is_easy]
        if not targets:
            continue
        target = draw.choice(sorted(targets))
        other = draw.choice(sorted(set(everything) - {target}))
        yield {
            "prompt": f"{' '.join(map(str, numbers))} make {target}:",
            "answer": str(target),
            "completion": _text(draw.choice(everything[target])),
            "wrong": _text(draw.choice(everything[other])),
            "level": "easy" if is_easy else "hard",
        }


def _text(expression: Expression) -> str:
    return "".join(f" {part}" for part in expression)


def check(answer: Answer) -> float:
    """1 for an expression of the prompt's three numbers, each used once, with the ground truth's value; else 0."""
    found = _EXPRESSION.fullmatch(answer.completion)
    if found is None:
        return 0.0
    a, first, b, second, c = found.groups()
    numbers = [int(part) for part in answer.prompt.split(" make ")[0].split()]
    if sorted(numbers) != sorted((int(a), int(b), int(c))):
        return 0.0
    return float(value((int(a), first, int(b), second, int(c))) == int(answer.ground_truth))
