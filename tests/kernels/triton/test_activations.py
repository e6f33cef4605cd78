"""SwiGLU's kernels, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.activations import swiglu, swiglu_packed, swiglu_reference
from tests.kernels.triton._compare import DEVICE, assert_matches, random, results

triton_activations = pytest.importorskip("kernels.triton.activations")
SETTINGS = settings(max_examples=8, deadline=None, derandomize=True)
SHAPES = st.sampled_from([(1, 1), (3, 7), (2, 5, 64), (70, 40), (2, 2100)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@SETTINGS
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_swiglu(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> None:
    inputs = [random(*shape, seed=seed, dtype=dtype), random(*shape, seed=seed + 1, dtype=dtype)]
    assert_matches(lambda g, u: [swiglu(g, u, backend="triton")], lambda g, u: [swiglu_reference(g, u)], inputs, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@SETTINGS
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_swiglu_packed(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> None:
    inputs = [random(*shape[:-1], 2 * shape[-1], seed=seed, dtype=dtype)]
    assert_matches(
        lambda x: [swiglu_packed(x, backend="triton")],
        lambda x: [swiglu_reference(*x.chunk(2, dim=-1))],
        inputs,
        dtype,
    )


def test_views() -> None:
    assert_matches(
        lambda x: [swiglu(x[..., :9], x[..., 20:29], backend="triton"), swiglu(x.mT, x.mT, backend="triton")],
        lambda x: [swiglu_reference(x[..., :9], x[..., 20:29]), swiglu_reference(x.mT, x.mT)],
        [random(3, 5, 30, seed=0)],
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, of exp(1e4)
def test_large_gates_and_empty_inputs() -> None:
    gate = torch.tensor([[-1e4, -90.0, 90.0, 1e4]], device=DEVICE, requires_grad=True)
    assert_matches(
        lambda g, u: [swiglu(g, u, backend="triton")],
        lambda g, u: [swiglu_reference(g, u)],
        [gate, random(1, 4, seed=0)],
    )
    empty = torch.zeros(0, 6, device=DEVICE, requires_grad=True)
    y, gradient = results(lambda x: [swiglu_packed(x, backend="triton")], [empty])
    assert (y.shape, gradient.shape) == ((0, 3), (0, 6))
