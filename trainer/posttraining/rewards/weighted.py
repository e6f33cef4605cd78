"""Several rewards of one answer, added up by weight."""

from collections.abc import Mapping

from trainer.posttraining.rewards.base import Score


def weighted_sum(scores: Mapping[str, Score], weights: Mapping[str, float]) -> Score:
    """Σ weight · value. The parts are the values by reward, and the rewards' own parts as REWARD/PART.

    An error of one reward leaves the others' values; the first is the error of the sum.
    """
    parts: dict[str, float] = {}
    for name, score in scores.items():
        parts[name] = score.value
        parts |= {f"{name}/{part}": value for part, value in score.parts.items()}
    value = sum(weights[name] * score.value for name, score in scores.items())
    return Score(value, parts, next((score.error for score in scores.values() if score.error is not None), None))
