"""Layout of sequences for the chunked kernels.

All chunks of all sequences (rows of a batch, or documents packed into one row) form one batch axis `N`, so that the
work inside chunks is a few batched matrix products. Chunks are ordered first by their position in the sequence, then by
sequence, longest sequence first. The chunks at position j are thus one contiguous slice whose r-th element continues
the r-th sequence, and the scan over positions carries `state[:count]` forward without indexing. A thousand short
documents take as many steps as one of them.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from kernels.documents import to_device
from kernels.indices import host_numbers
from kernels.shapes import block_limit

CHUNK = 64  # measured: 32 and 128 are slower at K = V = 64 and 128, for 8 x 512 and 1 x 4096 tokens
SMALLEST_CHUNK = 16
# Elements of one tensor in a segment (see `segments`), measured on a Zen 5 with 1 MiB of L2 cache per core.
_SEGMENT_ELEMENTS = 1 << 18


@dataclass(frozen=True, eq=False)
class ChunkIndex:
    """Token positions for sequences that do not consist of the same number of whole chunks.

    `token_of_slot` `[N, C]` is the token in each slot of each chunk, and 0 where `padding` `[N, C]` marks an empty
    slot. `slots` and `tokens` `[T]` are the pairs of flat slot and token without padding, ordered by slot; those of
    chunk n begin at `starts[n]`.
    """

    token_of_slot: Tensor
    padding: Tensor
    slots: Tensor
    tokens: Tensor
    starts: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ChunkLayout:
    """Maps the tokens of `[B, T]` to chunks of `chunk` tokens: to all chunks, or to those of a `segment`.

    `spans` holds (first chunk, count) for each chunk position. `first_position` and `first_chunk` are the offsets of a
    segment. `order` lists the sequences from longest to shortest, and is None if they are already in that order.
    `index` is None if all sequences consist of the same number of whole chunks, in which case the layout is a
    transposition.
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
        """Number of chunks of all sequences."""
        first, count = self.spans[-1]
        return first + count

    def segments(self, elements: int, on_cpu: bool) -> list["ChunkLayout"]:
        """Split into runs of consecutive chunk positions that fit into the CPU's cache; one segment on other devices.

        `elements` is the size of a chunk's tensors over all heads. A segment's temporaries are used and freed before
        the next segment begins.
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
        """Pack `x` `[B, T, H', D]` to `[N * heads, C, D]`, into `out` if given: repeats heads, pads with zeros."""
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
        """Transpose of `pack`: `[N * H, C, D]` into `x` `[B, T, H', D]`, summing repeated heads."""
        own_heads, dim = x.shape[2:]
        count = self.num_chunks
        packed = packed.reshape(count, own_heads, -1, self.chunk, dim)
        # Without repeated heads the sum would only cost a copy.
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
        """A fresh copy of `state` `[B, H, K, V]` in the layout's order and `like`'s dtype; zeros if it is None."""
        if state is None:
            return like.new_zeros(shape)
        # Always a copy, because the caller advances the state in place.
        state = state.to(like.dtype, copy=True)
        return state.contiguous() if self.order is None else state[self.order]

    def unsort_state(self, state: Tensor) -> Tensor:
        """Undo the reordering of `sort_state`."""
        if self.order is None:
            return state
        return torch.empty_like(state).index_copy_(0, self.order, state)


def chunk_layout(bounds: tuple[int, ...], device: torch.device) -> ChunkLayout:
    """Lay out the sequences between `bounds`. Cached by `Documents`: call `documents.made(chunk_layout, device)`."""
    lengths = [end - start for start, end in pairwise(bounds)]
    longest = max(lengths)
    chunk = CHUNK
    # Short sequences would mostly be padding in long chunks.
    while chunk > SMALLEST_CHUNK and chunk // 2 >= longest:
        chunk //= 2
    order = sorted(range(len(lengths)), key=lambda sequence: -lengths[sequence])
    spans, first = [], 0
    for position in range(-(-longest // chunk)):
        count = sum(length > position * chunk for length in lengths)
        spans.append((first, count))
        first += count
    in_order = order == list(range(len(order)))
    order_index = None if in_order else to_device(torch.tensor(order), device)
    # Equal whole chunks need no index tensors.
    if min(lengths) == longest and longest % chunk == 0:
        return ChunkLayout(len(lengths), chunk, tuple(spans), order_index, None)

    first_tokens = [
        bounds[order[rank]] + position * chunk for position, (_, n) in enumerate(spans) for rank in range(n)
    ]
    ends = [bounds[order[rank] + 1] for _, n in spans for rank in range(n)]
    token = torch.tensor(first_tokens)[:, None] + torch.arange(chunk)
    padding = token >= torch.tensor(ends)[:, None]
    slots = padding.logical_not().flatten().nonzero()[:, 0]
    starts = (0, *host_numbers(padding.logical_not().sum(1).cumsum(0)))
    tensors = (token.masked_fill(padding, 0), padding, slots, token.flatten()[slots])
    token_of_slot, padding, slots, tokens = (to_device(x, device) for x in tensors)
    index = ChunkIndex(token_of_slot, padding, slots, tokens, starts)
    return ChunkLayout(len(lengths), chunk, tuple(spans), order_index, index)
