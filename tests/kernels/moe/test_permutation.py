"""The copies of tokens for their experts and the sum of what comes back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.moe import permutation, permute, permute_reference, unpermute, unpermute_reference
from tests.kernels.triton._compare import assert_matches, random, results

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
SETTINGS = settings(max_examples=25, deadline=None, derandomize=True)
SIZES = {"tokens": st.integers(0, 12), "experts": st.integers(1, 6), "share": st.sampled_from([0.0, 0.3, 1.0])}


def random_map(tokens: int, experts: int, share: float, seed: int) -> Tensor:
    return torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@SETTINGS
@given(**SIZES, width=st.sampled_from([1, 7, 16]), weighted=st.booleans(), seed=st.integers(0, 99))
def test_permute(
    dtype: torch.dtype, tokens: int, experts: int, share: float, width: int, weighted: bool, seed: int
) -> None:
    routing_map = random_map(tokens, experts, share, seed)
    inputs = [random(tokens, width, seed=seed, dtype=dtype)]
    inputs += [random(tokens, experts, seed=seed + 1)] if weighted else []
    assert_matches(
        lambda *x: [y for y in permute(x[0], routing_map, *x[1:], backend="torch") if y is not None],
        lambda *x: [y for y in permute_reference(x[0], routing_map, *x[1:]) if y is not None],
        inputs,
        dtype,
        tolerance=TOLERANCE[dtype],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@SETTINGS
@given(
    tokens=st.integers(1, 12),
    rows=st.integers(0, 30),
    width=st.sampled_from([1, 7, 16]),
    weighted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_unpermute_of_rows_in_any_order(
    dtype: torch.dtype, tokens: int, rows: int, width: int, weighted: bool, seed: int
) -> None:
    row_tokens = torch.randint(tokens, (rows,), generator=torch.Generator().manual_seed(seed))
    inputs = [random(rows, width, seed=seed, dtype=dtype)]
    inputs += [random(rows, seed=seed + 1)] if weighted else []
    assert_matches(
        lambda *x: [unpermute(x[0], row_tokens, tokens, *x[1:], backend="torch")],
        lambda *x: [unpermute_reference(x[0], row_tokens, tokens, *x[1:])],
        inputs,
        dtype,
        tolerance=TOLERANCE[dtype],
    )


def test_a_map_by_hand() -> None:
    x = torch.arange(4.0)[:, None]
    routing_map = torch.tensor([[1, 0, 0], [1, 0, 1], [0, 0, 0], [0, 0, 1]]).bool()
    probs = torch.arange(12.0).view(4, 3)
    rows, row_probs, row_tokens, counts = permute(x, routing_map, probs)
    assert rows[:, 0].tolist() == [0.0, 1.0, 1.0, 3.0]
    assert row_probs is not None and row_probs.tolist() == [0.0, 3.0, 5.0, 11.0]
    assert (row_tokens.tolist(), counts.tolist()) == ([0, 1, 1, 3], [2, 0, 2])
    assert (row_tokens.dtype, counts.dtype) == (torch.int64, torch.int64)
    assert unpermute(rows, row_tokens, 4, row_probs)[:, 0].tolist() == [0.0, 8.0, 0.0, 33.0]
    assert unpermute(rows, row_tokens, 4)[:, 0].tolist() == [0.0, 2.0, 0.0, 3.0]


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_a_known_number_of_rows_is_not_counted(fraction: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where counting would wait for it."""
    routing_map = random_map(30, 5, fraction, seed=3)
    x, probs, rows = random(30, 4, seed=0), random(30, 5, seed=1), int(routing_map.sum())
    expected = permute(x, routing_map, probs)
    with monkeypatch.context() as patch:
        patch.setattr(permutation, "on_host", lambda _: False)
        actual = permute(x, routing_map, probs, num_rows=rows)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=rf"num_rows {rows + 1} must be the sum of the map, which is {rows}"):
        permute(x, routing_map, probs, num_rows=rows + 1)


def test_narrow_rows_are_added_in_float32() -> None:
    """256 + 1 + 1 is 258, but in bfloat16 256 + 1 is 256 again."""
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    for weights in (None, torch.ones(3)):
        assert unpermute(rows, torch.zeros(3, dtype=torch.int64), 1, weights).item() == 258.0


def test_strided_inputs_and_second_use() -> None:
    routing_map = random_map(9, 4, 0.5, seed=0)
    rows = int(routing_map.sum())
    assert_matches(
        lambda x, p: [permute(x.mT, routing_map, p.mT)[0], permute(x[:, :9].mT, routing_map, p.mT)[1]],
        lambda x, p: [
            permute_reference(x.mT, routing_map, p.mT)[0],
            permute_reference(x[:, :9].mT, routing_map, p.mT)[1],
        ],
        [random(5, 9, seed=1), random(4, 9, seed=2)],
    )
    tokens = permute(torch.zeros(9, 1), routing_map)[2]
    assert_matches(
        lambda x, p: [unpermute(x.mT, tokens, 9, p[::2])],
        lambda x, p: [unpermute_reference(x.mT, tokens, 9, p[::2])],
        [random(5, rows, seed=1), random(2 * rows, seed=2)],
    )


def test_gradients_of_a_round_trip() -> None:
    """Every row back at its token: the map's count of each times x."""
    routing_map = random_map(30, 5, 0.5, seed=3)
    y, dx = results(
        lambda x: [unpermute(*[permute(x, routing_map)[i] for i in (0, 2)], len(x))], [random(30, 4, seed=0)]
    )
    assert torch.equal(y == 0, (routing_map.sum(1) == 0)[:, None].expand(30, 4))
    assert torch.equal(dx == 0, y == 0)


def test_errors() -> None:
    x, routing_map = torch.zeros(3, 2), torch.zeros(3, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="must be bool"):
        permute(x, routing_map.int())
    with pytest.raises(ValueError, match="must be bool"):
        permute(x[:2], routing_map)
    with pytest.raises(ValueError, match="the map's shape"):
        permute(x, routing_map, torch.zeros(4, 3))
    with pytest.raises(ValueError, match="as many as rows"):
        unpermute(x, torch.zeros(2, dtype=torch.int64), 3)
    with pytest.raises(ValueError, match="as many as rows"):
        unpermute(x, torch.zeros(3, dtype=torch.int64), 3, torch.zeros(3, 1))
