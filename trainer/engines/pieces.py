"""The checkpoints of both engines: parameters, Adam's moments and what routers count, in the parameters' own shapes.

A rank has ranges of flattened parameters: the elements start .. start + n of a parameter, or of the part of it that a
tensor- or expert-parallel rank has. Such a range is a few boxes of the parameter as it is shaped, and boxes are what
torch.distributed.checkpoint stores and reads back under any other cut. Every rank writes ranges that no other writes,
into one file of its own, and reads those that it is to have, out of whatever files hold them:

    __0_0.distcp        of rank 0: its boxes, one after the other, each as torch.save writes a tensor
    .metadata           where each box of each parameter lies, in torch's own format
    facts.json          the format's version, the number of ranks, Adam's step
    random_00000.json   of rank 0: its random generators

The names are model.NAME for a parameter as the model reads it, optimizer.exp_avg.NAME and optimizer.exp_avg_sq.NAME,
and optimizer.main.NAME for the float32 copy that is updated, where training is not in float32 itself.

No rank holds, sends or reads more of the state than its ranges and one box. Rank 0 collects where everything lies; what
has not changed since the save before is not sent again. Reading exchanges nothing, and runs no code out of a file:
.metadata is a pickle, of which only names of torch's metadata classes are accepted.
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

from trainer.checksums import digest
from trainer.engines.base import PendingSave
from trainer.engines.random_state import random_state, set_random_state
from trainer.errors import ConfigError

FORMAT = 1
MODEL, MAIN, MOMENTS = "model.", "optimizer.main.", ("exp_avg", "exp_avg_sq")
_METADATA, _FACTS = ".metadata", "facts.json"
# A box is read as a whole, whichever part of it is wanted: 64 MB in float32.
_MOST_ELEMENTS = 1 << 24

Box = tuple[tuple[int, ...], tuple[int, ...]]


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Cover the elements start .. stop of a row-major tensor by (offsets, sizes), in the order of the elements."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    first_whole, after_whole = -(-start // row), stop // row

    def within(index: int, low: int, high: int) -> Iterator[Box]:
        for offsets, sizes in boxes(shape[1:], low - index * row, high - index * row):
            yield (index, *offsets), (1, *sizes)

    if first_whole > after_whole:
        yield from within(after_whole, start, stop)
        return
    yield from within(first_whole - 1, start, first_whole * row)
    if first_whole < after_whole:
        yield (first_whole, *[0] * (len(shape) - 1)), (after_whole - first_whole, *shape[1:])
    yield from within(after_whole, after_whole * row, stop)


def small_boxes(shape: Sequence[int], start: int, stop: int, most: int | None = None) -> Iterator[Box]:
    """As `boxes`, none of more than `most` elements: cut between rows where rows are short enough for it."""
    most = _MOST_ELEMENTS if most is None else most
    step = most
    for dim in range(1, len(shape) + 1):
        row = math.prod(shape[dim:])
        if row <= most:
            step = most // row * row
            break
    while start < stop:
        end = min(stop, (start // step + 1) * step)
        yield from boxes(shape, start, end)
        start = end


@dataclass(frozen=True)
class Shard:
    """The part of a parameter that a tensor- or expert-parallel rank has; all of it where it is not cut.

    Attributes:
        shape: Of the part.
        offsets: Where it begins in the whole.
        whole: Shape of the whole.
    """

    shape: torch.Size
    offsets: tuple[int, ...]
    whole: torch.Size

    @staticmethod
    def of(part: Tensor, axis: int | None = None, rank: int = 0, ranks: int = 1) -> "Shard":
        """The `rank`-th of `ranks` equal parts along `axis`; with None the whole."""
        sizes = [size * ranks if dim == axis else size for dim, size in enumerate(part.shape)]
        offsets = tuple(size * rank if dim == axis else 0 for dim, size in enumerate(part.shape))
        return Shard(part.shape, offsets, torch.Size(sizes))


class Piece:
    """A range of a flattened parameter, or of a flattened shard of it, in memory.

    Args:
        shard: What was flattened.
        start: Where the range begins in it.
        values: The range itself [n], contiguous; n = 0 where the rank owns nothing. Reading writes into it.
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
        """All of a contiguous tensor that is not cut."""
        return Piece(Shard.of(tensor), 0, tensor.detach().view(-1))

    def copy(self) -> "Piece":
        """The same range in host memory of its own."""
        return Piece(self.shard, self.start, self.values.detach().to("cpu", copy=True))

    def share(self, rank: int, ranks: int) -> "Piece":
        """The `rank`-th of `ranks` parts of about the same size, where all have the range."""
        first, end = (self.values.numel() * part // ranks for part in (rank, rank + 1))
        return Piece(self.shard, self.start + first, self.values[first:end])

    def view(self, index: MetadataIndex) -> Tensor:
        """The box that an index of the checkpoint means."""
        assert index.offset is not None
        return self._views[index.offset]

    def chunks(self) -> list[ChunkStorageMetadata]:
        """The boxes, as torch.distributed.checkpoint has them."""
        return [ChunkStorageMetadata(offsets, view.size()) for offsets, view in self._views.items()]

    def write_items(self, name: str) -> list[WriteItem]:
        """The boxes, as they are to be written."""
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
    """What a checkpoint holds of a parameter, by its names; `main` where that is not the parameter itself."""
    pieces = {MODEL + name: model} | {f"optimizer.{key}.{name}": moments[key] for key in MOMENTS}
    return pieces if main is None else pieces | {MAIN + name: main}


class _Planner(DefaultSavePlanner):
    """Finds the values of what is to be written."""

    def __init__(self, pieces: Mapping[str, Piece]) -> None:
        super().__init__(flatten_state_dict=False)
        self.pieces = pieces

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.pieces[index.fqn].view(index)


@dataclass(frozen=True)
class _Placed:
    """The boxes that a rank has written, and where in its file each lies."""

    items: list[WriteItem]
    results: list[WriteResult]


@dataclass(frozen=True)
class _Report:
    """What a rank tells rank 0 of a save.

    Attributes:
        digests: SHA-256 of the files that it has written.
        placed: What is in them; None where all lies as at the save before.
        error: What went wrong, None if nothing did.
    """

    digests: dict[str, str]
    placed: _Placed | None
    error: str | None


class Writer:
    """Writes the checkpoints of one engine, one after the other.

    Args:
        rank: Of this process.
        ranks: All of them.
        group: Over which they tell rank 0 what they have written, on CPU tensors. A save that is written by a thread
            needs one that the training does not use.
    """

    def __init__(self, rank: int = 0, ranks: int = 1, group: dist.ProcessGroup | None = None) -> None:
        self._rank, self._ranks, self._group = rank, ranks, group
        self._placed: _Placed | None = None
        # What rank 0 knows of all ranks.
        self._all_placed: list[_Placed] = []
        self._metadata: Metadata | None = None

    def write(self, pieces: Mapping[str, Piece], adam_step: int, directory: Path) -> dict[str, str]:
        """Write this rank's pieces into an existing empty directory. Every rank calls it.

        Returns:
            On rank 0 the SHA-256 of every file in the directory by its name, all of them flushed to the disk; on the
            others nothing.

        Raises:
            Exception: what went wrong on this rank; on the others that it did.
        """
        return self._write(pieces, self._small_files(adam_step), directory)

    def begin(self, pieces: Mapping[str, Piece], adam_step: int, directory: Path) -> PendingSave:
        """Copy what `write` would write; it is written later. Every rank calls both."""
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
        self._placed = placed
        return all_digests

    def _write_pieces(self, pieces: Mapping[str, Piece], directory: Path) -> _Placed:
        """Write the boxes into this rank's file, flushed to the disk."""
        items = [item for name, piece in pieces.items() for item in piece.write_items(name)]
        if not items:
            return _Placed([], [])
        # Nothing to copy ahead of: a stream of its own would have a thread use the first GPU.
        writer = FileSystemWriter(directory, per_thread_copy_ahead=0)
        # It names files by the places of the plans.
        plan = writer.prepare_global_plan([SavePlan([])] * self._rank + [SavePlan(items)])[self._rank]
        results = writer.write_data(plan, _Planner(pieces)).wait()
        return _Placed(items, results)

    def _finish(self, reports: list[_Report], directory: Path) -> tuple[dict[str, str], str | None]:
        """On rank 0: write down where everything lies. The digests of all files; what went wrong, if anything did."""
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
        """Bring what rank 0 knows up to date.

        Raises:
            ValueError: parts of a parameter were written by no rank, or by two.
        """
        if all(report.placed is None for report in reports):
            return
        known = self._all_placed or [_Placed([], [])] * len(reports)
        placed = [new.placed or old for new, old in zip(reports, known, strict=True)]
        plans = [SavePlan(part.items) for part in placed]
        # Of a single plan torch does not look whether it covers everything.
        kept, metadata = DefaultSavePlanner(flatten_state_dict=False).create_global_plan([*plans, SavePlan([])])
        if sum(len(plan.items) for plan in kept) != sum(len(plan.items) for plan in plans):
            raise ValueError("two ranks have written the same part of a parameter")
        self._all_placed, self._metadata = placed, metadata

    def _gather(self, report: _Report) -> list[_Report] | None:
        """The reports of all ranks, on rank 0."""
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
    """Reads a checkpoint's directory of state, whatever layout wrote it, in one process or on each of many.

    Attributes:
        adam_step: Updates that Adam has made.
        stored: Types, shapes and boxes of the parameters and moments, by their names in the checkpoint.

    Raises:
        ConfigError: an earlier, or later, version wrote it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
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
        """Where the float32 values of a parameter are: those that are updated."""
        return MAIN + name if MAIN + name in self.stored else MODEL + name

    def optimizer_state(self, name: str, main: Piece, moments: Mapping[str, Piece]) -> dict[str, Piece]:
        """What an optimizer has of a parameter, by the names in this checkpoint, for `read`.

        Of a parameter that was frozen there are no moments: they stay as they are, zero.
        """
        stored = {f"optimizer.{key}.{name}": moments[key] for key in MOMENTS}
        return {self.main_name(name): main} | {key: piece for key, piece in stored.items() if key in self.stored}

    def read(self, pieces: Mapping[str, Piece]) -> None:
        """Fill the pieces; what does not overlap with them is not read.

        Raises:
            ConfigError: the checkpoint lacks a parameter, or has it in another shape.
        """
        wanted: dict[MetadataIndex, list[ReadItem]] = {}
        for name, piece in pieces.items():
            for item in self._read_items(name, piece):
                wanted.setdefault(item.storage_index, []).append(item)
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
        box: Tensor = torch.load(content, map_location="cpu", weights_only=True)
        return box

    def restore_random_state(self, rank: int, ranks: int) -> None:
        """Set the random generators, whose state belongs to a rank: another number of ranks keeps its own seeds."""
        if ranks == self._saved_ranks:
            set_random_state(json.loads((self._directory / _random_file(rank)).read_text()))


class _MetadataUnpickler(pickle.Unpickler):
    """Makes what torch's metadata consists of, and refuses everything else that a pickle could name."""

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
    """Where the boxes of a checkpoint's parameters lie.

    Raises:
        ValueError: they cannot be read: another version of torch may have written them.
    """
    content = (directory / _METADATA).read_bytes()
    try:
        metadata = _MetadataUnpickler(io.BytesIO(content)).load()
    except Exception as error:
        # A pickle may raise whatever its instructions meet with.
        raise ValueError(f"state/{_METADATA} cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(metadata, Metadata) or metadata.storage_data is None:
        raise ValueError(f"state/{_METADATA} does not say where the parameters lie")
    return metadata


def files_of(directory: Path) -> set[str]:
    """The files that hold the parameters, by the checkpoint's own word.

    Raises:
        ValueError: it cannot be read.
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
