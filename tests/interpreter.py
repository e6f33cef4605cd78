"""Triton's interpreter as a GPU would round: float32 to bfloat16 to the nearest, ties to even.

`InterpreterBuilder.cast_impl` cuts the digits off instead, twice the error of a GPU; the mode that rounds carries no
digit into the exponent. The command `python -m tests.gpu_check --dry-run` and conftest ask for this module's patch.
"""

import numpy as np
from numpy.typing import NDArray


def to_bfloat16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of x in bfloat16; a NaN stays one."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    # Half a unit of the last digit that stays, a hair less where that digit is even.
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(x), quiet, rounded).astype(np.uint16).reshape(np.shape(x))


def round_to_nearest() -> None:
    """Patch the interpreter of this process; once is enough, again changes nothing."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    given = builder.cast_impl
    if getattr(given, "rounds_to_nearest", False):
        return

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return interpreter.TensorHandle(to_bfloat16(src.data), tl.bfloat16)
        return given(self, src, dst_type)

    cast_impl.rounds_to_nearest = True
    builder.cast_impl = cast_impl
