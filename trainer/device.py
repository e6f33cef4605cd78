"""The device a run trains on: choice, threads, allocator, peak speed, memory."""

import ctypes
import os
import platform
import resource
import time

import torch

from kernels.matmul import matmul
from trainer.cli import ConfigError

# Dense peak of the tensor cores, FLOP/s (vendors' data sheets), by a part of the device's name.
_GPU_PEAKS = {
    "H200": {torch.bfloat16: 989e12, torch.float32: 494e12},
    "H100": {torch.bfloat16: 989e12, torch.float32: 494e12},
    "A100": {torch.bfloat16: 312e12, torch.float32: 156e12},
    "B200": {torch.bfloat16: 2250e12, torch.float32: 1120e12},
    "MI300X": {torch.bfloat16: 1307e12, torch.float32: 653e12},
}


def choose_device(wanted: str) -> torch.device:
    """The device of this rank for run.device: cpu, cuda or auto.

    Raises:
        ConfigError: CUDA was asked for and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device=cuda, but torch sees no CUDA device; use run.device=cpu or auto")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def configure_threads(threads: int) -> int:
    """Give this process its CPU threads; 0 shares the machine's cores evenly among its ranks."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    chosen = threads or max(available // local_ranks, 1)
    torch.set_num_threads(chosen)
    return chosen


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for the next allocation of this process.

    By default every large tensor is mapped afresh and its pages fault in as they are first written: 4 GB/s against
    29 GB/s into memory that is used again. Returns whether the C library took the settings (glibc only).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    # malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX. One arena, since those of other threads (gloo's)
    # give large blocks back whatever the threshold.
    mmap_max, trim_threshold, top_pad, arena_max = -4, -1, -2, -8
    libc = ctypes.CDLL(None)
    settings = ((mmap_max, 0), (trim_threshold, -1), (top_pad, 64 << 20), (arena_max, 1))
    return all(libc.mallopt(name, value) == 1 for name, value in settings)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Matrix-multiplication peak of this rank, FLOP/s: measured on CPU, the data sheet's of a known GPU; else None."""
    if device.type == "cpu":
        return measure_matmul(dtype)
    name = torch.cuda.get_device_name(device)
    return next((peaks[dtype] for part, peaks in _GPU_PEAKS.items() if part in name), None)


def measure_matmul(dtype: torch.dtype, size: int = 1024, seconds: float = 0.3) -> float:
    """Best FLOP/s of a square matrix multiplication, through the library that the models use, over about `seconds`."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        matmul(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this rank has held: the allocator's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in kilobytes, macOS in bytes.
    return kilobytes if platform.system() == "Darwin" else kilobytes * 1024
