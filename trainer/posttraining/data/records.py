"""Files of records: JSON lines, JSON lists, parquet and CSV. Imports no torch, and no pickle is ever loaded."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from trainer.data.text import read_utf8
from trainer.errors import ConfigError

# Answers are longer than the csv module's own limit of 128 KiB. It must fit a C long on every platform.
_LONGEST_FIELD = 2**31 - 1
_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin")


def read_records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Read a .jsonl, .json, .parquet or .csv file into memory.

    A .json file may be a list of objects, or have an object on each line, as a .jsonl file may be a list.

    Returns:
        Each record with its place in the file, such as "line 3", for messages. Lines and rows count from 1.

    Raises:
        ConfigError: the file is missing, damaged, empty or of another kind.
    """
    if path.suffix in _PICKLES:
        raise ConfigError(
            f"rows: {path} is a pickle, which may run any program when it is opened: convert a buffer of DPH-RL with "
            "trainer.posttraining.data.dph_buffer.convert_buffer, or write rows as .jsonl or .parquet"
        )
    if path.is_dir():
        raise ConfigError(f"rows: {path} is a directory; name the files in it")
    if path.suffix == ".parquet":
        records = _parquet(path)
    elif path.suffix == ".csv":
        records = _csv(path)
    elif path.suffix in (".json", ".jsonl"):
        records = _json(path)
    else:
        raise ConfigError(f"rows: {path} is none of .jsonl, .json, .parquet and .csv; convert it, or name its ending")
    if not records:
        raise ConfigError(f"rows: {path} has no rows; name another file")
    return records


def _json(path: Path) -> list[tuple[str, dict[str, Any]]]:
    text = read_utf8("rows", path).removeprefix("\ufeff")
    if text.lstrip().startswith("["):
        try:
            found = [(f"row {number}", value) for number, value in enumerate(json.loads(text), 1)]
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"rows: {path} is no JSON ({error}); write it again") from error
    else:
        # Only a line feed ends a line: JSON text may contain the other characters that `splitlines` splits at.
        lines = [(f"line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        found = [(where, _parsed(line, where, path)) for where, line in lines]
    for where, value in found:
        if not isinstance(value, dict):
            raise ConfigError(f"rows: {where} of {path} is not an object but {_short(value)}; write one object per row")
    return found


def _parsed(line: str, where: str, path: Path) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"rows: {where} of {path} is no JSON ({error}); write one object per line, or one list of objects"
        ) from error


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 60 else text[:60] + "…"


def _parquet(path: Path) -> list[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        # Not `read_table`, which also takes directories and hive partitions from the path.
        with parquet.ParquetFile(path) as file:
            rows = file.read().to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"rows: {path} cannot be read ({error}); download or write it again") from error
    # The index that pandas writes is no column of the data.
    kept = ({key: value for key, value in row.items() if not key.startswith("__index_level_")} for row in rows)
    return [(f"row {number}", row) for number, row in enumerate(kept, 1)]


def _csv(path: Path) -> list[tuple[str, dict[str, Any]]]:
    text = read_utf8("rows", path).removeprefix("\ufeff")
    before, found = csv.field_size_limit(_LONGEST_FIELD), []
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for record in reader:
            if None in record or None in record.values():
                columns = len(reader.fieldnames or ())
                raise ConfigError(
                    f"rows: line {reader.line_num} of {path} has not the {columns} fields of the first line; put "
                    "quotation marks around fields with commas"
                )
            found.append((f"line {reader.line_num}", dict(record)))
    except csv.Error as error:
        raise ConfigError(f"rows: line {reader.line_num} of {path} is no CSV ({error}); write it again") from error
    finally:
        csv.field_size_limit(before)
    return found
