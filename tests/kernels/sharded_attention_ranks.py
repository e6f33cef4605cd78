"""One rank of test_sharded_attention: attention on this rank's part of the tokens, against the whole on one rank."""

import itertools
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group, which it would keep, with its threads, as a default argument
from torch import Tensor

from kernels.attention import attention
from tests.helpers import documents_of
from tests.kernels.test_linear_attention import assert_same

TIME = 48


class Case(NamedTuple):
    """Heads H, Hkv, K, V; the window; the lengths of the documents; the number of sinks."""

    shape: tuple[int, int, int, int]
    window: int | None = None
    lengths: list[int] | None = None
    dtype: torch.dtype = torch.float64
    backend: str = "auto"
    sinks: int = 0

    def tolerance(self) -> float:
        return {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}[self.dtype]


# Heads that divide, grouped, one key head, more ranks than heads; heads of (10, 2) that share their keys unevenly.
HEADS = [(4, 4), (4, 2), (3, 1), (3, 3), (6, 2), (10, 2), (5, 1), (8, 1), (1, 1)]
# Shards have 24, 16 and 12 tokens: no halo, parts of shards, whole shards and a token more or less, the whole row.
WINDOWS = [1, 5, 12, 13, 14, 24, 25, 40, 47, 48, 100]
# A document over all ranks, borders at and beside those of ranks, documents of one token.
PACKINGS = [[TIME], [24, 24], [12, 12, 24], [5, 1, 1, 30, 11], [23, 2, 23], [13, 35], [1] * 6 + [42], [1] * TIME]
OTHERS: list[dict[str, Any]] = [
    {"backend": "sdpa"},
    {"backend": "reference"},
    {"backend": "reference", "window": 14},
    {"dtype": torch.float32},
    {"dtype": torch.float32, "window": 14},
    {"dtype": torch.bfloat16, "lengths": [5, 1, 1, 30, 11]},
    {"dtype": torch.bfloat16, "window": 14, "lengths": [5, 1, 1, 30, 11]},
    {"dtype": torch.float16},
    {"dtype": torch.float16, "window": 30},
]
CASES = [
    *(Case((*heads, 4, 6), window) for heads, window in itertools.product(HEADS, (None, 14))),
    *(Case((4, 2, 6, 4), window) for window in WINDOWS),
    *(Case((3, 1, 4, 6), window, lengths) for window, lengths in itertools.product((None, 1, 5, 14, 30, 48), PACKINGS)),
    *(Case((4, 2, 8, 8), **other) for other in OTHERS),
    *(Case((*heads, 4, 6), window, sinks=3) for heads, window in itertools.product([(4, 2), (10, 2)], (None, 14))),
    *(Case((3, 1, 4, 6), window, [5, 1, 1, 30, 11], sinks=3) for window in (None, 14)),
]


class Wire:
    """Counts the bytes that this rank sends to others, and the calls, in place of torch's all-to-all."""

    def __init__(self) -> None:
        self.bytes = self.calls = 0
        self.send = dist.all_to_all_single

    def __call__(self, y: Tensor, x: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> None:
        self.calls += 1
        self.bytes += (sum(sent) - sent[dist.get_rank(group)]) * x.element_size()
        self.send(y, x, received, sent, group=group)

    def read(self) -> tuple[int, int]:
        """The bytes and calls since the last reading."""
        reading, self.bytes, self.calls = (self.bytes, self.calls), 0, 0
        return reading


def make_inputs(case: Case, time: int) -> tuple[list[Tensor], Tensor]:
    """Q, k, v and the gradient of the output."""
    heads, key_heads, key_dim, value_dim = case.shape
    generator = torch.Generator().manual_seed(0)
    widths = (heads, key_dim), (key_heads, key_dim), (key_heads, value_dim), (heads, value_dim)
    batch = 2 if case.lengths is None else 1
    q, k, v, grad = (
        torch.randn(batch, time, *width, generator=generator, dtype=torch.float64).to(case.dtype) for width in widths
    )
    return [q, k, v], grad


def make_sinks(case: Case) -> tuple[Tensor, Tensor] | None:
    """Keys and values of the sinks."""
    if not case.sinks:
        return None
    _, key_heads, *sizes = case.shape
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, case.sinks, key_heads, size) for size in sizes]
    k, v = (torch.randn(shape, generator=generator, dtype=case.dtype).requires_grad_() for shape in shapes)
    return k, v


def check_equals_one_rank(case: Case, group: dist.ProcessGroup) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    documents = None if case.lengths is None else documents_of(case.lengths)
    options: dict[str, Any] = {"window": case.window, "documents": documents, "backend": case.backend}
    tensors, grad = make_inputs(case, TIME)
    inputs = [x.requires_grad_() for x in tensors]
    sinks = make_sinks(case)
    o = attention(*inputs, sinks=sinks, **options)
    expected = torch.autograd.grad(o, [*inputs, *(sinks or ())], grad)

    tokens = slice(rank * TIME // world, (rank + 1) * TIME // world)
    local = [x[:, tokens].detach().clone().requires_grad_() for x in inputs]
    local_o = attention(*local, sinks=sinks, **options, group=group)
    actual = torch.autograd.grad(local_o, [*local, *(sinks or ())], grad[:, tokens], materialize_grads=True)
    assert_same([local_o, *actual[:3]], [x[:, tokens] for x in (o, *expected[:3])], case.tolerance())
    # Every rank has all sinks; their gradients are the ranks' sums.
    for mine, whole in zip(actual[3:], expected[3:], strict=True):
        total = mine.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        assert_same([total], [whole], case.tolerance())


def check_layers(group: dist.ProcessGroup) -> None:
    """Layers above one another: the ranks' exchanges must meet in the backward too; the keys need no gradient."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    tokens = slice(rank * TIME // world, (rank + 1) * TIME // world)
    (x, k, _), grad = make_inputs(Case((3, 3, 4, 4)), TIME)
    local = x[:, tokens].clone().requires_grad_()
    x.requires_grad_()

    def run(x: Tensor, k: Tensor, **options: Any) -> Tensor:
        for window in (None, 5, 30, None, 14):
            x = x + attention(x, k, x, window=window, **options)
        return x

    (expected,) = torch.autograd.grad(run(x, k), x, grad)
    (actual,) = torch.autograd.grad(run(local, k[:, tokens], group=group), local, grad[:, tokens])
    assert_same([actual], [expected[:, tokens]], 1e-10)


def sent_bytes(case: Case, time: int, group: dist.ProcessGroup, wire: Wire) -> list[tuple[int, int]]:
    """The bytes and calls of this rank in the forward and in the backward, with `time` tokens on every rank."""
    inputs, grad = make_inputs(case, time)
    documents = None if case.lengths is None else documents_of(case.lengths)
    wire.read()
    o = attention(*(x.requires_grad_() for x in inputs), window=case.window, documents=documents, group=group)
    forward = wire.read()
    o.backward(grad)
    return [forward, wire.read()]


def check_bytes(group: dist.ProcessGroup, wire: Wire) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    # Heads: q, k, v and o leave but for this rank's own part, and then their gradients.
    for time in (8, 16):
        tensor = 2 * time * world * 8 * torch.float32.itemsize
        sent = (4 * tensor * (world - 1) // world, 2)
        assert sent_bytes(Case((world, world, 8, 8), dtype=torch.float32), time, group, wire) == [sent, sent]
    # Grouped: every rank gets one key head for its two query heads.
    tensor = 2 * 8 * 2 * world * 8 * torch.float32.itemsize
    sent = ((2 * tensor + 2 * tensor // 2) * (world - 1) // world, 2)
    assert sent_bytes(Case((2 * world, world, 8, 8), dtype=torch.float32), 8, group, wire) == [sent, sent]

    def to_next(tokens: int, has_next: bool = rank + 1 < world) -> int:
        return tokens * 2 * (4 + 6) * torch.float64.itemsize * has_next

    # Halos: the last window - 1 tokens of keys and values, whatever the length; backward, what came in goes back.
    for time in (8, 64):
        forward, backward = sent_bytes(Case((4, 2, 4, 6), 6), time, group, wire)
        assert forward == (2 * to_next(5), 1) and backward == (2 * to_next(5, rank > 0), 1)
    # Documents that end with the ranks need no halo, those that begin one token before them a token.
    assert sent_bytes(Case((4, 2, 4, 6), 6, [8] * world), 8, group, wire) == [(0, 0), (0, 0)]
    forward, backward = sent_bytes(Case((4, 2, 4, 6), 6, [7] + [8] * (world - 1) + [1]), 8, group, wire)
    assert forward == (to_next(1), 1) and backward == (to_next(1, rank > 0), 1)


def check_refusals(group: dist.ProcessGroup, wire: Wire) -> None:
    """What is wrong is refused on every rank before a message that another would wait for."""
    q = torch.zeros(1, 8, 2, 4)
    wrong: dict[str, dict[str, Any]] = {
        f"from 0 to T = {8 * dist.get_world_size(group)}": {"documents": documents_of([8])},
        "asks for 'sdpa'": {"window": 8, "backend": "sdpa"},
        "at least 1": {"window": 0},
    }
    wire.read()
    for message, options in wrong.items():
        with pytest.raises(ValueError, match=message):
            attention(q, q, q, **options, group=group)
    assert wire.read() == (0, 0)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    for case in CASES:
        try:
            check_equals_one_rank(case, group)
        except AssertionError as error:
            raise AssertionError(f"{case}, rank {dist.get_rank()}") from error
    check_layers(group)
    wire = Wire()
    with mock.patch.object(dist, "all_to_all_single", wire):
        check_bytes(group, wire)
        check_refusals(group, wire)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
