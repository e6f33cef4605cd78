"""Triton kernels, the GPU path of the operations in `kernels/`. Files here have the name of the file that they serve.

This module tells whether the kernels can run, without importing triton, for machines that lack it. A kernel module is
imported when an operation first chooses it. Each defines `specs(target, head_dim, dtype)`, from which
`python -m kernels.compile` compiles its kernels without a GPU.
"""

import os
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

# Limits of the kernels: the key dimension of the chunked recurrences, the length of a row that one program holds, and
# the channels of a group that is quantized.
LARGEST_KEY = 256
LARGEST_ROW = 1 << 16
LARGEST_GROUP = 1 << 12
# Keeps a gate's sum of sigmoids above zero (as in DeepSeek-V3's code). Also used by kernels/moe/routing.py.
TINY = 1e-20

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors. Triton reads the variable when defining a kernel."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@lru_cache(maxsize=1)
def _installed() -> bool:
    return find_spec("triton") is not None


def usable(*tensors: Tensor | None) -> bool:
    """Whether kernels can run on these inputs: on a GPU or in the interpreter, floating dtypes of at most 32 bits."""
    given = [x for x in tensors if x is not None]
    if not (interpreting() if given[0].is_cpu else given[0].is_cuda) or not _installed():
        return False
    return all(x.device == given[0].device and (not x.is_floating_point() or x.dtype in _DTYPES) for x in given)


def implementations(others: tuple[str, ...], *tensors: Tensor | None, fits: bool = True) -> tuple[str, ...]:
    """Return `others`, the implementations without Triton, plus "triton" if usable: first on a GPU, last on a CPU.

    `fits` says whether the kernels support inputs of these sizes. If not, only `others` are returned.
    """
    if not fits or not usable(*tensors):
        return others
    on_cpu = any(x is not None and x.is_cpu for x in tensors)
    return (*others, "triton") if on_cpu else ("triton", *others)
