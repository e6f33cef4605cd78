"""Cases for the gates, and how every implementation is compared with the reference."""

from itertools import product
from typing import Any

import torch
from hypothesis import strategies as st

from kernels.moe import dense_to_sparse_gate, dense_to_sparse_gate_reference, top_k_gate, top_k_gate_reference
from kernels.moe.routing import ACTIVATIONS, NORMALIZATIONS, SCORES
from tests.kernels.triton._compare import DEVICE, assert_matches, random

# Gradients of sums of one are zero but for rounding; those of a gate are of order one.
FLOOR = 0.1


@st.composite
def top_k_cases(draw: st.DrawFn) -> tuple[int, int, dict[str, Any]]:
    """Tokens, experts and the options of top_k_gate but for the bias."""
    groups, size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    group_top_k = draw(st.integers(1, groups))
    top_k = group_top_k * draw(st.integers(1, size)) if groups > 1 else draw(st.integers(1, size))
    options = {
        "top_k": top_k,
        "score": draw(st.sampled_from(SCORES)),
        "normalize": draw(st.sampled_from(NORMALIZATIONS)),
        "num_groups": groups,
        "group_top_k": group_top_k,
        "scale": draw(st.sampled_from([1.0, 2.5])),
    }
    return draw(st.integers(0, 9)), groups * size, options


@st.composite
def dense_to_sparse_cases(draw: st.DrawFn) -> tuple[int, int, dict[str, Any]]:
    """Tokens, experts and the options of dense_to_sparse_gate but for temperature and noise."""
    experts = draw(st.integers(1, 9))
    options = {
        "threshold": draw(st.sampled_from([0.0, 0.02, 0.2, 2.0])),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "max_experts": draw(st.one_of(st.none(), st.integers(1, experts))),
        "renormalize": draw(st.booleans()),
    }
    return draw(st.integers(0, 9)), experts, options


def check_top_k(backend: str, case: tuple[int, int, dict[str, Any]], biased: bool, seed: int, tolerance: float) -> None:
    """`backend` equals the reference."""
    tokens, experts, options = case
    bias = random(experts, seed=seed + 1).detach() if biased else None
    assert_matches(
        lambda z: top_k_gate(z, bias_E=bias, backend=backend, **options),
        lambda z: top_k_gate_reference(z, bias_E=bias, **options),
        [random(tokens, experts, seed=seed)],
        tolerance=tolerance,
        floor=FLOOR,
    )


def check_dense_to_sparse(
    backend: str, case: tuple[int, int, dict[str, Any]], noisy: bool, seed: int, tolerance: float
) -> None:
    """`backend` equals the reference, with the gradient of a temperature between 0.3 and 3."""
    tokens, experts, options = case
    noise = random(tokens, experts, seed=seed + 1).detach() if noisy else None
    temperature = random(1, seed=seed).detach().div(2).exp().requires_grad_()
    assert_matches(
        lambda z, t: dense_to_sparse_gate(z, t, noise_TE=noise, backend=backend, **options),
        lambda z, t: dense_to_sparse_gate_reference(z, t, noise_TE=noise, **options),
        [random(tokens, experts, seed=seed), temperature],
        tolerance=tolerance,
        floor=FLOOR,
    )


def check_ties(backend: str) -> None:
    """Of equal values `backend` takes the first."""
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0], [3.0, -1.0, 3.0, 5.0]], device=DEVICE)
    expected = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 1]]).bool()
    assert torch.equal(top_k_gate(logits, 2, backend=backend)[2].cpu(), expected)
    assert torch.equal(dense_to_sparse_gate(logits, 1.0, 0.0, max_experts=2, backend=backend)[2].cpu(), expected)
    first = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]).bool()
    assert torch.equal(dense_to_sparse_gate(logits, 1.0, 2.0, backend=backend)[2].cpu(), first)
    # Two groups of two: the first row's are worth 2 and 2, the second's 0 and 0, the third's 3 and 5.
    grouped = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]).bool()
    assert torch.equal(top_k_gate(logits, 1, num_groups=2, backend=backend)[2].cpu(), grouped)


def check_nan(backend: str) -> None:
    """A token with NaN logits has experts like any other, with NaN gates among theirs and NaN in its gradient alone."""
    nan, inf = torch.nan, torch.inf
    rows = [[1.0, 2.0, 3.0, 4.0], [nan] * 4, [1.0, nan, 3.0, nan], [inf, 0.0, nan, 1.0], [4.0, 3.0, 2.0, 1.0]]

    def check(outputs: tuple[torch.Tensor, ...], logits: torch.Tensor, expected: list[list[int]], case: str) -> None:
        probs, gates, chosen = outputs
        assert torch.equal(chosen.cpu(), torch.tensor(expected).bool()), case
        assert gates.isnan().any(-1).tolist() == [False, True, True, True, False], case
        assert not gates[~chosen].any(), case
        (gradient,) = torch.autograd.grad((probs + gates).square().sum(), logits)
        assert gradient.isnan().any(-1).tolist() == [False, True, True, True, False], case

    logits = torch.tensor(rows, device=DEVICE).requires_grad_()
    two = [[0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1], [1, 0, 1, 0], [1, 1, 0, 0]]
    for score, normalize in product(SCORES, NORMALIZATIONS):
        options: dict[str, Any] = {"score": score, "normalize": normalize, "backend": backend}
        check(top_k_gate(logits, 2, **options), logits, two, f"{score}, {normalize}")
    grouped = [[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0]]
    options = {"score": "sigmoid", "normalize": "none", "num_groups": 2, "backend": backend}
    check(top_k_gate(logits, 2, **options), logits, grouped, "groups")
    check(top_k_gate(logits, 2, bias_E=torch.zeros(4, device=DEVICE), **options), logits, grouped, "groups and bias")
    one = [[0, 0, 1, 1], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, 1, 0, 0]]
    for renormalize, limit in product((False, True), (None, 2)):
        options = {"renormalize": renormalize, "max_experts": limit, "backend": backend}
        check(dense_to_sparse_gate(logits, 1.0, 0.1, **options), logits, one, f"{renormalize}, {limit}")
    # Without the infinite logit, of which an activation may make a NaN.
    for activation in ACTIVATIONS:
        _, gates, keep = dense_to_sparse_gate(logits[1:3], 1.0, 0.9, activation=activation, backend=backend)
        assert keep.int().tolist() == one[1:3] and gates[keep].isnan().all() and not gates[~keep].any(), activation
