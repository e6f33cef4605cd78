"""The rotation's kernel, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.rotary import apply_rotary, apply_rotary_reference, rotary_tables
from tests.kernels.triton._compare import DEVICE, assert_matches, error, random

triton_rotary = pytest.importorskip("kernels.triton.rotary")
SETTINGS = settings(max_examples=8, deadline=None, derandomize=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@SETTINGS
@given(
    batch=st.integers(1, 3),
    heads=st.sampled_from([1, 3, 40]),
    dim=st.sampled_from([2, 6, 64]),
    per_example=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rotary(dtype: torch.dtype, batch: int, heads: int, dim: int, per_example: bool, seed: int) -> None:
    time = 5
    positions = torch.arange(batch * time, device=DEVICE).view(batch, time) if per_example else torch.arange(time)
    tables = rotary_tables(positions.to(DEVICE), dim, 100.0)
    assert_matches(
        lambda x, cos, sin: [apply_rotary(x, cos, sin, backend="triton")],
        lambda x, cos, sin: [apply_rotary_reference(x, cos, sin)],
        [random(batch, time, heads, dim, seed=seed, dtype=dtype), *tables],
        dtype,
    )


def test_any_strides() -> None:
    tables = rotary_tables(torch.arange(7, device=DEVICE), 8, 10.0)
    assert_matches(
        lambda x: [apply_rotary(x.permute(2, 0, 3, 1), *tables, backend="triton")],
        lambda x: [apply_rotary_reference(x.permute(2, 0, 3, 1), *tables)],
        [random(7, 8, 2, 3, seed=0)],
    )


def test_many_heads_in_several_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_rotary, "_BLOCK_PAIRS", 8)
    tables = rotary_tables(torch.arange(3, device=DEVICE), 8, 10.0)
    x = random(2, 3, 5, 8, seed=0)
    assert triton_rotary._tile("sm_90", 5, 4)[0] == 2
    actual = apply_rotary(x, *tables, backend="triton")
    assert error(actual, apply_rotary_reference(x, *tables)) < 1e-6
