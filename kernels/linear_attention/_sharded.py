"""Sequences cut over the ranks of a process group: each rank holds consecutive tokens and passes on a state.

What a rank does to the state that enters it is affine: S_out = M S_in + C, where C is what its own tokens leave behind
and M what they do to what was there: the product of their decays, a diagonal, or for the delta rules a K x K matrix.
All ranks gather every (M, C) at once (LASP-2, arXiv 2502.07563), each folds those before it into its S_in, and then
runs on its own tokens as on a sequence that begins with S_in. What travels has the size of states, whatever the length.

With packed documents the shards are cut from one row, wherever its documents end: only the first piece of a rank can
have begun elsewhere, and only its last can go on. A piece that began here owes nothing to S_in: its M is zero.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.autograd import once_differentiable
from kernels.documents import Documents, sequences_in, to_device

# What a piece's tokens [B, T, ...] do to a state: (M, C), M a factor of C's shape or a matrix in front of it.
Summarize = Callable[..., tuple[Tensor, Tensor]]


class _AllGather(torch.autograd.Function):
    """Every rank's tensor, `[world, ...]`; backward adds up what all ranks want of this one's."""

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
    """Every rank's `x` of one shape, `[world, ...]`, differentiable; the loss is the sum of the ranks' losses."""
    return _AllGather.apply(x, group)


@dataclass(frozen=True)
class Shard:
    """The part of a row of documents that this rank holds.

    `pieces` are the local ones, `numbers` holds the number of each one's document among all `num_documents`.
    The first piece began on an earlier rank if `continues`; the last goes on to a later one if `leaves`.
    """

    pieces: Documents
    numbers: tuple[int, ...]
    num_documents: int
    continues: bool
    leaves: bool


def cut_documents(documents: Documents, batch: int, time: int, group: dist.ProcessGroup) -> Shard:
    """The shard of this rank, which holds `time` tokens as every rank does; ValueError if the documents do not fit."""
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
    """`op` on tokens that are cut over the ranks of `group`.

    Args:
        op: `(*inputs, initial_state=, output_final_state=, documents=) -> (o, final_state)` on one rank.
        summarize: `(inputs) -> (M, C)`.
        inputs: this rank's tokens, `[B, T, ...]`, of the same T on every rank if `documents` are given; None for one
            that `op` does without, but never the first.
        group: the ranks, in the order of the tokens.
        initial_state: of all sequences or documents, the same on every rank; its gradient is this rank's share.
        output_final_state: whether to return the final states of all of them, on every rank.
        documents: those of the whole row.
    """
    batch, time = inputs[0].shape[:2]
    shard = None if documents is None else cut_documents(documents, batch, time, group)
    last = inputs if shard is None else [None if x is None else x[:, shard.pieces.bounds[-2] :] for x in inputs]
    transition, contribution = summarize(last)
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
    """The initial state of the last piece's document, or of all rows."""
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
    """The second half of `run_sharded`: `op` on this rank's tokens, from the state that enters it."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if shard is None:
        local_state, pieces = entering if rank > 0 or initial_state is None else entering + initial_state, None
    else:
        local_state, pieces = _local_states(shard, entering, initial_state), shard.pieces
    o, final = op(*inputs, initial_state=local_state, output_final_state=output_final_state, documents=pieces)
    if final is None:
        return o, None
    if shard is None:
        ended = final if rank == world - 1 else torch.zeros_like(final) + final[:0].sum(0)
    else:
        count = len(shard.numbers) - shard.leaves
        numbers = to_device(torch.tensor(shard.numbers[:count], dtype=torch.int64), final.device)
        ended = final.new_zeros(shard.num_documents, *final.shape[1:]).index_add(0, numbers, final[:count])
    return o, all_gather(ended, group).sum(0)


def _apply(transition: Tensor, state: Tensor) -> Tensor:
    """M S: a product of matrices where M is `[..., K, K]` with K > 1, else of elements."""
    is_matrix = transition.dim() == state.dim() == 4 and transition.shape[-1] == state.shape[-2] > 1
    return transition @ state if is_matrix else transition * state


def _entering(transition: Tensor, contribution: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The state that enters this rank; zeros on the first."""
    # One message, and one node in the graph: the ranks' backward passes meet in the same order.
    both = all_gather(torch.cat((transition.flatten(), contribution.flatten())), group)
    sizes = [transition.numel(), contribution.numel()]
    # A sum over none is zero and hangs in the graph: the first rank, too, must take part in the backward exchange.
    state = both[:0].sum(0)[sizes[0] :].view_as(contribution)
    for message in both[: dist.get_rank(group)]:
        earlier_transition, earlier = message.split(sizes)
        state = _apply(earlier_transition.view_as(transition), state) + earlier.view_as(contribution)
    return state


def _local_states(shard: Shard, entering: Tensor, initial_state: Tensor | None) -> Tensor:
    """The state that each local piece begins with."""
    if initial_state is None:
        states = entering.new_zeros(len(shard.numbers), *entering.shape[1:])
    else:
        states = initial_state[shard.numbers[0] : shard.numbers[-1] + 1].to(entering.dtype)
    # A document that begins here takes none of what enters, but its gradient, zero, is waited for elsewhere.
    first = entering if shard.continues else states[:1] + entering[:0].sum(0)
    return torch.cat((first, states[1:]))


def decays_after(log_decay: Tensor) -> Tensor:
    """The decay from each token (exclusive) to the end of `[B, T, ...]`, and from the start to it at index 0.

    Returns `[B, T + 1, ...]`: index t + 1 is the decay after token t, index 0 that over all of them. Sums of what
    follows, not differences of sums from the start: nothing cancels.
    """
    nothing = torch.zeros_like(log_decay[:, :1])
    return torch.cat((log_decay, nothing), dim=1).flip(1).cumsum(1).flip(1).exp()
