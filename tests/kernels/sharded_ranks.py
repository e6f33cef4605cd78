"""One rank of test_sharded: every op on this rank's part of the tokens, against the whole on one rank."""

import sys

import torch
import torch.distributed as dist
from torch import Tensor

from tests.kernels.test_linear_attention import OPS, assert_same, bounds_tensor, cut, make_inputs, make_state

TIME = 96
# One row each: a document over three ranks, borders of documents at and beside those of ranks, documents of one token.
PACKINGS = [None, [TIME], [24, 72], [10, 1, 1, 60, 24], [48, 47, 1], [1] * 6 + [90]]


def check(name: str, lengths: list[int] | None, with_state: bool, group: dist.ProcessGroup) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    batch = 2 if lengths is None else 1
    cu_seqlens = None if lengths is None else bounds_tensor(lengths)
    inputs = make_inputs(name, batch, TIME, heads=(4, 2, 2))
    state = make_state(name, batch if lengths is None else len(lengths), 4) if with_state else None
    wanted = inputs if state is None else [*inputs, state]

    def loss_weight(x: Tensor, seed: int) -> Tensor:
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)

    o, final = OPS[name](*inputs, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens)
    weight_o, weight_final = loss_weight(o, 1), loss_weight(final, 2)
    expected = torch.autograd.grad((o * weight_o).sum() + (final * weight_final).sum(), wanted)

    tokens = slice(rank * TIME // world, (rank + 1) * TIME // world)
    local = [x.detach().clone().requires_grad_() for x in cut(inputs, tokens)]
    local_state = None if state is None else state.detach().clone().requires_grad_()
    local_o, local_final = OPS[name](
        *local, initial_state=local_state, output_final_state=True, cu_seqlens=cu_seqlens, group=group
    )
    # The whole loss is the sum of the ranks'.
    loss = (local_o * weight_o[:, tokens]).sum() + (local_final * weight_final).sum() / world
    # A rank on which no document begins has no use for initial_state.
    wanted_here = local if local_state is None else [*local, local_state]
    actual = torch.autograd.grad(loss, wanted_here, allow_unused=True, materialize_grads=True)
    shared = [i for i, x in enumerate(wanted) if x.dim() == 1 or x is state]
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
