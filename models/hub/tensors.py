"""Which block of which stored tensor holds which block of one of our parameters.

Every mapping is a set of copies of blocks: renames, experts stacked from one matrix each, several matrices fused into
one, heads interleaved with others. Copies change no number, so that both directions are exact, and any part of a
parameter can be read without the rest.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

Index = tuple[int | slice, ...]
"""One entry a dimension: an integer drops it, a slice has a start and a stop and no step."""


@dataclass(frozen=True)
class Copy:
    """Two blocks that hold the same numbers: their dimensions are equal, apart from those that an integer drops.

    Attributes:
        index: The block of our parameter.
        stored: Name of the tensor in a file.
        stored_index: The block of that tensor.
    """

    index: Index
    stored: str
    stored_index: Index


def everything(shape: Sequence[int]) -> Index:
    """The index of a whole tensor."""
    return tuple(slice(0, size) for size in shape)


def whole(shape: Sequence[int], stored: str) -> Copy:
    """A parameter that is stored as it is, under another name."""
    return Copy(everything(shape), stored, everything(shape))


def rows(start: int, stop: int, shape: Sequence[int]) -> Index:
    """The rows start .. stop of a tensor whose other dimensions are those of `shape`."""
    return (slice(start, stop), *everything(shape[1:]))


def stored_shapes(copies: Iterable[Copy]) -> dict[str, tuple[int, ...]]:
    """The shapes of the stored tensors that these copies fill, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for copy in copies:
        ends = tuple(entry + 1 if isinstance(entry, int) else entry.stop for entry in copy.stored_index)
        before = shapes.get(copy.stored, ends)
        shapes[copy.stored] = tuple(max(sizes) for sizes in zip(before, ends, strict=True))
    return shapes


def overlap(copy: Copy, part: Sequence[slice] | None) -> tuple[Index, Index] | None:
    """What a copy contributes to a part of our parameter, such as a rank's shard.

    Args:
        copy: The copy.
        part: One slice a leading dimension, `slice(None)` for all of it; None for the whole parameter.

    Returns:
        The block within the part, and the same block of the stored tensor; None if they do not overlap.
    """
    inside: list[int | slice] = []
    shifts: list[tuple[int, int]] = []
    for dim, entry in enumerate(copy.index):
        bounds = part[dim] if part is not None and dim < len(part) else slice(None)
        first = bounds.start or 0
        low, high = (entry, entry + 1) if isinstance(entry, int) else (entry.start, entry.stop)
        start, stop = max(low, first), high if bounds.stop is None else min(high, bounds.stop)
        if start >= stop:
            return None
        if isinstance(entry, int):
            inside.append(entry - first)
        else:
            inside.append(slice(start - first, stop - first))
            shifts.append((start - low, stop - low))
    left = iter(shifts)
    there: list[int | slice] = []
    for entry in copy.stored_index:
        if isinstance(entry, int):
            there.append(entry)
        else:
            begin, end = next(left)
            there.append(slice(entry.start + begin, entry.start + end))
    return tuple(inside), tuple(there)


def row_blocks(index: Index, stored_index: Index, elements: int) -> Iterator[tuple[Index, Index]]:
    """Cut two blocks that hold the same numbers into as few rows as hold this many elements, or one row.

    A row is a part of the first dimension that no integer drops.
    """
    mine, theirs = (next((i for i, e in enumerate(ix) if isinstance(e, slice)), None) for ix in (index, stored_index))
    if mine is None or theirs is None:
        yield index, stored_index
        return
    own, other = index[mine], stored_index[theirs]
    assert isinstance(own, slice) and isinstance(other, slice), "found as slices"
    row = prod(entry.stop - entry.start for entry in index[mine + 1 :] if isinstance(entry, slice))
    step, length = max(elements // max(row, 1), 1), own.stop - own.start
    for start in range(0, length, step):
        stop = min(start + step, length)
        yield (
            (*index[:mine], slice(own.start + start, own.start + stop), *index[mine + 1 :]),
            (*stored_index[:theirs], slice(other.start + start, other.start + stop), *stored_index[theirs + 1 :]),
        )
