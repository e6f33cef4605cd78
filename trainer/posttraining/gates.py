"""Gates: which losses a question contributes to, from how many of its sampled answers are correct.

HPT (arXiv:2509.04419, section 3) trains on a question's demonstration if the policy fails it, and else by reinforcement
learning. DPH-RL (arXiv:2509.07430) rehearses questions that the reference has mastered. The two choices concern
different questions: a group whose answers are all correct has no advantage and is free for rehearsal.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from trainer.errors import ConfigError

# Coefficients (reinforcement, off-policy, demonstration) by the number of correct answers among 8, from 0 on: the
# released code's "type 2". It has no entry for 0, which here is that of 1.
SOFT_TABLE: tuple[tuple[float, float, float], ...] = (
    *((0.0, 0.0, 1.0), (0.0, 0.0, 1.0), (0.125, 0.0, 0.5), (0.25, 0.0, 0.25), (0.5, 0.0, 0.125)),
    *((1.0, 0.0, 0.0), (1.0, 0.0, 0.0), (1.0, 0.0, 0.0), (1.0, 0.0, 0.0)),
)


@dataclass(frozen=True)
class Coefficients:
    """Factors of a question's losses, float64 [Q] each.

    Attributes:
        reinforcement: Of the loss on its sampled answers.
        off_policy: Of the policy-gradient loss on its demonstration (rows luffy and srft).
        demonstration: Of fine-tuning on its demonstration (row sft).
        rehearsal: Of the divergence from the reference on its stored answer.
    """

    reinforcement: np.ndarray
    off_policy: np.ndarray
    demonstration: np.ndarray
    rehearsal: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The choice as a function of the share P of correct answers.

    Attributes:
        kind: none: reinforcement alone. switch: HPT. soft: a table of mixtures by P. mixed: LUFFY, both the sampled
            answers and the demonstration as another one, whatever P is.
        failed: γ. switch takes the demonstration where P ≤ γ. The paper has 0 for Qwen and 2/8 for LLaMA.
        off_policy: switch takes the demonstration as an off-policy answer where γ < P ≤ this share. None for nowhere.
        mastered: Rehearse where P ≥ this share, instead of anything else. None for nowhere.
        table: Of soft: (reinforcement, off-policy, demonstration) at equal steps of P from 0 to 1, linear between them.

    Raises:
        ConfigError: the shares are not in order, or out of 0 to 1.
    """

    kind: Literal["none", "switch", "soft", "mixed"] = "switch"
    failed: float = 0.0
    off_policy: float | None = None
    mastered: float | None = None
    table: tuple[tuple[float, float, float], ...] = SOFT_TABLE

    def __post_init__(self) -> None:
        if self.kind not in ("none", "switch", "soft", "mixed"):
            raise ConfigError(f"gate: kind must be none, switch, soft or mixed, not {self.kind!r}")
        middle = self.failed if self.off_policy is None else self.off_policy
        if not 0 <= self.failed <= middle < 1:
            raise ConfigError(f"gate: need 0 <= failed <= off_policy < 1, not {self.failed} and {self.off_policy}")
        if self.mastered is not None and not middle < self.mastered <= 1:
            raise ConfigError(f"gate: mastered must be above {middle}, failed and off_policy, up to 1: {self.mastered}")


def gate(
    choice: Gate,
    correct: np.ndarray,
    samples: np.ndarray | int,
    *,
    has_demonstration: np.ndarray | None = None,
    mastered: np.ndarray | None = None,
) -> Coefficients:
    """Compute each question's coefficients.

    Args:
        choice: The gate.
        correct: Number of correct answers, integers [Q].
        samples: Number of answers, at least 1, [Q] or one for all.
        has_demonstration: bool [Q]; None if all have one. Questions without one are left to reinforcement learning.
        mastered: Which questions have a stored correct answer and were mastered by the reference policy, bool [Q]. It
            decides about rehearsal instead of `choice.mastered`, also for questions that now fail: those are what
            rehearsal is to bring back.

    Returns:
        The coefficients. They are not normalised: weights over the batch are the losses' own.

    Raises:
        ValueError: a count is below 0 or above the number of answers.
    """
    correct, samples = np.broadcast_arrays(np.asarray(correct), np.asarray(samples))
    if (samples < 1).any() or (correct < 0).any() or (correct > samples).any():
        raise ValueError("gate: need 0 <= correct <= samples and samples >= 1")
    if choice.kind == "soft":
        table = np.asarray(choice.table, dtype=np.float64)
        places = correct * (len(table) - 1) / samples
        rows = np.stack([np.interp(places, np.arange(len(table)), column) for column in table.T], axis=1)
    elif choice.kind == "mixed":
        rows = np.broadcast_to((1.0, 1.0, 0.0), (len(correct), 3))
    else:
        failed = _at_most(correct, samples, choice.failed) & (choice.kind == "switch")
        off = np.zeros_like(failed)
        if choice.kind == "switch" and choice.off_policy is not None:
            off = ~failed & _at_most(correct, samples, choice.off_policy)
        rows = np.stack([~(failed | off), off, failed], axis=1).astype(np.float64)
    if has_demonstration is not None:
        missing = ~has_demonstration & (rows[:, 1:] != 0).any(1)
        rows = np.where(missing[:, None], (1.0, 0.0, 0.0), rows)
    rehearsed = np.zeros(len(correct), dtype=bool)
    if mastered is not None:
        rehearsed = np.asarray(mastered, dtype=bool)
    elif choice.mastered is not None:
        rehearsed = _at_most(samples - correct, samples, 1 - choice.mastered)
    rows = np.where(rehearsed[:, None], 0.0, rows)
    return Coefficients(rows[:, 0], rows[:, 1], rows[:, 2], rehearsed.astype(np.float64))


def _at_most(counts: np.ndarray, samples: np.ndarray, share: float) -> np.ndarray:
    """Compare counts / samples ≤ share, with room for the rounding of the share."""
    return counts <= share * samples + 1e-9
