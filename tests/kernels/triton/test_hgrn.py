"""The kernels of HGRN's recurrence, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.documents import Documents
from tests.helpers import documents_of
from tests.kernels.triton._compare import assert_matches, random, results
from tests.kernels.triton._recurrences import LENGTHS, Op, decays, sequences

triton_hgrn = pytest.importorskip("kernels.triton.hgrn")
SETTINGS = settings(max_examples=5, deadline=None, derandomize=True)


def reference(x: Tensor, log_decay: Tensor, initial: Tensor | None, documents: Documents | None) -> list[Tensor]:
    outputs, finals = [], []
    for n, (row, start, end) in enumerate(sequences(x.shape[0], x.shape[1], documents)):
        state = torch.zeros_like(x[0, 0]) if initial is None else initial[n]
        for t in range(start, end):
            state = log_decay[row, t].exp() * state + x[row, t]
            outputs.append(state)
        finals.append(state)
    return [torch.stack(outputs).view(x.shape), torch.stack(finals)]


REFERENCE: Op = reference


@SETTINGS
@given(
    batch=st.integers(1, 2),
    time=st.integers(1, 140),
    dim=st.sampled_from([1, 20, 130]),
    strongest=st.sampled_from([0.1, 2.0, 20.0]),
    state=st.booleans(),
)
def test_hgrn(batch: int, time: int, dim: int, strongest: float, state: bool) -> None:
    inputs = [random(batch, time, dim, seed=0), decays(batch, time, dim, strongest=strongest, seed=1)]
    if state:
        inputs.append(random(batch, dim, seed=2))
    none: list[None] = [] if state else [None]
    assert_matches(
        lambda *inputs: triton_hgrn.scan_hgrn(*inputs, *none, None),
        lambda *inputs: REFERENCE(*inputs, *none, None),
        inputs,
    )


@pytest.mark.parametrize("lengths", [LENGTHS, [130, 3]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_documents(lengths: list[int], dtype: torch.dtype) -> None:
    time, documents = sum(lengths), documents_of(lengths)
    inputs = [random(1, time, 20, seed=0, dtype=dtype), decays(1, time, 20, strongest=1.0, seed=1)]
    inputs.append(random(len(lengths), 20, seed=2))
    h, final = triton_hgrn.scan_hgrn(*inputs, documents)
    assert (h.dtype, final.dtype) == (dtype, torch.float32)
    assert_matches(
        lambda *inputs: triton_hgrn.scan_hgrn(*inputs, documents),
        lambda *inputs: REFERENCE(*inputs, documents),
        inputs,
        dtype,
    )


def test_a_decay_to_nothing_is_finite() -> None:
    inputs = [random(1, 70, 4, seed=0), torch.full((1, 70, 4), -torch.inf, device=random(1, seed=0).device)]
    h, final, _ = results(lambda *inputs: triton_hgrn.scan_hgrn(*inputs, None, None), inputs)
    assert torch.equal(h, inputs[0])
    assert torch.equal(final, inputs[0][:, -1])
