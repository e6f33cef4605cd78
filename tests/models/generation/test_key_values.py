"""Attention of decoding steps: any layout of pages against attention row by row."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from models.generation.key_values import PagePool, PageStep, RowPages
from models.generation.pages import Pages, PageTable

HEADS, GROUPS, WIDTH = 2, 3, 8


def keys(count: int, tokens: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    shape = (count, tokens, HEADS, WIDTH)
    return {name: torch.randn(shape, generator=generator) for name in ("k", "v")}


def filled(
    lengths: list[int], clones: int, groups: int, size: int, gaps: list[bool]
) -> tuple[PagePool, list[PageTable]]:
    """Sequences of these lengths, in memory that was not a number before; the first are cloned. Some end again."""
    pages = Pages(size, None)
    pool, tables = PagePool(pages), []
    for length in lengths:
        table = PageTable(pages, length + 40)
        table.extend(length)
        tables.append(table)
    pool.fit(keys(1, 1, torch.Generator()))
    for x in pool.tensors.values():
        x.fill_(float("nan"))
        for table in tables:
            for page in table._own:
                x[:, page * size : (page + 1) * size] = 0
    for table, length in list(zip(tables, lengths, strict=True))[:groups]:
        for _ in range(clones):
            fork, copied = table.fork(length + 40)
            if copied is not None:
                pool.grow()
                pool.copy_page(*copied)
            # Memory of its own behind what it shares.
            fork.extend(length + 1)
            tables.append(fork)
    for table, gap in list(zip(tables, gaps, strict=False)):
        if gap and len(tables) > 1:
            table.release()
            tables.remove(table)
    return pool, tables


# Two answers of the second group have ended, and the others are read over the holes.
@example(lengths=[32, 32], clones=5, groups=2, size=16, gaps=[False] * 8 + [True, False, True], sinks=False, seed=0)
@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=6)
    | st.builds(lambda length, count: [length] * count, st.integers(1, 90), st.integers(1, 4)),
    clones=st.integers(0, 4),
    groups=st.integers(1, 3),
    size=st.sampled_from([1, 4, 16]),
    gaps=st.lists(st.booleans(), max_size=12),
    sinks=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rows_attend_to_their_own_tokens(lengths, clones, groups, size, gaps, sinks, seed):
    """In batches of runs that lie alike, as row by row; what lies outside of a row's memory is not read."""
    generator = torch.Generator().manual_seed(seed)
    pool, tables = filled(lengths, clones, groups, size, gaps)
    for table in tables:
        table.extend(table.length + 1)
    places = torch.tensor([table.place(table.length - 1) for table in tables])
    for start, end in {run for table in tables for run in table.runs()}:
        for x in pool.tensors.values():
            x[:, start:end] = torch.randn(HEADS, end - start, WIDTH, generator=generator)
    q = torch.randn(len(tables), 1, HEADS * GROUPS, WIDTH, generator=generator)
    own_sinks = tuple(keys(1, 3, generator).values()) if sinks else None
    runs, ends = [table.runs() for table in tables], [table.end for table in tables]
    store = RowPages(pool, PageStep(places, runs, ends, exact=False))
    o = store.attend(q, keys(len(tables), 1, generator), own_sinks)
    rows = q[:, 0].unflatten(1, (HEADS, GROUPS)).split(1)
    expected = torch.cat([store._row(row, of_row, own_sinks) for row, of_row in zip(rows, runs, strict=True)])
    torch.testing.assert_close(o, expected.flatten(1, 2)[:, None], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "calls"),
    [([50, 50, 50], 1), ([50, 45, 55], 1), ([50, 50, 400], 2), ([7], 1)],
)
def test_rows_of_like_length_are_one_call(lengths, calls):
    """Also of lengths that differ by a few tokens; a much longer row is read by itself."""
    pages = Pages(16, None)
    tables = [PageTable(pages, 512) for _ in lengths]
    for table, length in zip(tables, lengths, strict=True):
        table.extend(length)
    step = PageStep(
        torch.zeros(len(tables), dtype=torch.int64),
        [table.runs() for table in tables],
        [table.end for table in tables],
        exact=False,
    )
    assert len(step.batches) == calls and step.is_one_call == (calls == 1)
    assert all(end - start == length for (((start, end),), length) in zip(step.runs, lengths, strict=True))


@pytest.mark.parametrize(("prompt", "most", "ended"), [(64, 128, ()), (64, 128, (2, 9)), (128, 192, ())])
def test_groups_of_like_prompts_are_two_calls(prompt, most, ended):
    """One for all prompts and one for all answers, though the first answer of a group lies right behind its prompt."""
    pages, tables = Pages(16, None), []
    for _ in range(3):
        first = PageTable(pages, most)
        first.extend(prompt)
        tables += [first, *(first.fork(most)[0] for _ in range(5))]
        for table in tables[-6:]:
            table.extend(prompt + 1)
    for number in ended:
        tables.pop(number).release()
    runs, ends = [table.runs() for table in tables], [table.end for table in tables]
    step = PageStep(torch.zeros(len(tables), dtype=torch.int64), runs, ends, exact=False)
    answers, *prompts = step.batches
    assert len(prompts) == (2 if ended else 1), [batch.rows for batch in prompts]
    assert [row for rows in answers.rows for row in rows] == list(range(len(tables))) and [] in answers.rows
    assert {row for batch in prompts for rows in batch.rows for row in rows} == set(range(len(tables)))


def test_a_row_that_ends_leaves_memory_that_the_next_may_read():
    """Values that are not numbers stay in pages of a row that has ended; a new row of that memory masks zeros."""
    pages = Pages(4, 8)
    pool = PagePool(pages)
    pool.fit(keys(1, 1, torch.Generator()))
    for x in pool.tensors.values():
        x.fill_(float("nan"))
    table = PageTable(pages, 32)
    table.extend(5)
    assert all(bool((x[:, page * 4 : page * 4 + 4] == 0).all()) for x in pool.tensors.values() for page in table._own)
