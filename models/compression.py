"""Compressed activations: the number of bits and the rounding noise of the tensors that are stored for backward.

The scheme is Mesa's (arXiv 2111.11124). Forward is exact. The activations that it saves for backward are quantized, and
backward computes with the dequantized values (kernels.quantization). Rounding is stochastic and therefore unbiased. A
weight's gradient is linear in the saved input, so it is unbiased, too. The gradients of norms and activation functions
are not linear in the saved tensors; docs/memory.md gives their error.

The noise depends on which tensor is rounded, not on which rank holds it. Its key is made from the seed, the layer, the
tensor's place and the step. Rows are numbered by the position of the token in the step's global batch, columns by the
channel in the unsharded tensor. A place is a module's name within its block, followed by the tensor's label or, without
one, by its number in the order in which the module saves tensors. Recomputation, a resumed run and every parallel
layout therefore draw the same noise. Groups of channels never cross tensor-parallel ranks, and are the same for every
tensor-parallel size that the model allows.

A group's range is either exact or running. As in Mesa, a running range is the moving average over steps of the range
over all tokens of a step (`Ranges`).
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

# More than any number of experts. The number of a routed row combines its token and its expert.
_MOST_EXPERTS = 1 << 16


@dataclass(frozen=True)
class Origin:
    """Position of a micro-batch's tokens [B, T] in the global batch of a step.

    Attributes:
        step: Number of steps taken before this one.
        first: Number of the first row's first token in the global batch.
        length: Number of tokens in a whole row; 0 means T.
        offset: Position in the row of this rank's first token. It is above 0 on all but the first context-parallel
            rank.
    """

    step: int = 0
    first: int = 0
    length: int = 0
    offset: int = 0

    def part(self, tokens: int, whole: int, rank: int) -> "Origin":
        """Return the origin of part number `rank`, if rows of `whole` tokens are cut into parts of `tokens` tokens."""
        return replace(self, length=self.length or whole, offset=self.offset + rank * tokens)


class Encoding(Protocol):
    """The stored form of an encoded tensor (models.saved_activations.Kept)."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors kept from forward to backward."""

    @property
    def restore(self) -> Callable[..., Tensor]:
        """A function that decodes `tensors`."""


class Observer(Protocol):
    """Measures the activations of a block (models.compression_statistics.Meter)."""

    def forward(self) -> AbstractContextManager[None]:
        """Context in which the block runs forward on a micro-batch."""

    def encoded(self, place: str, x: Tensor, encoding: Encoding) -> None:
        """Add an encoded tensor, given its place in the block, its values and its encoding."""


# The first micro-batch of the first step.
BEGINNING = Origin()


class TokenRows:
    """Token numbers in the global batch of a step, for tensors with one row per token of a micro-batch.

    Args:
        origin: Origin of the micro-batch.
        batch: B.
        time: T on this rank.
        sequence: Ranks over which sequence parallelism shards the residual stream; None without it.
    """

    def __init__(self, origin: Origin, batch: int, time: int, sequence: dist.ProcessGroup | None = None) -> None:
        self.step = origin.step
        self._origin, self._batch, self._time = origin, batch, time
        ranks, rank = _place(sequence)
        self._own, self._begin = time // ranks, rank * (time // ranks)

    def of(self, shape: torch.Size) -> tuple[Tensor | int, int] | None:
        """Return the token numbers of a tensor's rows, and the number of rows. None if its rows are not tokens.

        [T, B, ...] and [T * B, D] are in the order of the residual stream, where T may be this rank's part of the
        sequence. [B, T, ...] is in the order of the kernels. For consecutive numbers, only the first one is returned.
        """
        batch, time, own = self._batch, self._time, self._own
        if shape[:2] == (time, batch) or shape[0] == time * batch:
            return self._numbers(0, time), time * batch
        if shape[:2] == (own, batch) or shape[0] == own * batch:
            return self._numbers(self._begin, own), own * batch
        return (self._rows_first, time * batch) if shape[:2] == (batch, time) else None

    def has_heads_first(self, shape: torch.Size) -> bool:
        """Return whether a shape is [B, H, T, K], the layout of fused attention's output."""
        return len(shape) == 4 and (shape[0], shape[2]) == (self._batch, self._time) and self.of(shape) is None

    @property
    def own(self) -> Tensor:
        """Token numbers of this rank's part of the residual stream, int64 [T/P * B]."""
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
        """Token numbers, int64 [B, T]."""
        rows = torch.arange(self._batch)[:, None] * (self._origin.length or self._time)
        return self._origin.first + self._origin.offset + rows + torch.arange(self._time)


@dataclass(frozen=True)
class Site:
    """The block that is running.

    Attributes:
        layer: Number of its layer in the whole model.
        sharded: Names of its modules whose activations are sharded over tensor-parallel ranks by channels.
        groups: Process groups of the ranks that share the model.
        rows: Token numbers of its micro-batch.
        meter: Measures the encoded tensors. None in most steps.
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
    """Context in which the block of `site` runs."""
    token = _SITE.set(site)
    try:
        yield
    finally:
        _SITE.reset(token)


def token_numbers() -> Tensor | None:
    """Return this rank's token numbers of the residual stream, int64 [N]. None where nothing is compressed."""
    site = _SITE.get()
    return None if site is None else site.rows.own


@contextmanager
def numbered(numbers: Tensor | None) -> Iterator[None]:
    """Context in which tensors with len(numbers) rows have these row numbers. None numbers rows by position."""
    token = _ROWS.set(numbers)
    try:
        yield
    finally:
        _ROWS.reset(token)


@contextmanager
def selected(places: Tensor) -> Iterator[None]:
    """Context in which the row numbers are those of the surrounding `numbered` context at these indices."""
    numbers = _ROWS.get()
    with numbered(None if numbers is None else numbers.index_select(0, places)):
        yield


def numbers_by_expert(numbers_N: Tensor, experts: Tensor, counts_E: Tensor) -> Tensor:
    """Return row numbers, int64 [N], for tokens sorted by expert. They are unique within a layer.

    Args:
        numbers_N: Token number of each row.
        experts: Indices of the experts in the whole layer, int64 [E].
        counts_E: Number of rows of each expert.
    """
    return numbers_N * _MOST_EXPERTS + experts.repeat_interleave(counts_E, output_size=len(numbers_N))


def sharded_modules(block: Module) -> frozenset[str]:
    """Return the names of a block's modules whose activations are sharded over tensor-parallel ranks by channels.

    These are all modules in a tensor-parallel region except linear layers whose weight is not sharded by inputs: the
    projections that enter the region, and those in a replicated part of it. A linear layer saves its input, and their
    input is replicated.
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
    """Storage settings for the places that match a pattern. None leaves a setting unchanged.

    Attributes:
        pattern: A pattern of places, such as `layers.*.ffn.*`; * matches any characters.
        bits: Bits per element: 4 or 8. 16 stores tensors unchanged.
        group: Largest number of channels of a token that share a scale and an offset.
        range: exact or running.
    """

    pattern: str
    bits: int | None = None
    group: int | None = None
    range: str | None = None


class Settings(NamedTuple):
    """Storage settings of one place (train.compression)."""

    bits: int
    group: int
    range: str


Observed = dict[str, dict[int, Tensor]]
"""Ranges observed in a step, by place and by number of the first group: lows and highs, float32 [2, G]."""


@dataclass(eq=False)
class Ranges:
    """Running ranges of groups of channels over all tokens, by place (Mesa, arXiv 2111.11124, section 3.2).

    After each step, low ← decay · low + (1 − decay) · (the group's smallest element in the step). The high is updated
    in the same way from the largest element. The first step uses exact ranges. Mesa updates before each use, which
    would make the ranges depend on the number of micro-batches.

    Attributes:
        decay: The share of the old range that a step keeps.
        values: Lows and highs of all groups of the whole tensor by place, float32 [2, G], on the CPU.
    """

    decay: float = 0.9
    values: dict[str, Tensor] = field(default_factory=dict)
    _observed: Observed = field(default_factory=dict)

    def bounds(self, place: str, first: int, groups: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Return lows and highs [1, G] of this rank's groups, the first of which is number `first`.

        None in the first step.
        """
        if place not in self.values:
            return None
        low, high = self.values[place][:, None, first : first + groups].to(device, non_blocking=True)
        return low, high

    @torch.no_grad()
    def observe(self, place: str, first: int, x_ND: Tensor, group: int) -> None:
        """Widen the step's ranges to include this rank's rows of a micro-batch."""
        if not len(x_ND) or not has_values():
            return
        low_NG, high_NG = group_bounds(x_ND, group)
        found = torch.stack([low_NG.amin(0), high_NG.amax(0)]).float()
        known = self._observed.setdefault(place, {})
        known[first] = _widest(known[first], found) if first in known else found

    def take(self) -> Observed:
        """Return the ranges that this rank observed in the step, on the CPU, and forget them."""
        observed, self._observed = self._observed, {}
        return {
            place: {first: part.cpu() for first, part in parts.items()} for place, parts in sorted(observed.items())
        }

    def update(self, of_ranks: Iterable[Observed]) -> None:
        """Move the ranges towards those of a step, given the observations of all ranks.

        A place whose observed ranges are not finite keeps its old ones.
        """
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
    """Return the union of two ranges, lows and highs [2, G]."""
    return torch.stack([torch.minimum(ours[0], theirs[0]), torch.maximum(ours[1], theirs[1])])


@dataclass(frozen=True)
class Compression:
    """How a run stores its activations (train.compression).

    Attributes:
        bits: Bits per element: 4 or 8. 16 stores tensors unchanged.
        group: Largest number of channels of a token that share a scale and an offset.
        min_bytes: Tensors smaller than this are stored unchanged.
        seed: Seed of the noise.
        shards: Largest number of tensor-parallel ranks that the model allows. No group crosses the ranks' borders.
        rules: Settings for some places. Later rules override earlier ones.
        range: exact or running.
        ranges: The running ranges.
        check: Raise a ValueError that names the place if a tensor is not finite.
    """

    bits: int = 8
    group: int = 64
    min_bytes: int = 4096
    seed: int = 0
    shards: int = 1
    rules: tuple[Rule, ...] = ()
    range: str = "exact"
    ranges: Ranges = field(default_factory=Ranges, compare=False)
    check: bool = False

    def codec(self) -> Codec | None:
        """Return the codec of the running block. None outside blocks."""
        site = _SITE.get()
        return None if site is None else partial(self._store, site)

    def settings_of(self, place: str) -> Settings:
        """Return the settings of a place, such as `layers.3.ffn.0`."""
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
        # Rows that are not tokens, such as a convolution's entering state, have no number that is the same in every
        # layout. Without numbers there is no noise: these tensors are rounded to nearest.
        numbers, rows = _rows(site, x.shape) or (None, x.numel() // x.shape[-1])
        channels, first = x.numel() // rows, 0
        if x.dim() == 4:
            # A group lies within one head. A group over several heads would round a head of small values by the range
            # of a larger one, and a norm per head would then enlarge these errors. Every rank has whole heads.
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
        check = path if self.check and has_values() else None
        stored = quantize(x_ND, bits=bits, group=group, noise=noise, bounds=bounds, check=check)
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
    """Return the number of ranks in a group, and this rank's number in it."""
    return (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))


@cache
def _group_within(channels: int, shards: int, most: int) -> int:
    """Return the largest group size, at most `most`, that divides each rank's channels for up to `shards` ranks."""
    part = channels // math.gcd(channels, shards)
    return next(size for size in range(min(most, part), 0, -1) if part % size == 0)


def _heads_first(restore: Callable[..., Tensor], shape_BTHK: torch.Size, *tensors: Tensor) -> Tensor:
    return restore(*tensors).view(shape_BTHK).transpose(1, 2).contiguous()


def _restore(shape: torch.Size, bits: int, group: int, codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return dequantize(Quantized(codes, scale, offset, shape, bits, group))
