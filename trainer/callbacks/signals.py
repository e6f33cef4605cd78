"""SIGTERM, SIGINT, SIGHUP and SIGUSR1 stop a run at the next step, saved; SIGUSR2 has it saved, and goes on."""

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
    """Sets trainer.stop_requested, or save_requested; the ranks agree between steps, so one that is signalled does."""

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}

    def on_start(self, trainer: Trainer) -> None:
        """Take the signals over."""

        def request(number: int, frame: FrameType | None) -> None:
            if not trainer.stop_requested:
                logging.getLogger("spiketrain").info("%s: stopping after this step", signal.Signals(number).name)
            trainer.stop_requested, trainer.stop_reason = True, signal.Signals(number).name

        def request_save(number: int, frame: FrameType | None) -> None:
            logging.getLogger("spiketrain").info("%s: saving after this step", signal.Signals(number).name)
            trainer.save_requested = True

        for number in STOPS:
            # Under nohup the end of the terminal is none of the run's business.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, request)
        self._previous[signal.SIGUSR2] = signal.signal(signal.SIGUSR2, request_save)

    def on_end(self, trainer: Trainer) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
