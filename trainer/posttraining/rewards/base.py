"""What rewards take and give. Imports nothing beyond the standard library."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# Kinds of failure, as counters and Score.error name them.
ERRORS = {
    "timeout": "scoring, or the code that was scored, took longer than its limit",
    "memory": "it needed more memory than its limit",
    "limit": "it wrote or returned more than its limit: output, files, rows",
    "crash": "its process ended before it had told a result",
    "refused": "it tried what is forbidden: writing, a socket, a process, another database",
    "exception": "the reward raised an exception",
    "value": "the reward returned no finite number",
    "truth": "the ground truth itself is broken: mend the data",
}
IN_WORKER = False
"""Whether this process is a worker of workers.RewardPool, which is killed if it takes too long."""

# Numbers of a reward beside its value, characters of their names, and characters of a text.
MOST_PARTS, MOST_CHARACTERS, MOST_TEXT = 64, 100, 1 << 13


@dataclass(frozen=True)
class Answer:
    """A completion with what it is judged by. Everything but `finished` must be what JSON can hold.

    Attributes:
        prompt: The prompt as text.
        completion: What the model wrote.
        data_source: Name of the data set, by which some rewards choose what to do.
        ground_truth: The right answer: a text, a number, or a structure of them.
        extra: Further columns of the row.
        finished: Whether the model ended the completion itself, rather than the limit of its length.
    """

    prompt: str
    completion: str
    data_source: str = ""
    ground_truth: Any = None
    extra: dict[str, Any] = field(default_factory=dict)
    finished: bool = True


@dataclass(frozen=True)
class Score:
    """What an answer is worth.

    Attributes:
        value: The reward; 0 if it could not be computed.
        parts: Numbers that explain it, by name.
        error: None, or why it is as it is, one of ERRORS.
        text: What an environment says.
    """

    value: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    text: str = ""


Reward = Callable[[Answer], float | Mapping[str, Any]]
"""Scores one answer: a number, or a mapping with the number as "score" and others that explain it."""


class ScoringError(Exception):
    """An answer cannot be scored, or is worth nothing for a reason worth counting.

    Args:
        kind: One of ERRORS.
        message: What happened.
    """

    def __init__(self, kind: str, message: str = "") -> None:
        super().__init__(message)
        assert kind in ERRORS, kind
        self.kind = kind


def as_score(result: Any) -> Score:
    """A Score of what a reward returned; what is neither a number nor has a number as "score" is the error "value".

    Values of a mapping that are no finite numbers are left out, and so are those beyond the first MOST_PARTS.
    """
    parts: dict[str, float] = {}
    text = result.get("text") if isinstance(result, Mapping) else None
    if isinstance(result, Mapping):
        for name, part in result.items():
            number = _number(part)
            if name != "score" and number is not None and len(parts) < MOST_PARTS:
                parts[str(name)[:MOST_CHARACTERS]] = number
        error = result.get("error")
        result = result.get("score")
    else:
        error = None
    value = _number(result)
    if value is None:
        return Score(0.0, parts, "value")
    known = error if isinstance(error, str) and error in ERRORS else None
    return Score(value, parts, known, text[:MOST_TEXT] if isinstance(text, str) else "")


def _number(value: Any) -> float | None:
    """A finite number, also one of numpy or torch; None if it is none."""
    if value is None or isinstance(value, str | bytes):
        return None
    try:
        number = float(value)
    # Tensors of several elements raise RuntimeError, integers beyond 1e308 OverflowError.
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return number if math.isfinite(number) else None
