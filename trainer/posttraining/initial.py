"""What the initial model answers to all prompts before the first step, and which prompts it always fails.

run.dir/prompt_filter.json has the number of right answers to every prompt. Training on the prompts without any raises
pass@k at large k above the initial model's (BBG, arXiv:2606.15455).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.durable import write_atomically
from trainer.errors import ConfigError
from trainer.json_files import read_object
from trainer.posttraining.rollouts import Group, Policy, Prompt, Sampler

if TYPE_CHECKING:
    from trainer.posttraining.data.row import Row

_LOGGER = logging.getLogger("spiketrain")
_VERSION = 1
# Prompts that are answered between two lines of progress.
_CHUNK = 64
# Added to the run's seed: other draws than those of training.
_SEED = 2_000_003


def numbered(rows: Sequence[tuple[Row, list[int]]]) -> list[Prompt]:
    """The rows as prompts, numbered from 0."""
    return [Prompt(number, row, tuple(ids)) for number, (row, ids) in enumerate(rows)]


def answers(prompts: Sequence[Prompt], sampler: Sampler, policy: Policy) -> Iterator[Group]:
    """Answer prompts, some at a time. Every rank calls this, and gets all groups in the order of the prompts."""
    for first in range(0, len(prompts), _CHUNK):
        yield from sampler.answer(prompts[first : first + _CHUNK], policy)


def count_right(
    prompts: Sequence[Prompt], sampler: Sampler, policy: Policy, samples: int, right: float, purpose: str
) -> list[int]:
    """Count the right answers of the model to each prompt. Every rank calls this.

    Args:
        prompts: The prompts.
        sampler: Answers them.
        policy: How answers of training are drawn.
        samples: Answers to each prompt.
        right: Reward of a right answer.
        purpose: What the answers are for; begins lines of progress.
    """
    counts: list[int] = []
    for group in answers(prompts, sampler, replace(policy, samples=samples, seed=policy.seed + _SEED)):
        counts.append(sum(reward >= right for reward in group.rewards))
        if sampler.rank == 0 and (len(counts) % _CHUNK == 0 or len(counts) == len(prompts)):
            solved = sum(count > 0 for count in counts)
            _LOGGER.info("%s: %d of %d prompts answered, %d of them solved", purpose, len(counts), len(prompts), solved)
    return counts


def read_known(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Read what is known about the initial model's answers; None if the file does not exist.

    Raises:
        ConfigError: the file is damaged, or of other settings or another model.
    """
    try:
        known = read_object(path, "remove it to answer the prompts again")
    except FileNotFoundError:
        return None
    if known["settings"] != settings:
        differing = [name for name in settings if known["settings"].get(name) != settings[name]]
        raise ConfigError(
            f"{path} was made with another {' and '.join(differing)}; choose another run.dir, or restore these"
        )
    return known


def write_known(path: Path, settings: dict[str, Any], **known: Any) -> None:
    """Write what `read_known` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps({"version": _VERSION, "settings": settings, **known}) + "\n").encode())


def solved_prompts(counts: Sequence[int], samples: int) -> set[int]:
    """The numbers of the prompts with a right answer, which training on failed prompts leaves out.

    Raises:
        ConfigError: no other prompt is left.
    """
    solved = {number for number, count in enumerate(counts) if count}
    if len(solved) == len(counts):
        raise ConfigError(
            f"prompt_filter.keep=failed: the initial model has solved all {len(counts)} prompts in {samples} answers "
            f"each ({sum(counts)} of {samples * len(counts)} answers are right); give harder rows, or a smaller "
            "prompt_filter.samples"
        )
    return solved
