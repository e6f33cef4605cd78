"""The kernels that gather rows and add them up."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.moe import permute, permute_reference, unpermute, unpermute_reference
from tests.kernels.triton._compare import DEVICE, assert_matches, random

triton_permutation = pytest.importorskip("kernels.triton.permutation")
SETTINGS = settings(max_examples=8, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_permutation, "_BLOCK_ELEMENTS", 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@SETTINGS
@given(
    tokens=st.integers(0, 9),
    experts=st.integers(1, 5),
    share=st.sampled_from([0.0, 0.4, 1.0]),
    width=st.sampled_from([1, 7, 16, 100]),
    seed=st.integers(0, 99),
)
def test_permute(dtype: torch.dtype, tokens: int, experts: int, share: float, width: int, seed: int) -> None:
    routing_map = (torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)) < share).to(DEVICE)
    inputs = [random(tokens, width, seed=seed, dtype=dtype), random(tokens, experts, seed=seed + 1)]
    assert_matches(
        lambda x, p: [y for y in permute(x, routing_map, p, backend="triton") if y is not None],
        lambda x, p: [y for y in permute_reference(x, routing_map, p) if y is not None],
        inputs,
        dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@SETTINGS
@given(
    tokens=st.integers(1, 9),
    rows=st.integers(0, 20),
    width=st.sampled_from([1, 7, 16, 100]),
    weighted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_unpermute(dtype: torch.dtype, tokens: int, rows: int, width: int, weighted: bool, seed: int) -> None:
    row_tokens = torch.randint(tokens, (rows,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    inputs = [random(rows, width, seed=seed, dtype=dtype)]
    inputs += [random(rows, seed=seed + 1)] if weighted else []
    assert_matches(
        lambda *x: [unpermute(x[0], row_tokens, tokens, *x[1:], backend="triton")],
        lambda *x: [unpermute_reference(x[0], row_tokens, tokens, *x[1:])],
        inputs,
        dtype,
    )


def test_views_of_several_blocks_of_columns() -> None:
    row_tokens = torch.tensor([2, 0, 2, 1, 2], device=DEVICE)
    assert_matches(
        lambda x, p: [unpermute(x.mT, row_tokens, 3, p[::2], backend="triton").mT],
        lambda x, p: [unpermute_reference(x.mT, row_tokens, 3, p[::2]).mT],
        [random(100, 5, seed=0), random(10, seed=1)],
    )
