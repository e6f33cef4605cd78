"""Where documents come from: the standard library's source, text files, jsonl, parquet and Hugging Face datasets.

A source is cut into shards of a few megabytes, in an order and at places that follow from the input alone. A shard
can be read by itself in another process, so that tokenising is parallel and a killed run continues behind its last
finished shard; the split of a document follows from a hash of its name, so that neither machine nor worker count
moves it.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.cli import ConfigError

# Small inputs are cut finely, to keep all workers busy; large ones coarsely, since each shard is two files until the
# end.
_SMALLEST_SHARD = 1 << 20
_LARGEST_SHARD = 1 << 26
_STREAM_SHARD = 1 << 23
_SKIPPED_DIRECTORIES = {"site-packages", "dist-packages", "__pycache__"}
_JSONL = (".jsonl", ".jsonl.gz", ".json.gz", ".ndjson")


@dataclass(frozen=True, slots=True)
class Document:
    """A text and the name that decides its split: a relative path, or file and row."""

    name: str
    text: str


def hash_unit(name: str, salt: str = "") -> float:
    """A number in [0, 1) that depends on `name` and `salt` alone."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8, salt=salt.encode()).digest()
    return int.from_bytes(digest, "big") / 2**64


def split_of(name: str, validation_share: float, test_share: float) -> str:
    """The split of a document: stable under added documents, other machines and other orders."""
    place = hash_unit(name)
    if place < validation_share:
        return "validation"
    return "test" if place < validation_share + test_share else "train"


def valid_text(text: str) -> str:
    """`text` without lone surrogates, which JSON escapes can hold and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode("utf-8")
    return text


class Shard(ABC):
    """A part of a source that can be read by itself, in any process.

    Attributes:
        size: about how many bytes it holds, for progress and sampling.
    """

    size: int

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """The documents, in order."""

    @abstractmethod
    def identity(self) -> str:
        """What would change if the input had changed since the shards were cut."""


@dataclass(frozen=True, slots=True)
class TextShard(Shard):
    """Text files, one document each, named by their path below `root`. Files that are not UTF-8 are left out."""

    root: str
    paths: tuple[str, ...]
    size: int

    def documents(self) -> Iterator[Document]:
        """See `Shard.documents`."""
        for path in self.paths:
            try:
                # newline="" keeps \r: a model of text should see what is in the file.
                with open(os.path.join(self.root, path), encoding="utf-8", newline="") as file:
                    text = file.read()
            except (UnicodeDecodeError, PermissionError):
                continue
            yield Document(path, text)

    def identity(self) -> str:
        """See `Shard.identity`."""
        return json.dumps([self.root, self.paths, self.size])


@dataclass(frozen=True, slots=True)
class JsonlShard(Shard):
    """The lines of a jsonl file that begin in bytes `start` to `stop`, named by file and place; all of a gzip file."""

    path: str
    start: int
    stop: int
    size: int
    text_key: str

    def documents(self) -> Iterator[Document]:
        """See `Shard.documents`."""
        with gzip.open(self.path) if self.path.endswith(".gz") else open(self.path, "rb") as file:
            place = self.start
            if place:
                # A line belongs to the shard that its first byte lies in: step back one byte, to see whether one
                # begins here.
                file.seek(place - 1)
                place += len(file.readline()) - 1
            while place < self.stop and (line := file.readline()):
                if line.strip():
                    yield Document(f"{Path(self.path).name}:{place}", self._text(line, place))
                place += len(line)

    def _text(self, line: bytes, place: int) -> str:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ConfigError(
                f"{self.path}, byte {place}: not a JSON object a line ({error}); correct or remove the line"
            ) from error
        text = record.get(self.text_key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            keys = ", ".join(sorted(map(str, record))) if isinstance(record, dict) else "none, it is not an object"
            raise ConfigError(
                f"{self.path}, byte {place}: no text under {self.text_key!r}; set text_key to one of its keys: {keys}"
            )
        return text

    def identity(self) -> str:
        """See `Shard.identity`."""
        return json.dumps([self.path, self.start, self.stop, self.size])


@dataclass(frozen=True, slots=True)
class ParquetShard(Shard):
    """A row group of a parquet file; documents are named by file and row."""

    path: str
    group: int
    first_row: int
    size: int
    text_key: str

    def documents(self) -> Iterator[Document]:
        """See `Shard.documents`."""
        import pyarrow.parquet as parquet

        with parquet.ParquetFile(self.path) as file:
            column = file.read_row_group(self.group, columns=[self.text_key]).column(0)
        for row, text in enumerate(column.to_pylist(), self.first_row):
            if text is not None:
                yield Document(f"{Path(self.path).name}:{row}", text)

    def identity(self) -> str:
        """See `Shard.identity`."""
        return json.dumps([self.path, self.group, self.first_row, self.size])


@dataclass(frozen=True, slots=True)
class MemoryShard(Shard):
    """Documents that a stream gave."""

    held: tuple[Document, ...]
    size: int

    def documents(self) -> Iterator[Document]:
        """See `Shard.documents`."""
        return iter(self.held)

    def identity(self) -> str:
        """See `Shard.identity`."""
        return json.dumps([self.held[0].name, len(self.held), self.size])


def stdlib_root() -> str:
    """The directory of this Python's standard library."""
    return sysconfig.get_path("stdlib")


def stdlib_paths(root: str) -> list[str]:
    """Every .py file of the standard library, relative to `root`, sorted."""
    found = []
    for directory, names, files in os.walk(root):
        names[:] = [name for name in names if name not in _SKIPPED_DIRECTORIES]
        found += [os.path.relpath(os.path.join(directory, file), root) for file in files if file.endswith(".py")]
    return sorted(path.replace(os.sep, "/") for path in found)


def shard_bytes(total: int) -> int:
    """How large the shards of an input of `total` bytes are."""
    return min(max(total >> 10, _SMALLEST_SHARD), _LARGEST_SHARD)


def text_shards(root: str, paths: Sequence[str]) -> Iterator[TextShard]:
    """Group files, in the given order, into shards."""
    sizes = [os.path.getsize(os.path.join(root, path)) for path in paths]
    enough = shard_bytes(sum(sizes))
    group: list[str] = []
    size = 0
    for path, of_file in zip(paths, sizes, strict=True):
        group.append(path)
        size += of_file
        if size >= enough:
            yield TextShard(root, tuple(group), size)
            group, size = [], 0
    if group:
        yield TextShard(root, tuple(group), size)


def jsonl_shards(path: str, text_key: str) -> Iterator[JsonlShard]:
    """Cut a jsonl file by bytes; a gzip file is one shard, since it can only be read from its beginning."""
    size = os.path.getsize(path)
    if path.endswith(".gz"):
        yield JsonlShard(path, 0, 1 << 62, size, text_key)
        return
    for start in range(0, size, shard_bytes(size)):
        stop = min(start + shard_bytes(size), size)
        yield JsonlShard(path, start, stop, stop - start, text_key)


def parquet_shards(path: str, text_key: str) -> Iterator[ParquetShard]:
    """Cut a parquet file into its row groups.

    Raises:
        ConfigError: if the file cannot be read or has no such column.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        metadata = parquet.ParquetFile(path).metadata
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(
            f"{path} is not a parquet file that can be read ({error}); download or write it again"
        ) from error
    columns = metadata.schema.names
    if text_key not in columns:
        raise ConfigError(f"{path} has no column {text_key!r}; set text_key to one of: {', '.join(columns)}")
    row = 0
    for group in range(metadata.num_row_groups):
        meta = metadata.row_group(group)
        yield ParquetShard(path, group, row, meta.total_byte_size, text_key)
        row += meta.num_rows


def path_shards(source: str, text_key: str) -> Iterator[Shard]:
    """The shards of a file, a directory (searched for files, hidden ones left out) or a glob, files in sorted order.

    Raises:
        ConfigError: if there are no files.
    """
    source = os.path.abspath(os.path.expanduser(source))
    matches = [source] if os.path.exists(source) else glob.glob(source, recursive=True)
    files: list[str] = []
    for match in matches:
        inside = Path(match).rglob("*") if os.path.isdir(match) else [Path(match)]
        files += [str(path) for path in inside if path.is_file() and not path.name.startswith(".")]
    files = sorted(set(files))
    if not files:
        raise ConfigError(f"{source} holds no files; give a file, directory or glob with documents")
    root = source if os.path.isdir(source) else os.path.commonpath([os.path.dirname(path) for path in files])
    texts = [path for path in files if not path.endswith((*_JSONL, ".parquet"))]
    for path in files:
        if path.endswith(_JSONL):
            yield from jsonl_shards(path, text_key)
        elif path.endswith(".parquet"):
            yield from parquet_shards(path, text_key)
    yield from text_shards(root, [os.path.relpath(path, root) for path in texts])


def open_hub(name: str) -> Any:
    """Stream a Hugging Face dataset from the hub or from this disk.

    Args:
        name: `NAME[:CONFIG][@SPLIT]`; NAME may be a directory, a file, or a directory that `save_to_disk` wrote.

    Raises:
        ConfigError: if there is no such dataset, or the hub cannot be reached.
    """
    import datasets

    name, _, split = name.partition("@")
    name, _, config = name.partition(":")
    split = split or "train"
    try:
        if Path(name, "state.json").is_file() or Path(name, "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(name)
            return (loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded).to_iterable_dataset()
        if Path(name).is_file():
            suffix = Path(name.removesuffix(".gz")).suffix.removeprefix(".")
            builder = {"jsonl": "json", "ndjson": "json", "txt": "text"}.get(suffix, suffix)
            return datasets.load_dataset(builder, data_files={split: name}, split=split, streaming=True)
        return datasets.load_dataset(name, config or None, split=split, streaming=True)
    except Exception as error:  # the hub, HTTP and file layers each raise their own kinds
        reason = (str(error).splitlines() or [""])[0][:300]
        raise ConfigError(
            f"hf:{name} cannot be opened ({type(error).__name__}: {reason}); check the name, config and split "
            f"{split!r}, the network and HF_HUB_OFFLINE, or download it elsewhere and give its directory or files"
        ) from error


def hub_shards(name: str, text_key: str) -> Iterator[MemoryShard]:
    """Read a Hugging Face dataset as a stream of shards; documents are named by their row.

    Raises:
        ConfigError: as `open_hub`; or if a row has no text under `text_key`, or the stream breaks.
    """
    group: list[Document] = []
    size = 0
    for row, record in enumerate(_hub_rows(name)):
        text = record.get(text_key)
        if not isinstance(text, str):
            raise ConfigError(
                f"hf:{name}, row {row}: no text under {text_key!r}; set text_key to one of: {', '.join(record)}"
            )
        group.append(Document(f"row:{row}", text))
        size += len(text)
        if size >= _STREAM_SHARD:
            yield MemoryShard(tuple(group), size)
            group, size = [], 0
    if group:
        yield MemoryShard(tuple(group), size)


def _hub_rows(name: str) -> Iterator[dict[str, Any]]:
    try:
        yield from open_hub(name)
    except ConfigError:
        raise
    except Exception as error:  # what a broken connection or file raises depends on the layer it breaks in
        reason = (str(error).splitlines() or [""])[0][:300]
        raise ConfigError(
            f"hf:{name} broke off ({type(error).__name__}: {reason}); "
            "run the same command again, it continues behind what is done"
        ) from error


def shards(source: str, text_key: str) -> Iterator[Shard]:
    """The shards of any source; see `PrepareConfig.source`."""
    if source == "stdlib":
        root = stdlib_root()
        return text_shards(root, stdlib_paths(root))
    if source.startswith("hf:"):
        return hub_shards(source.removeprefix("hf:"), text_key)
    return path_shards(source, text_key)
