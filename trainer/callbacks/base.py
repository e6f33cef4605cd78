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
        state_name: By which a checkpoint knows its state; None if it has none that a run must go on with.
        state_version: Of what `state_dict` gives; to be raised when that changes.
    """

    phase = "train"
    state_name: str | None = None
    state_version = 1

    def state_dict(self) -> dict[str, Any]:
        """What a run that is resumed must go on with, as JSON holds it; the same on every rank: rank 0's is written.

        Of the moment of the save: a callback that comes after Checkpointer has not seen that step yet.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any], version: int) -> None:
        """Go on from what `state_dict` gave in this version or an earlier one; before on_start, on every rank."""

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
