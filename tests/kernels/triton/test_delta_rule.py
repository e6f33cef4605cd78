"""The kernels of the delta rule, forward and backward: without decay, with one per head, with one per channel."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.documents import Documents
from tests.helpers import documents_of
from tests.kernels.triton._compare import assert_matches, random, results
from tests.kernels.triton._recurrences import LENGTHS, Op, make_inputs, reference

triton_delta_rule = pytest.importorskip("kernels.triton.delta_rule")
SETTINGS = settings(max_examples=4, deadline=None, derandomize=True)
REFERENCE: Op = reference


def both(axes: int, *, state: bool, documents: Documents | None = None, scale: float = 0.3) -> tuple[Op, Op]:
    """The kernels and the reference: functions of q, k, v, log_decay if there is one, beta, and the state if any."""

    def arguments(inputs: tuple[Tensor, ...]) -> list[Any]:
        given = list(inputs) if state else [*inputs, None]
        return given if axes else [*given[:3], None, *given[3:]]

    return (
        lambda *inputs: triton_delta_rule.chunk_delta_rule(*arguments(inputs), scale, documents),
        lambda *inputs: REFERENCE(*arguments(inputs), scale, documents),
    )


@pytest.mark.parametrize("axes", [0, 3, 4])
@SETTINGS
@given(
    batch=st.integers(1, 2),
    time=st.integers(1, 70),
    heads=st.sampled_from([(2, 2, 2, 2), (4, 2, 2, 2), (2, 2, 4, 1), (1, 1, 2, 2)]),
    dims=st.sampled_from([(16, 16), (32, 16), (24, 20)]),
    strongest=st.sampled_from([0.1, 2.0, 20.0]),
    state=st.booleans(),
)
def test_delta_rule(
    axes: int,
    batch: int,
    time: int,
    heads: tuple[int, int, int, int],
    dims: tuple[int, int],
    strongest: float,
    state: bool,
) -> None:
    inputs = make_inputs(batch, time, axes=axes, delta=True, heads=heads, dims=dims, strongest=strongest)
    if state:
        inputs.append(random(batch, max(heads), *dims, seed=9))
    kernels, plain = both(axes, state=state)
    assert_matches(kernels, plain, inputs)


def test_a_state_in_pieces_the_last_one_partial() -> None:
    inputs = [*make_inputs(1, 40, axes=4, delta=True, dims=(80, 16)), random(1, 2, 80, 16, seed=9)]
    kernels, plain = both(4, state=True)
    assert_matches(kernels, plain, inputs)


@pytest.mark.parametrize("axes", [0, 3, 4])
def test_packed_documents(axes: int) -> None:
    inputs = [*make_inputs(1, sum(LENGTHS), axes=axes, delta=True), random(len(LENGTHS), 2, 16, 16, seed=9)]
    kernels, plain = both(axes, state=True, documents=documents_of(LENGTHS))
    assert_matches(kernels, plain, inputs)


@pytest.mark.parametrize("axes", [3, 4])
def test_the_strongest_decay_everywhere(axes: int) -> None:
    inputs = make_inputs(1, 70, axes=axes, delta=True)
    inputs[3] = torch.full_like(inputs[3], -20.0).requires_grad_()
    kernels, plain = both(axes, state=False)
    assert_matches(kernels, plain, inputs)
    inputs[3] = torch.full_like(inputs[3], -torch.inf).requires_grad_()
    for result in results(kernels, inputs):
        assert result.isfinite().all()


def test_one_repeated_key_keeps_its_precision() -> None:
    inputs = make_inputs(1, 128, axes=0, delta=True)
    inputs[1] = inputs[1][:, :1].detach().expand_as(inputs[1]).contiguous().requires_grad_()
    inputs[3] = torch.ones_like(inputs[3]).requires_grad_()
    kernels, plain = both(0, state=False)
    assert_matches(kernels, plain, inputs)


@pytest.mark.parametrize("axes", [0, 3, 4])
def test_bfloat16(axes: int) -> None:
    inputs = make_inputs(1, 40, axes=axes, delta=True, dtype=torch.bfloat16)
    kernels, plain = both(axes, state=False)
    o, final = kernels(*inputs)
    assert (o.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    assert_matches(kernels, plain, inputs, torch.bfloat16)
