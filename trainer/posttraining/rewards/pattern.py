"""Regular expressions: 1 if the completion matches."""

import re
from typing import Literal

from trainer.errors import ConfigError
from trainer.posttraining.rewards.base import Answer, Reward, ScoringError


def pattern(
    pattern: str | None = None,
    mode: Literal["search", "whole"] = "search",
    ignore_case: bool = False,
    dot_matches_newline: bool = True,
) -> Reward:
    """Matches a regular expression of Python's `re`. One that takes forever ends with the limit of the reward.

    Args:
        pattern: The expression; null takes each answer's ground truth.
        mode: Whether it may stand anywhere in the completion, or must be all of it.
        ignore_case: Take upper and lower case for the same.
        dot_matches_newline: Whether . matches a newline, too.

    Raises:
        ConfigError: the expression is not valid.
    """
    if mode not in ("search", "whole"):
        raise ConfigError(f"mode is {mode!r}: give search or whole")
    flags = (re.IGNORECASE if ignore_case else 0) | (re.DOTALL if dot_matches_newline else 0)
    try:
        fixed = None if pattern is None else re.compile(pattern, flags)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"pattern: {pattern!r} is no regular expression ({error}); mend it") from error

    def score(answer: Answer) -> float:
        try:
            expression = fixed or re.compile(answer.ground_truth, flags)
        except (re.error, RecursionError, OverflowError, TypeError) as error:
            raise ScoringError("truth", f"the ground truth is no regular expression: {error}") from error
        match = expression.search if mode == "search" else expression.fullmatch
        return float(match(answer.completion) is not None)

    return score
