"""Triton's interpreter as a GPU would round, and without work that it does again and again.

Its `InterpreterBuilder.cast_impl` cuts digits off from float32 to bfloat16, twice the error of a GPU, and its mode that
rounds carries no digit into the exponent: here it is to the nearest, ties to even. The command
`python -m tests.gpu_check --dry-run` and conftest ask for this module's patches.
"""

from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray


def to_bfloat16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of x in bfloat16; a NaN stays one."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    # Half a unit of the last digit that stays, a hair less where that digit is even.
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(x), quiet, rounded).astype(np.uint16).reshape(np.shape(x))


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The number of each bfloat16; exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_to_nearest() -> None:
    """Patch the interpreter of this process; once is enough, again changes nothing."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    given = builder.cast_impl
    if getattr(given, "rounds_to_nearest", False):
        return

    def cast_impl(self, src, dst_type):
        kinds = src.dtype.scalar, dst_type.scalar
        if kinds == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(to_bfloat16(src.data), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(from_bfloat16(src.data), tl.float32)
        return given(self, src, dst_type)

    cast_impl.rounds_to_nearest = True
    builder.cast_impl = cast_impl
    _patch_language_once(interpreter)
    _look_up_dtypes_once(interpreter, tl)
    _assert_no_overflows(interpreter)


def _patch_language_once(interpreter: ModuleType) -> None:
    """Have a launch replace the functions of triton.language once, not again at each call of a function by another."""
    given = interpreter._patch_lang
    patched: set[str] = set()  # the modules that the running launch has replaced functions of
    functions: dict[Any, set[str]] = {}

    def patch_lang(fn):
        if fn not in functions:
            modules = filter(lambda value: isinstance(value, ModuleType), fn.__globals__.values())
            functions[fn] = {module.__name__ for module in modules} & {"triton.language", "triton.language.core"}
        if functions[fn] and functions[fn] <= patched:
            return interpreter._LangPatchScope()
        scope = given(fn)
        patched.update(functions[fn])
        restore = scope.restore

        def restore_all():
            restore()
            patched.clear()

        scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch_lang


def _look_up_dtypes_once(interpreter: ModuleType, tl: Any) -> None:
    """The interpreter builds a table of numpy's types for Triton's each time that it looks one up."""
    given = interpreter._get_np_dtype
    of_scalar = cache(given)

    def get_np_dtype(dtype):
        return given(dtype) if isinstance(dtype, tl.pointer_type) else of_scalar(dtype.scalar)

    interpreter._get_np_dtype = get_np_dtype


def _assert_no_overflows(interpreter: ModuleType) -> None:
    """The interpreter works out with a dozen operations whether an integer overflows, and then tells nobody."""
    builder = interpreter.interpreter_builder
    assert not builder.options.debug, "its assertions would be heard"
    builder.options = replace(builder.options, sanitize_overflow=False)
