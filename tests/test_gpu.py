"""What only a GPU can show. Without one, each of these is listed by name in the summary."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.attention import attention, attention_reference
from kernels.documents import Documents
from tests.trainer.conftest import in_process_config, trajectory
from trainer import pretrain

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[1]


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("packed", [False, True])
def test_flash_attention_equals_the_reference(window, packed):
    pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 512, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))
    documents = Documents((0, 77, 300, 512)) if packed else None
    ours = attention(q, k, v, window=window, documents=documents, backend="flash")
    exact = attention_reference(q.double(), k.double(), v.double(), window=window, documents=documents)
    assert relative(ours, exact) < 8e-3


def test_every_kernel_holds(tmp_path):
    file = tmp_path / "gpu-check.json"
    command = [sys.executable, "-m", "tests.gpu_check", "--seconds", "1500", "--json", str(file)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-1000:]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_on_the_gpu_equals_the_one_on_the_cpu(tiny_data, tmp_path, precision):
    from dataclasses import replace

    for device in ("cpu", "cuda"):
        config = in_process_config(tiny_data, tmp_path / device, precision=precision)
        assert pretrain.run(replace(config, run=replace(config.run, device=device)), "") == 0
    (on_cpu, _), (on_gpu, _) = trajectory(tmp_path / "cpu"), trajectory(tmp_path / "cuda")
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    assert [loss for _, loss, _ in on_gpu] == pytest.approx([loss for _, loss, _ in on_cpu], rel=tolerance)


def test_a_resumed_run_on_the_gpu_goes_on(tiny_data, tmp_path):
    from dataclasses import replace

    config = in_process_config(tiny_data, tmp_path / "run")
    short = replace(config, run=replace(config.run, device="cuda"), train=replace(config.train, steps=3))
    assert pretrain.run(short, "") == 0
    assert pretrain.run(replace(short, train=config.train), "") == 0
    assert [step for step, _, _ in trajectory(tmp_path / "run")[0]] == [1, 2, 3, 4, 5, 6]
