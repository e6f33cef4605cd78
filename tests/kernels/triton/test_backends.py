"""The public functions with backend="triton", in the interpreter: every recurrence against its reference in float64."""

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.test_linear_attention import OPS, assert_same, bounds_tensor, make_inputs, make_state, results

# The interpreter runs a program after another in Python: small shapes.
HEADS, DIMS = (4, 2, 2), (16, 24)


@pytest.mark.parametrize("lengths", [None, [5, 1, 40, 17]])
@pytest.mark.parametrize("name", OPS)
def test_triton_equals_the_reference(name: str, lengths: list[int] | None) -> None:
    batch, time, sequences = (1, 70, 1) if lengths is None else (1, sum(lengths), len(lengths))
    cu_seqlens = None if lengths is None else bounds_tensor(lengths)
    inputs = make_inputs(name, batch, time, heads=HEADS, dims=DIMS, dtype=torch.float32)
    state = make_state(name, sequences, max(HEADS), DIMS, dtype=torch.float32)
    actual = results(OPS[name], inputs, state, cu_seqlens=cu_seqlens, backend="triton")
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = results(OPS[name], wide, state.detach().double().requires_grad_(), cu_seqlens=cu_seqlens)
    assert_same([x.double() for x in actual], expected, 1e-4)


@pytest.mark.parametrize("name", OPS)
def test_triton_stays_finite_and_exact_at_strong_decays(name: str) -> None:
    inputs = make_inputs(name, 1, 70, strongest=20.0, dims=DIMS, dtype=torch.float32)
    actual = results(OPS[name], inputs, None, backend="triton")
    expected = results(OPS[name], [x.detach().double().requires_grad_() for x in inputs], None)
    assert_same([x.double() for x in actual], expected, 1e-4)
