"""The hooks of the training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.loop import Trainer


class Callback:
    """Hooks of the training loop. Every rank calls them in the order of the callbacks. By default each does nothing.

    on_give_up and on_end run in reverse order: the callback that was set up first is torn down last.

    Attributes:
        phase: The watchdog phase during its hooks. It sets their time limit (RunConfig.phase_seconds).
        state_name: Key of its state in a checkpoint. None for a stateless callback.
        state_version: Version of the format of `state_dict`. Raise it when that format changes.
    """

    phase = "train"
    state_name: str | None = None
    state_version = 1

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, as JSON values. Equal on every rank; rank 0's is written.

        It is taken when a save starts. Callbacks after Checkpointer have not seen that step yet.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any], version: int) -> None:
        """Restore a state that this or an earlier version returned. Runs on every rank, before on_start."""

    def on_start(self, trainer: Trainer) -> None:
        """Run before the first step, after a checkpoint has been loaded."""

    def on_resume(self, trainer: Trainer) -> None:
        """Run after every on_start of a resumed run. Do the work that the previous start left after its last step."""

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Run after a step. trainer.progress includes the step, and `metrics` is its line of metrics.jsonl."""

    def on_evaluation(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Run after a validation."""

    def on_stop(self, trainer: Trainer) -> None:
        """Run when the run is asked to stop before its last step."""

    def on_give_up(self, trainer: Trainer) -> None:
        """Run when the run ends with TrainingDiverged, on all ranks. on_end follows."""

    def on_end(self, trainer: Trainer) -> None:
        """Run when the loop has ended, for any reason."""
