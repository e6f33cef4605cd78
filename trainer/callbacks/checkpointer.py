"""When to save."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from trainer import checkpoint
from trainer.callbacks.base import Callback

if TYPE_CHECKING:
    from trainer.loop import Trainer


class Checkpointer(Callback):
    """Save every `every` steps (0 never on the way), at the last step, and when the run is asked to stop."""

    def __init__(self, every: int, keep: int) -> None:
        self.every, self.keep = every, keep
        self._saved_step = -1

    def on_start(self, trainer: Trainer) -> None:
        """What was just loaded need not be saved again."""
        self._saved_step = trainer.progress.step if trainer.resumed else -1

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Save if it is time."""
        if trainer.finished or (self.every and trainer.progress.step % self.every == 0):
            self._save(trainer)

    def on_stop(self, trainer: Trainer) -> None:
        """Save where the run stands."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.progress.step == self._saved_step:
            return
        path = checkpoint.save(
            trainer.engine, trainer.run_dir, trainer.progress, trainer.config_yaml, trainer.tokenizer, self.keep
        )
        self._saved_step = trainer.progress.step
        if trainer.engine.rank == 0:
            logging.getLogger("spiketrain").info("saved %s", path)
