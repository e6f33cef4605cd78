"""Checkpoints of flattened, evenly cut parameters, in torch's distributed format and in the parameters' own shapes.

ZeRO gives a rank the elements start .. start + n of a flattened parameter, or of the part of it that a tensor-parallel
rank has. Such a range is a few boxes of the parameter as it is shaped, and boxes are what torch.distributed.checkpoint
stores and reads back under any other cut.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint

Box = tuple[tuple[int, ...], tuple[int, ...]]


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Cover the elements start .. stop of a row-major tensor by (offsets, sizes), in the order of the elements."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
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


@dataclass(frozen=True)
class Shard:
    """The part of a parameter that a tensor-parallel rank has; all of it where it is not cut.

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
        for offsets, sizes in boxes(shard.shape, start, start + values.numel()):
            count = math.prod(sizes)
            within_whole = torch.Size(map(sum, zip(shard.offsets, offsets, strict=True)))
            self._views[within_whole] = values[done : done + count].view(sizes)
            done += count

    def copy(self) -> "Piece":
        """The same range in host memory of its own."""
        return Piece(self.shard, self.start, self.values.detach().to("cpu", copy=True))

    def view(self, index: MetadataIndex) -> Tensor:
        """The box that an index of the checkpoint means."""
        assert index.offset is not None
        return self._views[index.offset]

    # The names by which torch.distributed.checkpoint asks an object what it stores.
    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets, view.size()) for offsets, view in self._views.items()]

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.values.dtype)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shard.whole),
            )
            for chunk in self.__create_chunk_list__()
        ]


class _SavePlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn].view(index)


class _LoadPlanner(DefaultLoadPlanner):
    def set_up_planner(self, state_dict: dict[str, Any], metadata: Any = None, is_coordinator: bool = False) -> None:
        # The inherited one takes values of types it does not know for empty.
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].view(index)


def save(pieces: dict[str, Piece], directory: Path, group: dist.ProcessGroup | None = None) -> None:
    """Write every rank's pieces; ranks name the same parameters. What several ranks hold is written by one of them.

    The ranks of `group`, by default all, exchange their plans over it.
    """
    planner = _SavePlanner(flatten_state_dict=False)
    save_checkpoint(pieces, storage_writer=FileSystemWriter(directory), planner=planner, process_group=group)


def load(pieces: dict[str, Piece], directory: Path) -> None:
    """Fill the pieces from what `save` wrote, however it was cut. Every rank calls it."""
    planner = _LoadPlanner(flatten_state_dict=False)
    load_checkpoint(pieces, storage_reader=FileSystemReader(directory), planner=planner)
