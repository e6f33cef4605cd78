"""Measures of compressed activations in a training step: bytes that autograd saves, bytes kept, and rounding error.

While measuring, each block has a `Meter`. It sees every tensor that autograd saves in the block, before and after
encoding. Bytes are counted by storage, each storage once in a micro-batch, without parameters. The rounding error takes
one more decoding of every encoded tensor, so an engine measures in some steps only.

The engine sums the layers' rows over all ranks, together with the loss. A tensor that several tensor-parallel ranks
hold counts on each of them, as it takes memory on each.
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

# Columns of a row: bytes saved and kept, squared error and squared norm of what is encoded.
_COLUMNS = 4


class _Storages:
    """Distinct storages, and their bytes, but for those of parameters."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.bytes = 0
        self._known = {x.untyped_storage()._cdata for x in parameters}
        # A weak reference keeps the address of a freed storage from being used again.
        self._references: list[StorageWeakRef] = []

    def add(self, x: Tensor) -> None:
        """Add a tensor's storage, unless the tensor is a weight. ZeRO 3 gathers weights in storages of their own."""
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
        """In here the block runs forward on a micro-batch."""
        saved, kept = (_Storages(self.block.parameters()) for _ in range(2))

        def count(x: Tensor) -> Kept:
            kept.add(x)
            return as_it_is(x)

        with hooks(count), observing(saved.add):
            yield
        self.saved, self.kept = self.saved + saved.bytes, self.kept + kept.bytes

    def encoded(self, place: str, x: Tensor, encoding: Encoding) -> None:
        """Add a tensor that has been encoded."""
        self.places.setdefault(place, Tensors()).add(x, encoding)

    def row(self) -> list[float]:
        """The sums over the block: [saved bytes, kept bytes, squared error, squared norm]."""
        squares = [tensors.squares for tensors in self.places.values() if tensors.squares is not None]
        # One copy from the device for all places.
        error, norm = torch.stack(squares).sum(0).tolist() if squares else (0.0, 0.0)
        return [float(self.saved), float(self.kept), error, norm]


def blocks(decoders: Iterable[Decoder]) -> list[Block]:
    """The blocks of a rank's stages that compress."""
    found = [block for decoder in decoders for block in decoder.layers.values() if isinstance(block, Block)]
    return [block for block in found if block.policy.compression is not None]


def begin(decoders: Iterable[Decoder]) -> None:
    """Begin to measure."""
    for block in blocks(decoders):
        block.meter = Meter(block)


def collect(decoders: Iterable[Decoder], config: ModelConfig) -> list[float]:
    """Stop measuring, and return the rows of all the model's layers: zeros of those that this rank does not have.

    Empty if nothing compresses.
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
    """The `compression/` metrics of a step from the sums over all ranks of `collect`; none where nothing was measured.

    `kept_bytes` is the sum over ranks and micro-batches, `saved` the fraction of bytes that compression saves, `error`
    the relative error ‖x̂ − x‖ / ‖x‖ of all encoded tensors.
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
    """Run the blocks on a micro-batch; return the final hidden states, and each layer's meter."""
    begin([decoder])
    try:
        hidden = decoder.hidden_states(tokens, positions, **arguments)
        found = {block.layer: block.meter for block in blocks([decoder]) if isinstance(block.meter, Meter)}
    finally:
        collect([decoder], decoder.model_config)
    return hidden, found
