"""Everything that is not the step hangs on these hooks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.loop import Trainer


class Callback:
    """Hooks of the training loop, called on every rank in the order of the callbacks; all default to nothing.

    on_give_up and on_end go the other way round: what was set up first is taken down last.

    Attributes:
        phase: What the run does while its hooks run, which tells how long they may take (RunConfig.phase_seconds).
    """

    phase = "train"

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step, the checkpoint already loaded."""

    def on_resume(self, trainer: Trainer) -> None:
        """After every on_start, where a run goes on: do what its last start had no time for after the last step."""

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """After a step; trainer.progress counts it, `metrics` is its line of metrics.jsonl."""

    def on_evaluation(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """After a validation."""

    def on_stop(self, trainer: Trainer) -> None:
        """The run was asked to stop before its last step."""

    def on_give_up(self, trainer: Trainer) -> None:
        """The run ends with TrainingDiverged, on all ranks alike; on_end follows."""

    def on_end(self, trainer: Trainer) -> None:
        """The loop has ended, however it did."""
