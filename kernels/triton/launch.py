"""What the Triton modules share: the target's name and limits, dot products, and what is needed to compile ahead."""

# Triton reads a kernel's annotations: only those of constexprs mean anything to it.
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

# What one program may allocate of shared memory (NVIDIA: "maximum shared memory per block"; AMD: LDS per workgroup).
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
    """What a compiler is known to do wrong to kernels like ours: from release `first` on, before release `mended`."""

    targets: tuple[str, ...]
    first: tuple[int, ...]
    mended: tuple[int, ...]
    text: str


# docs/gpu.md has the reports in full. None of them was seen in these kernels, which had no GPU yet.
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
    """What this release of Triton, "3.6.0", is known to do wrong on `target`, with the way around it."""
    release = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    return [fault.text for fault in _FAULTS if target in fault.targets and fault.first <= release < fault.mended]


@cache
def log_known_faults(target: str) -> None:
    """Warns of `known_faults`, once a process."""
    for fault in known_faults(target, triton.__version__):
        logging.getLogger("spiketrain").warning("%s; python -m tests.gpu_check tells", fault)


@dataclass(frozen=True)
class KernelSpec:
    """One kernel as one problem would launch it, for `kernels.compile`.

    `signature` names the type of every argument that is not in `constexprs`, in the order of `fn`: "*bf16", "i32",
    "fp32"; "i32:16" is an integer known to be a multiple of 16. Pointers are taken to be aligned to 16 bytes.
    `multiplies` says that the kernel uses `dot`. `bytes` (of global memory) and `flops` are those of the problem.
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
    """The GPU's architecture, as in `SHARED_BYTES`; the interpreter takes the block sizes of sm_80."""
    if device.type == "cpu":
        return "sm_80"
    return _device_target(torch.cuda.current_device() if device.index is None else device.index)


def warp_size(target: str) -> int:
    """Lanes of a warp: 64 on AMD's data-centre GPUs, 32 on NVIDIA's."""
    return 64 if target.startswith("gfx") else 32


def dot_precision(target: str) -> str:
    """`input_precision` of float32 products that keeps float32's digits and uses the matrix units.

    NVIDIA's have no float32: three tf32 products make up for it. Products of narrower operands ignore this.
    """
    return "ieee" if target.startswith("gfx") else "tf32x3"


def dtype_bytes(dtype: str) -> int:
    """Bytes of "fp32", "bf16" or "fp16"."""
    return 4 if dtype == "fp32" else 2


def next_power(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def device_guard(x: Tensor) -> AbstractContextManager[object]:
    """Makes x's GPU the current one, on which Triton launches; nothing for the interpreter."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def unit_stride(x: Tensor) -> Tensor:
    """X, or a copy, as rows `[N, D]` of its last dimension with neighbours in a row beside each other."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """A @ b in float32, both of one dtype; wide in the interpreter, where Triton 3.9 multiplies bfloat16 wrongly."""
    if _INTERPRETING:
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        product = tl.dot(a, b, input_precision=PRECISION)
    return product
