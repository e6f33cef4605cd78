"""Stops a run that has diverged."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from trainer.callbacks.base import Callback

if TYPE_CHECKING:
    from trainer.loop import Trainer


class TrainingDiverged(RuntimeError):
    """Too many consecutive steps were skipped because of a non-finite loss or gradient."""


class NonFiniteGuard(Callback):
    """Counts skipped steps, and gives up after `limit` consecutive ones. The count survives a stop and a resume."""

    state_name = "non_finite_guard"

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the number of consecutive skipped steps."""
        return {"in_a_row": self._in_a_row}

    def load_state_dict(self, state: dict[str, Any], version: int) -> None:
        """See `state_dict`."""
        self._in_a_row = state["in_a_row"]

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Count a skipped step, or reset the count.

        Raises:
            TrainingDiverged: on every rank together.
        """
        if not metrics["skipped"]:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        trainer.record("skip", loss=metrics["loss"], grad_norm=metrics["grad_norm"], in_a_row=self._in_a_row)
        if trainer.engine.rank == 0:
            logging.getLogger("spiketrain").warning(
                "step %d skipped: loss %s, gradient norm %s", metrics["step"], metrics["loss"], metrics["grad_norm"]
            )
        # The metrics are equal on all ranks, so all of them raise at the same step.
        if self._in_a_row >= self.limit:
            raise TrainingDiverged(
                f"{self._in_a_row} steps in a row had a non-finite loss or gradient (train.max_skipped_steps="
                f"{self.limit}); lower optim.lr, lengthen optim.warmup_steps, or resume from an earlier checkpoint"
            )
