"""Reads a checkpoint's parameters in any layout, with their adapters merged into them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from models.config import LoraConfig
from models.lora import factor_names, factors_of_block, merged
from trainer.engines.pieces import MODEL, Piece, Reader, Shard


def _piece(tensor: Tensor, shard: Shard) -> Piece:
    return Piece(shard, 0, tensor.detach().view(-1))


@torch.no_grad()
def read_parameters(
    reader: Reader, shards: Mapping[str, tuple[Tensor, Shard]], lora: LoraConfig, main: bool = False
) -> None:
    """Fill shards or other blocks of parameters, by name.

    Args:
        reader: Reads the checkpoint.
        shards: The tensors to fill, and the blocks of the whole parameters that they are.
        lora: Configuration of the adapters.
        main: Read the optimizer's float32 main parameters.
    """

    def stored(name: str) -> str:
        return reader.main_name(name) if main else MODEL + name

    adapted = [name for name in shards if MODEL + factor_names(name)[0] in reader.stored]
    plain = {name: shard for name, shard in shards.items() if name not in adapted}
    reader.read({stored(name): _piece(into, shard) for name, (into, shard) in plain.items()})
    for name in adapted:
        into, shard = shards[name]
        # In float32, so that the sum is rounded once.
        weight = torch.empty(into.shape)
        a, b = (torch.empty(reader.stored[MODEL + factor].size) for factor in factor_names(name))
        factors = zip(factor_names(name), (a, b), strict=True)
        reader.read({stored(name): _piece(weight, shard)} | {stored(own): Piece.of(values) for own, values in factors})
        into.copy_(merged(weight, *factors_of_block(a, b, shard.offsets, shard.shape), lora.scale))


def read_block(reader: Reader, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...], lora: LoraConfig) -> Tensor:
    """Read a block of a parameter in its stored dtype, given the block's first index and its shape."""
    entry = reader.stored[MODEL + name]
    block = torch.empty(sizes, dtype=entry.properties.dtype)
    read_parameters(reader, {name: (block, Shard(block.shape, offsets, entry.size))}, lora)
    return block
