"""Figures and tables of answers to held-out prompts: rewards, pass@k and maj@k."""

from __future__ import annotations

import inspect
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.durable import write_atomically
from trainer.evaluation.pass_at_k import majority_at_k, pass_at_k
from trainer.posttraining.rewards.extraction import Extraction
from trainer.posttraining.rewards.numeric import parse_number
from trainer.posttraining.rewards.registry import maker

if TYPE_CHECKING:
    from trainer.posttraining.rewards.registry import RewardConfig
    from trainer.posttraining.rollouts import Group

# What of an answer is voted on; None for an answer without a vote.
Vote = Callable[[str], str | None]
# Of a reward that extracts answers in its workers alone.
_MATHEMATICS = ("boxed", "answer", "last_number")


def vote_of(rewards: Sequence[RewardConfig]) -> Vote:
    """What maj@k takes for the same answer.

    The first reward that extracts an answer from the text says how; numbers are compared by value, other texts but for
    white space. A text in which it finds nothing has no vote. If no reward extracts any, the text is the answer.
    """
    for config in rewards:
        if config.name == "math_verify":
            return _Extracted(Extraction(_MATHEMATICS))
        parameters = {} if ":" in config.name else inspect.signature(maker(config)).parameters
        if "extract" in parameters:
            return _Extracted(Extraction(config.options.get("extract", parameters["extract"].default)))
    return _normal


class _Extracted:
    """The answer in a text, None if there is none."""

    def __init__(self, find: Extraction) -> None:
        self._find = find

    def __call__(self, text: str) -> str | None:
        found = self._find(text)
        return None if found is None else _normal(found)


def _normal(text: str) -> str | None:
    number = parse_number(text)
    return str(number) if number is not None else " ".join(text.split()) or None


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4, … up to `most`, and `most`."""
    return sorted({most, *(1 << power for power in range(most.bit_length()))})


def answer_figures(groups: Sequence[Group], right: float, vote: Vote) -> dict[str, float]:
    """The mean reward, and pass@k and maj@k for k = 1, 2, 4, … up to the number of answers, means over prompts.

    Args:
        groups: Equally many answers to each prompt.
        right: Reward of a right answer. For maj@k an answer is right if any text with it is.
        vote: What of an answer is voted on.
    """
    count = len(groups[0].samples)
    solved = np.array([sum(reward >= right for reward in group.rewards) for group in groups])
    votes = [ballots(group, right, vote) for group in groups]
    figures = {"reward": statistics.fmean(reward for group in groups for reward in group.rewards)}
    for k in powers_of_two(count):
        figures[f"pass@{k}"] = float(np.mean(pass_at_k(np.full(len(solved), count), solved, k)))
    for k in powers_of_two(count):
        figures[f"maj@{k}"] = statistics.fmean(majority_at_k(*own, k) for own in votes)
    return figures


def ballots(group: Group, right: float, vote: Vote) -> tuple[list[str | None], set[str]]:
    """The votes of a group's answers, and those that are right."""
    votes = [vote(sample.text) for sample in group.samples]
    correct = {own for own, reward in zip(votes, group.rewards, strict=True) if own is not None and reward >= right}
    return votes, correct


def shown_rows(groups: Sequence[Group], decode: Callable[[Sequence[int]], str], count: int) -> list[dict[str, Any]]:
    """The first answers to the first `count` prompts, as plain values."""
    return [
        {
            "row": group.row,
            "prompt": decode(group.prompt),
            "answer": group.samples[0].text,
            "reward": group.samples[0].reward,
            "parts": group.samples[0].parts,
            "error": group.samples[0].error,
            "finished": group.samples[0].finished,
        }
        for group in groups[:count]
    ]


def save_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as lines of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of `shown_rows` as a table."""
    lines = ["| prompt | answer | reward | parts |", "|---|---|---|---|"]
    for row in rows:
        parts = ", ".join(f"{name} {value:g}" for name, value in row["parts"].items())
        cells = (_cell(row["prompt"]), _cell(row["answer"]), f"{row['reward']:g}", row["error"] or parts)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """A text as a cell of a table: markdown shows it as it is."""
    for special, shown in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("`", "&#96;"), ("*", "&#42;")):
        text = text.replace(special, shown)
    return text.replace("\n", "<br>")
