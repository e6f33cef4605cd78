"""Checkpoints of flattened, evenly cut parameters, in torch's distributed format and in the parameters' own shapes.

ZeRO gives a rank the elements start .. start + n of a flattened parameter. Such a range is a few boxes of the parameter
as it is shaped, and boxes are what torch.distributed.checkpoint stores and reads back under any other cut.
"""

import math
from collections.abc import Iterator, Sequence
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


class Piece:
    """A range of a flattened parameter, in memory.

    Args:
        shape: Of the whole parameter.
        start: Where the range begins in the flattened parameter.
        values: The range itself [n], contiguous; n = 0 where the rank owns nothing. Reading writes into it.
    """

    def __init__(self, shape: Sequence[int], start: int, values: Tensor) -> None:
        assert values.dim() == 1 and values.is_contiguous(), "boxes are views of it"
        self.shape, self.start, self.values = torch.Size(shape), start, values
        self._views: dict[torch.Size, Tensor] = {}
        done = 0
        for offsets, sizes in boxes(shape, start, start + values.numel()):
            count = math.prod(sizes)
            self._views[torch.Size(offsets)] = values[done : done + count].view(sizes)
            done += count

    def copy(self) -> "Piece":
        """The same range in host memory of its own."""
        return Piece(self.shape, self.start, self.values.detach().to("cpu", copy=True))

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
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
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
