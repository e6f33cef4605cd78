"""Shared by the Triton modules: the target's name and limits, dot products, and specifications to compile ahead."""

# Triton interprets a kernel's annotations, and only constexpr annotations are meaningful to it.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def, import-untyped"

import logging
import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton import implementations, interpreting, usable

__all__ = [
    "SHARED_BYTES",
    "KernelSpec",
    "device_guard",
    "dot",
    "dot_precision",
    "dtype_bytes",
    "implementations",
    "interpreting",
    "known_faults",
    "log_known_faults",
    "next_power",
    "target_name",
    "unit_stride",
    "usable",
    "warp_size",
]

# Shared memory available to one program, bytes (NVIDIA: maximum shared memory per block; AMD: LDS per workgroup).
SHARED_BYTES = {
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_103": 232448,
    "sm_120": 101376,
    "gfx942": 65536,
    "gfx950": 163840,
}

_INTERPRETING = tl.constexpr(interpreting())


class _Fault(NamedTuple):
    """A known compiler fault in kernels like ours, from Triton release `first` on, fixed in release `mended`."""

    targets: tuple[str, ...]
    first: tuple[int, ...]
    mended: tuple[int, ...]
    text: str


# The full reports are in docs/gpu.md. None of the faults was seen in these kernels, which have not run on a GPU yet.
_FAULTS = (
    _Fault(
        ("sm_90",),
        (3, 4),
        (3, 7, 1),
        "Triton from 3.4 to 3.7.0 multiplies a transposed register tile wrongly on Hopper "
        "(flash-linear-attention #640), as the backward of per-head decays does; should gradients be wrong, set "
        "SPIKETRAIN_TRITON_PLAN=chunk=32",
    ),
    _Fault(
        ("sm_90",),
        (3, 4),
        (3, 7, 2),
        "Triton from 3.4 to 3.7.1 may give wrong gradients of keys, or read beyond them, on Hopper where 4 warps "
        "multiply chunks of 64 (flash-linear-attention #984, triton #11366); should either show, set "
        "SPIKETRAIN_TRITON_PLAN=chunk=32",
    ),
    _Fault(
        ("sm_100",),
        (0,),
        (3, 7),
        "Triton before 3.7 may race in scans over states on Blackwell (triton #9871), seen with two stages or more "
        "where these have one; should two runs differ, set SPIKETRAIN_TRITON_PLAN=scan_warps=2",
    ),
    _Fault(
        ("sm_103",),
        (0,),
        (3, 8),
        "Triton before 3.8 may race in scans over states on Blackwell Ultra (triton #10590), seen with two stages or "
        "more where these have one; should two runs differ, set SPIKETRAIN_TRITON_PLAN=scan_warps=2",
    ),
)


def known_faults(target: str, version: str) -> list[str]:
    """Return the known faults of a Triton release, such as "3.6.0", on `target`, with their workarounds."""
    release = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    return [fault.text for fault in _FAULTS if target in fault.targets and fault.first <= release < fault.mended]


@cache
def log_known_faults(target: str) -> None:
    """Warn of `known_faults`, once per process."""
    for fault in known_faults(target, triton.__version__):
        logging.getLogger("spiketrain").warning("%s; run python -m tests.gpu_check to test for it", fault)


@dataclass(frozen=True)
class KernelSpec:
    """One kernel with the arguments of one problem's launch, for `kernels.compile`.

    Attributes:
        name: the name in the report.
        fn: the `triton.jit` function.
        signature: the type of every argument that is not in `constexprs`, in the order of `fn`: "*bf16", "i32",
            "fp32"; "i32:16" is an integer known to be a multiple of 16. Pointers are assumed to be aligned to 16 bytes.
        constexprs: the compile-time arguments.
        num_warps, num_stages: of the launch.
        multiplies: whether the kernel uses `dot`.
        bytes: global memory traffic of the problem.
        flops: floating-point operations of the problem.
    """

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
    multiplies: bool
    bytes: float
    flops: float


@cache
def _device_target(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def target_name(device: torch.device) -> str:
    """Return the GPU's architecture, a key of `SHARED_BYTES`. The interpreter uses the block sizes of sm_80."""
    if device.type == "cpu":
        return "sm_80"
    return _device_target(torch.cuda.current_device() if device.index is None else device.index)


def warp_size(target: str) -> int:
    """Return the lanes of a warp: 64 on AMD's data-centre GPUs, 32 on NVIDIA's."""
    return 64 if target.startswith("gfx") else 32


def dot_precision(target: str) -> str:
    """Return the `input_precision` that gives float32 products full precision on the matrix units.

    NVIDIA's matrix units have no float32, so three tf32 products are used. Narrower operands ignore this setting.
    """
    return "ieee" if target.startswith("gfx") else "tf32x3"


def dtype_bytes(dtype: str) -> int:
    """Return the bytes of "fp32", "bf16" or "fp16"."""
    return 4 if dtype == "fp32" else 2


def next_power(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def device_guard(x: Tensor) -> AbstractContextManager[object]:
    """Context in which x's GPU is the current one, where Triton launches. Does nothing for the interpreter."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def unit_stride(x: Tensor) -> Tensor:
    """Reshape x `[..., D]` to rows `[N, D]` with a stride of 1 in the last dimension, copying if necessary."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """Compute a @ b in float32; a and b have the same dtype."""
    # The interpreter of Triton 3.9 multiplies bfloat16 wrongly.
    if _INTERPRETING:
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        product = tl.dot(a, b, input_precision=PRECISION)
    return product
