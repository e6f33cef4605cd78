"""The checkpoint format of both engines: parameters, Adam's moments and router buffers, in the parameters' own shapes.

A rank owns ranges of flattened parameters: the elements start .. start + n of a parameter, or of its tensor- or
expert-parallel shard. Each range is a few boxes of the unflattened parameter, and torch.distributed.checkpoint stores
boxes and reads them back under any other sharding. Every rank writes ranges that no other rank writes, into one file of
its own. It reads its ranges from whichever files hold them:

    __0_0.distcp        of rank 0: its boxes in sequence, each in the format of torch.save
    .metadata           the file and offset of each box of each parameter, in torch's format
    facts.json          format version, number of ranks, Adam's step
    random_00000.json   of rank 0: its RNG states

The names are model.NAME for a parameter in the model's dtype, optimizer.exp_avg.NAME and optimizer.exp_avg_sq.NAME for
the moments, and optimizer.main.NAME for the float32 main parameter, which exists only if training is not in float32.

No rank holds, sends or reads more of the state than its ranges and one box. Rank 0 collects the positions of all boxes;
ranks resend them only if they changed since the previous save. Reading needs no communication and runs no code from a
file: .metadata is a pickle, and the reader accepts only the names of torch's metadata classes in it.
"""

import io
import json
import math
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from trainer.engines.base import PendingSave
from trainer.engines.random_state import random_state, set_random_state
from trainer.errors import ConfigError
from trainer.stored.checksums import digest

FORMAT = 1
MODEL, MAIN, MOMENTS = "model.", "optimizer.main.", ("exp_avg", "exp_avg_sq")
_METADATA, _FACTS = ".metadata", "facts.json"
# A reader loads a box as a whole, even if it needs only a part of it. This limits a box to 64 MB in float32.
_MOST_ELEMENTS = 1 << 24

Box = tuple[tuple[int, ...], tuple[int, ...]]


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Cover the elements start .. stop of a row-major tensor with (offsets, sizes) boxes, in the elements' order."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    # At most three groups: the end of a row, whole rows as one box, and the start of a row. Partial rows recurse.
    row = math.prod(shape[1:])
    first_whole, after_whole = -(-start // row), stop // row

    def within(index: int, low: int, high: int) -> Iterator[Box]:
        for offsets, sizes in boxes(shape[1:], low - index * row, high - index * row):
            yield (index, *offsets), (1, *sizes)

    # The range lies inside one row, so no whole row can be a box.
    if first_whole > after_whole:
        yield from within(after_whole, start, stop)
        return
    yield from within(first_whole - 1, start, first_whole * row)
    if first_whole < after_whole:
        yield (first_whole, *[0] * (len(shape) - 1)), (after_whole - first_whole, *shape[1:])
    yield from within(after_whole, after_whole * row, stop)


def small_boxes(shape: Sequence[int], start: int, stop: int, most: int | None = None) -> Iterator[Box]:
    """Like `boxes`, but with at most `most` elements per box. Splits between rows if a row fits into one box."""
    most = _MOST_ELEMENTS if most is None else most
    step = most
    for dim in range(1, len(shape) + 1):
        row = math.prod(shape[dim:])
        if row <= most:
            step = most // row * row
            break
    while start < stop:
        # Multiples of `step` lie between rows, so that few boxes are parts of a row.
        end = min(stop, (start // step + 1) * step)
        yield from boxes(shape, start, end)
        start = end


@dataclass(frozen=True)
class Shard:
    """The shard of a parameter on a tensor- or expert-parallel rank. A replicated parameter is one whole shard.

    Attributes:
        shape: Shape of the shard.
        offsets: First index of the shard in the whole parameter, per axis.
        whole: Shape of the whole parameter.
    """

    shape: torch.Size
    offsets: tuple[int, ...]
    whole: torch.Size

    @staticmethod
    def of(part: Tensor, axis: int | None = None, rank: int = 0, ranks: int = 1) -> "Shard":
        """Describe the `rank`-th of `ranks` equal shards along `axis`. With axis None the tensor is whole."""
        sizes = [size * ranks if dim == axis else size for dim, size in enumerate(part.shape)]
        offsets = tuple(size * rank if dim == axis else 0 for dim, size in enumerate(part.shape))
        return Shard(part.shape, offsets, torch.Size(sizes))


class Piece:
    """A range of a flattened shard, in memory.

    Args:
        shard: The shard.
        start: First element of the range in the flattened shard.
        values: The range's elements [n], contiguous; n = 0 if the rank owns none. Reading writes into it.
    """

    def __init__(self, shard: Shard, start: int, values: Tensor) -> None:
        assert values.dim() == 1 and values.is_contiguous(), "boxes are views of it"
        self.shard, self.start, self.values = shard, start, values
        self._views: dict[torch.Size, Tensor] = {}
        done = 0
        for offsets, sizes in small_boxes(shard.shape, start, start + values.numel()):
            count = math.prod(sizes)
            within_whole = torch.Size(map(sum, zip(shard.offsets, offsets, strict=True)))
            self._views[within_whole] = values[done : done + count].view(sizes)
            done += count

    @staticmethod
    def of(tensor: Tensor) -> "Piece":
        """Return all of a contiguous tensor that is not sharded, as a piece."""
        return Piece(Shard.of(tensor), 0, tensor.detach().view(-1))

    def copy(self) -> "Piece":
        """Return a copy of the range in new host memory."""
        return Piece(self.shard, self.start, self.values.detach().to("cpu", copy=True))

    def share(self, rank: int, ranks: int) -> "Piece":
        """Return the `rank`-th of `ranks` nearly equal parts of a range that all these ranks hold."""
        first, end = (self.values.numel() * part // ranks for part in (rank, rank + 1))
        return Piece(self.shard, self.start + first, self.values[first:end])

    def view(self, index: MetadataIndex) -> Tensor:
        """Return the values of the box at a checkpoint index."""
        assert index.offset is not None
        return self._views[index.offset]

    def chunks(self) -> list[ChunkStorageMetadata]:
        """List the boxes in torch.distributed.checkpoint's form."""
        return [ChunkStorageMetadata(offsets, view.size()) for offsets, view in self._views.items()]

    def write_items(self, name: str) -> list[WriteItem]:
        """List the boxes as items to write."""
        properties = TensorProperties(dtype=self.values.dtype)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shard.whole),
            )
            for chunk in self.chunks()
        ]


def stored(name: str, model: Piece, main: Piece | None, moments: Mapping[str, Piece]) -> dict[str, Piece]:
    """Name a parameter's pieces as in a checkpoint. `main` is None if the parameter is its own main parameter."""
    pieces = {MODEL + name: model} | {f"optimizer.{key}.{name}": moments[key] for key in MOMENTS}
    return pieces if main is None else pieces | {MAIN + name: main}


class _Planner(DefaultSavePlanner):
    """A save planner that looks values up in pieces."""

    def __init__(self, pieces: Mapping[str, Piece]) -> None:
        super().__init__(flatten_state_dict=False)
        self.pieces = pieces

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.pieces[index.fqn].view(index)


@dataclass(frozen=True)
class _Placed:
    """The boxes that a rank has written, and their positions in its file."""

    items: list[WriteItem]
    results: list[WriteResult]


@dataclass(frozen=True)
class _Report:
    """A rank's report of a save to rank 0.

    Attributes:
        digests: SHA-256 of the files that the rank has written.
        placed: Positions of the boxes in them. None if they equal those of the previous save.
        error: The error message, or None.
    """

    digests: dict[str, str]
    placed: _Placed | None
    error: str | None


class Writer:
    """Writes the checkpoints of one engine, one at a time.

    Args:
        rank: Rank of this process.
        ranks: Number of ranks.
        group: Group over which ranks report to rank 0, with CPU tensors. A save in a thread needs a group that
            training does not use.
    """

    def __init__(self, rank: int = 0, ranks: int = 1, group: dist.ProcessGroup | None = None) -> None:
        self._rank, self._ranks, self._group = rank, ranks, group
        self._placed: _Placed | None = None
        # Known on rank 0 only: the positions of all ranks' boxes.
        self._all_placed: list[_Placed] = []
        self._metadata: Metadata | None = None

    def write(self, pieces: Mapping[str, Piece], adam_step: int, directory: Path) -> dict[str, str]:
        """Write this rank's pieces into an existing empty directory. Every rank calls this.

        Returns:
            On rank 0 the SHA-256 of every file in the directory by name, after all were flushed to disk. Empty on the
            other ranks.

        Raises:
            Exception: this rank's write failed. If only other ranks failed, a RuntimeError that says so.
        """
        return self._write(pieces, self._small_files(adam_step), directory)

    def begin(self, pieces: Mapping[str, Piece], adam_step: int, directory: Path) -> PendingSave:
        """Copy the pieces now and return a save that writes the copies later. Every rank calls both."""
        copies = {name: piece.copy() for name, piece in pieces.items()}
        return PendingSave(partial(self._write, copies, self._small_files(adam_step), directory))

    def _small_files(self, adam_step: int) -> dict[str, str]:
        files = {_random_file(self._rank): json.dumps(random_state())}
        if self._rank == 0:
            facts = {"format": FORMAT, "world_size": self._ranks, "adam_step": adam_step}
            files[_FACTS] = json.dumps(facts) + "\n"
        return files

    def _write(self, pieces: Mapping[str, Piece], files: dict[str, str], directory: Path) -> dict[str, str]:
        placed, digests, failure = None, {}, None
        try:
            placed = self._write_pieces(pieces, directory)
            for name, text in files.items():
                _write_file(directory / name, text.encode())
            names = {result.storage_data.relative_path for result in placed.results} | files.keys()
            digests = {name: digest(directory / name) for name in sorted(names)}
        # Every rank must reach the collectives below, so an error is reported first and raised afterwards.
        except Exception as error:
            failure = error
        changed = placed if placed != self._placed else None
        message = None if failure is None else f"{type(failure).__name__}: {failure}"
        reports = self._gather(_Report(digests, changed, message))
        all_digests, message = self._finish(reports, directory) if reports is not None else ({}, None)
        message = self._broadcast(message)
        if failure is not None:
            raise failure
        if message is not None:
            raise RuntimeError(f"{directory} could not be written: {message}")
        # Set after success only, so that the save after a failed one sends all positions again.
        self._placed = placed
        return all_digests

    def _write_pieces(self, pieces: Mapping[str, Piece], directory: Path) -> _Placed:
        """Write the boxes into this rank's file, and flush it to disk."""
        items = [item for name, piece in pieces.items() for item in piece.write_items(name)]
        if not items:
            return _Placed([], [])
        # No copy-ahead: it would create a CUDA stream, and the writing thread would use the first GPU.
        writer = FileSystemWriter(directory, per_thread_copy_ahead=0)
        # The writer derives file names from the plans' positions, so empty plans stand in for earlier ranks.
        plan = writer.prepare_global_plan([SavePlan([])] * self._rank + [SavePlan(items)])[self._rank]
        results = writer.write_data(plan, _Planner(pieces)).wait()
        return _Placed(items, results)

    def _finish(self, reports: list[_Report], directory: Path) -> tuple[dict[str, str], str | None]:
        """Write the metadata, on rank 0. Return the digests of all files, or none and an error message."""
        failed = [f"rank {rank}: {report.error}" for rank, report in enumerate(reports) if report.error is not None]
        if failed:
            return {}, "; ".join(failed)
        try:
            self._learn(reports)
            assert self._metadata is not None
            FileSystemWriter(directory).finish(self._metadata, [placed.results for placed in self._all_placed])
            digests = {name: value for report in reports for name, value in report.digests.items()}
            return digests | {_METADATA: digest(directory / _METADATA)}, None
        except Exception as error:
            return {}, f"rank 0: {type(error).__name__}: {error}"

    def _learn(self, reports: list[_Report]) -> None:
        """Update rank 0's positions of all boxes.

        Raises:
            ValueError: no rank, or more than one, has written some elements of a parameter.
        """
        if all(report.placed is None for report in reports):
            return
        known = self._all_placed or [_Placed([], [])] * len(reports)
        placed = [new.placed or old for new, old in zip(reports, known, strict=True)]
        plans = [SavePlan(part.items) for part in placed]
        # torch checks the coverage only for more than one plan, hence the empty plan. It drops duplicates silently.
        kept, metadata = DefaultSavePlanner(flatten_state_dict=False).create_global_plan([*plans, SavePlan([])])
        if sum(len(plan.items) for plan in kept) != sum(len(plan.items) for plan in plans):
            raise ValueError("two ranks have written the same part of a parameter")
        self._all_placed, self._metadata = placed, metadata

    def _gather(self, report: _Report) -> list[_Report] | None:
        """Return all ranks' reports on rank 0, and None on the others."""
        if self._ranks == 1:
            return [report]
        reports: list[Any] | None = [None] * self._ranks if self._rank == 0 else None
        dist.gather_object(report, reports, group=self._group, group_dst=0)
        return reports

    def _broadcast(self, message: str | None) -> str | None:
        holder = [message]
        if self._ranks > 1:
            dist.broadcast_object_list(holder, group=self._group, group_src=0)
        return holder[0]


class Reader:
    """Reads a checkpoint's state directory, whichever layout wrote it, in one process or on each of many ranks.

    Attributes:
        adam_step: Number of updates that Adam has made.
        stored: dtypes, shapes and boxes of the parameters and moments, by their names in the checkpoint.

    Raises:
        ConfigError: an earlier or later version wrote the checkpoint.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # Earlier versions wrote no facts.json.
        facts = json.loads((directory / _FACTS).read_text()) if (directory / _FACTS).is_file() else {}
        if facts.get("format") != FORMAT:
            found = facts.get("format", "of an earlier version")
            raise ConfigError(
                f"{directory.parent} has the checkpoint format {found}, and this version reads format {FORMAT}; use "
                "the version that wrote it"
            )
        self.adam_step: int = facts["adam_step"]
        self._saved_ranks: int = facts["world_size"]
        metadata = read_metadata(directory)
        self._places = metadata.storage_data
        self.stored: dict[str, TensorStorageMetadata] = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def main_name(self, name: str) -> str:
        """Return the checkpoint's name of a parameter's float32 values, the ones that Adam updates."""
        return MAIN + name if MAIN + name in self.stored else MODEL + name

    def optimizer_state(self, name: str, main: Piece, moments: Mapping[str, Piece]) -> dict[str, Piece]:
        """Name a parameter's optimizer state as in this checkpoint, for `read`.

        A parameter that was frozen has no moments there. The given moments then keep their values, zero.
        """
        stored = {f"optimizer.{key}.{name}": moments[key] for key in MOMENTS}
        return {self.main_name(name): main} | {key: piece for key, piece in stored.items() if key in self.stored}

    def read(self, pieces: Mapping[str, Piece]) -> None:
        """Fill the pieces. Boxes that do not overlap with them are not read.

        Raises:
            ConfigError: the checkpoint lacks a parameter, or holds it in another shape.
        """
        wanted: dict[MetadataIndex, list[ReadItem]] = {}
        for name, piece in pieces.items():
            for item in self._read_items(name, piece):
                wanted.setdefault(item.storage_index, []).append(item)
        # In file order, each box once.
        by_place = sorted(wanted, key=lambda index: (self._places[index].relative_path, self._places[index].offset))
        for index in by_place:
            box = self._read_box(index)
            for item in wanted[index]:
                target = pieces[item.dest_index.fqn].view(item.dest_index)
                target[_slices(item.dest_offsets, item.lengths)].copy_(box[_slices(item.storage_offsets, item.lengths)])

    def _read_items(self, name: str, piece: Piece) -> list[ReadItem]:
        entry = self.stored.get(name)
        if entry is None or entry.size != piece.shard.whole:
            found = "lacks it" if entry is None else f"has {list(entry.size)}"
            raise ConfigError(
                f"{self._directory.parent} is of another model: {name} is {list(piece.shard.whole)} here, and the "
                f"checkpoint {found}; choose another checkpoint, or the model that it was made with"
            )
        items = create_read_items_for_chunk_list(name, entry, piece.chunks())
        if sum(math.prod(item.lengths) for item in items) != piece.values.numel():
            raise ConfigError(f"{self._directory.parent} does not hold all of {name}; choose another checkpoint")
        return items

    def _read_box(self, index: MetadataIndex) -> Tensor:
        place = self._places[index]
        with (self._directory / place.relative_path).open("rb") as stream:
            stream.seek(place.offset)
            content = io.BytesIO(stream.read(place.length))
        # weights_only: a box must not run code either.
        box: Tensor = torch.load(content, map_location="cpu", weights_only=True)
        return box

    def restore_random_state(self, rank: int, ranks: int) -> None:
        """Set this rank's random generators. With another number of ranks each rank keeps its own seeds."""
        if ranks == self._saved_ranks:
            set_random_state(json.loads((self._directory / _random_file(rank)).read_text()))


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles torch's metadata classes, and refuses every other name that a pickle may contain."""

    # The other names in a pickle of torch's Metadata.
    _OTHERS = (
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("pathlib", "PosixPath"),
    )

    def find_class(self, module: str, name: str) -> Any:
        if module == dcp_metadata.__name__ and isinstance(getattr(dcp_metadata, name, None), type):
            return super().find_class(module, name)
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in self._OTHERS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")


def read_metadata(directory: Path) -> Metadata:
    """Read the positions of a checkpoint's boxes.

    Raises:
        ValueError: the file cannot be read; another version of torch may have written it.
    """
    content = (directory / _METADATA).read_bytes()
    try:
        metadata = _MetadataUnpickler(io.BytesIO(content)).load()
    except Exception as error:
        # A damaged pickle may raise any exception.
        raise ValueError(f"state/{_METADATA} cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(metadata, Metadata) or metadata.storage_data is None:
        raise ValueError(f"state/{_METADATA} does not say where the parameters lie")
    return metadata


def files_of(directory: Path) -> set[str]:
    """Return the names of the files that hold the parameters, according to the checkpoint's metadata.

    Raises:
        ValueError: the metadata cannot be read.
    """
    return {place.relative_path for place in read_metadata(directory).storage_data.values()}


def _slices(offsets: Sequence[int], lengths: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(offset, offset + length) for offset, length in zip(offsets, lengths, strict=True))


def _random_file(rank: int) -> str:
    return f"random_{rank:05d}.json"


def _write_file(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
