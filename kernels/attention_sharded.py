"""Context parallelism for softmax attention: each rank holds consecutive tokens.

Without a window every query may see every key. Ranks exchange heads for tokens (DeepSpeed-Ulysses, arXiv 2309.14509):
[B, T/P, H, K] on each of P ranks becomes [B, T, H/P, K]. Each rank attends with its heads over the whole row, and the
outputs are exchanged back. A rank receives only the key heads that its query heads read.

With a window a query sees only the window − 1 keys before it. Each rank attends with its own queries over its own keys
preceded by a halo: the keys of the last window − 1 tokens before its shard that belong to its first token's document,
from as many ranks as they span. The communication volume grows with the window instead of T.

Both forms are chains of all-to-alls of known sizes. Each all-to-all is one graph node on every rank, even if the rank
sends or receives nothing, so that all ranks' backward passes communicate in the same order.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.autograd import derive, once_differentiable
from kernels.documents import Documents


class _Exchange(torch.autograd.Function):
    """All-to-all of a vector whose consecutive parts go to the ranks in order; backward is the reverse all-to-all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(x, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def _all_to_all(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    y = x.new_empty(sum(received))
    dist.all_to_all_single(y, x.contiguous(), received, sent, group=group)
    return y


def attention_sharded(
    one_rank: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    documents: Documents | None,
    sinks: tuple[Tensor, Tensor] | None,
    group: dist.ProcessGroup,
) -> Tensor:
    """Run `one_rank` on tokens sharded over the ranks of `group`.

    Args:
        one_rank: `(q, k, v, window=, documents=, sinks=) -> o` on one rank.
        q, k, v: this rank's tokens, [B, T, H, K], [B, T, Hkv, K] and [B, T, Hkv, V], with the same T on every rank.
        window: number of keys that a query sees, including its own, less than the row's length; None for all.
        documents: documents of the whole row, which has T tokens per rank; None if it is one document.
        sinks: keys and values [1, S, Hkv, K] that every query sees; each rank has them all.
        group: the ranks in token order.

    Returns:
        o: [B, T, H, V] for this rank's tokens.
    """
    if window is None:
        return _over_heads(one_rank, q, k, v, documents, sinks, group)
    return _over_halos(partial(one_rank, sinks=sinks), q, k, v, window, documents, group)


def split_heads(heads: int, key_heads: int, world: int) -> list[tuple[range, range]]:
    """Each rank's query heads, split as evenly as possible, and the key heads they read; empty for surplus ranks."""
    bounds = [rank * heads // world for rank in range(world + 1)]
    groups = heads // key_heads
    return [
        (range(first, end), range(first // groups, (end - 1) // groups + 1) if end > first else range(0))
        for first, end in pairwise(bounds)
    ]


def _over_heads(
    one_rank: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents | None,
    sinks: tuple[Tensor, Tensor] | None,
    group: dist.ProcessGroup,
) -> Tensor:
    """Full attention: every rank sees the whole row for some of the heads."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    batch, time, heads, key_dim = q.shape
    key_heads, value_dim = v.shape[2:]
    split = split_heads(heads, key_heads, world)
    query_counts, key_counts = [len(queries) for queries, _ in split], [len(keys) for _, keys in split]
    # A key head whose query heads lie on several ranks is sent to each of them.
    if sum(key_counts) > key_heads:
        sent_heads = torch.tensor([head for _, keys in split for head in keys], device=k.device)
        k, v = k.index_select(2, sent_heads), v.index_select(2, sent_heads)
    parts = _parts_by_rank(q, k, v, query_counts, key_counts)
    sizes = [len(part) for part in parts]
    whole = _Exchange.apply(torch.cat(parts), sizes, [sizes[rank]] * world, group)

    def exchanged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = _parts_by_rank(q, k, v, query_counts, key_counts)
        return _all_to_all(torch.cat(parts), sizes, [sizes[rank]] * world, group)

    # A rank that compresses stores its own tokens. Backward exchanges what comes back of them.
    derive(whole, exchanged, (q, k, v))
    queries, keys = split[rank]
    row = world * time
    widths = [len(queries) * key_dim, len(keys) * key_dim, len(keys) * value_dim]
    whole_BTX = whole.view(world, batch, time, sum(widths)).transpose(0, 1).reshape(batch, row, sum(widths))
    q_BTX, k_BTX, v_BTX = whole_BTX.split(widths, dim=2)
    q, k = q_BTX.view(batch, row, len(queries), key_dim), k_BTX.view(batch, row, len(keys), key_dim)
    v = v_BTX.view(batch, row, len(keys), value_dim)
    o = v
    # A rank without heads computes nothing, but v keeps it in the graph, since it must join the backward exchange.
    if queries:
        read = partial(_read_by, queries, keys, heads // key_heads)
        own_sinks = None if sinks is None else read(*(x[:, :, keys.start : keys.stop] for x in sinks))
        o = one_rank(q, *read(k, v), documents=documents, sinks=own_sinks)

    o_PBTX = o.reshape(batch, world, time, len(queries) * value_dim).transpose(0, 1)
    received = [batch * time * count * value_dim for count in query_counts]
    back = _Exchange.apply(o_PBTX.flatten(), [received[rank]] * world, received, group)
    o_by_rank = [x.view(batch, time, count, value_dim) for x, count in zip(back.split(received), query_counts)]
    return torch.cat(o_by_rank, dim=2)


def _parts_by_rank(q: Tensor, k: Tensor, v: Tensor, query_counts: list[int], key_counts: list[int]) -> list[Tensor]:
    """The heads that each rank gets, of q, k and v together, flat."""
    # split and cat touch every element once in backward too; slicing would sum full-length gradients.
    by_rank = zip(q.split(query_counts, dim=2), k.split(key_counts, dim=2), v.split(key_counts, dim=2))
    return [torch.cat([x.flatten(2) for x in part], dim=2).flatten() for part in by_rank]


def _read_by(queries: range, keys: range, groups: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The key heads `keys`, repeated per query head if the query heads do not share them evenly."""
    read = [head // groups - keys.start for head in queries]
    if read == [i * len(keys) // len(queries) for i in range(len(queries))] and len(queries) % len(keys) == 0:
        return k, v
    repeated = torch.tensor(read, device=k.device)
    return k.index_select(2, repeated), v.index_select(2, repeated)


def halo_lengths(time: int, world: int, window: int, bounds: Sequence[int]) -> list[int]:
    """Number of preceding tokens that each rank's queries see, in a row whose documents lie between `bounds`."""
    starts = (rank * time for rank in range(world))
    return [min(window - 1, start - bounds[bisect_right(bounds, start) - 1]) for start in starts]


def sent_lengths(halos: Sequence[int], time: int, sender: int) -> list[int]:
    """Number of its last tokens that `sender` sends to each rank, so that every rank receives its halo."""
    return [
        min(max(halo - (receiver - sender - 1) * time, 0), time) if receiver > sender else 0
        for receiver, halo in enumerate(halos)
    ]


def _over_halos(
    one_rank: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    documents: Documents | None,
    group: dist.ProcessGroup,
) -> Tensor:
    """Sliding-window attention: every rank attends with its own queries."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    time = q.shape[1]
    bounds = (0, world * time) if documents is None else documents.bounds
    halos = halo_lengths(time, world, window, bounds)
    # All ranks agree on `halos`, so either all of them communicate or none.
    if any(halos):
        k, v = _behind_halo(k, v, halos, group)
    if documents is None:
        return one_rank(q, k, v, window=window)
    # Only the first document can have begun earlier, so its queries are the last of its positions. All others begin
    # here; this rank's end may cut the last one short, which causal attention permits.
    first, others = documents.made(_cut, time, rank)
    rest = time - first
    q_first, q_rest = q.split([first, rest], dim=1)
    (k_first, k_rest), (v_first, v_rest) = (x.split([halos[rank] + first, rest], dim=1) for x in (k, v))
    o_first = one_rank(q_first, k_first, v_first, window=window)
    if others is None:
        return o_first
    return torch.cat((o_first, one_rank(q_rest, k_rest, v_rest, window=window, documents=others)), dim=1)


def _cut(bounds: tuple[int, ...], time: int, rank: int) -> tuple[int, Documents | None]:
    """Number of a rank's tokens in its first document, and its other documents, the last cut at its end (or None)."""
    start, end = rank * time, (rank + 1) * time
    cuts = [*(bound for bound in bounds if start < bound < end), end]
    others = None if cuts[0] == end else Documents(tuple(cut - cuts[0] for cut in cuts))
    return cuts[0] - start, others


def _behind_halo(k: Tensor, v: Tensor, halos: Sequence[int], group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Prepend the keys and values of the halo to this rank's own."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    batch, time, key_heads, key_dim = k.shape
    value_dim = v.shape[3]
    sent = sent_lengths(halos, time, rank)
    received = [sent_lengths(halos, time, sender)[rank] for sender in range(world)]
    longest = max(sent)
    tail_BTX = torch.cat([x[:, time - longest :].flatten(2) for x in (k, v)], dim=2)
    token_size = batch * tail_BTX.shape[2]
    # A rank that sends nothing uses an empty message in the graph, because it must join the backward exchange too.
    parts = [tail_BTX[:, longest - length :].flatten() for length in sent if length] or [tail_BTX.flatten()]
    sizes = [length * token_size for length in received]
    halo = _Exchange.apply(torch.cat(parts), [length * token_size for length in sent], sizes, group)
    pieces = [
        x.view(batch, length, tail_BTX.shape[2]).split([key_heads * key_dim, key_heads * value_dim], dim=2)
        for x, length in zip(halo.split(sizes), received)
    ]
    before_k, before_v = zip(*pieces)
    return (
        torch.cat([*(x.unflatten(2, (key_heads, key_dim)) for x in before_k), k], dim=1),
        torch.cat([*(x.unflatten(2, (key_heads, value_dim)) for x in before_v), v], dim=1),
    )
