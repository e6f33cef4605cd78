"""Linear layers through oneDNN against torch's own."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from kernels import matmul as module
from kernels.matmul import batched_matmul, linear, linear_reference, matmul


def _error(a, b):
    a, b = a.detach(), b.detach()
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


@pytest.fixture
def onednn(monkeypatch):
    """The backend wherever torch has the operation, whatever the processor."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    if not module._keeps_digits():
        pytest.skip("oneDNN would round float32 to bfloat16 on this processor")
    monkeypatch.setattr(module, "_onednn_is_faster", lambda: True)


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 33, 64), (1, 1, 1), (4, 16, 1)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_onednn_has_the_values_and_gradients_of_torch(onednn, shape, with_bias):
    batch, inputs, outputs = shape
    torch.manual_seed(0)
    x = torch.randn(batch, 6, inputs, requires_grad=True)
    weight = torch.randn(outputs, inputs, requires_grad=True)
    bias = torch.randn(outputs, requires_grad=True) if with_bias else None
    leaves = [x, weight] + ([bias] if with_bias else [])
    expected = linear_reference(x, weight, bias)
    grad = torch.randn_like(expected)
    actual = linear(x, weight, bias, backend="onednn")
    assert _error(actual, expected) < 1e-6
    for ours, theirs in zip(torch.autograd.grad(actual, leaves, grad), torch.autograd.grad(expected, leaves, grad)):
        assert _error(ours, theirs) < 1e-6


@pytest.mark.parametrize("a_transposed", [True, False])
@pytest.mark.parametrize("b_transposed", [True, False])
def test_matmul_takes_any_strides(onednn, a_transposed, b_transposed):
    a = torch.randn(20, 12).T if a_transposed else torch.randn(12, 20)
    b = torch.randn(9, 20).T if b_transposed else torch.randn(20, 9)
    assert _error(matmul(a, b, backend="onednn"), a.double() @ b.double()) < 1e-6


def test_gradients_are_only_computed_where_asked(onednn):
    x, weight = torch.randn(4, 8), torch.randn(3, 8, requires_grad=True)
    linear(x, weight, backend="onednn").sum().backward()
    assert x.grad is None
    assert weight.grad is not None


def test_a_view_of_a_transposed_input_works(onednn):
    x = torch.randn(5, 4, 8).transpose(0, 1)
    weight = torch.randn(3, 8)
    assert _error(linear(x, weight, backend="onednn"), linear_reference(x, weight)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_stay_with_torch(onednn, dtype):
    x, weight = torch.randn(4, 8).to(dtype), torch.randn(3, 8).to(dtype)
    assert torch.equal(linear(x, weight), linear_reference(x, weight))
    with pytest.raises(ValueError, match="onednn"):
        linear(x, weight, backend="onednn")


def test_small_products_stay_with_torch(onednn):
    x, weight = torch.randn(4, 8), torch.randn(3, 8)
    assert torch.equal(linear(x, weight), linear_reference(x, weight))


@pytest.mark.parametrize("name", ["torch", "reference", "matmul=torch"])
def test_the_environment_can_ask_for_torch(onednn, monkeypatch, name):
    monkeypatch.setenv("SPIKETRAIN_BACKEND", name)
    x, weight = torch.randn(256, 128), torch.randn(128, 128)
    assert torch.equal(linear(x, weight), linear_reference(x, weight))


@pytest.mark.parametrize("matrices", [1, 3])
@pytest.mark.parametrize("strided", [True, False])
def test_batched_products_of_views(onednn, matrices, strided):
    a = torch.randn(matrices, 6, 10)[..., ::2] if strided else torch.randn(matrices, 6, 5)
    b = torch.randn(matrices, 5, 14)[..., ::2] if strided else torch.randn(matrices, 5, 7)
    assert _error(batched_matmul(a, b, backend="onednn"), a.double() @ b.double()) < 1e-6


def _setting():
    return torch.backends.mkldnn.matmul.fp32_precision


def test_the_permission_to_round_is_taken_back(onednn):
    before = _setting()
    with module.fastest_products(torch.zeros(1)):
        assert _setting() == "bf16"
        with module.through_mkl():
            assert _setting() == "ieee"
        assert _setting() == "bf16"
    assert _setting() == before
    with pytest.raises(ValueError, match="inside"), module.through_onednn():
        raise ValueError("inside")
    assert _setting() == before


def test_the_environment_keeps_torch_as_it_is(onednn, monkeypatch):
    before = _setting()
    monkeypatch.setenv("SPIKETRAIN_BACKEND", "matmul=torch")
    with module.fastest_products(torch.zeros(1)):
        assert _setting() == before


def test_a_library_that_rounds_is_found_out(monkeypatch):
    product = torch.Tensor.__matmul__

    def rounded(a, b):
        return product(a.bfloat16(), b.bfloat16()).float() if a.dtype == torch.float32 else product(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not module._keeps_digits()


def test_the_question_can_be_asked_in_a_run_on_shapes_alone():
    with FakeTensorMode(), FlopCounterMode(display=False) as counted:
        answer = module._keeps_digits()
    assert answer == module._keeps_digits() and counted.get_total_flops() == 0
