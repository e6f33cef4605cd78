"""Document sources: the standard library's source code, text files, JSON, parquet and Hugging Face datasets.

A source is divided into shards of a few megabytes, whose order and boundaries depend only on the input. Another process
can read a shard by itself, so tokenisation runs in parallel and a killed run continues after its last finished shard. A
document's split follows from a hash of its name, so it depends on neither the machine nor the number of workers.

Text is decoded as UTF-8 and otherwise unchanged, including line ends and byte-order marks. Input that is not a readable
document becomes a `LeftOut`, which preparation counts.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.data.files import COMPRESSED, EMPTY_FILES, DamagedFile, LeftOut, find_files, reading, stamp
from trainer.errors import ConfigError

# Small inputs are divided finely, to keep all workers busy. Large inputs are divided coarsely, because each shard
# occupies two files until the end.
_SMALLEST_SHARD = 1 << 20
_LARGEST_SHARD = 1 << 26
_STREAM_SHARD = 1 << 23
_SKIPPED_DIRECTORIES = {"site-packages", "dist-packages", "__pycache__"}
_LINES = (".jsonl", ".ndjson")
# Bytes of a .json file that are examined to tell records from text, and rows of a stream that may lack text.
_HEAD = 1 << 24
_ROWS_WITHOUT_TEXT = 1000

NULL, MISSING, NOT_TEXT = "rows whose text is null", "rows without the text key", "rows whose text is not a string"
ROW_NOT_UTF8, FILE_NOT_UTF8 = "rows that are not UTF-8", "files that are not UTF-8"
NOT_COMPRESSED = "files that cannot be decompressed"


@dataclass(frozen=True, slots=True)
class Document:
    """A text, and the name whose hash decides its split: a relative path, or file and row."""

    name: str
    text: str


def hash_unit(name: str, salt: str = "") -> float:
    """A number in [0, 1) that depends only on `name` and `salt`."""
    # hash() is salted per process, and so would give another split on every run.
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8, salt=salt.encode()).digest()
    return int.from_bytes(digest, "big") / 2**64


def split_of(name: str, validation_share: float, test_share: float) -> str:
    """The split of a document. Adding documents, changing the machine or the order does not move it."""
    place = hash_unit(name)
    if place < validation_share:
        return "validation"
    return "test" if place < validation_share + test_share else "train"


def valid_text(text: str) -> str:
    """`text` with lone surrogates replaced: JSON escapes can express them, UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode("utf-8")
    return text


class Shard(ABC):
    """A part of a source that any process can read by itself.

    Attributes:
        size: approximate number of bytes, for progress and sampling.
    """

    size: int

    @abstractmethod
    def records(self) -> Iterator[Document | LeftOut]:
        """Yield the documents in order, and a `LeftOut` in place of each skipped one.

        Raises:
            ConfigError: if the input is damaged, or contains no text at all.
        """

    def documents(self) -> Iterator[Document]:
        """Yield the documents in order."""
        return (record for record in self.records() if isinstance(record, Document))

    @abstractmethod
    def identity(self) -> str:
        """A string that changes when the input has changed since it was divided into shards."""


@dataclass
class Rows:
    """The rule for rows of all kinds of sources: a string, or UTF-8 bytes, is a document; anything else is left out.

    Attributes:
        source: name for messages.
        text_key: key or column of the text.
        texts: number of rows that were documents.
    """

    source: str
    text_key: str
    texts: int = 0
    _unfit: str | None = field(default=None, init=False)

    def take(self, name: str, row: Any) -> Document | LeftOut:
        """The document in the row called `name`, or the reason why there is none."""
        missing = not isinstance(row, Mapping) or self.text_key not in row
        text = None if missing else row[self.text_key]
        if isinstance(text, bytes):
            try:
                text = text.decode("utf-8")
            except UnicodeDecodeError:
                return LeftOut(name, ROW_NOT_UTF8)
        if isinstance(text, str):
            self.texts += 1
            return Document(name, text)
        if text is None and not missing:
            return LeftOut(name, NULL)
        if self._unfit is None:
            keys = ", ".join(map(str, row)) if isinstance(row, Mapping) else "none, it is not an object"
            what = "no text" if missing else f"{type(text).__name__} and not text"
            self._unfit = f"{name} has {what} under {self.text_key!r}; set text_key to one of its keys: {keys}"
        return LeftOut(name, MISSING if missing else NOT_TEXT)

    def require_text(self) -> None:
        """Refuse a source whose text is under another key. Null rows do not count, because they do not show where the
        text is.

        Raises:
            ConfigError: if no row so far contained text, and some contained something else.
        """
        if not self.texts and self._unfit is not None:
            raise ConfigError(f"{self.source}: no row holds text: {self._unfit}")


@dataclass(frozen=True, slots=True)
class TextShard(Shard):
    """Text files, one document per file, named by their path relative to `root`."""

    root: str
    paths: tuple[str, ...]
    size: int
    stamp: str

    def records(self) -> Iterator[Document | LeftOut]:
        """See `Shard.records`."""
        for path in self.paths:
            try:
                with reading(os.path.join(self.root, path)) as file:
                    # Binary mode: text mode would turn \r into \n, and the model should see the file's own bytes.
                    text = file.read().decode("utf-8")
            except UnicodeDecodeError:
                yield LeftOut(path, FILE_NOT_UTF8)
            except DamagedFile:
                yield LeftOut(path, NOT_COMPRESSED)
            else:
                yield Document(path, text)

    def identity(self) -> str:
        """See `Shard.identity`."""
        return json.dumps([self.root, self.paths, self.stamp])


@dataclass(frozen=True, slots=True)
class JsonlShard(Shard):
    """The lines of a jsonl file that begin in bytes `start` to `stop`, named by file and offset; all if compressed."""

    path: str
    start: int
    stop: int
    size: int
    text_key: str
    stamp: str

    def records(self) -> Iterator[Document | LeftOut]:
        """See `Shard.records`."""
        rows = Rows(self.path, self.text_key)
        with reading(self.path) as file:
            place = self.start
            if place:
                # A line belongs to the shard that contains its first byte. Start one byte early: if that byte ends a
                # line, a new line begins here.
                file.seek(place - 1)
                place += len(file.readline()) - 1
            while place < self.stop and (line := file.readline()):
                if line.strip():
                    yield self._take(rows, line, place)
                place += len(line)
        # Only the beginning of the file decides whether text_key is wrong, so the result does not depend on shard
        # bounds.
        if self.start == 0:
            rows.require_text()

    def _take(self, rows: Rows, line: bytes, place: int) -> Document | LeftOut:
        name = f"{Path(self.path).name}:{place}"
        try:
            return rows.take(name, json.loads(line.decode("utf-8-sig")))
        except UnicodeDecodeError:
            return LeftOut(name, ROW_NOT_UTF8)
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"{self.path}, byte {place}: not a JSON object a line ({error}); correct or remove the line"
            ) from error

    def identity(self) -> str:
        """See `Shard.identity`."""
        return json.dumps([self.path, self.start, self.stop, self.stamp])


@dataclass(frozen=True, slots=True)
class JsonArrayShard(Shard):
    """A .json file that is an array of rows, or a single row, named by file and index. It is read into memory whole."""

    path: str
    size: int
    text_key: str
    stamp: str

    def records(self) -> Iterator[Document | LeftOut]:
        """See `Shard.records`."""
        rows = Rows(self.path, self.text_key)
        with reading(self.path) as file:
            try:
                content = json.loads(file.read())
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{self.path} is not whole JSON ({error}); correct or remove the file") from error
        for number, row in enumerate(content if isinstance(content, list) else [content]):
            yield rows.take(f"{Path(self.path).name}:{number}", row)
        rows.require_text()

    def identity(self) -> str:
        """See `Shard.identity`."""
        return json.dumps([self.path, self.stamp])


@dataclass(frozen=True, slots=True)
class ParquetShard(Shard):
    """A row group of a parquet file; documents are named by file and row."""

    path: str
    group: int
    first_row: int
    size: int
    text_key: str
    stamp: str

    def records(self) -> Iterator[Document | LeftOut]:
        """See `Shard.records`."""
        import pyarrow
        import pyarrow.parquet as parquet

        rows = Rows(self.path, self.text_key)
        try:
            with parquet.ParquetFile(self.path) as file:
                column = file.read_row_group(self.group, columns=[self.text_key]).column(0)
                try:
                    texts = column.to_pylist()
                except UnicodeDecodeError:
                    # As bytes, so that each row is decoded, or left out, by itself.
                    texts = column.cast(pyarrow.large_binary()).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise ConfigError(
                f"{self.path}, row group {self.group} cannot be read ({error}); download or write it again"
            ) from error
        for row, text in enumerate(texts, self.first_row):
            yield rows.take(f"{Path(self.path).name}:{row}", {self.text_key: text})

    def identity(self) -> str:
        """See `Shard.identity`."""
        return json.dumps([self.path, self.group, self.first_row, self.stamp])


@dataclass(frozen=True, slots=True)
class MemoryShard(Shard):
    """Records that are already in memory: rows of a stream, or files that were left out."""

    held: tuple[Document | LeftOut, ...]
    size: int

    def records(self) -> Iterator[Document | LeftOut]:
        """See `Shard.records`."""
        return iter(self.held)

    def identity(self) -> str:
        """See `Shard.identity`."""
        digest = hashlib.blake2b(digest_size=16)
        for record in self.held:
            digest.update(repr(record).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def stdlib_root() -> str:
    """Directory of this Python's standard library."""
    return sysconfig.get_path("stdlib")


def stdlib_paths(root: str) -> list[str]:
    """All .py files of the standard library, relative to `root`, sorted."""
    found = []
    for directory, names, files in os.walk(root):
        # Assigning to the slice makes os.walk skip the directories.
        names[:] = [name for name in names if name not in _SKIPPED_DIRECTORIES]
        found += [os.path.relpath(os.path.join(directory, file), root) for file in files if file.endswith(".py")]
    return sorted(path.replace(os.sep, "/") for path in found)


def shard_bytes(total: int) -> int:
    """Shard size in bytes for an input of `total` bytes."""
    return min(max(total >> 10, _SMALLEST_SHARD), _LARGEST_SHARD)


def text_shards(root: str, paths: Sequence[str]) -> Iterator[TextShard]:
    """Group files into shards, in the given order."""
    sizes = [os.path.getsize(os.path.join(root, path)) for path in paths]
    enough = shard_bytes(sum(sizes))
    group: list[str] = []
    size = 0

    def shard() -> TextShard:
        return TextShard(root, tuple(group), size, stamp([os.path.join(root, path) for path in group]))

    for path, of_file in zip(paths, sizes, strict=True):
        group.append(path)
        size += of_file
        if size >= enough:
            yield shard()
            group, size = [], 0
    if group:
        yield shard()


def jsonl_shards(path: str, text_key: str) -> Iterator[JsonlShard]:
    """Divide a jsonl file by bytes. A compressed file is one shard, because it can only be read from its beginning."""
    size, mark = os.path.getsize(path), stamp([path])
    if path.lower().endswith(COMPRESSED):
        yield JsonlShard(path, 0, 1 << 62, size, text_key, mark)
        return
    for start in range(0, size, shard_bytes(size)):
        stop = min(start + shard_bytes(size), size)
        yield JsonlShard(path, start, stop, stop - start, text_key, mark)


def parquet_shards(path: str, text_key: str) -> Iterator[ParquetShard]:
    """Divide a parquet file into its row groups.

    Raises:
        ConfigError: if the file is unreadable, or has no text column of that name.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            metadata, schema = file.metadata, file.schema_arrow
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(
            f"{path} is not a parquet file that can be read ({error}); download or write it again"
        ) from error
    texts = ", ".join(column.name for column in schema if _holds_text(column.type))
    way_out = f"set text_key to one of: {texts}" if texts else "none of its columns does: write one of strings"
    if text_key not in schema.names:
        # A column of nulls has no type: it may hold text in other files of the source.
        raise ConfigError(f"{path} has no column {text_key!r} that holds text; {way_out}")
    kind = schema.field(schema.names.index(text_key)).type
    if not _holds_text(kind) and not pyarrow.types.is_null(kind):
        raise ConfigError(f"{path}: column {text_key!r} is {kind} and holds no text; {way_out}")
    mark, row = stamp([path]), 0
    for group in range(metadata.num_row_groups):
        meta = metadata.row_group(group)
        yield ParquetShard(path, group, row, meta.total_byte_size, text_key, mark)
        row += meta.num_rows


def _holds_text(kind: Any) -> bool:
    """Whether an Arrow type holds strings, or bytes, which are decoded as UTF-8."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return _holds_text(kind.value_type)
    checks = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "fixed_size_binary")
    return any(getattr(types, f"is_{check}", lambda _: False)(kind) for check in checks)


def _json_kind(path: str, text_key: str) -> str:
    """How to read a .json file: rows as `lines`, an `array` of rows (or a single row), or as one `text`."""
    try:
        with reading(path) as file:
            head = file.read(_HEAD).decode("utf-8", "ignore").removeprefix("\ufeff").lstrip()
    except DamagedFile:
        return "text"
    array = head.startswith("[")
    head = head[1:].lstrip() if array else head
    try:
        row, end = json.JSONDecoder().raw_decode(head)
    except (ValueError, RecursionError):
        return "text"
    if not isinstance(row, dict):
        return "text"
    in_a_line = "\n" not in head[:end]
    # A single object may be any document. Several objects are rows, even if their text is under another key.
    several = array or (in_a_line and head[end:].lstrip().startswith("{"))
    if text_key not in row and not several:
        return "text"
    return "lines" if in_a_line and not array else "array"


def _records_kind(path: str, text_key: str) -> str:
    """The kind of a file, by its name and, for .json, its beginning."""
    name = whole = path.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    if name.endswith(".parquet"):
        return "parquet" if name == whole else "text"
    if name.endswith(_LINES):
        return "lines"
    return _json_kind(path, text_key) if name.endswith(".json") else "text"


def path_shards(source: str, text_key: str) -> Iterator[Shard]:
    """Yield the shards of a file, a directory or a glob, files in sorted order.

    Raises:
        ConfigError: if there are no files.
    """
    files, left_out = find_files(source)
    left_out += [LeftOut(path, EMPTY_FILES) for path in files if not os.path.getsize(path)]
    source = os.path.abspath(os.path.expanduser(source))
    root = source if os.path.isdir(source) else os.path.commonpath([os.path.dirname(path) for path in files])
    texts = []
    for path in files:
        kind = _records_kind(path, text_key) if os.path.getsize(path) else "empty"
        if kind == "lines":
            yield from jsonl_shards(path, text_key)
        elif kind == "array":
            yield JsonArrayShard(path, os.path.getsize(path), text_key, stamp([path]))
        elif kind == "parquet":
            yield from parquet_shards(path, text_key)
        elif kind == "text":
            texts.append(os.path.relpath(path, root))
    yield from text_shards(root, texts)
    if left_out:
        yield MemoryShard(tuple(left_out), 0)


def open_hub(name: str) -> Any:
    """Stream a Hugging Face dataset from the hub or from the local disk.

    Args:
        name: `NAME[:CONFIG][@SPLIT]`; NAME may also be a directory, a file, or a directory written by `save_to_disk`.

    Raises:
        ConfigError: if there is no such dataset, or the hub is unreachable.
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
            suffix = Path(name.lower().removesuffix(".gz").removesuffix(".zst")).suffix.removeprefix(".")
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
    """Yield shards of a Hugging Face dataset as it is streamed; documents are named by their row.

    Raises:
        ConfigError: as in `open_hub`; or if its rows have no text under `text_key`, or the stream breaks.
    """
    group: list[Document | LeftOut] = []
    rows = Rows(f"hf:{name}", text_key)
    size = 0
    for number, row in enumerate(_hub_rows(name)):
        record = rows.take(f"row:{number}", row)
        group.append(record)
        size += len(record.text) if isinstance(record, Document) else 0
        if number + 1 == _ROWS_WITHOUT_TEXT:
            rows.require_text()
        if size >= _STREAM_SHARD:
            yield MemoryShard(tuple(group), size)
            group, size = [], 0
    rows.require_text()
    if group:
        yield MemoryShard(tuple(group), size)


def _hub_rows(name: str) -> Iterator[dict[str, Any]]:
    try:
        yield from open_hub(name)
    except ConfigError:
        raise
    except Exception as error:  # the exception of a broken connection or file depends on the layer that broke
        reason = (str(error).splitlines() or [""])[0][:300]
        raise ConfigError(
            f"hf:{name} broke off ({type(error).__name__}: {reason}); "
            "run the same command again; it continues where it stopped"
        ) from error


def shards(source: str, text_key: str) -> Iterator[Shard]:
    """The shards of any source; see `PrepareConfig.source`."""
    if source == "stdlib":
        root = stdlib_root()
        return text_shards(root, stdlib_paths(root))
    if source.startswith("hf:"):
        return hub_shards(source.removeprefix("hf:"), text_key)
    return path_shards(source, text_key)
