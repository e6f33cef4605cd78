"""SIGTERM, SIGINT, SIGHUP and SIGUSR1 save and stop a run after the current step. SIGUSR2 saves and continues."""

from __future__ import annotations

import logging
import signal
from types import FrameType
from typing import TYPE_CHECKING, Any

from trainer.callbacks.base import Callback
from trainer.peers import STOPS

if TYPE_CHECKING:
    from trainer.loop import Trainer


class StopOnSignal(Callback):
    """Sets trainer.stop_requested or save_requested. The ranks agree between steps, so a signal to one is enough."""

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}

    def on_start(self, trainer: Trainer) -> None:
        """Install the signal handlers."""

        def request(number: int, frame: FrameType | None) -> None:
            if not trainer.stop_requested:
                logging.getLogger("spiketrain").info("%s: stopping after this step", signal.Signals(number).name)
            trainer.stop_requested, trainer.stop_reason = True, signal.Signals(number).name

        def request_save(number: int, frame: FrameType | None) -> None:
            logging.getLogger("spiketrain").info("%s: saving after this step", signal.Signals(number).name)
            trainer.save_requested = True

        for number in STOPS:
            # Under nohup SIGHUP is ignored already, and must stay so: the run outlives its terminal.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, request)
        self._previous[signal.SIGUSR2] = signal.signal(signal.SIGUSR2, request_save)

    def on_end(self, trainer: Trainer) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
