"""Keys and values of softmax layers during generation: pages for full attention, rings for windows.

Memory is laid out [heads, tokens, width]: the keys that a head reads lie beside each other, and query heads that share
a key head are the rows of one product. A new token is written where it stays, so no step copies what is there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import KeysValues, attention
from models.generation.pages import Pages, PageTable
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

    def fit(self, entries: dict[str, Tensor]) -> None:
        """Have memory for all pages, for entries [..., Hkv, width] of these names."""
        if self.tensors.keys() == entries.keys() and self._held == self.pages.capacity:
            return
        for name, x in entries.items():
            if name not in self.tensors:
                self.tensors[name] = x.new_empty(x.shape[-2], 0, x.shape[-1])
        self.grow()

    def grow(self) -> None:
        """Have memory for all pages that there are by now."""
        self._held = self.pages.capacity
        tokens = self._held * self.pages.size
        for name, before in self.tensors.items():
            if before.shape[1] < tokens:
                # Memory that nobody writes costs nothing: the operating system gives it on the first write.
                self.tensors[name] = before.new_empty(before.shape[0], tokens, before.shape[2])
                self.tensors[name][:, : before.shape[1]] = before

    def copy_page(self, source: int, target: int) -> None:
        """Copy a page."""
        size = self.pages.size
        for x in self.tensors.values():
            x[:, target * size : (target + 1) * size] = x[:, source * size : (source + 1) * size]

    def read(self, run: Run) -> dict[str, Tensor]:
        """The entries of a run of memory, views [Hkv, S, width]."""
        return {name: x[:, run[0] : run[1]] for name, x in self.tensors.items()}

    def gather(self, runs: Sequence[Run]) -> dict[str, Tensor]:
        """The entries of several runs, [Hkv, S, width]; a view if there is one run."""
        if len(runs) == 1:
            return self.read(runs[0])
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
    wide = torch.promote_types(q_1THK.dtype, torch.float32)
    q_XTK = q_1THK[0].transpose(0, 1)
    before = k_HSK.shape[1] - time
    earlier, normalizer = _attend_with_normalizer(
        q_XTK.unflatten(0, (heads, groups)).flatten(1, 2), k_HSK[:, :before], v_HSV[:, :before]
    )
    k_own, v_own = (x[:, before:].repeat_interleave(groups, dim=0) for x in (k_HSK, v_HSV))
    own, own_normalizer = _attend_with_normalizer(q_XTK, k_own, v_own, is_causal=True)
    o_XTV = _merged(
        [
            (earlier.unflatten(1, (groups, time)).flatten(0, 1).to(wide), normalizer.reshape(heads * groups, time)),
            (own.to(wide), own_normalizer),
        ]
    )
    return o_XTV.to(q_1THK.dtype).transpose(0, 1)[None]


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


@dataclass
class PageStep:
    """Where the sequences of a decoding step lie, the same for all layers.

    Attributes:
        places: Where each row's new token goes, int64 [n].
        runs: Each row's runs of memory, the new token included.
        exact: Whether a row's result must not depend on where its pages lie: they are then gathered first.
        shared: The rows that read each run.
        is_plain: Whether every row is one run of its own.
    """

    places: Tensor
    runs: list[list[Run]]
    exact: bool
    shared: dict[Run, list[int]] = field(init=False)
    is_plain: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.shared = {}
        if self.exact:
            return
        for row, runs in enumerate(self.runs):
            for run in runs:
                self.shared.setdefault(run, []).append(row)
        self.is_plain = len(self.shared) == len(self.runs) and all(len(runs) == 1 for runs in self.runs)


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
        heads = entries["k"].shape[2]
        # Query heads that share a key head take the place of queries.
        q_NHGK = q[:, 0].unflatten(1, (heads, -1))
        if self.step.exact or (self.step.is_plain and sinks is None) or not q.is_cpu:
            rows = [self._row(q, runs, sinks) for q, runs in zip(q_NHGK.split(1), self.step.runs, strict=True)]
            o_NHGV = rows[0] if len(rows) == 1 else torch.cat(rows)
        else:
            o_NHGV = self._by_run(q_NHGK, sinks)
        return o_NHGV.flatten(1, 2)[:, None]

    def _row(self, q_1HGK: Tensor, runs: list[Run], sinks: KeysValues | None) -> Tensor:
        """Attention of one row, [1, Hkv, G, V]."""
        k, v = keys_and_values(self.pool.gather(runs), q_1HGK.dtype)
        if sinks is not None:
            k, v = (torch.cat((by_head(x)[0], y), 1) for x, y in zip(sinks, (k, v), strict=True))
        if self.step.exact:
            k, v = k.contiguous(), v.contiguous()
        return F.scaled_dot_product_attention(q_1HGK, k[None], v[None])

    def _by_run(self, q_NHGK: Tensor, sinks: KeysValues | None) -> Tensor:
        """Attention run by run: all rows that share a run read it once. The parts are merged by their normalizers.

        Sinks are a run that all rows share.
        """
        groups = q_NHGK.shape[2]
        wide = torch.promote_types(q_NHGK.dtype, torch.float32)
        outputs: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.step.runs]
        runs = [(rows, keys_and_values(self.pool.read(run), q_NHGK.dtype)) for run, rows in self.step.shared.items()]
        if sinks is not None:
            runs.append((list(range(len(outputs))), (by_head(sinks[0])[0], by_head(sinks[1])[0])))
        for rows, (k, v) in runs:
            q_HCK = q_NHGK[rows].transpose(0, 1).flatten(1, 2)
            o_HCV, normalizer_HC = _attend_with_normalizer(q_HCK, k, v)
            parts = zip(rows, o_HCV.to(wide).split(groups, 1), normalizer_HC.split(groups, 1), strict=True)
            for row, o_HGV, normalizer_HG in parts:
                outputs[row].append((o_HGV, normalizer_HG))
        return torch.stack([_merged(parts) for parts in outputs]).to(q_NHGK.dtype)


def _attend_with_normalizer(
    q_HCK: Tensor, k_HSK: Tensor, v_HSV: Tensor, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention to all keys, [H, C, V], and the log of the sum of the scores' exponentials, float32 [H, C]."""
    # The operation behind scaled_dot_product_attention, which returns the normalizer too.
    o, normalizer = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_HCK[None], k_HSK[None], v_HSV[None], is_causal=is_causal
    )
    return o[0], normalizer[0]


def _merged(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention to all keys from the results [H, G, V] and normalizers [H, G] of their parts."""
    if len(parts) == 1:
        return parts[0][0]
    shares = torch.stack([normalizer for _, normalizer in parts]).softmax(0)
    return sum(share[..., None] * o for share, (o, _) in zip(shares, parts, strict=True))  # type: ignore[return-value]


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
