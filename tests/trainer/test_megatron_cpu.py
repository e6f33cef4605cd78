"""Every adaptation of mcore to the CPU, and that torch itself is left alone."""

import subprocess
import sys

import megatron.core
import numpy as np
import pytest
import torch

from tests.helpers import WAIT
from tests.processes import ROOT
from trainer.engines import megatron_cpu


@pytest.fixture(autouse=True)
def adapted():
    import trainer.engines.megatron  # noqa: F401  the modules that are adapted

    megatron_cpu.adapt()


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(megatron.core, "__version__", "0.17.0")
    with pytest.raises(RuntimeError, match=r"0.17.0 on CPU is not supported.*pip install megatron-core==0.16.1"):
        megatron_cpu.adapt()


def test_mcore_allocates_on_the_cpu():
    from megatron.core.pipeline_parallel import schedules

    view = schedules.torch
    assert view is not torch
    assert view.zeros([], dtype=torch.int, device="cuda").device.type == "cpu"
    assert view.tensor([1.0], device="cuda:0").device.type == "cpu"
    assert torch.zeros(1, device=view.cuda.current_device()).device.type == "cpu"
    assert not view.cuda.is_available() or torch.cuda.is_available()
    view.cuda.synchronize()
    view.cuda.empty_cache()
    with view.cuda.stream(view.cuda.Stream()):
        view.cuda.current_stream().wait_stream(view.cuda.default_stream())


def test_the_view_is_torch_in_everything_else():
    from megatron.core.pipeline_parallel import schedules

    assert schedules.torch.Tensor is torch.Tensor
    assert schedules.torch.nn is torch.nn
    assert schedules.torch.bfloat16 is torch.bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_torch_itself_still_has_no_cuda():
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1).cuda()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_a_start_imports_neither_dynamo_nor_inductor():
    """Mcore's fused functions are what they were written as; torch.compile is itself again after the import."""
    code = (
        "import sys, torch\n"
        "compile = torch.compile\n"
        "from trainer.engines import megatron, megatron_cpu\n"
        "megatron_cpu.adapt()\n"
        "from megatron.core.fusions.fused_bias_geglu import bias_geglu\n"
        "print(torch.compile is compile, bias_geglu(torch.ones(1, 2), torch.ones(2)).item())\n"
        "print([name for name in ('torch._dynamo', 'torch._inductor') if name in sys.modules])\n"
    )
    # In a process of its own, since tests that ran before in this one may have imported anything.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=WAIT
    )
    assert done.returncode == 0, done.stderr
    itself, modules = done.stdout.splitlines()
    assert itself.startswith("True 3.9") and modules == "[]"


def test_nothing_is_compiled_in_any_form_of_the_decorator():
    def double(x):
        return 2 * x

    original = torch.compile
    with megatron_cpu.nothing_compiled():
        assert torch.cuda.is_available() or torch.compile(double) is torch.compile(mode="x")(double) is double
    assert torch.compile is original
    with pytest.raises(ValueError, match="inside"), megatron_cpu.nothing_compiled():
        raise ValueError("inside")
    assert torch.compile is original


def test_cpu_tensors_pass_for_cuda_only_inside():
    tensor = torch.zeros(2, dtype=torch.bfloat16)
    with megatron_cpu.cpu_tensors_pass_for_cuda():
        assert tensor.type() == "torch.cuda.BFloat16Tensor"
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        assert tensor.type(torch.float32).dtype == torch.float32
    assert tensor.type() == "torch.BFloat16Tensor"
    with pytest.raises(ValueError, match="inside"), megatron_cpu.cpu_tensors_pass_for_cuda():
        raise ValueError("inside")
    assert tensor.type() == "torch.BFloat16Tensor"


def test_counts_become_plain_numbers():
    """Where split sizes are tensors, collectives would refuse them."""
    from megatron.core.transformer.moe import token_dispatcher

    move = token_dispatcher.maybe_move_tensor_to_cpu
    counts = torch.tensor([2, 3])
    assert isinstance(move(counts, as_numpy=True, record_stream=True), np.ndarray)
    assert move(counts) is counts and move(None, as_numpy=True) is None
    event = token_dispatcher.torch.cuda.Stream().record_event()
    event.synchronize()


def test_collectives_are_left_out_only_where_a_rank_is_alone(monkeypatch):
    calls = []
    collective = megatron_cpu._SkippedWhereAlone(lambda *args, **kwargs: calls.append((args, kwargs)) or "handle")
    buffer, part = torch.zeros(3), torch.arange(3.0)
    for ranks, returned, count in ((1, None, 0), (2, "handle", 1)):
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda group, ranks=ranks: ranks)
        assert collective(buffer, part, op="sum", group="dp") == returned
        assert len(calls) == count
    assert torch.equal(buffer, part), "one rank's part is the whole"
    assert calls[0][1] == {"op": "sum", "group": "dp"}


def test_mcore_reduces_and_gathers_through_it():
    from megatron.core.distributed import param_and_grad_buffer as buffers

    megatron_cpu.adapt()
    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        adapted = getattr(buffers, name)
        assert isinstance(adapted, megatron_cpu._SkippedWhereAlone)
        assert not isinstance(adapted.collective, megatron_cpu._SkippedWhereAlone), "adapted twice"
