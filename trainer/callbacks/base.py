"""Everything that is not the step hangs on these hooks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.loop import Trainer


class Callback:
    """Hooks of the training loop, called on every rank in the order of the callbacks; all default to nothing."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step, the checkpoint already loaded."""

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """After a step; trainer.progress counts it, `metrics` is its line of metrics.jsonl."""

    def on_evaluation(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """After a validation."""

    def on_stop(self, trainer: Trainer) -> None:
        """The run was asked to stop before its last step."""

    def on_end(self, trainer: Trainer) -> None:
        """The loop has ended, however it did."""
