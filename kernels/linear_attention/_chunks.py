"""How sequences are laid out for the chunked kernels, and what every linear attention shares around its recurrence.

All chunks of all sequences (the rows of a batch, or the documents packed by `cu_seqlens`) become one batch axis `N`,
so that the work inside the chunks is a few batched matrix products. Chunks are ordered by their position in the
sequence first and by sequence second, sequences from the longest to the shortest: the chunks at position j are then
one contiguous slice, whose r-th element continues the r-th sequence, and the scan over positions carries
`state[:count]` forward with no indexing. A thousand short documents cost as few steps as one of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from kernels.cache import cache_tensors
from kernels.matmul import multiplies_bfloat16
from kernels.shapes import block_limit

CHUNK = 64  # measured: 32 and 128 are slower at K = V = 64 and 128, for 8 x 512 and 1 x 4096 tokens
SMALLEST_CHUNK = 16
# Of one tensor in a segment (see `segments`). Measured on a Zen 5 with 1 MiB of second-level cache a core.
_SEGMENT_ELEMENTS = 1 << 18


@dataclass(frozen=True, eq=False)
class ChunkIndex:
    """Where the tokens of sequences that are not a whole number of chunks lie.

    `token_of_slot` `[N, C]` holds the token in each slot of each chunk, 0 where `padding` `[N, C]` says that there is
    none. `slots` and `tokens` `[T]` are the pairs of flat slot and token without the padding, by slot; those of chunk n
    begin at `starts[n]`.
    """

    token_of_slot: Tensor
    padding: Tensor
    slots: Tensor
    tokens: Tensor
    starts: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ChunkLayout:
    """Where each token of `[B, T]` lies among chunks of `chunk` tokens: all of them, or those of a `segment`.

    `spans` holds (first chunk, count) of each chunk position, `first_position` and `first_chunk` what a segment leaves
    out before it. `order` lists the sequences from longest to shortest, or is None when they are in order already.
    `index` is None when every sequence is the same whole number of chunks: the layout is then a transposition.
    """

    num_sequences: int
    chunk: int
    spans: tuple[tuple[int, int], ...]
    order: Tensor | None
    index: ChunkIndex | None
    first_position: int = 0
    first_chunk: int = 0

    @property
    def num_chunks(self) -> int:
        """Chunks of all sequences."""
        first, count = self.spans[-1]
        return first + count

    def segments(self, elements: int, on_cpu: bool) -> list["ChunkLayout"]:
        """Consecutive chunk positions, each with as many as the CPU's cache holds; one segment on other devices.

        `elements` are those of a chunk's tensors over all heads. What is computed of a segment is used, and its memory
        free again, before the next one begins.
        """
        if not on_cpu:
            return [self]
        limit = max(1, block_limit(_SEGMENT_ELEMENTS) // elements)
        segments, position = [], 0
        while position < len(self.spans):
            first = self.spans[position][0]
            end = position + 1
            while end < len(self.spans) and sum(self.spans[end]) - first <= limit:
                end += 1
            spans = tuple((start - first, count) for start, count in self.spans[position:end])
            segments.append(replace(self, spans=spans, first_position=position, first_chunk=first))
            position = end
        return segments

    def pack(self, x: Tensor, heads: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """`x` `[B, T, H', D]` as `[N * heads, C, D]`, in `out` if given: heads repeated to `heads`, padding zero."""
        own_heads, dim = x.shape[2:]
        count = self.num_chunks
        packed = x.new_empty(count * heads, self.chunk, dim, dtype=dtype) if out is None else out
        shape = (count, own_heads, heads // own_heads, self.chunk, dim)
        if self.index is None:
            end = self.first_position + len(self.spans)
            x = x.reshape(self.num_sequences, -1, self.chunk, own_heads, 1, dim)[:, self.first_position : end]
            positions = (len(self.spans), self.num_sequences, *shape[1:])
            packed.view(positions).copy_(x.permute(1, 0, 3, 4, 2, 5))
            return packed
        here = slice(self.first_chunk, self.first_chunk + count)
        tokens = self.index.token_of_slot[here].reshape(-1)
        x = x.reshape(-1, own_heads * dim).index_select(0, tokens).view(count, self.chunk, own_heads, 1, dim)
        packed.view(shape).copy_(x.permute(0, 2, 3, 1, 4))
        packed.view(shape).masked_fill_(self.index.padding[here, None, None, :, None], 0)
        return packed

    def unpack(self, packed: Tensor, x: Tensor) -> Tensor:
        """The inverse of `pack` and its transpose: `[N * H, C, D]` into `x` `[B, T, H', D]`, repeated heads summed."""
        own_heads, dim = x.shape[2:]
        count = self.num_chunks
        packed = packed.reshape(count, own_heads, -1, self.chunk, dim)
        packed = packed.sum(2) if packed.shape[2] > 1 else packed[:, :, 0]
        if self.index is None:
            end = self.first_position + len(self.spans)
            packed = packed.view(len(self.spans), self.num_sequences, own_heads, self.chunk, dim)
            chunks = x.view(self.num_sequences, -1, self.chunk, own_heads, dim)
            chunks[:, self.first_position : end] = packed.permute(1, 0, 3, 2, 4)
            return x
        here = slice(self.index.starts[self.first_chunk], self.index.starts[self.first_chunk + count])
        slots = self.index.slots[here] - self.first_chunk * self.chunk
        rows = packed.transpose(1, 2).reshape(-1, own_heads * dim).index_select(0, slots).to(x.dtype)
        x.view(-1, own_heads * dim).index_copy_(0, self.index.tokens[here], rows)
        return x

    def sort_state(self, state: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A fresh copy of `state` `[B, H, K, V]` in the layout's order and `like`'s dtype; zeros for None."""
        if state is None:
            return like.new_zeros(shape)
        state = state.to(like.dtype, copy=True)
        return state.contiguous() if self.order is None else state[self.order]

    def unsort_state(self, state: Tensor) -> Tensor:
        """The inverse of `sort_state`'s ordering."""
        if self.order is None:
            return state
        return torch.empty_like(state).index_copy_(0, self.order, state)


@cache_tensors
def chunk_layout(bounds: tuple[int, ...], device: torch.device) -> ChunkLayout:
    """The layout of the sequences between `bounds` (see `sequence_bounds`)."""
    lengths = [end - start for start, end in pairwise(bounds)]
    longest = max(lengths)
    chunk = CHUNK
    while chunk > SMALLEST_CHUNK and chunk // 2 >= longest:
        chunk //= 2
    order = sorted(range(len(lengths)), key=lambda sequence: -lengths[sequence])
    spans, first = [], 0
    for position in range(-(-longest // chunk)):
        count = sum(length > position * chunk for length in lengths)
        spans.append((first, count))
        first += count
    in_order = order == list(range(len(order)))
    order_index = None if in_order else torch.tensor(order, device=device)
    if min(lengths) == longest and longest % chunk == 0:
        return ChunkLayout(len(lengths), chunk, tuple(spans), order_index, None)

    first_tokens = [
        bounds[order[rank]] + position * chunk for position, (_, n) in enumerate(spans) for rank in range(n)
    ]
    ends = [bounds[order[rank] + 1] for _, n in spans for rank in range(n)]
    token = torch.tensor(first_tokens)[:, None] + torch.arange(chunk)
    padding = token >= torch.tensor(ends)[:, None]
    slots = padding.logical_not().flatten().nonzero()[:, 0]
    starts = (0, *padding.logical_not().sum(1).cumsum(0).tolist())
    tensors = (token.masked_fill(padding, 0), padding, slots, token.flatten()[slots])
    token_of_slot, padding, slots, tokens = (x.to(device) for x in tensors)
    index = ChunkIndex(token_of_slot, padding, slots, tokens, starts)
    return ChunkLayout(len(lengths), chunk, tuple(spans), order_index, index)


def operand_dtype(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What large products round their operands to: bfloat16 if q, k and v are and the device is fast at it.

    With AVX512-BF16 a batch of 64 x 64 products takes a third of its float32 time, conversions included; without it,
    bfloat16 products on a CPU are slower than float32 ones, and `dtype` is returned.
    """
    narrow = all(x.dtype == torch.bfloat16 for x in (q, k, v))
    return torch.bfloat16 if narrow and (q.device.type != "cpu" or multiplies_bfloat16()) else dtype


def product(a: Tensor, b: Tensor, operands: torch.dtype, result: torch.dtype) -> Tensor:
    """Batched a @ b with both rounded to `operands`, as `result`."""
    return torch.bmm(a.to(operands), b.to(operands)).to(result)


def add_product(total: Tensor, a: Tensor, b: Tensor, operands: torch.dtype) -> Tensor:
    """Adds a @ b to `total` in place, with a and b rounded to `operands`; the sum keeps the precision of `total`."""
    a, b = a.to(operands), b.to(operands)
    return total.baddbmm_(a, b) if total.dtype == operands else total.add_(torch.bmm(a, b))


def scan_states(layout: ChunkLayout, state: Tensor, decay: Tensor, increments: Tensor, reverse: bool = False) -> Tensor:
    """Runs state = decay * state + increment over the chunk positions, in place; returns the state met by each chunk.

    state `[N_sequences, H, K, V]`, decay `[N, H, K, 1]`, increments `[N, H, K, V]`; returns `[N, H, K, V]`.
    """
    met = torch.empty_like(increments)
    for first, count in reversed(layout.spans) if reverse else layout.spans:
        chunks, active = slice(first, first + count), state[:count]
        met[chunks] = active
        torch.addcmul(increments[chunks], active, decay[chunks], out=active)
    return met


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    per_head: dict[str, tuple[Tensor, int | None]],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[int, tuple[int, ...]]:
    """Raises ValueError for shapes that do not fit together; returns the number of heads and the sequences' bounds.

    `per_head` maps the name of each further input to the tensor and its size behind `[B, T, H]` (None: no such axis).
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} must be [B, T, H, D], got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {x.dtype}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"q and k must have the same key dimension, got {q.shape[-1]} and {k.shape[-1]}")
    for name, (x, dim) in per_head.items():
        if x.dim() != (3 if dim is None else 4) or (dim is not None and x.shape[-1] != dim):
            wanted = "[B, T, H]" if dim is None else f"[B, T, H, {dim}]"
            raise ValueError(f"{name} must be {wanted}, got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {x.dtype}")
    tensors = {"q": q, "k": k, "v": v} | {name: x for name, (x, _) in per_head.items()}
    heads = max(x.shape[2] for x in tensors.values())
    for name, x in tensors.items():
        if x.shape[:2] != q.shape[:2]:
            raise ValueError(f"{name} must begin with q's [B, T] = {tuple(q.shape[:2])}, got shape {tuple(x.shape)}")
        if not x.shape[2] or heads % x.shape[2]:
            raise ValueError(f"{name} has {x.shape[2]} heads, which does not divide the largest number, {heads}")
    if q.numel() == 0 or v.numel() == 0:
        raise ValueError(f"empty input: q has shape {tuple(q.shape)}, v {tuple(v.shape)}")
    bounds = sequence_bounds(q.shape[0], q.shape[1], cu_seqlens)
    state_shape = (len(bounds) - 1, heads, q.shape[-1], v.shape[-1])
    if initial_state is not None and initial_state.shape != state_shape:
        raise ValueError(f"initial_state must be [N, H, K, V] = {state_shape}, got shape {tuple(initial_state.shape)}")
    return heads, bounds


def sequence_bounds(batch: int, time: int, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    """The bounds of the sequences in `[B, T]` seen as one row of B * T tokens; ValueError for a wrong `cu_seqlens`."""
    if cu_seqlens is None:
        return tuple(range(0, batch * time + 1, time))
    if batch != 1:
        raise ValueError(f"cu_seqlens packs documents into one row: the batch size must be 1, got {batch}")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 [N+1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    bounds = tuple(cu_seqlens.tolist())
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != time:
        raise ValueError(f"cu_seqlens must run from 0 to T = {time}, got {bounds[:1]} … {bounds[-1:]}")
    if any(start >= end for start, end in pairwise(bounds)):
        raise ValueError("cu_seqlens must increase: every document needs at least one token")
    return bounds


def implementations(time: int) -> tuple[str, ...]:
    """What can run, the preferred one first: for a single token (decoding) the recurrence, with no chunk to fill."""
    return ("reference", "torch") if time == 1 else ("torch", "reference")


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any input is float64, else float32: what states and sums are kept in."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def recurrence(
    step: Callable[..., Tensor],
    q: Tensor,
    inputs: Sequence[Tensor],
    heads: int,
    scale: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Token by token: state = step(state, *inputs_t), o_t = scale * state^T q_t.

    `inputs` are k, v and what else the step takes, each `[B, T, H, …]`. Returns o `[B, T, H, V]` in v's dtype and the
    final states `[N, H, K, V]`.
    """
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        documents = []
        for n, (start, end) in enumerate(pairwise(bounds)):
            state = None if initial_state is None else initial_state[n : n + 1]
            pieces = [x[:, start:end] for x in inputs]
            documents.append(recurrence(step, q[:, start:end], pieces, heads, scale, state, None))
        return torch.cat([o for o, _ in documents], dim=1), torch.cat([state for _, state in documents])
    dtype, out_dtype = compute_dtype(q, *inputs, initial_state), inputs[1].dtype
    q, *inputs = (x.to(dtype).repeat_interleave(heads // x.shape[2], dim=2) for x in (q, *inputs))
    state_shape = (q.shape[0], heads, q.shape[-1], inputs[1].shape[-1])
    state = q.new_zeros(state_shape) if initial_state is None else initial_state.to(dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outputs = []
    for t in range(q.shape[1]):
        state = step(state, *(x[:, t] for x in inputs))
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, dim=1).to(out_dtype), state
