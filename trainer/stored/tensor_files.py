"""Files of safetensors: headers, blocks of tensors, and writing one tensor at a time.

A file is eight bytes with the length of the header, the header (JSON: dtype, shape and place of each tensor), then the
tensors' bytes. safetensors itself writes a file from tensors that are all in memory; `write_file` holds one at a time.
Headers are checked without importing torch.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open

from models.hub.tensors import Index, everything
from trainer.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# By safetensors' name: torch's name.
TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_NAMES = {name: kind for kind, name in TYPES.items()}
_LENGTH = 8


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        file: The file.
        shape: Its shape.
        dtype: Its dtype, in safetensors' notation such as BF16.
        start: Where its bytes begin in the file.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int

    def read(self, index: Index = ()) -> "Tensor":
        """Read a block, in the stored dtype; without an index the whole tensor. Integers drop their dimension."""
        import torch

        dtype = getattr(torch, TYPES[self.dtype])
        if not prod(self.shape):
            return torch.empty(self.shape, dtype=dtype)[index]
        first, rest = self._rows(index)
        size = prod(self.shape[1:]) * dtype.itemsize
        if rest == everything(self.shape[1:]):
            # Rows lie together. Read, not mapped: pages of a mapping would count as memory of this process, too.
            count, start = (first.stop - first.start) * size, self.start + first.start * size
            found = torch.from_numpy(np.fromfile(self.file, np.uint8, count, offset=start)).view(dtype)
            return found.view(-1, *self.shape[1:]) if self.shape else found.view(())
        # Mapped, so that only the pages of the block are read; "c" makes a private mapping, which torch may view.
        mapped = np.memmap(self.file, np.uint8, "c", self.start, (prod(self.shape) * dtype.itemsize,))
        tensor: Tensor = torch.from_numpy(mapped).view(dtype).view(self.shape)[index].clone()
        return tensor

    def _rows(self, index: Index) -> tuple[slice, Index]:
        """The rows of a block, and its index in the other dimensions; of an integer its row, and nothing of these."""
        if not self.shape:
            return slice(0, 1), ()
        whole = everything(self.shape)
        filled = (*index, *whole[len(index) :])
        first = filled[0]
        return (first, filled[1:]) if isinstance(first, slice) else (slice(first, first + 1), ())


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, by name.

    Raises:
        ConfigError: the file is not a whole safetensors file, or a tensor is of another type.
    """
    try:
        # Checks places, sizes and the length of the file. numpy, because no tensor is read.
        with safe_open(file, framework="np"):
            pass
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(_LENGTH), "little")
            header: dict[str, Any] = json.loads(opened.read(length))
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file} is not a whole safetensors file ({error}); write the weights again") from error
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        if entry["dtype"] not in TYPES:
            raise ConfigError(f"{file}: {name} is {entry['dtype']}; weights are {', '.join(TYPES)}")
        start = _LENGTH + length + entry["data_offsets"][0]
        found[name] = StoredTensor(file, tuple(entry["shape"]), entry["dtype"], start)
    return found


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of a tensor to write."""

    shape: tuple[int, ...]
    dtype: "torch.dtype"

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


def write_file(file: Path, specs: Mapping[str, Spec], produce: Callable[[str], "Tensor"]) -> None:
    """Write a file, one tensor in memory at a time.

    Args:
        file: The file.
        specs: Shapes and dtypes by name. Wider dtypes must come first, so that every tensor is aligned.
        produce: Returns the tensor of a name; called once for each, in order.
    """
    import torch

    with file.open("wb") as opened:
        opened.write(_header(specs))
        for name in specs:
            # A view of the bytes: numpy has no bfloat16.
            data: Any = produce(name).detach().contiguous().view(-1).view(torch.uint8).numpy()
            opened.write(data)


def _header(specs: Mapping[str, Spec]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        kind = _NAMES[str(spec.dtype).removeprefix("torch.")]
        entries[name] = {"dtype": kind, "shape": list(spec.shape), "data_offsets": [end, end + spec.nbytes]}
        end += spec.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    # Spaces up to a multiple of eight, so that the data begin aligned.
    header += b" " * (-len(header) % _LENGTH)
    return len(header).to_bytes(_LENGTH, "little") + header


def widest_first(names: Iterable[str], specs: Mapping[str, Spec]) -> list[str]:
    """The names in the order in which `write_file` needs them."""
    return sorted(names, key=lambda name: -specs[name].dtype.itemsize)
