"""Context parallelism for recurrences: each rank holds consecutive tokens and passes on a state.

A rank's effect on its incoming state is affine: S_out = M S_in + C. C is the contribution of the rank's own tokens, and
M the transition of the incoming state: the product of the rank's decays (a diagonal), or a K x K matrix for the delta
rules. All ranks gather all (M, C) at once (LASP-2, arXiv 2502.07563), each folds those of earlier ranks into its S_in,
and then processes its own tokens as a sequence with initial state S_in. The messages have the size of states,
independent of the sequence length.

With packed documents, shards are cut from one row regardless of document bounds: only the first piece of a rank can
continue an earlier rank's document, and only its last piece can continue on a later rank. A piece that begins on this
rank does not depend on S_in: its M is zero.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.autograd import exact, once_differentiable
from kernels.documents import Documents, sequences_in, to_device

# Maps a piece's tokens [B, T, ...] to (M, C). M is an elementwise factor broadcastable to C, or a matrix applied from
# the left.
Summarize = Callable[..., tuple[Tensor, Tensor]]


class _AllGather(torch.autograd.Function):
    """All-gather to `[world, ...]`; backward sums the gradients that all ranks have for this rank's tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = [
            torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))
        ]
        dist.all_gather(gathered, x.contiguous(), group=group)
        return torch.stack(gathered)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad[dist.get_rank(ctx.group)], None


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Differentiable all-gather of same-shaped `x` to `[world, ...]`; the loss is the sum of the ranks' losses."""
    return _AllGather.apply(x, group)


@dataclass(frozen=True)
class Shard:
    """One rank's shard of a row of documents.

    `pieces` are the local document pieces, and `numbers` the index of each piece's document among all `num_documents`.
    If `continues`, the first piece began on an earlier rank. If `leaves`, the last piece continues on a later rank.
    """

    pieces: Documents
    numbers: tuple[int, ...]
    num_documents: int
    continues: bool
    leaves: bool


def cut_documents(documents: Documents, batch: int, time: int, group: dist.ProcessGroup) -> Shard:
    """The shard of this rank, where every rank holds `time` tokens; ValueError if the documents do not fit."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    return sequences_in(batch, time * world, documents).made(_cut, time, rank)


def _cut(bounds: tuple[int, ...], time: int, rank: int) -> Shard:
    start, end = rank * time, (rank + 1) * time
    here = [n for n, (first, last) in enumerate(pairwise(bounds)) if first < end and last > start]
    local = (0, *(min(bounds[n + 1], end) - start for n in here))
    return Shard(Documents(local), tuple(here), len(bounds) - 1, bounds[here[0]] < start, bounds[here[-1] + 1] > end)


def run_sharded(
    op: Callable[..., tuple[Tensor, Tensor | None]],
    summarize: Summarize,
    inputs: Sequence[Any],
    group: dist.ProcessGroup,
    initial_state: Tensor | None,
    output_final_state: bool,
    documents: Documents | None,
) -> tuple[Tensor, Tensor | None]:
    """Run `op` on tokens sharded over the ranks of `group`.

    Args:
        op: `(*inputs, initial_state=, output_final_state=, documents=) -> (o, final_state)` on one rank.
        summarize: `(inputs) -> (M, C)`.
        inputs: this rank's tokens, `[B, T, ...]`, with the same T on every rank if `documents` are given. An optional
            input may be None, but never the first.
        group: the ranks in token order.
        initial_state: of all sequences or documents, the same on every rank; its gradient is this rank's share.
        output_final_state: whether to return the final states of all sequences or documents, on every rank.
        documents: documents of the whole row.
    """
    batch, time = inputs[0].shape[:2]
    shard = None if documents is None else cut_documents(documents, batch, time, group)
    # Only the last piece can affect later ranks.
    last = inputs if shard is None else [None if x is None else x[:, shard.pieces.bounds[-2] :] for x in inputs]
    transition, contribution = summarize(last)
    # States and transitions are never compressed.
    with exact():
        if begins_here(shard, group):
            if initial_state is not None:
                contribution = contribution + _apply(transition, state_of_last(initial_state, shard))
            transition = torch.zeros_like(transition)
        entering = _entering(transition, contribution, group)
    return run_from(op, inputs, entering, shard, group, initial_state, output_final_state)


def begins_here(shard: Shard | None, group: dist.ProcessGroup) -> bool:
    """Whether the last piece began on this rank."""
    return dist.get_rank(group) == 0 if shard is None else len(shard.numbers) > 1 or not shard.continues


def state_of_last(initial_state: Tensor, shard: Shard | None) -> Tensor:
    """The initial state of the last piece's document, or of all rows without documents."""
    return initial_state if shard is None else initial_state[shard.numbers[-1] :][:1]


def run_from(
    op: Callable[..., tuple[Tensor, Tensor | None]],
    inputs: Sequence[Any],
    entering: Tensor,
    shard: Shard | None,
    group: dist.ProcessGroup,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """The second half of `run_sharded`: run `op` on this rank's tokens from the incoming state."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if shard is None:
        local_state, pieces = entering if rank > 0 or initial_state is None else entering + initial_state, None
    else:
        local_state, pieces = _local_states(shard, entering, initial_state), shard.pieces
    o, final = op(*inputs, initial_state=local_state, output_final_state=output_final_state, documents=pieces)
    if final is None:
        return o, None
    if shard is None:
        # Adding the empty sum keeps `final` in the graph, so that every rank joins the backward exchange.
        ended = final if rank == world - 1 else torch.zeros_like(final) + final[:0].sum(0)
    else:
        count = len(shard.numbers) - shard.leaves
        numbers = to_device(torch.tensor(shard.numbers[:count], dtype=torch.int64), final.device)
        ended = final.new_zeros(shard.num_documents, *final.shape[1:]).index_add(0, numbers, final[:count])
    return o, all_gather(ended, group).sum(0)


def _apply(transition: Tensor, state: Tensor) -> Tensor:
    """M S: a matrix product if M is `[..., K, K]` with K > 1, else elementwise."""
    is_matrix = transition.dim() == state.dim() == 4 and transition.shape[-1] == state.shape[-2] > 1
    return transition @ state if is_matrix else transition * state


def _entering(transition: Tensor, contribution: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The incoming state of this rank; zeros on the first."""
    # A single message makes a single graph node, so the ranks' backward passes communicate in the same order.
    both = all_gather(torch.cat((transition.flatten(), contribution.flatten())), group)
    sizes = [transition.numel(), contribution.numel()]
    # An empty sum is zero but part of the graph: the first rank must join the backward exchange as well.
    state = both[:0].sum(0)[sizes[0] :].view_as(contribution)
    for message in both[: dist.get_rank(group)]:
        earlier_transition, earlier = message.split(sizes)
        state = _apply(earlier_transition.view_as(transition), state) + earlier.view_as(contribution)
    return state


def _local_states(shard: Shard, entering: Tensor, initial_state: Tensor | None) -> Tensor:
    """The initial state of each local piece."""
    if initial_state is None:
        states = entering.new_zeros(len(shard.numbers), *entering.shape[1:])
    else:
        states = initial_state[shard.numbers[0] : shard.numbers[-1] + 1].to(entering.dtype)
    # A document that begins here does not use the incoming state, but other ranks wait for its gradient, which is zero.
    first = entering if shard.continues else states[:1] + entering[:0].sum(0)
    return torch.cat((first, states[1:]))


def decays_after(log_decay: Tensor) -> Tensor:
    """Decay from each token (exclusive) to the end of `[B, T, ...]`, preceded by the decay over all tokens.

    Returns `[B, T + 1, ...]`: index t + 1 is the decay after token t, and index 0 the decay over all tokens. It sums
    the following log decays instead of subtracting cumulative sums, so nothing cancels.
    """
    nothing = torch.zeros_like(log_decay[:, :1])
    return torch.cat((log_decay, nothing), dim=1).flip(1).cumsum(1).flip(1).exp()
