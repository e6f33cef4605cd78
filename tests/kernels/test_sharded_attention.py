"""Attention over 2, 3 and 4 ranks equals one rank, in outputs, gradients and bytes; who sends what to whom."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention import attention
from kernels.attention_sharded import halo_lengths, sent_lengths, split_heads
from tests.processes import run_ranks


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_equal_one(world: int) -> None:
    run_ranks(world, "-m", "tests.kernels.sharded_attention_ranks")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(key_heads=st.integers(1, 6), groups=st.integers(1, 6), world=st.integers(1, 9))
def test_every_rank_gets_the_key_heads_that_its_query_heads_read(key_heads: int, groups: int, world: int) -> None:
    split = split_heads(key_heads * groups, key_heads, world)
    assert [head for queries, _ in split for head in queries] == list(range(key_heads * groups))
    assert all(set(keys) == {head // groups for head in queries} for queries, keys in split)
    counts = [len(queries) for queries, _ in split]
    assert max(counts) - min(counts) <= 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(time=st.integers(1, 6), world=st.integers(1, 5), window=st.integers(1, 40), data=st.data())
def test_halos_are_what_queries_see_before_their_rank(time: int, world: int, window: int, data: st.DataObject) -> None:
    row = time * world
    bounds = sorted({0, row, *data.draw(st.lists(st.integers(0, row), max_size=5))})
    starts = [max(bound for bound in bounds if bound <= token) for token in range(row)]
    seen = [range(max(start, token - window + 1), token) for token, start in enumerate(starts)]
    halos = halo_lengths(time, world, window, bounds)
    received: list[list[int]] = [[] for _ in range(world)]
    for sender in range(world):
        last = (sender + 1) * time
        for receiver, length in enumerate(sent_lengths(halos, time, sender)):
            assert 0 <= length <= time
            received[receiver] += range(last - length, last)
    for rank, tokens in enumerate(received):
        first = rank * time
        needed = {token for query in range(first, first + time) for token in seen[query] if token < first}
        assert tokens == sorted(needed) and len(tokens) == halos[rank]


def test_ranks_of_a_cache_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.get_world_size", lambda _: 2)
    group: Any = object()
    q, k = torch.zeros(1, 2, 2, 4), torch.zeros(1, 5, 2, 4)
    with pytest.raises(ValueError, match="over ranks Tq = Tk > 0, not 2 and 5"):
        attention(q, k, k, group=group)
