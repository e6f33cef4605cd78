"""Location and description of token files. Standard library only, to check settings before torch is imported."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError
from trainer.json_files import read_object

SPLITS = ("train", "validation", "test")
INFO_NAME = "dataset.json"
NO_END = (
    "document masks need the end-of-document token: set data.tokenizer or data.eod_id, or data.document_mask to false"
)


def read_info(directory: str | Path) -> dict[str, Any] | None:
    """Read the `dataset.json` that preparation wrote into `directory`; None if absent (Megatron's own files have none).

    Raises:
        ConfigError: if the file exists but is not a JSON object.
    """
    path = Path(directory) / INFO_NAME
    try:
        return read_object(path, "delete the directory and prepare the data again")
    except FileNotFoundError:
        return None


def tokenizer_file(path: str | Path) -> Path:
    """Resolve a tokenizer path to its model file: the path itself, or the file in that directory.

    Raises:
        ConfigError: if there is none.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return path
    for name in ("tokenizer.model", "tokenizer.json"):
        if (path / name).is_file():
            return path / name
    raise ConfigError(f"no tokenizer at {path}: give a tokenizer.json, a SentencePiece .model, or a directory with one")


def tokenizer_sha256(path: str | Path) -> str:
    """Hash of a tokenizer's model file, as stored in `dataset.json`: equal hashes mean equal token ids.

    Args:
        path: tokenizer.json, a SentencePiece .model, or a directory with one of them.

    Raises:
        ConfigError: if there is none, or it is unreadable.
    """
    file = tokenizer_file(path)
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}): correct its permissions or path") from error


def info_of_prefix(prefix: str | Path) -> dict[str, Any] | None:
    """Read the `dataset.json` beside the files of `prefix`; None if absent."""
    return read_info(Path(prefix).parent)


def resolve_prefix(path: str | Path, split: str = "train") -> Path:
    """Resolve `path` to a `.bin`/`.idx` pair.

    Args:
        path: a directory written by preparation (the pair is `path/SPLIT.bin`), or the prefix of a pair, with or
            without suffix, as Megatron's own tools write it.
        split: the split of a directory; a prefix already denotes one split.

    Returns:
        The prefix: the path without `.bin` and `.idx`.

    Raises:
        ConfigError: if there is no such pair.
    """
    path = Path(path).expanduser()
    # Only these suffixes: a prefix may contain dots itself, as in corpus_v1.5.
    if path.suffix in (".bin", ".idx"):
        path = path.with_suffix("")
    prefix = path / split if path.is_dir() else path
    missing = [suffix for suffix in (".bin", ".idx") if not Path(f"{prefix}{suffix}").is_file()]
    if missing:
        raise ConfigError(
            f"no token data at {path}: {prefix}{missing[0]} does not exist; prepare it with "
            f"`spiketrain prepare_data --source SOURCE --output {path}`, or give the prefix "
            "of a Megatron .bin/.idx pair"
        )
    return prefix


@dataclass(frozen=True, slots=True)
class Corpora:
    """Facts about a run's data that are known before it is opened.

    Attributes:
        prefixes: one `.bin`/`.idx` prefix per source.
        weights: share of samples of each source; they need not sum to 1.
        eod_id: the end-of-document token; None if unknown.
        vocab_size: vocabulary size of the tokenizer that made the data; None if unknown.
    """

    prefixes: tuple[Path, ...]
    weights: tuple[float, ...]
    eod_id: int | None
    vocab_size: int | None


def find_corpora(paths: str | Path | Mapping[str, float], split: str = "train", eod_id: int | None = None) -> Corpora:
    """Resolve and check the sources of a run, using only file names and `dataset.json`.

    Args:
        paths: a directory or prefix, or several with their shares of the samples.
        split: the split of prepared directories.
        eod_id: the end-of-document token if `dataset.json` does not name it, as with Megatron's own files.

    Raises:
        ConfigError: if files are missing, a share is not positive, or sources were made with different tokenizers.
    """
    shares = dict(paths) if isinstance(paths, Mapping) else {str(paths): 1.0}
    if not shares:
        raise ConfigError("data.path names no data: give a path, or a mapping of paths to weights")
    for path, weight in shares.items():
        if not 0 < weight < math.inf:
            raise ConfigError(
                f"data.path gives {path} the weight {weight}: weights are positive numbers; drop the source instead"
            )
    prefixes = tuple(resolve_prefix(path, split) for path in shares)
    # Sources without dataset.json contribute nothing here, so Megatron's files can be blended with prepared ones.
    known: dict[str, set[Any]] = {"eod_id": {eod_id} - {None}, "vocab_size": set(), "tokenizer_sha256": set()}
    for prefix in prefixes:
        info = info_of_prefix(prefix) or {}
        for key, values in known.items():
            values |= {info[key]} if key in info else set()
    for key, values in known.items():
        if len(values) > 1:
            raise ConfigError(
                f"the sources {', '.join(map(str, prefixes))} differ in {key} ({', '.join(map(str, sorted(values)))}): "
                "prepare them with the same tokenizer (--tokenizer.path), and set data.tokenizer to it"
            )
    return Corpora(
        prefixes, tuple(shares.values()), *(next(iter(known[key]), None) for key in ("eod_id", "vocab_size"))
    )
