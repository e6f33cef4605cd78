"""Evaluation of a checkpoint with spikes and of the same weights without: losses on the same batches, and measures."""

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from models import spiking_statistics as counted
from models.config import SpikingConfig
from models.decoder import Decoder
from trainer import raster
from trainer.data.batch import Batch
from trainer.errors import ConfigError
from trainer.evaluation import EvaluationSums


def choose(own: SpikingConfig, last_step: int, asked: SpikingConfig) -> SpikingConfig:
    """Choose the neurons to evaluate: those asked for, otherwise the checkpoint's own, otherwise the report's.

    Neurons that are asked for are always on. If they name no layers, they take the checkpoint's, or all layers if the
    checkpoint has none.

    Args:
        own: `model.spiking` of the checkpoint.
        last_step: Number of the checkpoint's last step, counted from 0.
        asked: The settings asked for. The defaults ask for nothing.

    Raises:
        ConfigError: the neurons need parameters that the checkpoint lacks, or the checkpoint's own are not on yet.
    """
    if asked == SpikingConfig() and own.layers:
        if not own.is_on(last_step):
            raise ConfigError(
                f"checkpoint: it ends at step {last_step}, but its spikes start at step {own.start_step}; choose the "
                "neurons to evaluate, such as --neurons.layers '[all]'"
            )
        return own
    if asked.threshold not in ("adaptive", own.threshold if own.layers else "adaptive"):
        raise ConfigError(
            f"neurons.threshold={asked.threshold} needs values that only training with it stores; this checkpoint has "
            "none, so use neurons.threshold=adaptive"
        )
    layers = asked.layers or own.layers or ["all"]
    return replace(asked, layers=layers, start_step=0, k_start=None, anneal_steps=0)


class Comparison:
    """Compares a model with spikes to the same weights without.

    The caller evaluates the model with spikes. This class collects its spike statistics, and runs the model without
    spikes on the same batches.

    Args:
        spiking: The model with spikes.
        floats: The model with the same weights without spikes, on the same device.
    """

    def __init__(self, spiking: Decoder, floats: Decoder) -> None:
        self.spiking, self.floats = spiking, floats
        self._nll, self._tokens = 0.0, 0
        self._first: Batch | None = None
        counted.begin([spiking], spiking.model_config)

    def add(self, batch: Batch) -> None:
        """Run the model without spikes on a micro-batch that the model with spikes has run on, on the same device."""
        self._first = batch if self._first is None else self._first
        self._tokens += batch.tokens.numel()
        loss, _ = self.floats(batch.tokens, batch.positions, batch.documents, batch.labels, batch.loss_mask)
        self._nll += float(loss)

    def result(self, sums: EvaluationSums) -> dict[str, Any]:
        """Stop collecting and return the results as plain values, given the sums of the model with spikes."""
        config, floats = self.spiking.model_config, replace(sums, nll=self._nll)
        found = counted.activities(config, counted.collect([self.spiking], config))
        layers = counted.by_layer(config, found)
        return {
            "neurons": asdict(config.spiking),
            "float_loss": floats.loss,
            "float_bits_per_byte": floats.bits_per_byte,
            "loss_increase": sums.loss / floats.loss - 1,
            "total": self._summary(sum(layers.values(), counted.Activity())),
            "layers": {str(layer): self._summary(activity) for layer, activity in layers.items()},
            "inputs": {name: self._summary(activity) for name, activity in found.items()},
        }

    def _summary(self, activity: counted.Activity) -> dict[str, Any]:
        operations, measures = activity.operations, activity.measures
        return counted.summary(activity, self._tokens) | {
            "picojoules_per_token_fp16": operations.picojoules_fp16 / self._tokens,
            "picojoules_per_token_int8": operations.picojoules_int8 / self._tokens,
            "steps": measures.steps,
            "channels": activity.channels,
            "histogram": list(measures.histogram),
        }

    def print_table(self, found: dict[str, Any]) -> None:
        """Print one line per layer, one for all layers, and the losses."""
        table = Table(title="spikes that enter the linear layers", title_justify="left")
        table.add_column("")
        for title, _ in _COLUMNS.values():
            table.add_column(title, justify="right")
        for name, values in [*found["layers"].items(), ("all", found["total"])]:
            table.add_row(name, *(form.format(values[key]) for key, (_, form) in _COLUMNS.items()))
        # rich assumes 80 columns for files and pipes.
        Console(width=None if sys.stdout.isatty() else 140).print(table)
        print(
            f"without spikes: loss {found['float_loss']:.4f}; spikes change the loss by {found['loss_increase']:+.2%} "
            f"and save {found['total']['energy_saved']:.1%} of the energy of FP16 (idealised: arithmetic only, 45 nm)"
        )

    def draw(self, path: Path) -> None:
        """Draw the spikes of the first micro-batch into a file."""
        assert self._first is not None, "an evaluation has a batch"
        counts = counted.record(self.spiking, self._first.tokens, self._first.positions, self._first.documents)
        raster.draw(counted.rasters(counts, raster.CHANNELS, raster.TOKENS), path)


# For each measure, the column's title and number format.
_COLUMNS = {
    "sparsity": ("sparsity, 3 steps", "{:.2%}"),
    "sparsity_all_steps": ("all steps", "{:.2%}"),
    "firing_rate": ("firing rate", "{:.3f}"),
    "within_window": ("|s| <= 7", "{:.2%}"),
    "silent": ("s = 0", "{:.2%}"),
    "silent_channels": ("silent channels", "{:.2%}"),
    "picojoules_per_token": ("pJ/token", "{:,.0f}"),
    "picojoules_per_token_fp16": ("FP16, pJ/token", "{:,.0f}"),
}
