"""Records in every checkpoint which teachers the run has learned from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trainer.callbacks.base import Callback
from trainer.stored.teacher import STATE

if TYPE_CHECKING:
    from trainer.loop import Trainer


class TeacherRecord(Callback):
    """Keeps the digest of the teacher of each phase that has begun. trainer.stored.teacher compares it at a start.

    Args:
        digests: Digests of the teachers of the phases that are not over, by phase.
    """

    state_name = STATE

    def __init__(self, digests: Mapping[int, str]) -> None:
        self._digests = digests
        self._begun: dict[str, str] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the digests by phase."""
        return dict(self._begun)

    def load_state_dict(self, state: dict[str, Any], version: int) -> None:
        """Load the digests of the phases that had begun."""
        self._begun = dict(state)

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Add the teacher of the step's phase."""
        number = trainer.phase.number
        if number in self._digests:
            self._begun[str(number)] = self._digests[number]
