"""Running ranges of compressed activations (train.compression.range): updated after each step, and in checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from models.compression import Compression, Ranges
from models.compression_statistics import blocks
from trainer.callbacks.base import Callback

if TYPE_CHECKING:
    from trainer.loop import Trainer


class RunningRanges(Callback):
    """Gathers the ranges that ranks have observed in a step. A skipped step changes none."""

    state_name = "compression_ranges"

    def __init__(self) -> None:
        # Of a rank without layers, if there is one.
        self._ranges = Ranges()

    def state_dict(self) -> dict[str, Any]:
        """Lows and highs by place."""
        return {place: values.tolist() for place, values in self._ranges.values.items()}

    def load_state_dict(self, state: dict[str, Any], version: int) -> None:
        """Take the ranges of a checkpoint; `on_start` gives them to the model."""
        self._ranges.values = {place: torch.tensor(values) for place, values in state.items()}

    def on_start(self, trainer: Trainer) -> None:
        """Find the model's ranges."""
        for block in blocks([trainer.engine.model]):
            stored = block.policy.compression
            if isinstance(stored, Compression):
                # All blocks of a rank, also those of its other stages, have the same object.
                stored.ranges.values = self._ranges.values
                self._ranges = stored.ranges
                return

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Update the ranges. Every rank sends a few numbers per group."""
        observed = trainer.engine.collectives.gather(self._ranges.take())
        if not metrics["skipped"]:
            self._ranges.update(observed)
