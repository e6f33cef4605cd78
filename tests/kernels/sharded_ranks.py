"""One rank of test_sharded: every op on this rank's part of the tokens, against the whole on one rank."""

import sys

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.convolution import causal_conv1d
from tests.kernels import test_linear_attention as recurrences
from tests.kernels.test_linear_attention import assert_same, bounds_tensor

TIME = 96
# One row each: a document over three ranks, borders of documents at and beside those of ranks, documents of one token.
OPS = {**recurrences.OPS, "causal_conv1d": causal_conv1d}
PACKINGS = [None, [TIME], [24, 72], [10, 1, 1, 60, 24], [48, 47, 1], [1] * 6 + [90]]


def make_inputs(name: str, batch: int) -> list[Tensor]:
    if name != "causal_conv1d":
        return recurrences.make_inputs(name, batch, TIME, heads=(4, 2, 2))
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, TIME, 6), (6, 4)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def make_state(name: str, sequences: int) -> Tensor:
    if name != "causal_conv1d":
        return recurrences.make_state(name, sequences, 4)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(sequences, 6, 3, generator=generator, dtype=torch.float64).requires_grad_()


def check(name: str, lengths: list[int] | None, with_state: bool, group: dist.ProcessGroup) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    batch = 2 if lengths is None else 1
    cu_seqlens = None if lengths is None else bounds_tensor(lengths)
    inputs = make_inputs(name, batch)
    state = make_state(name, batch if lengths is None else len(lengths)) if with_state else None
    wanted = inputs if state is None else [*inputs, state]

    def loss_weight(x: Tensor, seed: int) -> Tensor:
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)

    o, final = OPS[name](*inputs, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens)
    weight_o, weight_final = loss_weight(o, 1), loss_weight(final, 2)
    expected = torch.autograd.grad((o * weight_o).sum() + (final * weight_final).sum(), wanted)

    # What is the same on every rank: retention's decay, the convolution's weight, the initial state.
    shared = [i for i, x in enumerate(wanted) if x is state or x.shape[:2] != (batch, TIME)]
    tokens = slice(rank * TIME // world, (rank + 1) * TIME // world)
    pieces = [x if i in shared else x[:, tokens] for i, x in enumerate(inputs)]
    local = [x.detach().clone().requires_grad_() for x in pieces]
    local_state = None if state is None else state.detach().clone().requires_grad_()
    local_o, local_final = OPS[name](
        *local, initial_state=local_state, output_final_state=True, cu_seqlens=cu_seqlens, group=group
    )
    # The whole loss is the sum of the ranks'.
    loss = (local_o * weight_o[:, tokens]).sum() + (local_final * weight_final).sum() / world
    # A rank on which no document begins has no use for initial_state.
    wanted_here = local if local_state is None else [*local, local_state]
    actual = torch.autograd.grad(loss, wanted_here, allow_unused=True, materialize_grads=True)
    actual = [x.contiguous() for x in actual]  # or gloo would add up the wrong elements
    for i in shared:
        dist.all_reduce(actual[i], group=group)
    here = [x if i in shared else x[:, tokens] for i, x in enumerate(expected)]
    assert_same([local_o, local_final, *actual], [o[:, tokens], final, *here], 1e-10)


def main(rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    group = dist.group.WORLD
    for name in OPS:
        for lengths in PACKINGS:
            for with_state in (False, True):
                try:
                    check(name, lengths, with_state, group)
                except AssertionError as error:
                    raise AssertionError(f"{name}, {lengths}, initial state {with_state}, rank {rank}") from error
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
