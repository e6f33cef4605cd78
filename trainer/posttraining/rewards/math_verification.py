"""Mathematics by math-verify (Hugging Face, github.com/huggingface/Math-Verify): LaTeX and expressions, by value.

The library limits its time by SIGALRM, which works in a main thread only, and hangs in ways that no signal ends. So it
runs in workers alone, without its own limits: the pool ends a worker that takes too long, and counts a timeout.
"""

import functools
import logging
from importlib.util import find_spec
from typing import Any

from trainer.errors import ConfigError
from trainer.posttraining.rewards import base
from trainer.posttraining.rewards.base import Answer, Reward, ScoringError
from trainer.posttraining.rewards.extraction import after_thoughts, tagged, truths


def math_verify(rounding: int = 6, strict: bool = True, thoughts: bool = False) -> Reward:
    """1 if the completion's answer equals the ground truth as mathematics. Only in workers (see above).

    Args:
        rounding: Decimal places to which floating-point numbers are compared.
        strict: Whether names of variables, and sets against tuples, matter.
        thoughts: Search the answer before </think>, too.

    Raises:
        ConfigError: math-verify is not installed.
    """
    if find_spec("math_verify") is None:
        raise ConfigError("math_verify needs the package math-verify: pip install 'spiketrain[rewards]'")

    if base.IN_WORKER:
        # It takes a second, which is not the first answer's.
        _library()

    def score(answer: Answer) -> float:
        if not base.IN_WORKER:
            raise ConfigError("math_verify runs in the workers of a RewardPool only, which can be killed; use one")
        gold = [expression for truth in truths(answer.ground_truth) for expression in _parsed_truth(str(truth))]
        found = _parsed(answer.completion if thoughts else after_thoughts(answer.completion))
        return float(
            bool(found) and _library().verify(gold, found, float_rounding=rounding, strict=strict, timeout_seconds=None)
        )

    return score


def _library() -> Any:
    import math_verify as library

    # Its warning that timeouts are off would be logged for every worker.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return library


def _parse(text: str) -> list[Any]:
    return _library().parse(text, parsing_timeout=None)


def _parsed(text: str) -> list[Any]:
    """Expressions of a completion; those of an <answer> without dollars or box as if it had them."""
    inside = tagged(text)
    return _parse(text if inside is None else inside if "$" in inside or "\\boxed" in inside else f"${inside}$")


@functools.lru_cache(4096)
def _parsed_truth(truth: str) -> list[Any]:
    """Expressions of a ground truth, which may be LaTeX without its dollars."""
    marked = truth if "\\boxed" in truth or "$" in truth else f"${truth}$"
    parsed = _parse(marked) or _parse(truth)
    if not parsed:
        raise ScoringError("truth", f"the ground truth {truth[:100]!r} is no mathematics")
    return parsed
