"""Statistics that a model's modules collect in a training step: one vector, which the engine sums with the loss.

Routers collect statistics in every step (models.moe.statistics). Neurons (models.spiking_statistics) and compressed
activations (models.compression_statistics) are measured in some steps, because that takes time. All count each
micro-batch once, not again in its recomputation. Routers and neurons count each token on one rank. A pipeline stage
contributes zeros for the layers that it does not have.
"""

from collections.abc import Sequence
from typing import Any

from models import compression_statistics, spiking, spiking_statistics
from models.config import ModelConfig
from models.decoder import Decoder
from models.moe import statistics as routers


class StepStatistics:
    """Collects the statistics of this rank's modules, and updates the routers from the sums over all ranks.

    Args:
        config: Configuration of the whole model.
        decoders: This rank's stages.
        measure_every: Spikes and compression are measured every so many training steps; 0 disables it.
    """

    def __init__(self, config: ModelConfig, decoders: Sequence[Decoder], measure_every: int) -> None:
        self._config, self._decoders, self._measure_every = config, decoders, measure_every
        self._measures = False
        # Lengths of the parts of the vector: routers, neurons, compression.
        self._lengths = [0, 0, 0]

    def begin(self, step: int, loss_scale: float = 1.0) -> None:
        """Set the modules' step and the factor of the loss before backward, and reset their statistics."""
        routers.begin_step(self._decoders, step, loss_scale)
        spiking.begin_step(self._decoders, step, loss_scale)
        every = self._measure_every
        # Metrics number steps from 1, so measure if that number is a multiple.
        self._measures = bool(every) and (step + 1) % every == 0
        if self._measures:
            spiking_statistics.begin(self._decoders, self._config)
            compression_statistics.begin(self._decoders)

    def collect(self) -> list[float]:
        """Return this rank's statistics, which the engine sums over all ranks. All ranks' lists have equal length."""
        parts: list[list[float]] = [routers.collect(self._decoders, self._config), [], []]
        if self._measures:
            parts[1] = spiking_statistics.collect(self._decoders, self._config)
            parts[2] = compression_statistics.collect(self._decoders, self._config)
        self._lengths = [len(part) for part in parts]
        return [value for part in parts for value in part]

    def finish(self, totals: list[float]) -> None:
        """Update the routers from the sums over all ranks. Not called for a skipped step."""
        routers.finish_step(self._decoders, self._config, totals[: self._lengths[0]])

    def metrics(self, totals: list[float]) -> dict[str, Any]:
        """Compute the metrics `moe/`, `spiking/` and `compression/` of the step from the sums over all ranks."""
        routed, rest = totals[: self._lengths[0]], totals[self._lengths[0] :]
        fired, compressed = rest[: self._lengths[1]], rest[self._lengths[1] :]
        return (
            routers.metrics(self._config, routed)
            | spiking_statistics.metrics(self._config, fired)
            | compression_statistics.metrics(compressed)
        )
