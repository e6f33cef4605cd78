"""The norms' hand-written gradients against plain autograd."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import norms

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}
EPS = 1e-5
CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "rms": (lambda x, _, w: norms.rms_norm(x, w, EPS), lambda x, _, w: norms.rms_norm_reference(x, w, EPS)),
    "silu": (
        lambda x, g, w: norms.gated_rms_norm(x, g, w, EPS, "silu"),
        lambda x, g, w: norms.gated_rms_norm_reference(x, g, w, EPS, "silu"),
    ),
    "sigmoid": (
        lambda x, g, w: norms.gated_rms_norm(x, g, w, EPS, "sigmoid"),
        lambda x, g, w: norms.gated_rms_norm_reference(x, g, w, EPS, "sigmoid"),
    ),
    "l2": (lambda x, *_: norms.l2_norm(x), lambda x, *_: norms.l2_norm_reference(x)),
}


def _run(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return [draw(*shape), draw(*shape), draw(shape[-1])], draw(*shape)


def _compare(case: str, inputs: list[Tensor], grad: Tensor, tolerance: float) -> None:
    fast, reference = CASES[case]
    results = _run(fast, inputs, grad)
    expected = _run(reference, [x.double() for x in inputs], grad.double())
    assert len(results) == len(expected)
    for result, target in zip(results, expected):
        assert result.dtype == inputs[0].dtype
        assert (result.double() - target).norm() <= tolerance * target.norm()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_matches_reference_over_several_blocks(case: str, dtype: torch.dtype) -> None:
    # 2 x 300 rows of 512 are more than one block and do not fill the last.
    _compare(case, *_inputs((2, 300, 512), dtype), TOLERANCE[dtype])


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(CASES)), st.lists(st.integers(1, 6), max_size=3), st.integers(2, 40), st.integers(0, 99))
def test_matches_reference_on_any_shape(case: str, leading: list[int], width: int, seed: int) -> None:
    _compare(case, *_inputs((*leading, width), torch.float64, seed), 1e-10)


@pytest.mark.parametrize("case", CASES)
def test_strided_inputs_and_gradients(case: str) -> None:
    (x, gate, weight), grad = _inputs((4, 6, 10), torch.float64)
    strided = [x.transpose(0, 1), gate[..., :1].expand(4, 6, 10).transpose(0, 1), weight]
    _compare(case, strided, grad.transpose(0, 1), 1e-10)


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case: str) -> None:
    inputs, _ = _inputs((2, 3, 5), torch.float64)
    assert torch.autograd.gradcheck(CASES[case][0], [x.requires_grad_() for x in inputs])


def test_float32_weight_on_bfloat16_input() -> None:
    (x, gate, weight), grad = _inputs((7, 16), torch.bfloat16)
    for case in ("rms", "silu"):
        out, *grads = _run(CASES[case][0], [x, gate, weight.float()], grad)
        assert out.dtype == torch.bfloat16 and grads[-1].dtype == torch.float32


def test_zero_rows_stay_finite() -> None:
    x = torch.zeros(3, 8, requires_grad=True)
    norms.l2_norm(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_errors() -> None:
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="weight"):
        norms.rms_norm(x, torch.ones(5), EPS)
    with pytest.raises(ValueError, match="gate"):
        norms.gated_rms_norm(x, x[:1], torch.ones(4), EPS)
    with pytest.raises(ValueError, match="silu or sigmoid"):
        norms.gated_rms_norm(x, x, torch.ones(4), EPS, "gelu")  # type: ignore[arg-type]
