"""Keys and values of softmax layers during generation: pages for full attention, rings for windows.

Memory is laid out [heads, tokens, width]: the keys that a head reads lie beside each other, and query heads that share
a key head are the rows of one product. A new token is written where it stays, so no step copies what is there.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import KeysValues, attention
from models.generation.pages import Pages, PageTable, merged
from models.mixers.softmax import keys_and_values

Run = tuple[int, int]


def by_head(x: Tensor) -> Tensor:
    """Keys or values [B, S, Hkv, K] as memory here is laid out, [B, Hkv, S, K]."""
    return x.transpose(1, 2)


class PagePool:
    """The memory of one full-attention layer: all of its pages, one tensor [Hkv, tokens, width] for each entry."""

    def __init__(self, pages: Pages) -> None:
        self.pages = pages
        self.tensors: dict[str, Tensor] = {}
        self._held = 0
        pages.on_take.append(self.clear)

    def fit(self, entries: dict[str, Tensor]) -> None:
        """Have memory for all pages, for entries [..., Hkv, width] of these names."""
        if self.tensors.keys() == entries.keys() and self._held == self.pages.capacity:
            return
        known = self.tensors.keys() == entries.keys()
        for name, x in entries.items():
            if name not in self.tensors:
                self.tensors[name] = x.new_empty(x.shape[-2], 0, x.shape[-1])
        self.grow()
        if not known:
            self.clear(self.pages.in_use())

    def grow(self) -> None:
        """Have memory for all pages that there are by now."""
        self._held = self.pages.capacity
        tokens = self._held * self.pages.size
        for name, before in self.tensors.items():
            if before.shape[1] < tokens:
                # Memory that nobody writes costs nothing: the operating system gives it on the first write.
                self.tensors[name] = before.new_empty(before.shape[0], tokens, before.shape[2])
                self.tensors[name][:, : before.shape[1]] = before

    def clear(self, pages: Sequence[int]) -> None:
        """Set pages that a sequence takes to zero: calls for several rows read some past their ends, and mask it."""
        size = self.pages.size
        if self._held < self.pages.capacity and self.tensors:
            self.grow()
        for first, count in merged(pages):
            for x in self.tensors.values():
                x[:, first * size : (first + count) * size] = 0

    def copy_page(self, source: int, target: int) -> None:
        """Copy a page."""
        size = self.pages.size
        for x in self.tensors.values():
            x[:, target * size : (target + 1) * size] = x[:, source * size : (source + 1) * size]

    def read_batch(self, batch: "RunBatch") -> dict[str, Tensor]:
        """The entries of runs of memory, views [runs, Hkv, S, width]."""
        found = {}
        for name, x in self.tensors.items():
            heads, _, width = x.shape
            shape = (len(batch.rows), heads, batch.most, width)
            strides = (batch.spacing * width, x.stride(0), width, 1)
            found[name] = x.as_strided(shape, strides, batch.start * width)
        return found

    def gather(self, runs: Sequence[Run]) -> dict[str, Tensor]:
        """The entries of several runs, [Hkv, S, width]; a view if there is one run."""
        if len(runs) == 1:
            ((a, b),) = runs
            return {name: x[:, a:b] for name, x in self.tensors.items()}
        return {name: torch.cat([x[:, a:b] for a, b in runs], 1) for name, x in self.tensors.items()}


@dataclass
class PromptPages:
    """Store of one sequence that is being prefilled. `table` already counts the new tokens."""

    pool: PagePool
    table: PageTable

    def attend(self, q: Tensor, entries: dict[str, Tensor], sinks: KeysValues | None = None) -> Tensor:
        """See KeyValueStore; B = 1."""
        self.write(entries)
        k_HSK, v_HSV = keys_and_values(self.pool.gather(self.table.runs()), q.dtype)
        if q.is_cpu and q.shape[1] < k_HSK.shape[1] and sinks is None:
            return _attend_in_parts(q, k_HSK, v_HSV)
        return attention(q, k_HSK.transpose(0, 1)[None], v_HSV.transpose(0, 1)[None], sinks=sinks)

    def write(self, entries: dict[str, Tensor]) -> None:
        """Write the entries [1, T, Hkv, width] of the last T tokens of the sequence."""
        self.pool.fit(entries)
        for name, x in entries.items():
            first = self.table.length - x.shape[1]
            _write(self.pool.tensors[name], self.table.runs(), first, x[0].transpose(0, 1))


def _attend_in_parts(q_1THK: Tensor, k_HSK: Tensor, v_HSV: Tensor) -> Tensor:
    """Attention of the last T of S tokens, in the cache-sized blocks of torch's kernel for CPUs.

    That kernel has no mask for queries that are the last of the keys. Keys before the queries need no mask, and those
    of the queries themselves the usual one; the two parts are merged by their normalizers.
    """
    time, heads, groups = q_1THK.shape[1], len(k_HSK), q_1THK.shape[2] // len(k_HSK)
    q_1XTK = q_1THK.transpose(1, 2)
    before = k_HSK.shape[1] - time
    earlier, normalizer = _attend_with_normalizer(
        q_1XTK.unflatten(1, (heads, groups)).flatten(2, 3), k_HSK[None, :, :before], v_HSV[None, :, :before]
    )
    k_own, v_own = (x[None, :, before:].repeat_interleave(groups, dim=1) for x in (k_HSK, v_HSV))
    own, own_normalizer = _attend_with_normalizer(q_1XTK, k_own, v_own, is_causal=True)
    normalizers = torch.stack((normalizer.unflatten(2, (groups, time)).flatten(1, 2), own_normalizer))
    outputs = torch.stack((earlier.unflatten(2, (groups, time)).flatten(1, 2), own))
    o_1XTV = (outputs * normalizers.softmax(0)[..., None]).sum(0)
    return o_1XTV.to(q_1THK.dtype).transpose(1, 2)


def _write(memory: Tensor, runs: Sequence[Run], first: int, x: Tensor) -> None:
    """Write tokens x [Hkv, T, width] of a sequence, of which the first is number `first`, to where its runs lie."""
    passed = 0
    for start, end in runs:
        count = end - start
        begin = max(first - passed, 0)
        if begin < count:
            source = passed + begin - first
            memory[:, start + begin : end] = x[:, source : source + count - begin]
        passed += count


# A batch reads runs to the length of its longest: its others are at most this many tokens or this share shorter.
_SHORTER_TOKENS, _SHORTER_SHARE = 64, 0.25
# Runs of other sequences may lie between those of a batch: they are read, too, if they are at most this share.
_HOLES = 0.5


@dataclass
class RunBatch:
    """Runs of memory, equally far apart and each read by as many rows: one call of attention reads them all.

    Attributes:
        start: Where the first run begins.
        lengths: Tokens of each run.
        rows: The rows that read each run; none of a hole, whose result nobody takes.
        least: The shortest run, in tokens.
        most: The longest one, to whose length all are read.
        room: Tokens to which all runs may be read.
        spacing: Tokens from the start of a run to the start of the next.
        mask: Which tokens are not of the run, as the scores' summand -inf, [runs, 1, 1, most]; None if all are.
        flat_rows: The rows one after another, int64 [runs * readers]. In place of a hole's there is row 0.
        parts: For each of these, which part of its row the run is: 0, 1, ..., int64 [runs * readers].
        taken: The places among these that are no hole's, int64; None if all are.
    """

    start: int
    lengths: list[int]
    rows: list[list[int]]
    least: int
    most: int
    room: int
    spacing: int = 0
    mask: Tensor | None = None
    flat_rows: Tensor = field(init=False)
    parts: Tensor = field(init=False)
    taken: Tensor | None = field(init=False, default=None)

    @classmethod
    def of(cls, run: Run, room: int, rows: list[int]) -> "RunBatch":
        """The batch of one run."""
        length = run[1] - run[0]
        return cls(run[0], [length], [rows], length, length, room)

    def take(self, run: Run, room: int, rows: list[int]) -> bool:
        """Add a run that begins after the others, if it is alike and as far from the last one as they are."""
        length, distance = run[1] - run[0], run[0] - self.start
        if not distance:
            return False
        least, most, room = min(self.least, length), max(self.most, length), min(self.room, room)
        place, beside = divmod(distance, self.spacing or distance)
        holes = place - len(self.rows)
        if len(rows) != len(self.rows[0]) or beside or most > room:
            return False
        if most - least > max(_SHORTER_TOKENS, _SHORTER_SHARE * most):
            return False
        if holes + self.rows.count([]) > _HOLES * (len(self.rows) - self.rows.count([]) + 1):
            return False
        self.rows += [*([] for _ in range(holes)), rows]
        self.lengths += [*(0 for _ in range(holes)), length]
        self.least, self.most, self.room, self.spacing = least, most, room, self.spacing or distance
        return True

    def prepare(self, passed: list[int], like: Tensor) -> None:
        """Make the tensors on the device of `like`; `passed` counts the parts of each row so far."""
        device, readers = like.device, len(self.rows[0])
        flat, parts = [], []
        for rows in self.rows:
            for row in rows:
                parts.append(passed[row])
                passed[row] += 1
            flat += rows or [0] * readers
        self.flat_rows, self.parts = torch.tensor(flat, device=device), torch.tensor(parts, device=device)
        if [] in self.rows:
            taken = [place for place, rows in enumerate(self.rows) if rows]
            self.taken = torch.tensor([place * readers + i for place in taken for i in range(readers)], device=device)
        if self.least < self.most:
            outside = torch.arange(self.most, device=device) >= torch.tensor(self.lengths, device=device)[:, None]
            self.mask = torch.zeros(outside.shape, device=device).masked_fill_(outside, -torch.inf)[:, None, None]

    def mask_in(self, dtype: torch.dtype) -> Tensor | None:
        """The mask in another dtype."""
        if self.mask is not None and self.mask.dtype != dtype:
            self.mask = self.mask.to(dtype)
        return self.mask


@dataclass
class PageStep:
    """Where the sequences of a decoding step lie, the same for all layers.

    Attributes:
        places: Where each row's new token goes, int64 [n].
        runs: Each row's runs of memory, the new token included.
        ends: Where the memory ends that each row has from its last run on.
        exact: Whether a row's result must not depend on where its pages lie: they are then gathered first.
        batches: All runs, those that several rows read once.
        most_parts: The largest number of runs of a row.
    """

    places: Tensor
    runs: list[list[Run]]
    ends: list[int]
    exact: bool
    batches: list[RunBatch] = field(init=False, default_factory=list)
    most_parts: int = field(init=False, default=1)

    def __post_init__(self) -> None:
        if self.exact:
            return
        readers: dict[Run, list[int]] = {}
        rooms: dict[Run, int] = {}
        # Where rows leave what they share. One of them may go on right there, in the same run of memory.
        borders: dict[int, set[int]] = {}
        for runs in self.runs:
            for first, end in runs[:-1]:
                borders.setdefault(first, set()).add(end)
        for row, runs in enumerate(self.runs):
            parts = [part for run in runs for part in _cut(run, borders.get(run[0], ()))]
            for part in parts:
                readers.setdefault(part, []).append(row)
                rooms[part] = (self.ends[row] if part is parts[-1] else part[1]) - part[0]
        for run, rows in sorted(readers.items(), key=lambda item: (len(item[1]), item[0])):
            if not (self.batches and self.batches[-1].take(run, rooms[run], rows)):
                self.batches.append(RunBatch.of(run, rooms[run], rows))
        passed = [0] * len(self.runs)
        for batch in self.batches:
            batch.prepare(passed, self.places)
        self.most_parts = max(passed)

    @property
    def is_one_call(self) -> bool:
        """Whether one call of attention reads every row's memory, in the order of the rows."""
        return len(self.batches) == 1 and self.batches[0].rows == [[row] for row in range(len(self.runs))]


@dataclass
class RowPages:
    """Store of the rows of a decoding step, one new token each."""

    pool: PagePool
    step: PageStep

    def attend(self, q: Tensor, entries: dict[str, Tensor], sinks: KeysValues | None = None) -> Tensor:
        """See KeyValueStore; T = 1."""
        self.pool.fit(entries)
        for name, x in entries.items():
            self.pool.tensors[name].index_copy_(1, self.step.places, x[:, 0].transpose(0, 1))
        # Query heads that share a key head take the place of queries.
        q_NHGK = q[:, 0].unflatten(1, (entries["k"].shape[2], -1))
        if self.step.exact or not q.is_cpu:
            rows = [self._row(q, runs, sinks) for q, runs in zip(q_NHGK.split(1), self.step.runs, strict=True)]
            o_NHGV = rows[0] if len(rows) == 1 else torch.cat(rows)
        elif self.step.is_one_call and sinks is None:
            (batch,) = self.step.batches
            k, v = self._read(batch, q.dtype)
            o_NHGV = F.scaled_dot_product_attention(q_NHGK, k, v, attn_mask=batch.mask_in(q.dtype))
        else:
            o_NHGV = self._by_part(q_NHGK, sinks)
        return o_NHGV.flatten(1, 2)[:, None]

    def _row(self, q_1HGK: Tensor, runs: list[Run], sinks: KeysValues | None) -> Tensor:
        """Attention of one row, [1, Hkv, G, V]."""
        k, v = keys_and_values(self.pool.gather(runs), q_1HGK.dtype)
        if sinks is not None:
            k, v = (torch.cat((by_head(x)[0], y), 1) for x, y in zip(sinks, (k, v), strict=True))
        if self.step.exact:
            k, v = k.contiguous(), v.contiguous()
        return F.scaled_dot_product_attention(q_1HGK, k[None], v[None])

    def _read(self, batch: RunBatch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The keys and values of a batch, [runs, Hkv, S, width]."""
        return keys_and_values(self.pool.read_batch(batch), dtype)

    def _by_part(self, q_NHGK: Tensor, sinks: KeysValues | None) -> Tensor:
        """Attention run by run: all rows that share a run read it once. The parts are merged by their normalizers.

        Sinks are a run that all rows share.
        """
        count, heads, groups, _ = q_NHGK.shape
        runs = [
            (batch.flat_rows, batch.parts, self._read(batch, q_NHGK.dtype), batch.mask_in(q_NHGK.dtype), batch.taken)
            for batch in self.step.batches
        ]
        if sinks is not None:
            everyone = torch.arange(count)
            k, v = (by_head(x) for x in sinks)
            runs.append((everyone, torch.full_like(everyone, self.step.most_parts), (k, v), None, None))
        # Rows of fewer parts have empty ones: zeros, of which the share is nothing.
        wide = torch.promote_types(q_NHGK.dtype, torch.float32)
        most = self.step.most_parts + (sinks is not None)
        outputs = q_NHGK.new_zeros(count, most, heads, groups, runs[0][2][1].shape[-1], dtype=wide)
        normalizers = outputs.new_full(outputs.shape[:-1], -torch.inf)
        for rows, parts, (k, v), mask, taken in runs:
            readers = len(rows) // len(k)
            q_RHCK = q_NHGK[rows].unflatten(0, (-1, readers)).transpose(1, 2).flatten(2, 3)
            found = [_by_reader(x, readers).to(wide) for x in _attend_with_normalizer(q_RHCK, k, v, mask=mask)]
            if taken is not None:
                rows, *found = (x[taken] for x in (rows, *found))
            outputs[rows, parts], normalizers[rows, parts] = found
        return (outputs * normalizers.softmax(1)[..., None]).sum(1).to(q_NHGK.dtype)


def _cut(run: Run, borders: Iterable[int]) -> list[Run]:
    """The parts of a run between the borders within it."""
    ends = [*sorted(border for border in borders if border < run[1]), run[1]]
    return list(pairwise([run[0], *ends]))


def _by_reader(x: Tensor, readers: int) -> Tensor:
    """Results [R, H, readers * G, ...] as [R * readers, H, G, ...]."""
    return x.unflatten(2, (readers, -1)).transpose(1, 2).flatten(0, 1)


def _attend_with_normalizer(
    q_BHCK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, is_causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention to all keys, [B, H, C, V], and the log of the sum of the scores' exponentials, float32 [B, H, C]."""
    # The operation behind scaled_dot_product_attention, which returns the normalizer too.
    o, normalizer = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_BHCK, k_BHSK, v_BHSV, is_causal=is_causal, attn_mask=mask
    )
    return o, normalizer


@dataclass
class RingRows:
    """Store of the rows of a decoding step in a sliding-window layer: their last `window` tokens.

    The token at position p is at place p modulo the window. Attention does not depend on the order of keys, and these
    are already rotated by their positions.

    Attributes:
        memory: One tensor [n, Hkv, window, width] for each entry.
        positions: Position of each row's new token, int64 [n].
        least: The smallest of the positions.
        most: The largest one.
    """

    memory: dict[str, Tensor]
    positions: Tensor
    least: int
    most: int

    def attend(self, q: Tensor, entries: dict[str, Tensor], sinks: KeysValues | None = None) -> Tensor:
        """See KeyValueStore; T = 1."""
        rows = torch.arange(len(self.positions), device=q.device)
        window = self.memory["k"].shape[2]
        for name, x in entries.items():
            self.memory[name][rows, :, self.positions % window] = x[:, 0]
        reach = min(self.most + 1, window)
        held = {name: x[:, :, :reach] for name, x in self.memory.items()}
        k, v = keys_and_values(held, q.dtype)
        mask = None
        if self.least + 1 < reach:
            mask = (torch.arange(reach, device=q.device) <= self.positions[:, None])[:, None, None]
        if sinks is not None:
            k, v = (
                torch.cat((x, by_head(y).expand(len(x), -1, -1, -1)), 2) for x, y in zip((k, v), sinks, strict=True)
            )
            mask = None if mask is None else F.pad(mask, (0, sinks[0].shape[1]), value=True)
        q_NHGK = q[:, 0].unflatten(1, (k.shape[1], -1))
        o_NHGV = F.scaled_dot_product_attention(q_NHGK, k, v, attn_mask=mask)
        return o_NHGV.flatten(1, 2)[:, None]
