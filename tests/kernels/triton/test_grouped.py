"""The kernels of the experts' matrix products."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.moe import grouped_linear, grouped_linear_reference
from tests.kernels.triton._compare import DEVICE, assert_matches, random

triton_grouped = pytest.importorskip("kernels.triton.grouped")
SMALL = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_grouped, "_tile", lambda target, size: (SMALL, 1, 2))
    monkeypatch.setattr(triton_grouped, "_SCHEDULE_ELEMENTS", 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.sampled_from([0, 1, 15, 16, 40]), min_size=1, max_size=5),
    width=st.sampled_from([1, 16, 35]),
    out=st.sampled_from([1, 16, 20]),
    seed=st.integers(0, 99),
)
def test_any_counts(dtype: torch.dtype, counts: list[int], width: int, out: int, seed: int) -> None:
    tokens = torch.tensor(counts, device=DEVICE)
    assert_matches(
        lambda x, w: [grouped_linear(x, w, tokens, backend="triton")],
        lambda x, w: [grouped_linear_reference(x, w, tokens)],
        [random(sum(counts), width, seed=seed, dtype=dtype), random(len(counts), out, width, seed=1, dtype=dtype)],
        dtype,
    )


def test_views() -> None:
    tokens = torch.tensor([17, 0, 3], device=DEVICE)
    assert_matches(
        lambda x, w: [grouped_linear(x.mT, w.mT, tokens, backend="triton").mT],
        lambda x, w: [grouped_linear_reference(x.mT, w.mT, tokens).mT],
        [random(7, 20, seed=0), random(3, 7, 10, seed=1)],
    )


@settings(max_examples=20, deadline=None, derandomize=True)
@given(counts=st.lists(st.sampled_from([0, 0, 1, 16, 17, 50]), min_size=1, max_size=9))
def test_the_schedule_covers_every_row_once(counts: list[int]) -> None:
    ends, (experts, begins) = triton_grouped._schedule(torch.tensor(counts, device=DEVICE), sum(counts), 16)
    assert ends.tolist() == torch.tensor(counts).cumsum(0).tolist()
    rows = []
    for expert, begin in zip(experts.tolist(), begins.tolist()):
        if expert < len(counts):
            rows += [(expert, row) for row in range(begin, min(begin + 16, int(ends[expert])))]
    assert rows == [(e, row) for row, e in enumerate(e for e, count in enumerate(counts) for _ in range(count))]
