"""Triton kernels, the GPU path of the operations in `kernels/`; a file here serves the file of the same name there.

This module says whether they can run and imports no triton: machines without it load nothing of it. The kernel modules
are imported when an operation first chooses them. Each has `specs(target, head_dim, dtype)`, from which
`python -m kernels.compile` builds its kernels without a GPU.
"""

import os
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

# What the kernels take: key dimensions of the chunked recurrences, and the rows that one program holds whole.
LARGEST_KEY = 256
LARGEST_ROW = 1 << 16
# Keeps the sum of sigmoids of a gate off zero (DeepSeek-V3's code), here and in kernels/moe/routing.py alike.
TINY = 1e-20

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors; Triton itself asks when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@lru_cache(maxsize=1)
def _installed() -> bool:
    return find_spec("triton") is not None


def usable(*tensors: Tensor | None) -> bool:
    """Whether kernels can run on these inputs: on a GPU or in the interpreter, all floating ones of 32 bits or less."""
    given = [x for x in tensors if x is not None]
    if not (interpreting() if given[0].is_cpu else given[0].is_cuda) or not _installed():
        return False
    return all(x.device == given[0].device and (not x.is_floating_point() or x.dtype in _DTYPES) for x in given)


def implementations(others: tuple[str, ...], *tensors: Tensor | None, fits: bool = True) -> tuple[str, ...]:
    """`others`, the implementations that need no Triton, and "triton" where usable: on a GPU first, on a CPU last.

    `fits` says whether the kernels take inputs of these sizes; where they do not, `others` serve.
    """
    if not fits or not usable(*tensors):
        return others
    on_cpu = any(x is not None and x.is_cpu for x in tensors)
    return (*others, "triton") if on_cpu else ("triton", *others)
