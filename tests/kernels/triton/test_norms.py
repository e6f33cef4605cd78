"""The three norms' kernels, forward and backward."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernels.norms as norms
from tests.kernels.triton._compare import DEVICE, assert_matches, random, results

triton_norms = pytest.importorskip("kernels.triton.norms")
SETTINGS = settings(max_examples=8, deadline=None, derandomize=True)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@SETTINGS
@given(rows=st.integers(1, 70), columns=st.sampled_from([5, 33, 64, 100]), seed=st.integers(0, 99))
def test_rms_norm(dtype: torch.dtype, rows: int, columns: int, seed: int) -> None:
    inputs = [random(rows, columns, seed=seed, dtype=dtype), random(columns, seed=seed + 1)]
    assert_matches(
        lambda x, w: [norms.rms_norm(x, w, 1e-5, backend="triton")],
        lambda x, w: [norms.rms_norm_reference(x, w, 1e-5)],
        inputs,
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@SETTINGS
@given(shape=st.sampled_from([(3, 17), (2, 3, 2, 32), (40, 64)]), seed=st.integers(0, 99))
def test_gated_rms_norm(activation: norms.Activation, dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> None:
    inputs = [random(*shape, seed=seed, dtype=dtype), random(*shape, seed=seed + 1, dtype=dtype)]
    inputs.append(random(shape[-1], seed=seed + 2))
    assert_matches(
        lambda x, g, w: [norms.gated_rms_norm(x, g, w, 1e-5, activation, backend="triton")],
        lambda x, g, w: [norms.gated_rms_norm_reference(x, g, w, 1e-5, activation)],
        inputs,
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@SETTINGS
@given(shape=st.sampled_from([(1, 3), (2, 5, 3, 64), (33, 24)]), seed=st.integers(0, 99))
def test_l2_norm(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> None:
    assert_matches(
        lambda x: [norms.l2_norm(x, backend="triton")],
        lambda x: [norms.l2_norm_reference(x)],
        [random(*shape, seed=seed, dtype=dtype)],
        dtype,
    )


def test_views_and_an_expanded_gradient() -> None:
    whole, weight = random(6, 3, 40, seed=0), random(16, seed=1)

    def heads(x: Tensor) -> list[Tensor]:  # rows apart, and rows whose elements are apart
        return [x.transpose(0, 1)[..., 8:24], x.transpose(1, 2)[:, 8:24].transpose(1, 2)]

    assert_matches(
        lambda x, w: [norms.rms_norm(view, w, 1e-5, backend="triton") for view in heads(x)],
        lambda x, w: [norms.rms_norm_reference(view, w, 1e-5) for view in heads(x)],
        [whole, weight],
    )
    gradient, expected = (
        torch.autograd.grad(norm(whole, 1e-6).sum(), whole)[0]
        for norm in (lambda x, eps: norms.l2_norm(x, eps, backend="triton"), norms.l2_norm_reference)
    )
    torch.testing.assert_close(gradient, expected)


def test_programs_that_walk_over_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_norms, "_BACKWARD_PROGRAMS", 2)
    inputs = [random(150, 64, seed=3), random(64, seed=4)]  # five blocks of 32 rows for two programs

    def run(x, w):
        return [norms.rms_norm(x, w, 1e-5, backend="triton")]

    assert_matches(run, lambda x, w: [norms.rms_norm_reference(x, w, 1e-5)], inputs)
    for a, b in zip(results(run, inputs), results(run, inputs), strict=True):
        assert torch.equal(a, b)


def test_weight_gradient_keeps_the_weights_dtype_and_empty_inputs_work() -> None:
    weight = random(16, seed=0, dtype=torch.bfloat16)
    x = torch.zeros(0, 16, device=DEVICE, requires_grad=True)
    y, dx, dweight = results(lambda x, w: [norms.rms_norm(x, w, 1e-5, backend="triton")], [x, weight])
    assert y.shape == dx.shape == (0, 16)
    assert (dweight.dtype, dweight.abs().sum().item()) == (torch.bfloat16, 0.0)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the interpreter's rule")
def test_the_interpreter_runs_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(triton_norms, "l2_norm", lambda x, eps: calls.append(eps) or x)
    x = torch.ones(2, 4)
    norms.l2_norm(x)
    assert not calls
    monkeypatch.setenv("SPIKETRAIN_BACKEND", "l2_norm=triton")
    norms.l2_norm(x)
    assert len(calls) == 1
    with pytest.raises(ValueError, match="triton"):
        norms.l2_norm(x.double())
    assert os.environ["TRITON_INTERPRET"] == "1"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="triton"):
        norms.l2_norm(x)
