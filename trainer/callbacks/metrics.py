"""metrics.jsonl and TensorBoard. Rank 0 writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from trainer.callbacks.base import Callback
from trainer.durable import write_atomically
from trainer.json_lines import as_line
from trainer.raster import image

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from trainer.loop import Trainer

# A line of metrics.jsonl holds matrices of up to this many elements. Larger ones appear in every hundredth line only:
# the loads of 60 layers with 256 experts take 300 kB of text.
_ELEMENTS_IN_EVERY_LINE = 1024
_LINES_BETWEEN_MATRICES = 100
# Columns of an image over time. Limits TensorBoard's memory per matrix; a screen shows no more.
_COLUMNS = 512


class History:
    """A vector over time in bounded memory: at most 2 * `columns` means, each over equally many consecutive steps.

    When the columns are full, neighbours are averaged. A column then stands for 1, 2, 4, … steps.
    """

    def __init__(self, columns: int = _COLUMNS) -> None:
        self._columns, self._steps = columns, 1
        self._means: list[np.ndarray] = []
        self._open: list[np.ndarray] = []

    def append(self, values: list[float]) -> None:
        """Add the next step's vector [lines]."""
        self._open.append(np.array(values, np.float32))
        if len(self._open) < self._steps:
            return
        self._means.append(np.mean(self._open, axis=0))
        self._open = []
        if len(self._means) == 2 * self._columns:
            self._means = [(a + b) / 2 for a, b in zip(self._means[::2], self._means[1::2], strict=True)]
            self._steps *= 2

    def image(self) -> np.ndarray:
        """Return an image [lines, columns] of bytes. Steps that do not fill a column yet form the last one."""
        unfinished = [np.mean(self._open, axis=0)] if self._open else []
        return heat_map([*self._means, *unfinished], self._columns)


def cut_back(path: Path, step: int) -> None:
    """Drop a metrics file's lines after `step`, and damaged lines: a crash may truncate the last one."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_atomically(path, "".join(kept).encode())


def heat_map(columns: Sequence[np.ndarray | list[float]], most: int = _COLUMNS) -> np.ndarray:
    """Return an image [lines, columns] of bytes, white at the largest value. Averages down to `most` columns."""
    values = np.array(columns).T
    groups = min(values.shape[1], most)
    image = np.stack([part.mean(axis=1) for part in np.array_split(values, groups, axis=1)], axis=1)
    return (255 * image / max(image.max(), 1e-9)).astype(np.uint8)


class MetricsFile(Callback):
    """Writes metrics.jsonl: a JSON object per line, for every `every`-th training step and every validation.

    Large matrices appear in the first line, and then in every hundredth.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every
        self._file: IO[str] | None = None
        self._lines = 0

    def on_start(self, trainer: Trainer) -> None:
        """Truncate the file to the step that the run continues from."""
        if trainer.engine.rank == 0:
            cut_back(self.path, trainer.progress.step)
            # Line-buffered, so that a crash loses at most a line.
            self._file = self.path.open("a", buffering=1)

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Write the step's metrics."""
        if self._file and (metrics["step"] % self.every == 0 or trainer.finished):
            if self._lines % _LINES_BETWEEN_MATRICES:
                metrics = {name: value for name, value in metrics.items() if not _is_large(value)}
            self._lines += 1
            self._file.write(as_line(metrics))

    def on_evaluation(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Write the validation's metrics."""
        if self._file:
            self._file.write(as_line(metrics))

    def on_end(self, trainer: Trainer) -> None:
        """Close the file."""
        if self._file:
            self._file.close()


def _results(metrics: dict[str, Any]) -> dict[str, float]:
    """The figures of a validation."""
    return {name: value for name, value in metrics.items() if name not in ("step", "split") and value is not None}


def _is_large(value: Any) -> bool:
    return isinstance(value, list) and sum(map(len, value)) > _ELEMENTS_IN_EVERY_LINE


class TensorBoard(Callback):
    """Writes scalars, text samples and hyper-parameters as TensorBoard events, and matrices over time as images.

    Spikes of a validation are an image as well, a line for each of some channels (trainer.raster).

    The image of a matrix metric (such as expert loads by layer) has a line per element and a column per step since the
    last start, or per several steps. Every validation draws it again.
    """

    def __init__(self, directory: Path, every: int) -> None:
        self.directory, self.every = directory, every
        self._writer: SummaryWriter | None = None
        self._history: dict[str, History] = {}

    def on_start(self, trainer: Trainer) -> None:
        """Open the writer. Events after the step that the run continues from become hidden."""
        if trainer.engine.rank != 0:
            return
        # Imported here, because tensorboard takes long to import and is needed on rank 0 only.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.directory), purge_step=trainer.progress.step + 1)
        self._writer.add_text("config", f"```yaml\n{trainer.config_yaml}\n```", trainer.progress.step)

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Write the step's scalars."""
        if self._writer and (metrics["step"] % self.every == 0 or trainer.finished):
            for name, value in metrics.items():
                if isinstance(value, list):
                    self._history.setdefault(name, History()).append([element for row in value for element in row])
                elif name != "step" and value is not None:
                    self._writer.add_scalar(f"train/{name}" if "/" not in name else name, value, metrics["step"])

    def on_evaluation(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Write the validation's scalars, images and text samples."""
        if self._writer is None:
            return
        for name, value in _results(metrics).items():
            self._writer.add_scalar(f"{metrics['split']}/{name}", value, metrics["step"])
        for name, history in self._history.items():
            self._writer.add_image(name, history.image(), metrics["step"], dataformats="HW")
        if trainer.rasters:
            self._writer.add_image("spiking/raster", image(trainer.rasters), metrics["step"], dataformats="HW")
        for i, text in enumerate(trainer.samples):
            self._writer.add_text(f"sample/{i}", f"```\n{text}\n```", metrics["step"])
        for name, table in trainer.tables.items():
            self._writer.add_text(f"{metrics['split']}/{name}", table, metrics["step"])
        if trainer.finished:
            self._write_hyper_parameters(trainer, metrics)

    def _write_hyper_parameters(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        from torch.utils.tensorboard.summary import hparams

        assert self._writer is not None and self._writer.file_writer is not None
        results = {f"final/{name}": value for name, value in _results(metrics).items()}
        for summary in hparams(trainer.hyper_parameters(), results):
            self._writer.file_writer.add_summary(summary)
        for name, value in results.items():
            self._writer.add_scalar(name, value, metrics["step"])

    def on_end(self, trainer: Trainer) -> None:
        """Close the writer."""
        if self._writer:
            self._writer.close()
