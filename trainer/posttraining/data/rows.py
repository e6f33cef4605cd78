"""Files of post-training rows, in any of the public formats. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import ConfigError
from trainer.posttraining.data.formats import adapt, recognise
from trainer.posttraining.data.records import read_records
from trainer.posttraining.data.row import FORMATS, Format, Row, RowOptions

__all__ = ["FORMATS", "Format", "Row", "RowFile", "RowOptions", "Rows", "read_rows"]


@dataclass(frozen=True)
class RowFile:
    """The rows of a file.

    Attributes:
        path: The file.
        format: Its format, as named or as recognised.
        rows: Its rows, in the file's order.
        weight: Its share of the rows that a run takes, relative to the other files'. None if shares follow from the
            numbers of rows.
    """

    path: Path
    format: Format
    rows: tuple[Row, ...]
    weight: float | None = None


@dataclass(frozen=True)
class Rows:
    """The rows of a run, file after file.

    Attributes:
        files: The files. All have a weight, or none has.
    """

    files: tuple[RowFile, ...]

    def __len__(self) -> int:
        return sum(len(file.rows) for file in self.files)

    def __iter__(self) -> Iterator[Row]:
        return (row for file in self.files for row in file.rows)

    def pools(self) -> tuple[tuple[tuple[Row, ...], ...], tuple[float, ...]]:
        """Pools of rows with the weights of drawing from them: the files, or one pool if they have no weights."""
        if self.files[0].weight is None:
            return (tuple(self),), (1.0,)
        return tuple(file.rows for file in self.files), tuple(file.weight or 0.0 for file in self.files)

    def __str__(self) -> str:
        """The files with their formats, as one line to print when a run starts."""
        return "; ".join(f"{file.path}: {len(file.rows)} rows, format {file.format}" for file in self.files)


def read_rows(
    paths: str | Path | Sequence[str | Path] | Mapping[str, float], options: RowOptions | None = None
) -> Rows:
    """Read files of rows into memory. Each file's format is recognised by itself.

    Args:
        paths: A file, several, or several with their weights.
        options: How they are read.

    Raises:
        ConfigError: a file is missing, damaged or of no known format, or a row lacks what the format needs; names file
            and line.
    """
    options = options or RowOptions()
    weights = {str(path): weight for path, weight in paths.items()} if isinstance(paths, Mapping) else {}
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    if not given:
        raise ConfigError("rows: no file is named; name one")
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(f"rows: the weight {weight} of {name} must be above 0; leave the file out instead")
    return Rows(tuple(_read(Path(path).expanduser(), options, weights.get(str(path))) for path in given))


def _read(path: Path, options: RowOptions, weight: float | None) -> RowFile:
    records = read_records(path)
    columns = {name for _, record in records for name, value in record.items() if value is not None}
    format = recognise(columns, options, str(path))
    rows = (
        adapt(record, format, options, f"{where} of {path}", f"{path.name}:{number}")
        for number, (where, record) in enumerate(records)
    )
    return RowFile(path, format, tuple(rows), weight)
