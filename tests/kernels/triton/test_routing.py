"""The gates' kernels."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.moe import dense_to_sparse_gate, top_k_gate
from tests.kernels.moe._gates import (
    check_dense_to_sparse,
    check_nan,
    check_ties,
    check_top_k,
    dense_to_sparse_cases,
    top_k_cases,
)
from tests.kernels.triton._compare import TOLERANCE, assert_matches, random

triton_routing = pytest.importorskip("kernels.triton.routing")
SETTINGS = settings(max_examples=30, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_routing, "_BLOCK_ELEMENTS", 32)


@SETTINGS
@given(case=top_k_cases(), biased=st.booleans(), seed=st.integers(0, 99))
def test_top_k(case: tuple[int, int, dict[str, Any]], biased: bool, seed: int) -> None:
    check_top_k("triton", case, biased, seed, TOLERANCE[torch.float32])


@SETTINGS
@given(case=dense_to_sparse_cases(), noisy=st.booleans(), seed=st.integers(0, 99))
def test_dense_to_sparse(case: tuple[int, int, dict[str, Any]], noisy: bool, seed: int) -> None:
    check_dense_to_sparse("triton", case, noisy, seed, TOLERANCE[torch.float32])


def test_ties_go_to_the_lower_index() -> None:
    check_ties("triton")


def test_nan_is_never_hidden() -> None:
    check_nan("triton")


def test_views_and_narrow_logits() -> None:
    logits = random(6, 9, seed=0)
    assert_matches(
        lambda z: [*top_k_gate(z.mT, 2, backend="triton"), *dense_to_sparse_gate(z.mT, 0.5, 0.1, backend="triton")],
        lambda z: [*top_k_gate(z.mT, 2, backend="reference"), *dense_to_sparse_gate(z.mT, 0.5, 0.1)],
        [logits],
    )
    narrow = random(9, 6, seed=0, dtype=torch.bfloat16)
    assert_matches(
        lambda z: top_k_gate(z, 2, score="sigmoid", normalize="after", backend="triton"),
        lambda z: top_k_gate(z, 2, score="sigmoid", normalize="after", backend="reference"),
        [narrow],
        torch.bfloat16,
    )
