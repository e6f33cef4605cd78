"""SwiGLU's hand-written gradients against plain autograd."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.activations import swiglu, swiglu_packed, swiglu_reference

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def _packed(gate: Tensor, up: Tensor) -> Tensor:
    return swiglu_packed(torch.cat((gate, up), dim=-1))


def _run(function: Callable[..., Tensor], gate: Tensor, up: Tensor, grad: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (gate, up)]
    out = function(*leaves)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def _compare(function: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    gate, up, grad = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(3))
    results = _run(function, gate, up, grad)
    for result, target in zip(results, _run(swiglu_reference, gate.double(), up.double(), grad.double())):
        assert result.dtype == dtype and result.shape == target.shape
        assert (result.double() - target).norm() <= tolerance * target.norm()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("function", [swiglu, _packed])
def test_matches_reference_over_several_blocks(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # 2 x 150 rows of 1000 are more than one block and do not fill the last.
    _compare(function, (2, 150, 1000), dtype, TOLERANCE[dtype])


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([swiglu, _packed]), st.lists(st.integers(1, 6), max_size=3), st.integers(1, 20))
def test_matches_reference_on_any_shape(function: Callable[..., Tensor], leading: list[int], width: int) -> None:
    torch.manual_seed(0)
    _compare(function, (*leading, width), torch.float64, 1e-10)


@pytest.mark.parametrize("function", [swiglu, _packed])
def test_gradcheck_and_strided_inputs(function: Callable[..., Tensor]) -> None:
    gate, up = (torch.randn(4, 3, dtype=torch.float64).T.requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(function, (gate, up))


def test_inputs_are_left_alone() -> None:
    gate, up, grad = (torch.randn(5, 6) for _ in range(3))
    before = [x.clone() for x in (gate, up, grad)]
    leaves = [x.requires_grad_() for x in (gate, up)]
    swiglu(*leaves).backward(grad)
    assert all(torch.equal(x, y) for x, y in zip((gate, up, grad), before))


def test_errors() -> None:
    with pytest.raises(ValueError, match="must have the same shape"):
        swiglu(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="odd"):
        swiglu_packed(torch.zeros(2, 3))
