"""The gates: hand-written gradients against plain autograd, and what they promise of every choice."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.moe import dense_to_sparse_gate, top_k_gate
from kernels.moe.routing import NORMALIZATIONS, SCORES, _largest_by_sort, largest
from tests.kernels.moe._gates import (
    check_dense_to_sparse,
    check_nan,
    check_ties,
    check_top_k,
    dense_to_sparse_cases,
    top_k_cases,
)
from tests.kernels.triton._compare import random, results

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
TOLERANCE = 1e-5


@SETTINGS
@given(case=top_k_cases(), biased=st.booleans(), seed=st.integers(0, 99))
def test_top_k(case: tuple[int, int, dict[str, Any]], biased: bool, seed: int) -> None:
    check_top_k("torch", case, biased, seed, TOLERANCE)


@SETTINGS
@given(case=dense_to_sparse_cases(), noisy=st.booleans(), seed=st.integers(0, 99))
def test_dense_to_sparse(case: tuple[int, int, dict[str, Any]], noisy: bool, seed: int) -> None:
    check_dense_to_sparse("torch", case, noisy, seed, TOLERANCE)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_what_adds_up_to_one(score: str, normalize: str) -> None:
    logits = random(20, 8, seed=0).detach()
    probs, gates, chosen = top_k_gate(logits, 3, score=score, normalize=normalize)
    assert chosen.sum(-1).eq(3).all() and torch.equal(gates != 0, chosen)
    torch.testing.assert_close(probs.sum(-1), torch.ones(20))
    if normalize == "after":
        torch.testing.assert_close(gates.sum(-1), torch.ones(20))
    elif normalize == "before" or score == "softmax":
        torch.testing.assert_close(gates, probs * chosen)
    else:
        torch.testing.assert_close(gates, logits.sigmoid() * chosen)


@SETTINGS
@given(
    row=st.lists(st.sampled_from([torch.nan, torch.inf, -torch.inf, 1.0, 0.0, -0.0]), min_size=1, max_size=9),
    data=st.data(),
)
def test_the_largest_are_those_of_a_stable_sort(row: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(row)))
    values = torch.tensor([row, row[::-1]])
    assert torch.equal(largest(values, count), _largest_by_sort(values, count))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_nan_is_never_hidden(backend: str) -> None:
    check_nan(backend)


def test_saturated_scores_are_told_apart() -> None:
    logits = torch.tensor([[30.0, 60.0, -1.0, 90.0]])
    assert logits.sigmoid()[0, [0, 1, 3]].tolist() == [1.0, 1.0, 1.0]
    for backend in ("reference", "torch"):
        assert top_k_gate(logits, 2, score="sigmoid", backend=backend)[2].tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_ties_go_to_the_lower_index(backend: str) -> None:
    check_ties(backend)


def test_the_bias_chooses_but_does_not_weigh() -> None:
    logits, bias = torch.zeros(1, 4), torch.tensor([0.0, 0.0, 1.0, 2.0])
    _, gates, chosen = top_k_gate(logits, 2, score="sigmoid", normalize="after", bias_E=bias)
    assert chosen.tolist() == [[False, False, True, True]]
    torch.testing.assert_close(gates, torch.tensor([[0.0, 0.0, 0.5, 0.5]]))


def test_groups_are_valued_by_their_best_experts() -> None:
    """Group 0 has the largest expert, group 1 the largest pair."""
    logits = torch.tensor([[4.0, -9.0, -9.0, 3.0, 3.0, -9.0]])
    _, _, chosen = top_k_gate(logits, 2, score="sigmoid", num_groups=2, group_top_k=1)
    assert chosen.nonzero()[:, 1].tolist() == [3, 4]


def test_dense_becomes_sparse() -> None:
    logits = random(200, 8, seed=0).detach()
    counts = [
        int(dense_to_sparse_gate(logits, temperature, 0.01)[2].sum()) / 200 for temperature in (10.0, 1.0, 0.3, 0.01)
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 8.0 and 1.0 <= counts[-1] < 1.2
    _, gates, keep = dense_to_sparse_gate(logits, 1.0, 0.0, max_experts=2)
    assert torch.equal(keep, top_k_gate(logits, 2)[2])
    torch.testing.assert_close(gates, top_k_gate(logits, 2)[1])


def test_a_scheduled_temperature_and_narrow_logits() -> None:
    logits = random(5, 6, seed=0, dtype=torch.bfloat16)
    probs, gates, keep = dense_to_sparse_gate(logits, 0.5, 0.1)
    assert (probs.dtype, gates.dtype, keep.dtype) == (torch.float32, torch.float32, torch.bool)
    torch.testing.assert_close(probs, (logits.float() / 0.5).softmax(-1))
    gates.square().sum().backward()
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16
    assert top_k_gate(logits, 2)[1].dtype == torch.float32


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_homogeneous_activations_leave_the_temperature_unidentified(activation: str) -> None:
    """Scaling logits and temperature alike changes nothing, so their gradients cancel: ⟨dz, z⟩ + dτ τ = 0."""
    logits, temperature = random(6, 5, seed=0), torch.tensor([0.7], requires_grad=True)
    *_, dlogits, dtemperature = results(
        lambda z, t: dense_to_sparse_gate(z, t, 0.1, activation=activation), [logits, temperature]
    )
    product: Tensor = (dlogits * logits).sum() + (dtemperature * temperature).sum()
    assert abs(product.item()) < 1e-5
    assert abs(dtemperature.item()) > 1e-2


def test_errors() -> None:
    for wrong in (torch.zeros(()), torch.zeros(6), torch.zeros(3, 6, dtype=torch.int64)):
        with pytest.raises(ValueError, match="top_k_gate: logits must be floating"):
            top_k_gate(wrong, 1)
        with pytest.raises(ValueError, match="dense_to_sparse_gate: logits must be floating"):
            dense_to_sparse_gate(wrong, 1.0, 0.1)
    logits = torch.zeros(3, 6)
    for options, message in (
        ({"top_k": 7}, "top_k 7 must be 1 to"),
        ({"top_k": 0}, "top_k 0 must be 1 to"),
        ({"top_k": 1, "scale": 0.0}, "scale 0.0 positive"),
        ({"top_k": 1, "score": "relu"}, "score must be one of softmax, sigmoid, not 'relu'"),
        ({"top_k": 1, "normalize": None}, "normalize must be one of"),
        ({"top_k": 1, "bias_E": torch.zeros(5)}, r"must be \[6\]"),
        ({"top_k": 1, "num_groups": 4}, "must divide 6 experts"),
        ({"top_k": 2, "num_groups": 3, "group_top_k": 4}, "1 to num_groups"),
        ({"top_k": 3, "num_groups": 3, "group_top_k": 2}, "multiple of group_top_k 2"),
        ({"top_k": 4, "num_groups": 3, "group_top_k": 1}, "and at most"),
    ):
        with pytest.raises(ValueError, match=message):
            top_k_gate(logits, **options)
    for arguments, options, message in (
        ((0.0, 0.1), {}, "temperature 0.0 must be positive"),
        ((torch.ones(2), 0.1), {}, "must have one element"),
        ((1.0, 0.1), {"max_experts": 7}, "max_experts 7 must be 1 to"),
        ((1.0, 0.1), {"max_experts": 0}, "max_experts 0 must be 1 to"),
        ((1.0, 0.1), {"activation": "softplus"}, "activation must be one of"),
        ((1.0, 0.1), {"noise_TE": torch.zeros(3, 5)}, "must have the logits' shape"),
    ):
        with pytest.raises(ValueError, match=message):
            dense_to_sparse_gate(logits, *arguments, **options)
