"""Compressed activations: which tensors that backward keeps are stored in how many bits, and with which noise.

The scheme is Mesa's (arXiv 2111.11124): forward is exact, what it saves is quantized, backward reads what comes back
(kernels.quantization). Rounding is stochastic, and so unbiased. A weight's gradient is linear in what its product
saved: it is unbiased, too. Norms and activation functions are not linear in what they saved; docs/memory.md has what
that costs.

What is drawn depends on what a tensor is, and not on where it lies. Its key is made of the seed, the layer, the place
and the step; its rows are numbered by the tokens' places in the whole batch of the step, its columns by the channel in
the whole tensor. A place is a module's name in its block and the order in which the module's tensors are saved. So
recomputation, a resumed run and every layout round alike. Groups of channels never cross tensor-parallel ranks, and are
the same for every number of ranks over which the model can be cut.

Ranges of groups are exact, or running as Mesa's: of a group of channels over all tokens of earlier steps (`Ranges`).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.quantization import Noise, Quantized, dequantize, group_bounds, noise_key, quantize
from kernels.shapes import has_values
from models.parameters import WHOLE, Groups, Module, matches
from models.saved_activations import Codec, Kept, as_it_is

# Above every number of experts: rows are numbered by token and expert.
_MOST_EXPERTS = 1 << 16


@dataclass(frozen=True)
class Origin:
    """Where the tokens [B, T] of a micro-batch lie in the whole batch of a step.

    Attributes:
        step: Steps taken before this one.
        first: The number of the first row's first token.
        length: Tokens in a whole row; 0 for as many as there are.
        offset: The place of the first token in its row: context-parallel ranks have later parts of it.
    """

    step: int = 0
    first: int = 0
    length: int = 0
    offset: int = 0

    def part(self, tokens: int, whole: int, rank: int) -> "Origin":
        """Of the `rank`-th part, of so many tokens, of rows of `whole`."""
        return replace(self, length=self.length or whole, offset=self.offset + rank * tokens)


class Encoding(Protocol):
    """An encoded tensor (models.saved_activations.Kept)."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is kept."""

    @property
    def restore(self) -> Callable[..., Tensor]:
        """Decodes `tensors`."""


class Observer(Protocol):
    """What measures a block's activations (models.compression_statistics.Meter)."""

    def forward(self) -> AbstractContextManager[None]:
        """In here the block runs forward on a micro-batch."""

    def encoded(self, place: str, x: Tensor, encoding: Encoding) -> None:
        """Add a tensor that has been encoded."""


# Of a step's first micro-batch.
BEGINNING = Origin()


class TokenRows:
    """The tokens' numbers in the batch of a step, for whatever has one row for each token of a micro-batch.

    Args:
        origin: Of the micro-batch.
        batch: B.
        time: T on this rank.
        sequence: The ranks over which the residual stream is cut along the sequence; None if it is not.
    """

    def __init__(self, origin: Origin, batch: int, time: int, sequence: dist.ProcessGroup | None = None) -> None:
        self.step = origin.step
        self._origin, self._batch, self._time = origin, batch, time
        ranks, rank = _place(sequence)
        self._own, self._begin = time // ranks, rank * (time // ranks)

    def of(self, shape: torch.Size) -> tuple[Tensor | int, int] | None:
        """The rows' numbers of a tensor of this shape, and how many there are; None if its rows are not the tokens'.

        [T, B, ...] and [T * B, D] are in the order of the residual stream, [B, T, ...] in that of the kernels. Numbers
        that are consecutive are given by the first one.
        """
        batch, time, own = self._batch, self._time, self._own
        if shape[:2] == (time, batch) or shape[0] == time * batch:
            return self._numbers(0, time), time * batch
        if shape[:2] == (own, batch) or shape[0] == own * batch:
            return self._numbers(self._begin, own), own * batch
        return (self._rows_first, time * batch) if shape[:2] == (batch, time) else None

    def has_heads_first(self, shape: torch.Size) -> bool:
        """Whether this is [B, H, T, K], as fused attention puts out."""
        return len(shape) == 4 and (shape[0], shape[2]) == (self._batch, self._time) and self.of(shape) is None

    @property
    def own(self) -> Tensor:
        """The numbers of the tokens of this rank's part of the residual stream, int64 [T/P * B]."""
        numbers = self._numbers(self._begin, self._own)
        return torch.arange(numbers, numbers + self._own) if isinstance(numbers, int) else numbers

    def _numbers(self, begin: int, count: int) -> Tensor | int:
        if self._batch == 1:
            return self._origin.first + self._origin.offset + begin
        return self._table[:, begin : begin + count].T.flatten()

    @property
    def _rows_first(self) -> Tensor | int:
        return self._numbers(0, self._time) if self._batch == 1 else self._table.flatten()

    @cached_property
    def _table(self) -> Tensor:
        """[B, T]."""
        rows = torch.arange(self._batch)[:, None] * (self._origin.length or self._time)
        return self._origin.first + self._origin.offset + rows + torch.arange(self._time)


@dataclass(frozen=True)
class Site:
    """The block that runs.

    Attributes:
        layer: Its number in the whole model.
        sharded: Its modules, by name, whose activations are cut over tensor-parallel ranks along the channels.
        groups: The ranks that share the model.
        rows: The numbers of its micro-batch's tokens.
        meter: Measures what is encoded; None in most steps.
    """

    layer: int
    sharded: frozenset[str]
    groups: Groups = WHOLE
    rows: TokenRows = field(default_factory=lambda: TokenRows(BEGINNING, 0, 0))
    meter: Observer | None = None


_SITE: ContextVar[Site | None] = ContextVar("site", default=None)
_ROWS: ContextVar[Tensor | None] = ContextVar("rows", default=None)


@contextmanager
def running(site: Site) -> Iterator[None]:
    """In here a block runs."""
    token = _SITE.set(site)
    try:
        yield
    finally:
        _SITE.reset(token)


def token_numbers() -> Tensor | None:
    """The numbers of the residual stream's tokens on this rank, int64 [N]; None where nothing is compressed."""
    site = _SITE.get()
    return None if site is None else site.rows.own


@contextmanager
def numbered(numbers: Tensor | None) -> Iterator[None]:
    """In here tensors of as many rows as there are numbers have these rows, whatever their place in the sequence."""
    token = _ROWS.set(numbers)
    try:
        yield
    finally:
        _ROWS.reset(token)


@contextmanager
def selected(places: Tensor) -> Iterator[None]:
    """In here the rows at these places of those that are numbered."""
    numbers = _ROWS.get()
    with numbered(None if numbers is None else numbers.index_select(0, places)):
        yield


def numbers_by_expert(numbers_N: Tensor, experts: Tensor, counts_E: Tensor) -> Tensor:
    """Numbers of rows, of tokens, which are sorted by expert: no two of a layer have the same.

    Args:
        numbers_N: The tokens' numbers, in the order of the rows.
        experts: The experts' indices in the whole layer, int64 [E].
        counts_E: How many rows each has.
    """
    return numbers_N * _MOST_EXPERTS + experts.repeat_interleave(counts_E, output_size=len(numbers_N))


def sharded_modules(block: Module) -> frozenset[str]:
    """The modules of a block, by name, whose activations tensor-parallel ranks have a part of the channels of.

    These are a region's modules, but for the projections that lead into it or stay within a replicated part of it: a
    linear layer saves its input, which is cut only if its weight is cut along the inputs.
    """
    return frozenset(_sharded(block, "", False))


def _sharded(module: nn.Module, path: str, in_region: bool) -> Iterator[str]:
    whole_input = False
    if isinstance(module, Module):
        in_region = in_region if module.in_region is None else module.in_region
        whole_input = isinstance(module, nn.Linear) and module.placements["weight"].shard_axis != 1
    if in_region and not whole_input:
        yield path
    for name, child in module.named_children():
        yield from _sharded(child, f"{path}.{name}" if path else name, in_region)


@dataclass(frozen=True)
class Rule:
    """How the tensors of some modules are stored, where it differs; None for as elsewhere.

    Attributes:
        pattern: Of places, as `layers.*.ffn.*`, where * matches anything.
        bits: 4 or 8; 16 as they are.
        group: Channels that share a scale.
        range: exact or running.
    """

    pattern: str
    bits: int | None = None
    group: int | None = None
    range: str | None = None


class Settings(NamedTuple):
    """How one place is stored (train.compression)."""

    bits: int
    group: int
    range: str


Observed = dict[str, dict[int, Tensor]]
"""Ranges of a step by place and number of the first group: lows and highs, float32 [2, G]."""


@dataclass(eq=False)
class Ranges:
    """Running ranges of groups of channels over all tokens, by place (Mesa, arXiv 2111.11124, section 3.2).

    After each step, low ← decay · low + (1 − decay) · (the step's least element), and alike the high. The first step
    has exact ranges. Mesa updates before each use, which would make ranges depend on the number of micro-batches.

    Attributes:
        decay: The share of a range that a step keeps.
        values: By place, lows and highs of all groups of the whole tensor, float32 [2, G], on the CPU.
    """

    decay: float = 0.9
    values: dict[str, Tensor] = field(default_factory=dict)
    _observed: Observed = field(default_factory=dict)

    def bounds(self, place: str, first: int, groups: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Lows and highs [1, G] of this rank's groups; None in the first step."""
        if place not in self.values:
            return None
        low, high = self.values[place][:, None, first : first + groups].to(device, non_blocking=True)
        return low, high

    @torch.no_grad()
    def observe(self, place: str, first: int, x_ND: Tensor, group: int) -> None:
        """Extend the step's ranges by this rank's rows of a micro-batch."""
        if not len(x_ND) or not has_values():
            return
        low_NG, high_NG = group_bounds(x_ND, group)
        found = torch.stack([low_NG.amin(0), high_NG.amax(0)]).float()
        known = self._observed.setdefault(place, {})
        known[first] = _widest(known[first], found) if first in known else found

    def take(self) -> Observed:
        """What this rank has observed in the step, on the CPU; it is then forgotten."""
        observed, self._observed = self._observed, {}
        return {
            place: {first: part.cpu() for first, part in parts.items()} for place, parts in sorted(observed.items())
        }

    def update(self, of_ranks: Iterable[Observed]) -> None:
        """Move the ranges towards those of a step, given what all ranks have observed."""
        merged: Observed = {}
        for observed in of_ranks:
            for place, parts in observed.items():
                known = merged.setdefault(place, {})
                for first, part in parts.items():
                    known[first] = _widest(known[first], part) if first in known else part
        for place, parts in merged.items():
            step = torch.cat([parts[first] for first in sorted(parts)], 1)
            if step.isfinite().all():
                old = self.values.get(place)
                self.values[place] = step if old is None else self.decay * old + (1 - self.decay) * step


def _widest(ours: Tensor, theirs: Tensor) -> Tensor:
    """Of lows and highs [2, G]."""
    return torch.stack([torch.minimum(ours[0], theirs[0]), torch.maximum(ours[1], theirs[1])])


@dataclass(frozen=True)
class Compression:
    """What a run stores of its activations (train.compression).

    Attributes:
        bits: Of an element: 4 or 8; 16 keeps it as it is.
        group: Channels of a token that share a scale and an offset, at most.
        min_bytes: Smaller tensors are kept as they are.
        seed: Of the noise.
        shards: The most tensor-parallel ranks over which the model can be cut: every group lies within one of them.
        rules: For some modules; later ones go before earlier ones.
        range: exact or running.
        ranges: The running ones.
    """

    bits: int = 8
    group: int = 64
    min_bytes: int = 4096
    seed: int = 0
    shards: int = 1
    rules: tuple[Rule, ...] = ()
    range: str = "exact"
    ranges: Ranges = field(default_factory=Ranges, compare=False)

    def codec(self) -> Codec | None:
        """See `models.saved_activations.Compressing`."""
        site = _SITE.get()
        return None if site is None else partial(self._store, site)

    def settings_of(self, place: str) -> Settings:
        """The settings of a place, such as `layers.3.ffn.0`."""
        found = Settings(self.bits, self.group, self.range)
        for rule in self.rules:
            if matches(place, [rule.pattern]):
                own = {name: getattr(rule, name) for name in Settings._fields}
                found = found._replace(**{name: value for name, value in own.items() if value is not None})
        return found

    def _store(self, site: Site, x: Tensor, place: str) -> Kept:
        path = f"layers.{site.layer}.{place}"
        bits, group, ranges = self.settings_of(path)
        if bits in (0, 16) or x.numel() * x.element_size() < self.min_bytes:
            return as_it_is(x)
        if site.rows.has_heads_first(x.shape):
            x_BTHK = x.transpose(1, 2).contiguous()
            kept = self._store(site, x_BTHK, place)
            return Kept(kept.tensors, partial(_heads_first, kept.restore, x_BTHK.shape))
        # Of what has no tokens as rows, a convolution's entering state, nobody knows what they are in other layouts.
        numbers, rows = _rows(site, x.shape) or (None, x.numel() // x.shape[-1])
        channels, first = x.numel() // rows, 0
        if x.dim() == 4:
            # Groups of a token and a head: a norm by head would enlarge what a larger head's range does to a small one.
            # Ranks have whole heads.
            group = _group_within(x.shape[-1], 1, group)
        if place.rpartition(".")[0] in site.sharded:
            ranks, rank = _place(site.groups.tensor)
            first = rank * channels
            if x.dim() < 4:
                group = _group_within(channels * ranks, self.shards, group)
        noise = None if numbers is None else Noise(self._key(site, place), numbers, first)
        x_ND, bounds = x.view(rows, channels), None
        if ranges == "running":
            bounds = self.ranges.bounds(path, first // group, -(-channels // group), x.device)
            self.ranges.observe(path, first // group, x_ND, group)
        stored = quantize(x_ND, bits=bits, group=group, noise=noise, bounds=bounds)
        kept = Kept(stored.tensors, partial(_restore, stored.shape, bits, group))
        if site.meter is not None:
            site.meter.encoded(place, x, kept)
        return kept

    def _key(self, site: Site, place: str) -> int:
        return noise_key(self.seed, site.layer, place, site.rows.step)


def _rows(site: Site, shape: torch.Size) -> tuple[Tensor | int, int] | None:
    rows = _ROWS.get()
    return (rows, len(rows)) if rows is not None and len(rows) == shape[0] else site.rows.of(shape)


def _place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Ranks of a group, and this rank's number."""
    return (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))


@cache
def _group_within(channels: int, shards: int, most: int) -> int:
    """The largest group that every part of the channels is a multiple of, over at most `shards` ranks."""
    part = channels // math.gcd(channels, shards)
    return next(size for size in range(min(most, part), 0, -1) if part % size == 0)


def _heads_first(restore: Callable[..., Tensor], shape_BTHK: torch.Size, *tensors: Tensor) -> Tensor:
    return restore(*tensors).view(shape_BTHK).transpose(1, 2).contiguous()


def _restore(shape: torch.Size, bits: int, group: int, codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return dequantize(Quantized(codes, scale, offset, shape, bits, group))
