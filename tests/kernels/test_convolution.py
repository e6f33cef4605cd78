"""The fast causal convolution against its definition, and the properties both must have."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernels.convolution
from kernels.convolution import causal_conv1d
from tests.helpers import documents_of

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


@pytest.fixture(autouse=True)
def _one_thread_small_slabs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kernels.convolution, "SLAB_ELEMENTS", 64)  # 32 rows: short inputs cross several slabs
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_inputs(
    batch: int, time: int, width: int, sequences: int, dim: int = 6, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(time)
    shapes = (batch, time, dim), (dim, width), (sequences, dim, width - 1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def results(x: Tensor, weight: Tensor, state: Tensor | None, **kwargs: object) -> list[Tensor]:
    """y, the final state and all gradients under a loss that uses both."""
    y, final = causal_conv1d(x, weight, initial_state=state, output_final_state=True, **kwargs)
    generator = torch.Generator().manual_seed(7)
    loss = sum((z.double() * torch.randn(z.shape, generator=generator, dtype=torch.float64)).sum() for z in (y, final))
    return [y, final, *torch.autograd.grad(loss, [x, weight] if state is None else [x, weight, state])]


def assert_same(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert (a - b).norm() <= tolerance * b.norm(), f"tensor {index}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@SETTINGS
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=6),
    width=st.integers(1, 5),
    activation=st.sampled_from(["silu", None]),
    with_state=st.booleans(),
)
def test_packed_equals_reference(
    dtype: torch.dtype, lengths: list[int], width: int, activation: str | None, with_state: bool
) -> None:
    x, weight, state = make_inputs(1, sum(lengths), width, len(lengths), dtype=dtype)
    state = state if with_state else None
    fast, reference = (
        results(x, weight, state, activation=activation, documents=documents_of(lengths), backend=backend)
        for backend in ("torch", "reference")
    )
    assert_same(fast, reference, TOLERANCE[dtype])


@SETTINGS
@given(batch=st.integers(1, 3), time=st.integers(1, 80), width=st.integers(1, 5))
def test_batch_equals_reference(batch: int, time: int, width: int) -> None:
    inputs = make_inputs(batch, time, width, batch)
    assert_same(results(*inputs, backend="torch"), results(*inputs, backend="reference"), 1e-12)


def test_reference_is_a_causal_convolution() -> None:
    x, weight, _ = make_inputs(2, 20, 4, 2)
    expected = F.silu(F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), weight[:, None], groups=6)).transpose(1, 2)
    y, final = causal_conv1d(x, weight, output_final_state=True, backend="reference")
    assert_same([y, final], [expected, x[:, -3:].transpose(1, 2)], 1e-12)


@SETTINGS
@given(time=st.integers(2, 70), fraction=st.floats(0, 1), width=st.integers(1, 5))
def test_cutting_a_sequence_and_carrying_the_state_changes_nothing(time: int, fraction: float, width: int) -> None:
    cut = min(max(int(fraction * time), 1), time - 1)
    x, weight, state = make_inputs(2, time, width, 2)
    whole = causal_conv1d(x, weight, initial_state=state, output_final_state=True)
    first, middle = causal_conv1d(x[:, :cut], weight, initial_state=state, output_final_state=True)
    second, final = causal_conv1d(x[:, cut:], weight, initial_state=middle, output_final_state=True)
    parts = [torch.cat((first, second), dim=1), final]
    assert_same(parts, list(whole), 1e-12)
    grads = [torch.autograd.grad(y.square().sum() + s.square().sum(), [x, weight, state]) for y, s in (parts, whole)]
    assert_same(list(grads[0]), list(grads[1]), 1e-12)


def test_decoding_token_by_token_equals_the_whole() -> None:
    x, weight, _ = (z.detach() for z in make_inputs(3, 9, 4, 3))
    whole, final = causal_conv1d(x, weight, output_final_state=True)
    state, outputs = None, []
    for t in range(9):
        y, state = causal_conv1d(x[:, t : t + 1], weight, initial_state=state, output_final_state=True)
        outputs.append(y)
    assert_same([torch.cat(outputs, dim=1), state], [whole, final], 1e-12)


def test_a_document_never_influences_another() -> None:
    x, weight, _ = make_inputs(1, 90, 4, 3)
    outputs = []
    for value in (0.0, torch.inf):
        changed = x.detach().clone()
        changed[:, 30:32] = value
        changed.requires_grad_()
        y, final = causal_conv1d(changed, weight, output_final_state=True, documents=documents_of([30, 2, 58]))
        kept = torch.cat((y[:, :30], y[:, 32:]), dim=1)
        (grad,) = torch.autograd.grad(kept.square().sum(), changed)
        outputs.append((kept, final[0], final[2], grad[:, :30], grad[:, 32:]))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_bfloat16_is_near_float32() -> None:
    wide = make_inputs(1, 100, 4, 2, dtype=torch.float32)
    narrow = [x.detach().bfloat16().requires_grad_() for x in wide]
    wide = [x.detach().float().requires_grad_() for x in narrow]
    documents = documents_of([40, 60])
    actual = results(*narrow, documents=documents)
    assert all(x.dtype == torch.bfloat16 for x in actual)
    assert_same([x.float() for x in actual], results(*wide, documents=documents), 1e-2)


@pytest.mark.parametrize("activation", ["silu", None])
def test_gradcheck(activation: str | None) -> None:
    inputs = make_inputs(1, 12, 4, 3, dim=2)

    def run(x: Tensor, weight: Tensor, state: Tensor) -> tuple[Tensor, Tensor | None]:
        documents = documents_of([5, 2, 5])
        return causal_conv1d(
            x, weight, activation=activation, initial_state=state, output_final_state=True, documents=documents
        )

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(8, 6)}, r"x must be floating-point \[B, T, D\]"),
        ({"weight": torch.zeros(5, 4)}, "weight must be"),
        ({"activation": "relu"}, "activation must be"),
        ({"initial_state": torch.zeros(1, 6, 3)}, "initial_state must be"),
        ({"documents": documents_of([8])}, "batch size must be 1"),
        ({"backend": "fast"}, "choose auto or one of torch, reference"),
    ],
)
def test_bad_inputs_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**({"x": torch.zeros(2, 8, 6), "weight": torch.zeros(6, 4)} | change))
