"""The experts' products against a loop over experts."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.moe import grouped_linear, grouped_linear_reference
from tests.kernels.triton._compare import assert_matches, error, random, results

COUNTS = st.lists(st.sampled_from([0, 0, 1, 2, 5, 17]), min_size=1, max_size=6)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def inputs(counts: Sequence[int], width: int, out: int, seed: int, dtype: torch.dtype) -> list[Tensor]:
    return [random(sum(counts), width, seed=seed, dtype=dtype), random(len(counts), out, width, seed=1, dtype=dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(counts=COUNTS, width=st.sampled_from([1, 8, 19]), out=st.sampled_from([1, 8, 33]), seed=st.integers(0, 99))
def test_any_counts(dtype: torch.dtype, counts: list[int], width: int, out: int, seed: int) -> None:
    tokens = torch.tensor(counts)
    assert_matches(
        lambda x, w: [grouped_linear(x, w, tokens, backend="torch")],
        lambda x, w: [grouped_linear_reference(x, w, tokens)],
        inputs(counts, width, out, seed, dtype),
        dtype,
        tolerance=TOLERANCE[dtype],
    )


def test_large_products_keep_float32s_digits() -> None:
    counts = torch.tensor([0, 200, 1, 0, 311])
    wide = inputs(counts.tolist(), 128, 192, 0, torch.float64)
    narrow = [x.detach().float().requires_grad_() for x in wide]
    expected = results(lambda x, w: [grouped_linear_reference(x, w, counts)], wide)
    for actual, exact in zip(results(lambda x, w: [grouped_linear(x, w, counts)], narrow), expected):
        assert error(actual, exact) < 1e-6


def test_matches_torchs_grouped_product() -> None:
    counts = torch.tensor([3, 0, 8, 5])
    x, weight = inputs(counts.tolist(), 16, 8, 0, torch.float32)
    theirs = torch.nn.functional.grouped_mm(x, weight.mT, offs=counts.cumsum(0, dtype=torch.int32))
    torch.testing.assert_close(grouped_linear(x, weight, counts), theirs)


def test_one_expert_is_a_linear_layer_and_gradients_that_nobody_wants() -> None:
    x, weight = inputs([6], 8, 4, 0, torch.float32)
    expected = results(lambda x, w: [torch.nn.functional.linear(x, w[0])], [x, weight])
    for actual, exact in zip(results(lambda x, w: [grouped_linear(x, w, torch.tensor([6]))], [x, weight]), expected):
        torch.testing.assert_close(actual, exact)
    for frozen in (0, 1):
        leaves = [leaf.detach().requires_grad_(index != frozen) for index, leaf in enumerate((x, weight))]
        (_, gradient) = results(lambda x, w: [grouped_linear(x, w, torch.tensor([6]))], leaves)
        torch.testing.assert_close(gradient, expected[2 - frozen])


def test_strided_inputs() -> None:
    counts = torch.tensor([4, 0, 5])
    assert_matches(
        lambda x, w: [grouped_linear(x.mT, w.mT, counts).mT],
        lambda x, w: [grouped_linear_reference(x.mT, w.mT, counts).mT],
        [random(7, 9, seed=0), random(3, 7, 10, seed=1)],
    )


def test_errors() -> None:
    x, weight, counts = torch.zeros(3, 4), torch.zeros(2, 5, 4), torch.tensor([1, 2])
    for arguments in (
        (x[:, :3], weight, counts),
        (x, weight[0], counts),
        (x, weight, counts[:1]),
        (x.double(), weight, counts),
    ):
        with pytest.raises(ValueError, match=r"grouped_linear: x .* must be \[N, D\]"):
            grouped_linear(*arguments)
