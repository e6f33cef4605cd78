"""Shared by the linear recurrences in Triton: the table of chunks, rows of tokens in kernels, and launches.

Tensors are rows of tokens `[T, H, D]`: all sequences (rows of a batch, or packed documents), one after another. A chunk
is C consecutive tokens of one sequence, or fewer at its end.
"""

# Triton interprets a kernel's annotations, and only constexpr annotations are meaningful to it.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def, import-untyped"

import inspect
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.documents import to_device
from kernels.triton.launch import KernelSpec, device_guard

_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}


class ChunkTable(NamedTuple):
    """The chunks of all sequences.

    Attributes:
        chunks: int32 `[N, 2]`, each chunk's first token and end.
        first: int32 `[sequences + 1]`, each sequence's first chunk, and N.
    """

    chunks: Tensor
    first: Tensor

    @property
    def num_chunks(self) -> int:
        """Number of chunks of all sequences."""
        return self.chunks.shape[0]

    @property
    def num_sequences(self) -> int:
        """Number of sequences: rows of the batch, or packed documents."""
        return self.first.shape[0] - 1


def chunk_table(bounds: tuple[int, ...], chunk: int, device: torch.device) -> ChunkTable:
    """Build the table of chunks, in order, of the sequences between `bounds` (see `kernels.documents`)."""
    chunks, first = [], [0]
    for start, end in pairwise(bounds):
        chunks += [(token, min(token + chunk, end)) for token in range(start, end, chunk)]
        first.append(len(chunks))
    return ChunkTable(*(to_device(torch.tensor(rows, dtype=torch.int32), device) for rows in (chunks, first)))


class Launcher:
    """Launches kernels, or for tensors on the device "meta", records them in `specs` instead."""

    def __init__(self) -> None:
        self.specs: list[KernelSpec] = []

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], *, num_warps: int = 4, flops: float, **arguments: Any
    ) -> None:
        """Launch `kernel` over `grid`.

        Args:
            kernel: a `triton.jit` function.
            grid: number of programs along each axis.
            num_warps: warps of one program.
            flops: operations of the whole launch, for its spec.
            arguments: all arguments of the kernel by name. Tensors are contiguous, unused ones None.
        """
        tensors = [x for x in arguments.values() if isinstance(x, Tensor)]
        if tensors[0].is_meta:
            spec = _spec(kernel, arguments, num_warps, flops)
            again = any(spec.name == earlier.name for earlier in self.specs)
            self.specs.append(replace(spec, name=f"{spec.name}_again") if again else spec)
            return
        with device_guard(tensors[0]):
            # One stage: the loops are short, and a second copy of their tiles would not fit every target's shared
            # memory.
            kernel[grid](**arguments, num_warps=num_warps, num_stages=1)


def _spec(kernel: Any, arguments: dict[str, Any], num_warps: int, flops: float) -> KernelSpec:
    signature: dict[str, str] = {}
    constexprs: dict[str, object] = {}
    for parameter in inspect.signature(kernel.fn).parameters.values():
        value = arguments[parameter.name]
        if parameter.annotation is tl.constexpr or value is None:
            constexprs[parameter.name] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    moved = sum(x.numel() * x.element_size() for x in arguments.values() if isinstance(x, Tensor))
    name = kernel.fn.__name__.removeprefix("_").removesuffix("_kernel")
    multiplies = "PRECISION" in constexprs and bool(constexprs.get("SCORES", True))
    return KernelSpec(name, kernel, signature, constexprs, num_warps, 1, multiplies, moved, flops)


@triton.jit
def chunk_tokens(chunks, chunk, CHUNK: tl.constexpr):
    """Return the chunk's tokens `[C]`, and whether each exists."""
    tokens = tl.load(chunks + 2 * chunk).to(tl.int64) + tl.arange(0, CHUNK)
    return tokens, tokens < tl.load(chunks + 2 * chunk + 1)


@triton.jit
def load_rows(x, tokens, valid, head, heads, DIM: tl.constexpr, first, BLOCK: tl.constexpr):
    """Load `[C, BLOCK]` of x `[T, heads, DIM]`, from column `first`; zero outside."""
    column = first + tl.arange(0, BLOCK)
    mask = valid[:, None] & (column < DIM)[None, :]
    return tl.load(x + (tokens[:, None] * heads + head) * DIM + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(x, value, tokens, valid, head, heads, DIM: tl.constexpr, first, BLOCK: tl.constexpr):
    """Store `value` where `load_rows` would load it, converted to x's dtype."""
    column = first + tl.arange(0, BLOCK)
    mask = valid[:, None] & (column < DIM)[None, :]
    address = x + (tokens[:, None] * heads + head) * DIM + column[None, :]
    tl.store(address, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def state_block(first_key, first_value, KEY, VALUE, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    """Return offsets `[BLOCK_K, BLOCK_V]` into a state `[K, V]`, and whether each lies in it."""
    key = first_key + tl.arange(0, BLOCK_K)[:, None]
    value = first_value + tl.arange(0, BLOCK_V)[None, :]
    return key * VALUE + value, (key < KEY) & (value < VALUE)
