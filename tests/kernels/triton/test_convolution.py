"""The causal convolution's kernels, forward and backward, with states and packed documents."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.convolution import causal_conv1d
from tests.helpers import documents_of
from tests.kernels.triton._compare import assert_matches, random, results

triton_convolution = pytest.importorskip("kernels.triton.convolution")
SETTINGS = settings(max_examples=10, deadline=None, derandomize=True)


def runs(backend: str, **kwargs: object) -> Callable[..., list[Tensor]]:
    """The convolution as a function of tensors: y and, if asked for, the final state."""

    def run(x: Tensor, weight: Tensor, state: Tensor | None = None) -> list[Tensor]:
        y, final = causal_conv1d(x, weight, initial_state=state, backend=backend, **kwargs)
        return [y] if final is None else [y, final]

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@SETTINGS
@given(
    lengths=st.lists(st.sampled_from([1, 1, 2, 3, 4, 7, 16, 33]), min_size=1, max_size=5),
    dim=st.sampled_from([1, 6, 80]),
    width=st.integers(1, 5),
    activation=st.sampled_from(["silu", None]),
    with_state=st.booleans(),
    wants_final=st.booleans(),
)
def test_packed_documents(
    dtype: torch.dtype,
    lengths: list[int],
    dim: int,
    width: int,
    activation: str | None,
    with_state: bool,
    wants_final: bool,
) -> None:
    inputs = [random(1, sum(lengths), dim, seed=1, dtype=dtype), random(dim, width, seed=2)]
    if with_state and width > 1:
        inputs.append(random(len(lengths), dim, width - 1, seed=3, dtype=dtype))
    kwargs = {"activation": activation, "output_final_state": wants_final and width > 1}
    kwargs["documents"] = documents_of(lengths)
    assert_matches(runs("triton", **kwargs), runs("reference", **kwargs), inputs, dtype)


@SETTINGS
@given(batch=st.integers(1, 3), time=st.integers(1, 40), width=st.integers(2, 5), with_state=st.booleans())
def test_batches(batch: int, time: int, width: int, with_state: bool) -> None:
    inputs = [random(batch, time, 10, seed=1), random(10, width, seed=2)]
    if with_state:
        inputs.append(random(batch, 10, width - 1, seed=3))
    assert_matches(*(runs(name, output_final_state=True) for name in ("triton", "reference")), inputs)


def test_cutting_a_sequence_and_carrying_the_state_changes_nothing() -> None:
    inputs = [random(2, 9, 4, seed=1), random(4, 4, seed=2), random(2, 4, 3, seed=3)]

    def in_pieces(x: Tensor, weight: Tensor, state: Tensor) -> list[Tensor]:
        outputs = []
        for piece in x.split([2, 1, 6], dim=1):  # the first two are shorter than the state
            y, state = runs("triton", output_final_state=True)(piece, weight, state)
            outputs.append(y)
        return [torch.cat(outputs, dim=1), state]

    assert_matches(in_pieces, runs("reference", output_final_state=True), inputs)


def test_only_the_final_state_has_a_gradient() -> None:
    inputs = [random(1, 6, 4, seed=1), random(4, 4, seed=2), random(2, 4, 3, seed=3)]
    bounds = documents_of([1, 5])
    finals = (runs(name, output_final_state=True, documents=bounds) for name in ("triton", "reference"))
    triton_run, reference_run = (lambda *x, run=run: [run(*x)[1] + 0 * x[1].sum()] for run in finals)
    for actual, expected in zip(results(triton_run, inputs), results(reference_run, inputs), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, of the infinities
def test_a_document_never_influences_another() -> None:
    weight = random(4, 4, seed=2)
    outputs = []
    for value in (0.0, torch.inf):
        x = random(1, 20, 4, seed=1).detach()
        x[:, 8:10] = value
        x.requires_grad_()
        y, final = causal_conv1d(
            x, weight, output_final_state=True, documents=documents_of([8, 2, 10]), backend="triton"
        )
        kept = torch.cat((y[:, :8], y[:, 10:]), dim=1)
        (gradient,) = torch.autograd.grad(kept.square().sum(), x)
        outputs.append([kept, final[0], final[2], gradient[:, :8], gradient[:, 10:]])
    for a, b in zip(*outputs, strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()


def test_views_and_repeatable_gradients() -> None:
    inputs = [random(6, 50, 2, seed=1), random(4, 6, seed=2)]

    def run(x, w):
        return runs("triton")(x.permute(2, 1, 0), w.t(), None)

    assert_matches(run, lambda x, w: runs("reference")(x.permute(2, 1, 0), w.t(), None), inputs)
    for a, b in zip(results(run, inputs), results(run, inputs), strict=True):
        assert torch.equal(a, b)
