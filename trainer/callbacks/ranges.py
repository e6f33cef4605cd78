"""Running ranges of compressed activations (train.compression.range): their updates and their state in checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from models.compression import Compression, Ranges
from models.compression_statistics import blocks
from trainer.callbacks.base import Callback

if TYPE_CHECKING:
    from trainer.loop import Trainer


class RunningRanges(Callback):
    """Updates the running ranges after each step from the ranges that all ranks observed.

    A skipped step changes no range.
    """

    state_name = "compression_ranges"

    def __init__(self) -> None:
        # A rank without layers keeps this object. On all others, on_start replaces it with the model's.
        self._ranges = Ranges()

    def state_dict(self) -> dict[str, Any]:
        """Return the ranges by place, as lists of lows and highs."""
        return {place: values.tolist() for place, values in self._ranges.values.items()}

    def load_state_dict(self, state: dict[str, Any], version: int) -> None:
        """Load the ranges of a checkpoint. `on_start` gives them to the model."""
        self._ranges.values = {place: torch.tensor(values) for place, values in state.items()}

    def on_start(self, trainer: Trainer) -> None:
        """Give the loaded ranges to the model, and keep a reference to the model's object."""
        for block in blocks([trainer.engine.model]):
            stored = block.policy.compression
            if isinstance(stored, Compression):
                # All blocks of a rank share one object, including those of its other stages.
                stored.ranges.values = self._ranges.values
                self._ranges = stored.ranges
                return

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Update the ranges. Every rank sends two numbers per group to all others."""
        observed = trainer.engine.collectives.gather(self._ranges.take())
        if not metrics["skipped"]:
            self._ranges.update(observed)
