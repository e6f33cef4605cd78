"""What the modules of a model count in a training step: one vector, which the engine sums over ranks with the loss.

Routers count in every step (models.moe.statistics), neurons in some (models.spiking_statistics). Both count each
micro-batch once, not in its recomputation, and each token on one rank; a pipeline stage sends zeros for layers that it
lacks.
"""

from collections.abc import Sequence
from typing import Any

from models import spiking, spiking_statistics
from models.config import ModelConfig
from models.decoder import Decoder
from models.moe import statistics as routers


class StepStatistics:
    """Collects what this rank's modules count, and updates them by the sums over all ranks.

    Args:
        config: Configuration of the whole model.
        decoders: This rank's stages.
        spikes_every: Training steps between those in which neurons count; 0 for never.
    """

    def __init__(self, config: ModelConfig, decoders: Sequence[Decoder], spikes_every: int) -> None:
        self._config, self._decoders, self._spikes_every = config, decoders, spikes_every
        self._counts_spikes = False
        self._of_routers = 0

    def begin(self, step: int, loss_scale: float = 1.0) -> None:
        """Set the modules' step and the factor of the loss before backward, and reset what they count."""
        routers.begin_step(self._decoders, step, loss_scale)
        spiking.begin_step(self._decoders, step, loss_scale)
        every = self._spikes_every
        # In those steps whose number, which counts from 1 in metrics, is a multiple.
        self._counts_spikes = bool(every) and (step + 1) % every == 0
        if self._counts_spikes:
            spiking_statistics.begin(self._decoders, self._config)

    def collect(self) -> list[float]:
        """Return what has been counted on this rank, to be summed over all ranks; of the same length on each."""
        counted = routers.collect(self._decoders, self._config)
        self._of_routers = len(counted)
        if self._counts_spikes:
            counted += spiking_statistics.collect(self._decoders, self._config)
        return counted

    def finish(self, totals: list[float]) -> None:
        """Update the routers by the sums over all ranks. Not called for a skipped step."""
        routers.finish_step(self._decoders, self._config, totals[: self._of_routers])

    def metrics(self, totals: list[float]) -> dict[str, Any]:
        """Compute the metrics `moe/` and `spiking/` of the step from the sums over all ranks."""
        of_routers, of_neurons = totals[: self._of_routers], totals[self._of_routers :]
        return routers.metrics(self._config, of_routers) | spiking_statistics.metrics(self._config, of_neurons)
