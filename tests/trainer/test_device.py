"""Device, threads, allocator and peaks."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from tests.processes import finish, start
from trainer import device as module
from trainer.device import (
    choose_device,
    configure_threads,
    keep_freed_memory,
    measure_matmul,
    peak_flops,
    peak_memory_bytes,
)
from trainer.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("wanted", ["cpu", "auto"])
def test_the_cpu_where_there_is_no_gpu(no_gpu, wanted):
    assert choose_device(wanted) == CPU


def test_a_gpu_that_is_not_there(no_gpu):
    with pytest.raises(
        ConfigError, match=r"^run\.device=cuda, but torch sees no CUDA device; use run\.device=cpu or auto$"
    ):
        choose_device("cuda")


@pytest.mark.parametrize(("wanted", "rank", "expected"), [("auto", "1", 1), ("cuda", "5", 1), ("cuda", "0", 0)])
def test_each_local_rank_has_a_gpu(monkeypatch, wanted, rank, expected):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert choose_device(wanted) == torch.device("cuda", expected) == chosen[0]
    assert choose_device("cpu") == CPU


@pytest.mark.gpu
def test_a_gpu_that_is_there():
    assert choose_device("auto").type == "cuda"
    assert peak_memory_bytes(choose_device("auto")) >= 0


@pytest.fixture
def threads(monkeypatch):
    """Threads that were asked of torch, which keeps its own number."""
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    for name in ("LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return asked


@pytest.mark.parametrize(("cores", "ranks", "expected"), [(8, 1, 8), (8, 2, 4), (8, 3, 2), (2, 4, 1)])
def test_cores_are_shared_among_the_local_ranks(threads, monkeypatch, cores, ranks, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(cores), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert configure_threads(0) == expected
    assert configure_threads(3) == 3
    assert threads == [expected, 3]


def test_one_process_has_every_core(threads, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(6), raising=False)
    assert configure_threads(0) == 6


@pytest.mark.parametrize(
    ("value", "ranks", "started_with", "expected"),
    [
        ("1", 1, {}, 1),
        ("3", 1, {}, 3),
        ("3,1", 1, {}, 3),
        ("3", 2, {}, 3),
        ("", 1, {}, 8),
        ("many", 1, {}, 8),
        ("0", 1, {}, 8),
        # torchrun's own, and the user's.
        ("1", 2, {"HOME": "/"}, 4),
        ("1", 2, {"HOME": "/", "OMP_NUM_THREADS": "1"}, 1),
    ],
)
def test_the_users_number_of_openmp_threads_is_taken(threads, monkeypatch, value, ranks, started_with, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8), raising=False)
    monkeypatch.setattr(module, "environment", lambda pid: {os.getppid(): started_with}[pid])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert configure_threads(0) == expected
    assert configure_threads(5) == 5
    assert threads == [expected, 5]


# The user's own number is also told above, without torchrun.
@pytest.mark.parametrize("by_user", [pytest.param(True, marks=pytest.mark.slow), False])
def test_torchruns_number_of_threads_is_told_from_the_users(tmp_path, by_user):
    (tmp_path / "rank.py").write_text(
        "import os, trainer.device as d\n"
        "d.os.sched_getaffinity = lambda process: range(6)\n"
        "print('threads', os.environ['OMP_NUM_THREADS'], d.configure_threads(0), flush=True)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)} | ({"OMP_NUM_THREADS": "1"} if by_user else {})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "rank.py"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:2] == [f"threads 1 {1 if by_user else 3}"] * 2, result.stdout


def test_threads_are_really_set(tmp_path):
    code = "import torch; from trainer.device import configure_threads as c; print(c(2), torch.get_num_threads())"
    (tmp_path / "script.py").write_text(code)
    assert finish(start(tmp_path / "script.py")) == (0, "2 2\n")


MEASURE = """
import resource, torch
from trainer.device import keep_freed_memory
def faults():
    for _ in range(16):  # until the allocator's small caches are full
        torch.ones(16 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
default = faults()
assert keep_freed_memory()
print(default, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_memory_is_used_again():
    """Page faults of allocating 64 MiB eight times over, with the setting and without: 4 kB (or 2 MB) a fault."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_", "LD_"))}
    result = subprocess.run(
        [sys.executable, "-c", MEASURE], env=environment, capture_output=True, text=True, check=True
    )
    default, kept = map(int, result.stdout.split())
    assert kept < default / 4, (default, kept)


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    monkeypatch.setattr(module.ctypes, "CDLL", lambda name: pytest.fail("must not be opened"))
    assert keep_freed_memory() is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_measured_peak_is_positive(dtype):
    assert 0 < measure_matmul(dtype, sizes=(32, 64), seconds=0.02) < float("inf")


def test_the_peak_of_a_cpu_is_measured(monkeypatch):
    speeds = {torch.float32: 1.0, torch.bfloat16: 2.0}
    monkeypatch.setattr(module, "measure_matmul", speeds.__getitem__)
    assert (peak_flops(CPU, torch.float32), peak_flops(CPU, torch.bfloat16)) == (1.0, 2.0)
    # A bf16 step multiplies in float32, too.
    speeds[torch.bfloat16] = 0.5
    assert (peak_flops(CPU, torch.float32), peak_flops(CPU, torch.bfloat16)) == (1.0, 1.0)


def test_the_peak_is_the_best_of_all_sizes(monkeypatch):
    """By a clock on which the product of each size takes so long."""
    now, seconds, counted = [0.0], {8: 4.0, 16: 1.0, 32: 100.0}, []

    def product(x, weight):
        assert x.dtype == weight.dtype == torch.bfloat16
        counted.append(len(x))
        now[0] += seconds[len(x)]

    monkeypatch.setattr(module, "linear", product)
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    assert measure_matmul(torch.bfloat16, sizes=(8, 16, 32), seconds=0.3) == 2 * 16**3
    # One to warm up, and three more however long they take.
    assert [counted.count(size) for size in seconds] == [4, 4, 4]


@pytest.mark.parametrize(
    ("name", "expected"), [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-40GB", 312e12), ("Some GPU", None)]
)
def test_the_peak_of_a_gpu_is_looked_up(monkeypatch, name, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0), torch.bfloat16) == expected


def test_peak_memory_is_in_bytes():
    held = torch.ones(64 << 20)  # 256 MiB
    assert held.numel() * 4 < peak_memory_bytes(CPU) < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
