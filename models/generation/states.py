"""States of sequences: one while its prompt is computed, and the rows of all that are being continued.

A mixer finds its state in a LayerCache whatever it is: recurrent states, inputs of convolutions and what neurons carry
are tensors with one row per sequence; keys and values lie in pages or rings (models.generation.key_values).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.decoder import Decoder
from models.generation.key_values import PagePool, PageStep, PromptPages, RingRows, RowPages
from models.generation.pages import Pages, PageTable
from models.mixers.base import LayerCache
from models.mixers.parallel_branches import ParallelBranches
from models.mixers.softmax import FullAttention

_KEYS_AND_VALUES = ("k", "k_scale", "v", "v_scale")


@dataclass(frozen=True)
class Cell:
    """Where one cache belongs: a layer or one of its branches.

    Attributes:
        name: "LAYER", or "LAYER.BRANCH" in a layer of parallel branches.
        window: The window of a sliding-window mixer; None for other mixers.
        pool: The pages of a full-attention mixer; None for other mixers.
    """

    name: str
    window: int | None
    pool: PagePool | None


def cells(model: Decoder, pages: Pages) -> list[list[Cell]]:
    """The cells of each layer: the layer's own first, then those of its branches."""
    layers = []
    for number, block in model.layers.items():
        mixer = block.get_submodule("mixer")
        found = [_cell(number, mixer, pages)]
        if isinstance(mixer, ParallelBranches):
            found += [_cell(f"{number}.{i}", branch, pages) for i, branch in enumerate(mixer.branches)]
        layers.append(found)
    return layers


def _cell(name: str, mixer: nn.Module, pages: Pages) -> Cell:
    if not isinstance(mixer, FullAttention):
        return Cell(name, None, None)
    return Cell(name, mixer.window, PagePool(pages) if mixer.window is None else None)


def linked(caches: Sequence[LayerCache]) -> LayerCache:
    """The cache of a layer, from those of its cells."""
    first, *branches = caches
    first.branches = dict(enumerate(branches))
    return first


@dataclass
class State:
    """The state of one sequence after `length` tokens.

    Attributes:
        layers: The cells of each layer.
        table: Pages of the full-attention layers.
        caches: The caches of each cell, by the cell's name, with rows of one sequence.
        logits: Logits [1, V] of the last token; None before the first one.
        experts: The recorded choices of the routers for the tokens, int16 [n, layers with experts, k] each.
    """

    layers: list[list[Cell]]
    table: PageTable
    caches: dict[str, LayerCache]
    logits: Tensor | None = None
    experts: list[Tensor] = field(default_factory=list)

    @classmethod
    def empty(cls, layers: list[list[Cell]], table: PageTable) -> "State":
        """The state before the first token."""
        caches = {
            cell.name: LayerCache(store=None if cell.pool is None else PromptPages(cell.pool, table))
            for cell in _flat(layers)
        }
        return cls(layers, table, caches)

    def by_layer(self) -> list[LayerCache]:
        """The caches as `Decoder.hidden_states` takes them."""
        return [linked([self.caches[cell.name] for cell in layer]) for layer in self.layers]

    def fork(self, most: int) -> "State":
        """A state that continues this one by itself, up to `most` tokens. They share full pages."""
        table, copied = self.table.fork(most)
        state = State.empty(self.layers, table)
        state.logits, state.experts = self.logits, list(self.experts)
        for cell in _flat(self.layers):
            # Copies, because kernels may advance a state in place.
            tensors = self.caches[cell.name].tensors
            state.caches[cell.name].tensors = {name: x.clone() for name, x in tensors.items()}
            if cell.pool is not None and copied is not None:
                cell.pool.grow()
                cell.pool.copy_page(*copied)
        return state

    def export(self) -> dict[str, Tensor]:
        """Copies of all tensors by name, for `restore`."""
        tensors = {} if self.logits is None else {"logits": self.logits.clone()}
        for cell in _flat(self.layers):
            for name, x in self.caches[cell.name].tensors.items():
                tensors[f"{cell.name}/{name}"] = x.clone(memory_format=torch.contiguous_format)
            if cell.pool is not None:
                for name, x in cell.pool.gather(self.table.runs()).items():
                    tensors[f"{cell.name}/pages/{name}"] = x.clone(memory_format=torch.contiguous_format)
        return tensors

    def restore(self, tensors: dict[str, Tensor], length: int) -> None:
        """Set an empty state to what `export` of the same model gave after `length` tokens."""
        own: dict[str, dict[str, Tensor]] = {}
        for name, x in tensors.items():
            place, _, entry = name.rpartition("/")
            own.setdefault(place, {})[entry] = x
        self.logits = tensors["logits"]
        self.table.extend(length)
        for cell in _flat(self.layers):
            # Copies, because kernels may advance a state in place.
            self.caches[cell.name].tensors = {name: x.clone() for name, x in own.get(cell.name, {}).items()}
            if cell.pool is not None:
                entries = {name: x.transpose(0, 1)[None] for name, x in own[f"{cell.name}/pages"].items()}
                PromptPages(cell.pool, self.table).write(entries)


def _flat(layers: list[list[Cell]]) -> Iterator[Cell]:
    return (cell for layer in layers for cell in layer)


class Slots:
    """The states of up to `size` sequences that are continued together, one row each.

    The rows in use are the first ones, so a decoding step reads and writes states where they are.

    Args:
        layers: The cells of each layer.
        size: Number of rows.
    """

    def __init__(self, layers: list[list[Cell]], size: int) -> None:
        self.layers, self.size = layers, size
        self.count = 0
        # By cell and entry, [size, ...]; allocated when the first sequence shows their shapes.
        self._rows: dict[str, dict[str, Tensor]] = {cell.name: {} for cell in _flat(layers)}
        self.tables: list[PageTable] = []

    def add(self, state: State) -> int:
        """Add a sequence, whose state the slots take over. Return its row."""
        row, self.count = self.count, self.count + 1
        self.tables.append(state.table)
        for cell in _flat(self.layers):
            for name, x in state.caches[cell.name].tensors.items():
                if cell.window is not None and name in _KEYS_AND_VALUES:
                    self._add_to_ring(cell, name, row, x[0].transpose(0, 1), state.table.length)
                else:
                    self._memory(cell, name, x[0])[row] = x[0]
        return row

    def remove(self, row: int) -> None:
        """Remove a sequence. The last row takes its place."""
        self.tables[row].release()
        last = self.count - 1
        if row != last:
            self.tables[row] = self.tables[last]
            for tensors in self._rows.values():
                for x in tensors.values():
                    x[row] = x[last]
        self.tables.pop()
        self.count = last

    def step(self, first: int, count: int, exact: bool) -> "Step":
        """Make room for one more token of `count` rows from `first` on, and return their caches."""
        tables = self.tables[first : first + count]
        before = [table.length for table in tables]
        for table in tables:
            table.extend(table.length + 1)
        return Step(self, slice(first, first + count), before, exact)

    def _memory(self, cell: Cell, name: str, like: Tensor) -> Tensor:
        memory = self._rows[cell.name]
        if name not in memory:
            memory[name] = _aligned_rows(self.size, like)
        return memory[name]

    def _add_to_ring(self, cell: Cell, name: str, row: int, x_HSK: Tensor, length: int) -> None:
        assert cell.window is not None
        ring = self._memory(cell, name, x_HSK.new_empty(x_HSK.shape[0], cell.window, x_HSK.shape[2]))
        places = torch.arange(length - x_HSK.shape[1], length, device=x_HSK.device) % cell.window
        ring[row][:, places] = x_HSK

    @property
    def state_bytes(self) -> int:
        """Bytes of the states of all rows in use; pages that rows share count once."""
        own = sum(x[0].nbytes for tensors in self._rows.values() for x in tensors.values()) * self.count
        tokens = sum(end - start for start, end in {run for table in self.tables for run in table.runs()})
        pools = [cell.pool for cell in _flat(self.layers) if cell.pool is not None]
        return own + tokens * sum(x[:, :1].nbytes for pool in pools for x in pool.tensors.values())

    def rows(self, cell: Cell, rows: slice) -> dict[str, Tensor]:
        """The entries of some rows of a cell."""
        return {name: x[rows] for name, x in self._rows[cell.name].items()}


def _aligned_rows(size: int, like: Tensor) -> Tensor:
    """Zeros [size, ...] whose rows begin at multiples of 64 bytes: the same products are chosen for every row."""
    step = max(64 // like.element_size(), 1)
    length = -(-like.numel() // step) * step
    return like.new_zeros(size, length)[:, : like.numel()].unflatten(1, like.shape)


class Step:
    """One more token of some rows.

    Args:
        slots: The sequences.
        rows: Which of them.
        before: Number of tokens that each has already.
        exact: Whether a row's result must not depend on where its pages lie.
    """

    def __init__(self, slots: Slots, rows: slice, before: list[int], exact: bool) -> None:
        self.slots, self.rows, self.before = slots, rows, before
        self.exact = exact
        self._entries: list[tuple[LayerCache, dict[str, Tensor]]] = []

    def caches(self, positions: Tensor) -> list[LayerCache]:
        """The caches as `Decoder.hidden_states` takes them, given the new tokens' positions, int64 [n]."""
        tables = self.slots.tables[self.rows]
        pages: PageStep | None = None
        layers = []
        for layer in self.slots.layers:
            caches = []
            for cell in layer:
                entries = self.slots.rows(cell, self.rows)
                cache = LayerCache()
                if cell.pool is not None:
                    if pages is None:
                        places = [table.place(token) for table, token in zip(tables, self.before, strict=True)]
                        runs = [table.runs() for table in tables]
                        ends = [table.end for table in tables]
                        pages = PageStep(torch.tensor(places, device=positions.device), runs, ends, self.exact)
                    cache.store = RowPages(cell.pool, pages)
                elif cell.window is not None:
                    ring = {name: entries.pop(name) for name in _KEYS_AND_VALUES if name in entries}
                    cache.store = RingRows(ring, positions, min(self.before), max(self.before))
                cache.tensors = dict(entries)
                self._entries.append((cache, entries))
                caches.append(cache)
            layers.append(linked(caches))
        return layers

    def finish(self) -> None:
        """Write states that kernels returned in new memory to their rows."""
        for cache, entries in self._entries:
            for name, x in cache.tensors.items():
                if x.data_ptr() != entries[name].data_ptr():
                    entries[name].copy_(x)
