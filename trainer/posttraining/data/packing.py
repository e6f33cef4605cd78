"""Sequences of different lengths in micro-batches of at most so many tokens, the same number on every rank.

The longest sequence goes first, into the first micro-batch that has room (first fit decreasing). That gives a number of
micro-batches, which is rounded up to a multiple of the ranks. If the sequences also fit when each goes into the
emptiest micro-batch, they are spread that way, so that all micro-batches take about equal time. Ranks get equally many
micro-batches, and about equally many tokens. Everything is a function of the lengths, the seed and the step.

A micro-batch is one packed row. Each sequence is a document: attention and recurrent states end with it, positions
start from 0 in it, and its last token predicts nothing. Padding is a document of its own.

Sequences with one prompt, the answers of a group, may instead be rows of a micro-batch of their own, behind a prefix:
the prompt is then computed once for all of them. That saves (rows - 1) · (prompt - 1) tokens, less the padding of the
rows to the longest one.

Sums over the step's sequences do not depend on the packing, and objectives are such sums, so the number of ranks
changes results by rounding only. Routers of experts see padding tokens: their statistics depend on it a little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kernels.documents import Documents
from models.compression import Origin
from trainer.data.batch import Batch
from trainer.errors import ConfigError
from trainer.posttraining.data.sequences import TokenSequence

SEQUENCE = "sequence"
"""Name of the extra tensor with the number, in the step, of the sequence that each token belongs to; −1 for padding."""

_NOTHING: Mapping[tuple[int, ...], int] = {}
# The data type of extra values by name, and their shape at each token.
_Kinds = dict[str, tuple[np.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Packing:
    """What micro-batches must look like.

    Attributes:
        tokens: Most tokens of a micro-batch: seq_len · micro_batch_size.
        multiple: Divides the number of tokens of every micro-batch. Context parallelism over C ranks needs a multiple
            of C, and sequence parallelism over P ranks one of C · P.
        fixed_length: Pad every micro-batch to `tokens`. Pipeline parallelism needs equal shapes.
        count: Number of micro-batches on each rank. None: as few as possible. DeepSpeed needs the same in every step;
            global_batch_size / (micro_batch_size · ranks) is always enough for sequences of up to seq_len tokens.
        pad_id: The token of padding.
        alone: Give each sequence a micro-batch of its own, padded to `tokens` within its document: shapes then depend
            on nothing.
        share: Compute a prompt once for sequences that have it in common, if that saves at least this many tokens;
            None never does.

    Raises:
        ConfigError: `multiple` does not divide `tokens`.
    """

    tokens: int
    multiple: int = 1
    fixed_length: bool = False
    count: int | None = None
    pad_id: int = 0
    alone: bool = False
    share: int | None = None

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.multiple < 1 or self.tokens % self.multiple:
            raise ConfigError(
                f"a micro-batch of {self.tokens} tokens does not divide into {self.multiple} ranks' parts; let "
                "train.seq_len times train.micro_batch_size be a multiple of the context- and sequence-parallel ranks"
            )


def plan(
    lengths: Sequence[int],
    packing: Packing,
    *,
    seed: int,
    step: int,
    world: int = 1,
    shared: Mapping[tuple[int, ...], int] = _NOTHING,
) -> list[list[list[int]]]:
    """Distribute sequences over ranks and micro-batches.

    Args:
        lengths: Tokens of each sequence.
        packing: Limits.
        seed: Of the run; with the step it decides between sequences of one length.
        step: Steps taken before this one.
        world: Data-parallel ranks.
        shared: Micro-batches that are made already: the numbers of their sequences, and their tokens.

    Returns:
        For each rank its micro-batches, and for each of these the numbers of its sequences. Every number occurs once.
        Micro-batches may be empty if there are fewer sequences than micro-batches.

    Raises:
        ConfigError: a sequence is longer than a micro-batch, or they do not fit into `packing.count`.
    """
    longest = max(lengths, default=0)
    if longest > packing.tokens:
        raise ConfigError(
            f"a sequence of {longest} tokens does not fit into a micro-batch of {packing.tokens}; lower max_length, or "
            "raise train.seq_len or train.micro_batch_size"
        )
    keys = np.random.Philox(np.random.SeedSequence([seed, step])).random_raw(len(lengths))
    order = np.lexsort((keys, -np.asarray(lengths, np.int64))).tolist()
    taken = {number for members in shared for number in members}
    order = [number for number in order if number not in taken]
    bins = _first_fit(order, lengths, packing.tokens)
    count = packing.count or max(-(-(len(bins) + len(shared)) // world), 1)
    left = count * world - len(shared)
    if len(bins) > left:
        raise ConfigError(
            f"the sequences of a step take {len(bins)} micro-batches of {packing.tokens} tokens, and there are {count} "
            f"on each of {world} ranks; lower train.global_batch_size or max_length"
        )
    spread = _emptiest(order, lengths, packing.tokens, left) or _filled(bins, left)
    sizes = [*shared.values(), *(sum(lengths[number] for number in members) for members in spread)]
    return _share_out([*map(list, shared), *spread], sizes, count, world)


def find_shared(sequences: Sequence[TokenSequence], packing: Packing) -> dict[tuple[int, ...], int]:
    """Find the sequences whose prompt is worth computing once: those of each micro-batch by number, and its tokens."""
    if packing.share is None:
        return {}
    groups: dict[bytes, list[int]] = {}
    for number, sequence in enumerate(sequences):
        if 1 < sequence.prompt < len(sequence):
            groups.setdefault(sequence.tokens[: sequence.prompt].tobytes(), []).append(number)
    found = {}
    for members in groups.values():
        # The prompt's last token predicts the first one of every answer, so it is the first token of every row.
        prefix = sequences[members[0]].prompt - 1
        left = sorted(members, key=lambda number: -len(sequences[number]))
        while left:
            longest = len(sequences[left[0]]) - prefix
            count = max((packing.tokens - prefix) // longest, 1)
            chosen, left = left[:count], left[count:]
            size = prefix + len(chosen) * longest
            if len(chosen) > 1 and sum(len(sequences[number]) for number in chosen) - size >= packing.share:
                found[tuple(chosen)] = size
    return found


def _first_fit(order: Sequence[int], lengths: Sequence[int], tokens: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room = np.zeros(0, np.int64)
    for number in order:
        fits = np.flatnonzero(room >= lengths[number])
        if not fits.size:
            bins.append([])
            room = np.append(room, tokens)
        place = int(fits[0]) if fits.size else len(bins) - 1
        bins[place].append(number)
        room[place] -= lengths[number]
    return bins


def _emptiest(order: Sequence[int], lengths: Sequence[int], tokens: int, count: int) -> list[list[int]] | None:
    """Put each sequence into the emptiest of `count` micro-batches; None if one overflows."""
    if not count:
        return None if order else []
    bins: list[list[int]] = [[] for _ in range(count)]
    filled = np.zeros(count, np.int64)
    for number in order:
        place = int(filled.argmin())
        bins[place].append(number)
        filled[place] += lengths[number]
    return bins if filled.max() <= tokens else None


def _filled(bins: list[list[int]], count: int) -> list[list[int]]:
    """Raise the number of micro-batches to `count` by halving those with the most sequences."""
    bins = [list(members) for members in bins]
    while len(bins) < count:
        most = max(bins, key=len)
        # Every other one, since members are in order of their length. Of one sequence none is left to move.
        bins.append(most[1::2])
        most[:] = most[::2]
    return bins


def _share_out(bins: list[list[int]], size: Sequence[int], count: int, world: int) -> list[list[list[int]]]:
    """Give each rank `count` micro-batches: the fullest first, to the rank with the fewest tokens so far."""
    ranks: list[list[list[int]]] = [[] for _ in range(world)]
    totals = [0] * world
    for place in sorted(range(len(bins)), key=lambda place: -size[place]):
        rank = min((rank for rank in range(world) if len(ranks[rank]) < count), key=lambda rank: totals[rank])
        ranks[rank].append(bins[place])
        totals[rank] += size[place]
    return ranks


def pack(
    sequences: Sequence[TokenSequence],
    packing: Packing,
    *,
    seed: int,
    step: int,
    rank: int = 0,
    world: int = 1,
    together: int = 1,
) -> list[Batch]:
    """The micro-batches of data-parallel rank `rank` of `world`: equally many on every rank.

    Args:
        sequences: The whole step's, equal on all ranks; all with the same `extra`.
        packing: Limits.
        seed: Of the run.
        step: Steps taken before this one.
        rank: This data-parallel rank.
        world: Data-parallel ranks.
        together: This many consecutive sequences, such as both answers of a pair, stay in one micro-batch.

    Returns:
        Packed micro-batches: labels, loss mask and `extra` are shifted by one within each sequence, and 0 at its end.
        `extra` has the sequences' own and `SEQUENCE`. A micro-batch without sequences has a loss mask of 0: it counts
        for nothing, but the rank takes part in every collective operation. Where a prompt is shared, a micro-batch has
        a row for each sequence, from the prompt's last token on.

    Raises:
        ConfigError: see `plan`.
        ValueError: the sequences differ in the names of `extra`.
    """
    names = {frozenset(sequence.extra) for sequence in sequences}
    if len(names) > 1:
        raise ValueError(f"sequences of one step differ in their extra values: {sorted(map(sorted, names))}")
    # As many values of the same kind for each token.
    kinds = {name: (array.dtype, array.shape[1:]) for name, array in sequences[0].extra.items()} if sequences else {}
    assert len(sequences) % together == 0, "sequences come in groups of `together`"
    lengths = [sum(map(len, sequences[first : first + together])) for first in range(0, len(sequences), together)]
    if packing.alone:
        lengths = [max(length, packing.tokens) for length in lengths]
    shared = find_shared(sequences, packing) if together == 1 else {}
    own = plan(lengths, packing, seed=seed, step=step, world=world, shared=shared)[rank]
    first = rank * len(own)
    batches = []
    for place, members in enumerate(own):
        numbers = [group * together + number for group in members for number in range(together)]
        make = _rows if tuple(numbers) in shared else _row
        # Numbers of tokens in the step are counted as if every micro-batch were full, so that none occurs twice.
        origin = Origin(step, (first + place) * packing.tokens)
        batches.append(make([(number, sequences[number]) for number in numbers], packing, kinds, origin))
    return batches


def _rows(members: Sequence[tuple[int, TokenSequence]], packing: Packing, kinds: _Kinds, origin: Origin) -> Batch:
    """A row for each sequence, behind their prompt."""
    prefix = members[0][1].prompt - 1
    size = max(len(sequence) for _, sequence in members) - prefix
    starts = range(0, len(members) * size, size)
    tensors = _laid_out(members, starts, len(members) * size, packing.pad_id, kinds, prefix)
    positions = np.tile(np.arange(prefix, prefix + size), len(members))
    before = torch.from_numpy(members[0][1].tokens[None, :prefix].astype(np.int64))
    return _batch(tensors, positions, (len(members), size), None, origin, before)


def _row(members: Sequence[tuple[int, TokenSequence]], packing: Packing, kinds: _Kinds, origin: Origin) -> Batch:
    """One packed row."""
    bounds = np.cumsum([0, *(len(sequence) for _, sequence in members)]).tolist()
    used = bounds[-1]
    is_fixed = packing.fixed_length or packing.alone
    size = packing.tokens if is_fixed else max(-(-used // packing.multiple), 1) * packing.multiple
    tensors = _laid_out(members, bounds, size, packing.pad_id, kinds)
    ends = bounds + [size] * (size > used)
    if packing.alone:
        ends = [0, size]
    positions = np.arange(size) - np.repeat(ends[:-1], np.diff(ends))
    return _batch(tensors, positions, (1, size), Documents(tuple(ends)), origin)


def _laid_out(
    members: Sequence[tuple[int, TokenSequence]],
    starts: Sequence[int],
    size: int,
    pad_id: int,
    kinds: _Kinds,
    first: int = 0,
) -> dict[str, np.ndarray]:
    """Tokens, labels, loss mask and extra values of `size` places: each sequence from its token `first` on."""
    tokens, labels = np.full((2, size), pad_id, np.int64)
    mask, numbers = np.zeros(size, np.float32), np.full(size, -1, np.int64)
    extra = {name: np.zeros((size, *shape), dtype) for name, (dtype, shape) in kinds.items()}
    for start, (number, sequence) in zip(starts, members, strict=False):
        stop = start + len(sequence) - first
        tokens[start:stop], numbers[start:stop] = sequence.tokens[first:], number
        # What belongs to a token stands where the token before it predicts it.
        labels[start : stop - 1], mask[start : stop - 1] = sequence.tokens[first + 1 :], sequence.loss_mask[first + 1 :]
        for name, values in extra.items():
            values[start : stop - 1] = sequence.extra[name][first + 1 :]
    return {"tokens": tokens, "labels": labels, "loss_mask": mask, **extra, SEQUENCE: numbers}


def _batch(
    arrays: dict[str, np.ndarray],
    positions: np.ndarray,
    shape: tuple[int, int],
    documents: Documents | None,
    origin: Origin,
    prefix: torch.Tensor | None = None,
) -> Batch:
    """A micro-batch of these places, in rows."""
    tensors = {name: torch.from_numpy(array).unflatten(0, shape) for name, array in arrays.items()}
    return Batch(
        tokens=tensors.pop("tokens"),
        labels=tensors.pop("labels"),
        loss_mask=tensors.pop("loss_mask"),
        positions=torch.from_numpy(positions).view(shape),
        documents=documents,
        origin=origin,
        extra=tensors,
        prefix=prefix,
    )
