"""Profiles three steps with torch's profiler."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer.callbacks.base import Callback

if TYPE_CHECKING:
    from trainer.loop import Trainer

_STEPS = 3


class Profiler(Callback):
    """Traces the three steps after `step` on rank 0, into a file for chrome://tracing or Perfetto."""

    def __init__(self, directory: Path, step: int) -> None:
        self.directory, self.step = directory, step
        self._profile: torch.profiler.profile | None = None

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Start after `step`, and stop three steps later."""
        if trainer.engine.rank != 0:
            return
        if self._profile is None and metrics["step"] == self.step:
            self._profile = torch.profiler.profile(profile_memory=True, record_shapes=True)
            self._profile.start()
        elif self._profile is not None and metrics["step"] == self.step + _STEPS:
            self._finish()

    def _finish(self) -> None:
        assert self._profile is not None
        self._profile.stop()
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"step_{self.step:08d}.json"
        self._profile.export_chrome_trace(str(path))
        logging.getLogger("spiketrain").info("profile: %s", path)
        # on_end must not write the trace again.
        self._profile = None

    def on_end(self, trainer: Trainer) -> None:
        """Write a trace that the end of the run has cut short."""
        if self._profile is not None:
            self._finish()
