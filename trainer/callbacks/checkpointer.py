"""Decides when to save."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.callbacks.base import Callback
from trainer.run_directory import checkpoint_path
from trainer.stored import checkpoint
from trainer.stored.checkpoint import BackgroundSave, Retention

if TYPE_CHECKING:
    from trainer.loop import Trainer


class Checkpointer(Callback):
    """Saves every `every` steps (0: never in between), at the last step, and when a save or a stop is requested.

    Each step polls an asynchronous save, so that its failure ends the run there. The next save waits for it. So does
    the end of the run, including on_give_up.
    """

    phase = "save"

    def __init__(self, every: int, keep: Retention, asynchronous: bool = False) -> None:
        self.every, self.keep, self.asynchronous = every, keep, asynchronous
        self._saved_step = -1
        self._began = 0.0
        self._saving: BackgroundSave | None = None

    def on_start(self, trainer: Trainer) -> None:
        """Note the loaded step, which need not be saved again."""
        self._saved_step = trainer.progress.step if trainer.resumed else -1

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Save if a save is due or requested."""
        start = time.perf_counter()
        # At every step, so that a failed save is noticed soon.
        self._look_after(trainer, wait=trainer.finished)
        is_time = self.every and trainer.progress.step % self.every == 0
        if trainer.finished or is_time or trainer.agreed_to_save:
            trainer.agreed_to_save = False
            self._save(trainer, wait=trainer.finished)
        # The next step's line in metrics.jsonl reports it.
        trainer.seconds_in_checkpoints += time.perf_counter() - start

    def on_stop(self, trainer: Trainer) -> None:
        """Save the current state."""
        self._save(trainer, wait=True)

    def on_give_up(self, trainer: Trainer) -> None:
        """Finish the save in progress. The diverged state itself is not worth saving."""
        self._look_after(trainer, wait=True)

    def _save(self, trainer: Trainer, wait: bool) -> None:
        # One save at a time: the engine has a single writer.
        self._look_after(trainer, wait=True)
        if trainer.progress.step == self._saved_step:
            return
        self._saved_step = trainer.progress.step
        self._began = time.perf_counter()
        path = checkpoint_path(trainer.run_dir, self._saved_step)
        trainer.record("checkpoint", state="begun", path=str(path))
        what = trainer.engine, trainer.run_dir, trainer.state(), self.keep
        if self.asynchronous:
            self._saving = BackgroundSave(*what)
            self._look_after(trainer, wait)
        else:
            self._report(trainer, checkpoint.save(*what))

    def _look_after(self, trainer: Trainer, wait: bool) -> None:
        if self._saving is not None and self._saving.advance(wait):
            self._report(trainer, self._saving.path)
            self._saving = None

    def _report(self, trainer: Trainer, path: Path) -> None:
        if trainer.engine.rank == 0:
            logging.getLogger("spiketrain").info("saved %s", path)
        seconds = time.perf_counter() - self._began
        trainer.record("checkpoint", state="published", path=str(path), seconds=seconds)
