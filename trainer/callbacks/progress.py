"""A live progress line on a terminal, or a plain line every few seconds elsewhere. Rank 0 prints."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from trainer.callbacks.base import Callback
from trainer.logs import CONSOLE

if TYPE_CHECKING:
    from trainer.loop import Trainer

_PLAIN_SECONDS = 10.0
# A long run on a CPU gets one hint, as soon as this many steps or seconds have been measured.
_LONG_SECONDS = 20 * 60.0
_SHORT_SECONDS = 10 * 60.0
_JUDGED_STEPS = 10
_JUDGED_SECONDS = 60.0
_LOGGER = logging.getLogger("spiketrain")


class ProgressLine(Callback):
    """Shows step, loss, speed and remaining time."""

    def __init__(self) -> None:
        self._live: Progress | None = None
        self._task = TaskID(0)
        self._began = self._last_plain = time.monotonic()
        self._first_step = 0
        self._training_seconds = 0.0
        self._first_seconds = 0.0
        self._judged = False

    def on_start(self, trainer: Trainer) -> None:
        """Show the progress line."""
        self._began, self._first_step = time.monotonic(), trainer.progress.step
        if trainer.engine.rank != 0 or not sys.stderr.isatty():
            return
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._live = Progress(*columns, console=CONSOLE)
        self._task = self._live.add_task(
            "train", total=trainer.config.train.steps, completed=trainer.progress.step, status=""
        )
        self._live.start()

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Update the progress line."""
        self._training_seconds += metrics["step_seconds"]
        if trainer.engine.rank != 0:
            return
        self._judge_length(trainer, metrics)
        status = f"loss {metrics['loss']:.4f}  {metrics['tokens_per_second']:,.0f} tokens/s"
        if metrics["model_flops_utilization"] is not None:
            status += f"  {100 * metrics['model_flops_utilization']:.0f} % of peak"
        if self._live:
            self._live.update(self._task, completed=metrics["step"], status=status)
        elif time.monotonic() - self._last_plain >= _PLAIN_SECONDS or trainer.finished:
            self._last_plain = time.monotonic()
            taken = metrics["step"] - self._first_step
            # Includes validation and saving, unlike the speed in `status`.
            left = (time.monotonic() - self._began) / taken * (trainer.config.train.steps - metrics["step"])
            _LOGGER.info("step %d/%d  %s  %.0f s left", metrics["step"], trainer.config.train.steps, status, left)

    def _judge_length(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Tell once, early, that a run on a CPU will take long, and how to get a smaller result sooner."""
        taken = metrics["step"] - self._first_step
        if taken == 1:  # the first step is slower, so it does not count
            self._first_seconds = self._training_seconds
        measured = self._training_seconds - self._first_seconds
        if self._judged or taken < 2 or (taken <= _JUDGED_STEPS and measured < _JUDGED_SECONDS):
            return
        self._judged = True
        config, seconds = trainer.config, measured / (taken - 1)
        left = seconds * (config.train.steps - metrics["step"])
        if trainer.engine.device.type != "cpu" or left <= _LONG_SECONDS:
            return
        steps = metrics["step"] + max(int(_SHORT_SECONDS / seconds), 1)
        _LOGGER.info(
            "about %.0f minutes to go on this machine; for a smaller result in about %.0f: --train.steps %d "
            "--run.dir %s-short",
            left / 60,
            _SHORT_SECONDS / 60,
            steps,
            config.run.dir,
        )

    def on_evaluation(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Log a validation."""
        if trainer.engine.rank == 0:
            figures = [
                f"{value:.4f} bits per byte" if name == "bits_per_byte" else f"{name} {value:.4f}"
                for name, value in metrics.items()
                if name not in ("step", "split") and value is not None
            ]
            _LOGGER.info("step %d  %s %s", metrics["step"], metrics["split"], "  ".join(figures))

    def on_end(self, trainer: Trainer) -> None:
        """Remove the progress line, and log the time of the steps without validation and saving."""
        if self._live:
            self._live.stop()
        if trainer.engine.rank == 0:
            steps = trainer.progress.step - self._first_step
            _LOGGER.info("%d steps in %.0f s of training", steps, self._training_seconds)
