"""The kernels of gated linear attention, forward and backward: a decay per channel, per head, or none."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.documents import Documents
from tests.helpers import documents_of
from tests.kernels.triton._compare import DEVICE, assert_matches, error, random, results
from tests.kernels.triton._recurrences import LENGTHS, Op, make_inputs, reference

triton_gla = pytest.importorskip("kernels.triton.gla")
SETTINGS = settings(max_examples=4, deadline=None, derandomize=True)
REFERENCE: Op = reference


def both(axes: int, *, state: bool, documents: Documents | None = None, scale: float = 0.3) -> tuple[Op, Op]:
    """The kernels and the reference, as functions of q, k, v, log_decay if there is one, and the state if there is."""

    def arguments(inputs: tuple[Tensor, ...]) -> tuple[list[Any], Tensor | None]:
        given, initial = (inputs[:-1], inputs[-1]) if state else (inputs, None)
        return [*given, *([] if axes else [None])], initial

    def kernels(*inputs: Tensor) -> Sequence[Tensor]:
        given, initial = arguments(inputs)
        return triton_gla.chunk_gla(*given, initial, scale, documents)

    def plain(*inputs: Tensor) -> Sequence[Tensor]:
        given, initial = arguments(inputs)
        return REFERENCE(*given, None, initial, scale, documents)

    return kernels, plain


@pytest.mark.parametrize("axes", [4, 3, 0])
@SETTINGS
@given(
    batch=st.integers(1, 2),
    time=st.integers(1, 70),
    heads=st.sampled_from([(2, 2, 2, 2), (4, 2, 2, 2), (2, 2, 4, 1), (1, 1, 2, 2)]),
    dims=st.sampled_from([(16, 16), (32, 16), (24, 20)]),
    strongest=st.sampled_from([0.1, 2.0, 20.0]),
    state=st.booleans(),
)
def test_gla(
    axes: int,
    batch: int,
    time: int,
    heads: tuple[int, int, int, int],
    dims: tuple[int, int],
    strongest: float,
    state: bool,
) -> None:
    inputs = make_inputs(batch, time, axes=axes, delta=False, heads=heads, dims=dims, strongest=strongest)
    if state:
        inputs.append(random(batch, max(heads if axes else heads[:3]), *dims, seed=9))
    kernels, plain = both(axes, state=state)
    assert_matches(kernels, plain, inputs)


@pytest.mark.parametrize("axes", [4, 3, 0])
def test_packed_documents(axes: int) -> None:
    inputs = [*make_inputs(1, sum(LENGTHS), axes=axes, delta=False), random(len(LENGTHS), 2, 16, 16, seed=9)]
    kernels, plain = both(axes, state=True, documents=documents_of(LENGTHS))
    assert_matches(kernels, plain, inputs)


@pytest.mark.parametrize("axes", [4, 3])
def test_the_strongest_decay_everywhere(axes: int) -> None:
    inputs = make_inputs(1, 70, axes=axes, delta=False)
    inputs[3] = torch.full_like(inputs[3], -20.0).requires_grad_()
    kernels, plain = both(axes, state=False)
    assert_matches(kernels, plain, inputs)
    inputs[3] = torch.full_like(inputs[3], -torch.inf).requires_grad_()
    for result in results(kernels, inputs):
        assert result.isfinite().all()


@pytest.mark.parametrize("axes", [4, 3])
def test_weak_decays_keep_their_digits_behind_strong_ones(axes: int) -> None:
    inputs = make_inputs(1, 64, axes=axes, delta=False)
    weak = 0.01 * inputs[3].detach()
    weak[:, :48] = -20.0
    inputs[3] = weak.requires_grad_()
    kernels, plain = both(axes, state=False)
    expected = plain(*(x.detach().double() for x in inputs))
    assert error(kernels(*inputs)[0][:, 48:], expected[0][:, 48:]) < 2e-6


@pytest.mark.parametrize("axes", [4, 3, 0])
def test_bfloat16(axes: int) -> None:
    inputs = make_inputs(1, 40, axes=axes, delta=False, dtype=torch.bfloat16)
    kernels, plain = both(axes, state=False)
    o, final = kernels(*inputs)
    assert (o.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    assert_matches(kernels, plain, inputs, torch.bfloat16)


def test_documents_do_not_touch() -> None:
    kernels, _ = both(4, state=False, documents=documents_of([20, 20, 20]))
    inputs = [x.detach() for x in make_inputs(1, 60, axes=4, delta=False)]
    o, final = kernels(*inputs)
    inputs[2][:, 20:40] = torch.inf
    changed, changed_final = kernels(*inputs)
    kept = [*range(20), *range(40, 60)]
    assert torch.equal(changed[:, kept], o[:, kept])
    assert torch.equal(changed_final[[0, 2]], final[[0, 2]])


def test_a_key_dimension_too_large_is_refused() -> None:
    q = torch.zeros(1, 1, 1, 512, device=DEVICE)
    with pytest.raises(ValueError, match="up to 256, got 512"):
        triton_gla.chunk_gla(q, q, q, None, None, 1.0, None)
