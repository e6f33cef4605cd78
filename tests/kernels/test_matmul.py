"""Linear layers through oneDNN against torch's own."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kernels import matmul as module
from kernels.matmul import batched_matmul, linear, linear_reference, matmul
from models.config import (
    AttentionConfig,
    GatedDeltaNetConfig,
    GatedLinearAttentionConfig,
    MixerLayoutConfig,
    ModelConfig,
    MoEConfig,
    RetentionConfig,
)
from models.decoder import Decoder, initialize
from models.parameters import cast_parameters


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


# bfloat16 through float32


@pytest.fixture
def without_bfloat16(monkeypatch):
    """A processor without instructions for bfloat16."""
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda: False)


def _bf16(*shape):
    return torch.randn(shape).bfloat16()


@pytest.mark.parametrize("a_transposed", [True, False])
@pytest.mark.parametrize("b_transposed", [True, False])
def test_a_product_through_float32_is_rounded_once(without_bfloat16, a_transposed, b_transposed):
    a = _bf16(70, 33).T if a_transposed else _bf16(33, 70)
    b = _bf16(21, 70).T if b_transposed else _bf16(70, 21)
    expected = (a.float() @ b.float()).bfloat16()
    assert torch.equal(matmul(a, b), expected)
    written = torch.full((33, 2, 21), 7.0, dtype=torch.bfloat16)
    assert matmul(a, b, out=written[:, 0]) is not None
    assert torch.equal(written[:, 0], expected) and (written[:, 1] == 7).all()
    stacked = batched_matmul(torch.stack([a, 2 * a]), torch.stack([b, b]))
    assert torch.equal(stacked, torch.stack([expected, 2 * expected]))


@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_through_float32_are_rounded_once(without_bfloat16, with_bias):
    x, weight, grad = _bf16(3, 40, 96), _bf16(31, 96), _bf16(3, 40, 31)
    leaves = [x, weight] + ([_bf16(31)] if with_bias else [])
    wide = [leaf.float().requires_grad_() for leaf in leaves]
    expected = linear_reference(*wide)
    for leaf in leaves:
        leaf.requires_grad_()
    actual = linear(*leaves)
    assert torch.equal(actual, expected.bfloat16())
    theirs = torch.autograd.grad(expected, wide, grad.float())
    for ours, right in zip(torch.autograd.grad(actual, leaves, grad), theirs):
        assert ours.dtype == torch.bfloat16 and torch.equal(ours, right.bfloat16())


def test_what_is_kept_for_the_backward_is_not_wider(without_bfloat16):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.dtype) or x, lambda x: x):
        linear(_bf16(4, 8), _bf16(3, 8).requires_grad_()).sum()
    assert set(kept) == {torch.bfloat16}


def test_no_product_of_bfloat16_is_left_in_a_step(without_bfloat16, monkeypatch):
    """Forward and backward of a model of every kind of layer: none of torch's products gets bfloat16 operands."""
    from kernels.linear_attention import driver

    monkeypatch.setattr(driver, "multiplies_bfloat16", lambda: False)
    config = ModelConfig(
        num_layers=4,
        hidden_size=32,
        ffn_hidden_size=48,
        mixers=MixerLayoutConfig(pattern="gated_delta_net, full_attention, gated_linear_attention, retention"),
        gated_delta_net=GatedDeltaNetConfig(num_heads=2, head_dim=16),
        attention=AttentionConfig(num_heads=2, num_kv_heads=1),
        gated_linear_attention=GatedLinearAttentionConfig(num_heads=2, gate_low_rank=4),
        retention=RetentionConfig(num_heads=2),
        moe=MoEConfig(num_experts=4, shared_experts=1, expert_hidden_size=16),
    )
    model = Decoder(config, 64)
    initialize(model, 0)
    cast_parameters(model, torch.bfloat16)
    tokens = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(40).expand(2, -1)
    with _Products() as seen:
        loss, _ = model(tokens, positions, None, tokens, torch.ones(2, 40))
        loss.backward()
    assert seen.dtypes == {torch.float32}
    # The same on a processor that has the instructions: there they are used.
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda: True)
    with _Products() as seen:
        model(tokens, positions, None, tokens, torch.ones(2, 40))
    assert torch.bfloat16 in seen.dtypes


class _Products(TorchDispatchMode):
    """Takes down what torch's products are given."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.split(".")[0] in ("mm", "bmm", "addmm", "baddbmm", "baddbmm_", "linear", "_grouped_mm"):
            self.dtypes |= {x.dtype for x in args if isinstance(x, torch.Tensor)}
        return func(*args, **(kwargs or {}))


X86, ARM = {"architecture": "x86_64"}, {"architecture": "aarch64"}


@pytest.mark.parametrize(
    ("features", "onednn_takes_it", "limit", "expected"),
    [
        (X86 | {"avx2": True}, False, None, False),
        (X86 | {"avx2": True, "avx512_f": True}, True, None, False),
        (X86 | {"avx512_f": True, "avx512_bf16": True}, True, None, True),
        (X86 | {"avx512_f": True, "avx512_bf16": True, "amx_bf16": True}, True, "ALL", True),
        (X86 | {"avx512_bf16": True}, False, "AVX2", False),
        (X86 | {"avx512_bf16": True}, True, "AVX512_CORE", False),
        (X86 | {"avx512_bf16": True}, True, "avx512_core_vnni", False),
        (X86 | {"avx512_bf16": True}, True, "AVX512_CORE_BF16", True),
        (ARM | {"bf16": True}, True, None, True),
        (ARM | {"bf16": False}, False, None, False),
    ],
)
def test_which_processors_multiply_bfloat16(monkeypatch, features, onednn_takes_it, limit, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(_is_mkldnn_bf16_supported=lambda: onednn_takes_it))
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    if limit:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert module.multiplies_bfloat16.__wrapped__() is expected
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert module.multiplies_bfloat16.__wrapped__() is False


def test_a_limit_set_for_onednn_is_seen():
    """By a process that begins with it."""
    code = "from kernels.matmul import multiplies_bfloat16; print(multiplies_bfloat16())"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False"]


@pytest.mark.parametrize(("multiplies", "chosen"), [(True, "torch"), (False, "float32")])
def test_the_choice_for_bfloat16(monkeypatch, multiplies, chosen):
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda: multiplies)
    x = _bf16(2, 2)
    assert module._choose(x, "auto", 1) == chosen
    assert [module._choose(x, name, 1) for name in ("torch", "float32", "reference")] == ["torch", "float32", "torch"]
    monkeypatch.setenv("SPIKETRAIN_BACKEND", "matmul=torch")
    assert module._choose(x, "auto", 1) == "torch"
