"""How sequences are laid out for the chunked kernels, and what every linear attention shares around its recurrence.

All chunks of all sequences (the rows of a batch, or the documents packed by `cu_seqlens`) become one batch axis `N`,
so that the work inside the chunks is a few batched matrix products. Chunks are ordered by their position in the
sequence first and by sequence second, sequences from the longest to the shortest: the chunks at position j are then
one contiguous slice, whose r-th element continues the r-th sequence, and the scan over positions carries
`state[:count]` forward with no indexing. A thousand short documents cost as few steps as one of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

CHUNK = 64  # measured: 32 and 128 are slower at K = V = 64 and 128, for 8 x 512 and 1 x 4096 tokens
SMALLEST_CHUNK = 16


@dataclass(frozen=True, eq=False)
class ChunkIndex:
    """The token in each slot of each chunk `[N, C]` (0 where there is none), and the (chunk, slot) pairs behind it.

    `chunk_of_token` and `slot_of_token` are `[T]`; `padded_chunk` and `padded_slot` list the slots without a token.
    """

    token_of_slot: Tensor
    chunk_of_token: Tensor
    slot_of_token: Tensor
    padded_chunk: Tensor
    padded_slot: Tensor


@dataclass(frozen=True, eq=False)
class ChunkLayout:
    """Where each token of `[B, T]` lies among `num_chunks` chunks of `chunk` tokens.

    `spans` holds (first chunk, count) of each chunk position. `order` lists the sequences from longest to shortest, or
    is None when they are in order already. `index` is None when every sequence is the same whole number of chunks: the
    layout is then a transposition.
    """

    num_sequences: int
    chunk: int
    num_chunks: int
    spans: tuple[tuple[int, int], ...]
    order: Tensor | None
    index: ChunkIndex | None

    def pack(self, x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
        """`x` `[B, T, H', D]` as a new `[N, heads, C, D]`: each head repeated `heads / H'` times, padding zero."""
        own_heads, dim = x.shape[2:]
        repeat = heads // own_heads
        if self.index is None:
            x = x.reshape(self.num_sequences, len(self.spans), self.chunk, own_heads, 1, dim).permute(1, 0, 3, 4, 2, 5)
            x = x.expand(-1, -1, -1, repeat, -1, -1)
            packed = torch.empty(x.shape, dtype=dtype, device=x.device)
            return packed.copy_(x).view(self.num_chunks, heads, self.chunk, dim)
        source_head = torch.arange(heads, device=x.device) // repeat
        rows = self.index.token_of_slot[:, None, :] * own_heads + source_head[:, None]
        packed = x.reshape(-1, dim).index_select(0, rows.view(-1)).to(dtype).view(*rows.shape, dim)
        packed[self.index.padded_chunk, :, self.index.padded_slot] = 0
        return packed

    def unpack(self, packed: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The inverse of `pack` and its transpose: `[N, H, C, D]` to `shape` `[B, T, H', D]`, repeated heads summed."""
        heads, dim = packed.shape[1], packed.shape[-1]
        batch, time, own_heads = shape[:3]
        if self.index is None:
            x = packed.view(len(self.spans), self.num_sequences, heads, self.chunk, dim).permute(1, 0, 3, 2, 4)
        else:
            head = torch.arange(heads, device=packed.device)
            groups = self.index.chunk_of_token[:, None] * heads + head
            rows = groups * self.chunk + self.index.slot_of_token[:, None]
            x = packed.reshape(-1, dim).index_select(0, rows.view(-1))
        if own_heads != heads:
            x = x.reshape(batch, time, own_heads, heads // own_heads, dim).sum(3)
        return x.reshape(shape).to(dtype)

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


@lru_cache(maxsize=32)  # every layer of a step asks for the same one
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
        return ChunkLayout(len(lengths), chunk, first, tuple(spans), order_index, None)

    starts = [bounds[order[rank]] + position * chunk for position, (_, n) in enumerate(spans) for rank in range(n)]
    ends = [bounds[order[rank] + 1] for _, n in spans for rank in range(n)]
    token = torch.tensor(starts)[:, None] + torch.arange(chunk)
    valid = token < torch.tensor(ends)[:, None]
    chunk_index, slot_index = valid.nonzero(as_tuple=True)
    by_token = token[valid].argsort()
    padded_chunk, padded_slot = (~valid).nonzero(as_tuple=True)
    index = (token.masked_fill(~valid, 0), chunk_index[by_token], slot_index[by_token], padded_chunk, padded_slot)
    on_device = ChunkIndex(*(x.to(device) for x in index))
    return ChunkLayout(len(lengths), chunk, first, tuple(spans), order_index, on_device)


@lru_cache(maxsize=1)
def _cpu_multiplies_bfloat16() -> bool:
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def operand_dtype(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What large products round their operands to: bfloat16 if q, k and v are and the device is fast at it.

    With AVX512-BF16 a batch of 64 x 64 products takes a third of its float32 time, conversions included; without it,
    bfloat16 products on a CPU are slower than float32 ones, and `dtype` is returned.
    """
    narrow = all(x.dtype == torch.bfloat16 for x in (q, k, v))
    return torch.bfloat16 if narrow and (q.device.type != "cpu" or _cpu_multiplies_bfloat16()) else dtype


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
    tensors = {"q": q, "k": k, "v": v} | {name: x for name, (x, _) in per_head.items()}
    heads = max(x.shape[2] for x in tensors.values())
    for name, x in tensors.items():
        if x.shape[:2] != q.shape[:2]:
            raise ValueError(f"{name} must begin with q's [B, T] = {tuple(q.shape[:2])}, got shape {tuple(x.shape)}")
        if heads % max(x.shape[2], 1):
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
