"""The training device: selection, threads, allocator, peak speed, memory."""

import ctypes
import os
import platform
import resource
import time
from collections.abc import Sequence

import torch

from kernels.matmul import linear
from trainer.errors import ConfigError
from trainer.peers import environment

# Dense tensor-core peak in FLOP/s from the vendors' data sheets, by a substring of the device name.
_GPU_PEAKS = {
    "H200": {torch.bfloat16: 989e12, torch.float32: 494e12},
    "H100": {torch.bfloat16: 989e12, torch.float32: 494e12},
    "A100": {torch.bfloat16: 312e12, torch.float32: 156e12},
    "B200": {torch.bfloat16: 2250e12, torch.float32: 1120e12},
    "MI300X": {torch.bfloat16: 1307e12, torch.float32: 653e12},
}

# Minimum number of timed products per size, after one warm-up.
_LEAST_RUNS = 3


def choose_device(wanted: str) -> torch.device:
    """Choose the device of this rank for run.device: cpu, cuda or auto.

    Raises:
        ConfigError: cuda was requested, but there is no CUDA device.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device=cuda, but torch sees no CUDA device; use run.device=cpu or auto")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    # Modulo, because a launcher may give each rank only its own GPU as device 0.
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def configure_threads(threads: int) -> int:
    """Set this process's CPU threads; 0 takes OMP_NUM_THREADS, or else divides the cores among the local ranks."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    chosen = threads or _openmp_threads(local_ranks) or max(available // local_ranks, 1)
    torch.set_num_threads(chosen)
    return chosen


def _openmp_threads(local_ranks: int) -> int | None:
    """OMP_NUM_THREADS if the user has set it to a number, or to a list that begins with one.

    For several ranks torchrun sets it to 1 if the user has not. In that case it is absent from torchrun's own
    environment.
    """
    value = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if not value.isdecimal() or int(value) == 0:
        return None
    if local_ranks > 1 and value == "1" and "OMP_NUM_THREADS" not in environment(os.getppid()):
        return None
    return int(value)


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for this process's next allocations. Returns whether glibc accepted the settings.

    By default every large tensor is mapped anew, and its pages fault on first write: 4 GB/s, against 29 GB/s into
    reused memory. Only glibc has these settings.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    # malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX. A single arena, because the arenas of other
    # threads (gloo's) return large blocks to the system regardless of the threshold.
    mmap_max, trim_threshold, top_pad, arena_max = -4, -1, -2, -8
    libc = ctypes.CDLL(None)
    settings = ((mmap_max, 0), (trim_threshold, -1), (top_pad, 64 << 20), (arena_max, 1))
    return all(libc.mallopt(name, value) == 1 for name, value in settings)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Matrix-multiplication peak of this rank in FLOP/s: measured on CPU, from the data sheet on known GPUs, else None.

    A bf16 step also multiplies in float32 (scores, states), which is faster on some processors: the larger peak counts.
    """
    if device.type == "cpu":
        return max(measure_matmul(each) for each in {dtype, torch.float32})
    name = torch.cuda.get_device_name(device)
    return next((peaks[dtype] for part, peaks in _GPU_PEAKS.items() if part in name), None)


def measure_matmul(dtype: torch.dtype, sizes: Sequence[int] = (256, 512, 1024), seconds: float = 0.3) -> float:
    """Best FLOP/s of x · Wᵀ for square matrices through the models' own code path, in about `seconds` in total.

    The smallest size fits into a core's cache and the largest occupies all cores; the fastest depends on the processor.
    """
    best = 0.0
    for size in sizes:
        x, weight = (torch.randn(size, size).to(dtype) for _ in range(2))
        linear(x, weight)
        end, runs = time.perf_counter() + seconds / len(sizes), 0
        while runs < _LEAST_RUNS or time.perf_counter() < end:
            start = time.perf_counter()
            linear(x, weight)
            best, runs = max(best, 2 * size**3 / (time.perf_counter() - start)), runs + 1
    return best


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this rank in bytes: the allocator's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # ru_maxrss is in kilobytes on Linux, in bytes on macOS.
    return kilobytes if platform.system() == "Darwin" else kilobytes * 1024
