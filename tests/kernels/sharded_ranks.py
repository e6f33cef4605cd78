"""One rank of test_sharded: every op on this rank's part of the tokens.

    python -m tests.kernels.sharded_ranks results|traffic

"results" compares with the whole on one rank, "traffic" the bytes in all collectives with the size of the states.
"""

import math
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group, which it would keep, with its threads, as a default argument
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.convolution import causal_conv1d
from tests.helpers import documents_of
from tests.kernels import test_linear_attention as recurrences
from tests.kernels.test_linear_attention import assert_same

TIME = 96
# One row each: a document over three ranks, borders of documents at and beside those of ranks, documents of one token.
OPS = {**recurrences.OPS, "causal_conv1d": causal_conv1d}
# M of a row, see kernels.linear_attention._sharded; C has the shape of a state. The convolution has no M.
TRANSITIONS = {
    "retention": (4, 1, 1),
    "gla": (4, 16, 1),
    "hgrn": (16,),
    "hgrn2": (4, 16, 1),
    "delta_rule": (4, 16, 16),
    "gated_delta_rule": (4, 16, 16),
    "kimi_delta_rule": (4, 16, 16),
    "causal_conv1d": (0,),
}
PACKINGS = [None, [TIME], [24, 72], [10, 1, 1, 60, 24], [48, 47, 1], [1] * 6 + [90]]


def make_inputs(name: str, batch: int, time: int = TIME) -> list[Tensor]:
    if name != "causal_conv1d":
        return recurrences.make_inputs(name, batch, time, heads=(4, 2, 2))
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, time, 6), (6, 4)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def make_state(name: str, sequences: int) -> Tensor:
    if name != "causal_conv1d":
        return recurrences.make_state(name, sequences, 4)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(sequences, 6, 3, generator=generator, dtype=torch.float64).requires_grad_()


def check(name: str, lengths: list[int] | None, with_state: bool, group: dist.ProcessGroup) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    batch = 2 if lengths is None else 1
    documents = None if lengths is None else documents_of(lengths)
    inputs = make_inputs(name, batch)
    state = make_state(name, batch if lengths is None else len(lengths)) if with_state else None
    wanted = inputs if state is None else [*inputs, state]

    def loss_weight(x: Tensor, seed: int) -> Tensor:
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)

    o, final = OPS[name](*inputs, initial_state=state, output_final_state=True, documents=documents)
    weight_o, weight_final = loss_weight(o, 1), loss_weight(final, 2)
    expected = torch.autograd.grad((o * weight_o).sum() + (final * weight_final).sum(), wanted)

    # What is the same on every rank: retention's decay, the convolution's weight, the initial state.
    shared = [i for i, x in enumerate(wanted) if x is state or x.shape[:2] != (batch, TIME)]
    tokens = slice(rank * TIME // world, (rank + 1) * TIME // world)
    pieces = [x if i in shared else x[:, tokens] for i, x in enumerate(inputs)]
    local = [x.detach().clone().requires_grad_() for x in pieces]
    local_state = None if state is None else state.detach().clone().requires_grad_()
    local_o, local_final = OPS[name](
        *local, initial_state=local_state, output_final_state=True, documents=documents, group=group
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


class Traffic(TorchDispatchMode):
    """Keeps (name, bytes) of every collective, whoever calls it: all tensors that are handed to it, sent or filled."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            self.calls.append((func._schema.name, sum(x.numel() * x.element_size() for x in tensors)))
        return func(*args, **(kwargs or {}))


def check_traffic(
    name: str, time: int, lengths: list[int] | None, output_final: bool, group: dist.ProcessGroup
) -> None:
    """Forward and backward of `time` tokens a rank, with an initial state."""
    world = dist.get_world_size(group)
    batch = 2 if lengths is None else 1
    documents = None if lengths is None else documents_of(lengths)
    sequences = batch if lengths is None else len(lengths)
    inputs, state = make_inputs(name, batch, time), make_state(name, sequences)
    with Traffic() as forward:
        o, final = OPS[name](
            *inputs, initial_state=state, output_final_state=output_final, documents=documents, group=group
        )
    with Traffic() as backward:
        (o.sum() if final is None else o.sum() + final.sum()).backward()
    entry = 8 * math.prod(state.shape[1:])
    # (M, C) of each row's last piece, and the final states of all sequences where they are asked for.
    messages = [batch * (8 * math.prod(TRANSITIONS[name]) + entry)] + [sequences * entry] * output_final
    # Each rank hands over its message and room for all ranks', and takes part in the sum of all messages' gradients.
    assert forward.calls == [("c10d::allgather_", (world + 1) * message) for message in messages]
    assert backward.calls == [("c10d::allreduce_", world * message) for message in reversed(messages)]


def check_all_results(group: dist.ProcessGroup) -> None:
    for name in OPS:
        for lengths in PACKINGS:
            for with_state in (False, True):
                try:
                    check(name, lengths, with_state, group)
                except AssertionError as error:
                    case = f"{name}, {lengths}, initial state {with_state}, rank {dist.get_rank(group)}"
                    raise AssertionError(case) from error


def check_all_traffic(group: dist.ProcessGroup) -> None:
    for name in OPS:
        for time in (64, 256):
            whole = time * dist.get_world_size(group)
            for lengths in (None, [24, 1, whole - 25]):
                for output_final in (False, True):
                    try:
                        check_traffic(name, time, lengths, output_final, group)
                    except AssertionError as error:
                        raise AssertionError(f"{name}, {time} tokens, {lengths}, {output_final}") from error


def main(what: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    {"results": check_all_results, "traffic": check_all_traffic}[what](dist.group.WORLD)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
