"""Measures of compressed activations in a training step: bytes that autograd saves, bytes kept, and rounding error.

While measuring, each block has a `Meter`. It sees every tensor that autograd saves in the block, before and after
encoding. Bytes are counted by storage: each storage counts once per micro-batch, and parameters do not count. Measuring
the rounding error decodes every encoded tensor once more, so an engine measures only in some steps.

The engine sums the layers' rows over all ranks, together with the loss. A tensor that several tensor-parallel ranks
hold counts once for each of them, because it takes memory on each.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from kernels.autograd import Role, role_of
from models.compression import Encoding
from models.config import ModelConfig
from models.decoder import Block, Decoder
from models.saved_activations import Kept, as_it_is, hooks, observing

# Columns of a row: bytes saved, bytes kept, squared error and squared norm of the encoded tensors.
_COLUMNS = 4


class _Storages:
    """A set of distinct storages without those of parameters, and the sum of their bytes."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.bytes = 0
        self._known = {x.untyped_storage()._cdata for x in parameters}
        # A weak reference keeps the address of a freed storage from being used again.
        self._references: list[StorageWeakRef] = []

    def add(self, x: Tensor) -> None:
        """Add a tensor's storage, unless the tensor is a weight.

        Addresses do not suffice to recognise weights, because ZeRO 3 gathers them into storages of their own.
        """
        storage = x.untyped_storage()
        if storage._cdata in self._known or role_of(x) is Role.WEIGHT:
            return
        self._known.add(storage._cdata)
        self._references.append(StorageWeakRef(storage))
        self.bytes += storage.nbytes()


@dataclass
class Tensors:
    """Sums over the encoded tensors of one place.

    Attributes:
        saved: Bytes before encoding.
        kept: Bytes after encoding.
        squares: Sum of squared differences between decoded and original elements, and sum of squared original
            elements, float64 [2]; None before the first tensor.
    """

    saved: int = 0
    kept: int = 0
    squares: Tensor | None = None

    def add(self, x: Tensor, encoding: Encoding) -> None:
        """Add a tensor and its encoding."""
        self.saved += x.numel() * x.element_size()
        self.kept += sum(part.numel() * part.element_size() for part in encoding.tensors)
        wide = x.detach().double()
        error = encoding.restore(*encoding.tensors).view_as(x).double() - wide
        squares = torch.stack([error.square().sum(), wide.square().sum()])
        self.squares = squares if self.squares is None else self.squares + squares


@dataclass
class Meter:
    """What a block keeps for backward, over the micro-batches of a step.

    Attributes:
        block: The block.
        saved: Bytes of the storages that autograd saves.
        kept: Bytes of the storages that are kept for them.
        places: The encoded tensors, by their place in the block.
    """

    block: Block
    saved: int = 0
    kept: int = 0
    places: dict[str, Tensors] = field(default_factory=dict)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Context in which the block runs forward on a micro-batch."""
        saved, kept = (_Storages(self.block.parameters()) for _ in range(2))

        def count(x: Tensor) -> Kept:
            kept.add(x)
            return as_it_is(x)

        with hooks(count), observing(saved.add):
            yield
        self.saved, self.kept = self.saved + saved.bytes, self.kept + kept.bytes

    def encoded(self, place: str, x: Tensor, encoding: Encoding) -> None:
        """Add an encoded tensor, given its place in the block, its values and its encoding."""
        self.places.setdefault(place, Tensors()).add(x, encoding)

    def row(self) -> list[float]:
        """Return the sums over the block: [saved bytes, kept bytes, squared error, squared norm]."""
        squares = [tensors.squares for tensors in self.places.values() if tensors.squares is not None]
        # Sum on the device first, so that only one copy to the host is needed.
        error, norm = torch.stack(squares).sum(0).tolist() if squares else (0.0, 0.0)
        return [float(self.saved), float(self.kept), error, norm]


def blocks(decoders: Iterable[Decoder]) -> list[Block]:
    """Return the blocks of a rank's stages that compress activations."""
    found = [block for decoder in decoders for block in decoder.layers.values() if isinstance(block, Block)]
    return [block for block in found if block.policy.compression is not None]


def begin(decoders: Iterable[Decoder]) -> None:
    """Start measuring: give every block that compresses a new meter."""
    for block in blocks(decoders):
        block.meter = Meter(block)


def collect(decoders: Iterable[Decoder], config: ModelConfig) -> list[float]:
    """Stop measuring and return the concatenated rows of all layers of the model.

    The rows of layers that this rank does not have are 0. The list is empty if no block compresses.
    """
    if not blocks(decoders):
        return []
    rows = [[0.0] * _COLUMNS for _ in range(config.num_layers)]
    for block in blocks(decoders):
        if isinstance(block.meter, Meter):
            rows[block.layer] = block.meter.row()
        block.meter = None
    return [value for row in rows for value in row]


def metrics(totals: Sequence[float]) -> dict[str, Any]:
    """Return the `compression/` metrics of a step, given the results of `collect` summed over all ranks.

    `kept_bytes` is the sum over ranks and micro-batches. `saved` is the fraction of bytes that compression saves.
    `error` is the relative error ‖x̂ − x‖ / ‖x‖ over all encoded tensors. Metrics named `_by_layer` are lists with one
    value per layer. The result is empty if nothing was measured.
    """
    if not any(totals):
        return {}
    rows = [totals[first : first + _COLUMNS] for first in range(0, len(totals), _COLUMNS)]
    named = _summary([sum(column) for column in zip(*rows, strict=True)])
    by_layer = [_summary(row) for row in rows]
    return {f"compression/{name}": value for name, value in named.items()} | {
        f"compression/{name}_by_layer": [[row[name] for row in by_layer]] for name in named
    }


def _summary(row: Sequence[float]) -> dict[str, float]:
    saved, kept, error, norm = row
    return {
        "kept_bytes": kept,
        "saved": 1 - kept / saved if saved else 0.0,
        "error": math.sqrt(error / norm) if norm else 0.0,
    }


def measure(decoder: Decoder, tokens: Tensor, positions: Tensor, **arguments: Any) -> tuple[Tensor, dict[int, Meter]]:
    """Run the blocks on a micro-batch. Return the final hidden states, and the meters by layer number."""
    begin([decoder])
    try:
        hidden = decoder.hidden_states(tokens, positions, **arguments)
        found = {block.layer: block.meter for block in blocks([decoder]) if isinstance(block.meter, Meter)}
    finally:
        collect([decoder], decoder.model_config)
    return hidden, found
