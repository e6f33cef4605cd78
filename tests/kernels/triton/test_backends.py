"""The public functions with backend="triton", in the interpreter: every recurrence against its reference in float64."""

import pytest
import torch

from tests.helpers import documents_of
from tests.kernels.test_linear_attention import OPS, assert_same, make_inputs, make_state, results

chunked = pytest.importorskip("kernels.triton.chunked")
chunk_kernels = pytest.importorskip("kernels.triton.chunk_kernels")

# The interpreter runs a program after another in Python: small shapes.
HEADS, DIMS = (4, 2, 2), (16, 24)


@pytest.mark.parametrize("lengths", [None, [5, 1, 40, 17]])
@pytest.mark.parametrize("name", OPS)
def test_triton_equals_the_reference(name: str, lengths: list[int] | None) -> None:
    batch, time, sequences = (1, 70, 1) if lengths is None else (1, sum(lengths), len(lengths))
    documents = None if lengths is None else documents_of(lengths)
    inputs = make_inputs(name, batch, time, heads=HEADS, dims=DIMS, dtype=torch.float32)
    state = make_state(name, sequences, max(HEADS), DIMS, dtype=torch.float32)
    actual = results(OPS[name], inputs, state, documents=documents, backend="triton")
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = results(OPS[name], wide, state.detach().double().requires_grad_(), documents=documents)
    assert_same([x.double() for x in actual], expected, 1e-4)


def test_the_delta_rule_runs_the_kernels_without_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    plans, make_plan = [], chunked.make_plan
    monkeypatch.setattr(chunked, "make_plan", lambda *args: plans.append(make_plan(*args)) or plans[-1])
    OPS["delta_rule"](*make_inputs("delta_rule", 1, 20, dims=DIMS, dtype=torch.float32), backend="triton")
    assert [plan.decay for plan in plans] == [chunk_kernels.NO_DECAY]


@pytest.mark.parametrize("name", OPS)
def test_triton_stays_finite_and_exact_at_strong_decays(name: str) -> None:
    inputs = make_inputs(name, 1, 70, strongest=20.0, dims=DIMS, dtype=torch.float32)
    actual = results(OPS[name], inputs, None, backend="triton")
    expected = results(OPS[name], [x.detach().double().requires_grad_() for x in inputs], None)
    assert_same([x.double() for x in actual], expected, 1e-4)


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
@pytest.mark.parametrize("name", OPS)
def test_nan_is_never_hidden_and_stays_in_its_document(name: str, backend: str) -> None:
    lengths, token = [5, 21, 3], 12
    inputs = make_inputs(name, 1, sum(lengths), heads=(2, 2, 2), dims=DIMS, dtype=torch.float32)
    for poisoned, x in enumerate(inputs):
        # Triton's are slow: of them the decay's alone, or beta's, which are the last ones.
        if x.dim() == 1 or (
            backend == "triton" and poisoned < len(inputs) - 1 - (name in ("gated_delta_rule", "kimi_delta_rule"))
        ):
            continue
        leaves = [leaf.detach().clone().requires_grad_() for leaf in inputs]
        with torch.no_grad():
            leaves[poisoned].view(1, sum(lengths), -1)[0, token, 0] = torch.nan
        o, state, *gradients = results(OPS[name], leaves, None, documents=documents_of(lengths), backend=backend)
        assert o[0, token].isnan().any(), poisoned
        assert state[[0, 2]].isfinite().all() and o[0, :5].isfinite().all() and o[0, 26:].isfinite().all(), poisoned
        per_token = [gradient[0] for gradient, leaf in zip(gradients, leaves) if leaf.dim() > 1]
        assert any(gradient[5:26].isnan().any() for gradient in per_token), poisoned
        assert all(gradient[:5].isfinite().all() and gradient[26:].isfinite().all() for gradient in per_token), poisoned
