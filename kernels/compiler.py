"""Run Triton's compiler without a GPU, and read a kernel's resources from the machine code.

Shared by `kernels.compile` and `kernels.compile_fla`: the resources of a compiled kernel (registers, spilled bytes and
so on), the check that this machine can compile, and the format of reports.
"""

# mypy: disable-error-code="import-untyped"

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

NO_RESOURCES = {"registers": 0, "spilled_bytes": 0, "shared_bytes": 0, "matrix_instructions": 0}

_NVIDIA_MATRIX = re.compile(r"^\s*(?:@!?%p\d+ )?(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b", re.MULTILINE)
_AMD_MATRIX = re.compile(r"^\s*v_mfma_\w+", re.MULTILINE)


class MachineError(Exception):
    """The machine cannot compile kernels. The message says why, and how to fix it."""


def try_to_compile(compile_kernel: Callable[[], Any], target: str) -> tuple[Any, dict[str, int], str]:
    """Return (kernel, resources, "") if `compile_kernel` succeeds, else (None, zeros, the compiler's last line)."""
    from triton.errors import TritonError

    try:
        compiled = compile_kernel()
        return compiled, _resources(compiled, target), ""
    # Compiler passes after the front end raise RuntimeError and similar errors.
    except (TritonError, RuntimeError, ValueError, AssertionError, subprocess.CalledProcessError) as failure:
        lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
        return None, dict(NO_RESOURCES), lines[-1] if lines else type(failure).__name__


def _resources(compiled: Any, target: str) -> dict[str, int]:
    if target.startswith("gfx"):
        assembly = compiled.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s*(\d+)", assembly)
        scratch = _number(r"\.private_segment_fixed_size:\s*(\d+)", assembly)
        spilled = max(scratch, 4 * _number(r"\.vgpr_spill_count:\s*(\d+)", assembly))
        instructions = len(_AMD_MATRIX.findall(assembly))
    else:
        usage = _resource_usage(compiled.asm["cubin"])
        registers, spilled = _number(r"\bREG:(\d+)", usage), _number(r"\bSTACK:(\d+)", usage)
        instructions = len(_NVIDIA_MATRIX.findall(compiled.asm["ptx"]))
    return {
        "registers": registers,
        "spilled_bytes": spilled,
        "shared_bytes": compiled.metadata.shared,
        "matrix_instructions": instructions,
    }


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's output has no {pattern}")
    return int(found.group(1))


def _resource_usage(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_cuobjdump()), "--dump-resource-usage", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _cuobjdump() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def check_machine(targets: Iterable[str]) -> None:
    """Raise MachineError if this machine cannot compile for the targets."""
    if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("", "0", "false", "off", "no"):
        raise MachineError("TRITON_INTERPRET is set, and interpreted kernels cannot be compiled: unset it")
    try:
        import_module("triton")
    except ImportError as error:
        raise MachineError(f"triton cannot be imported ({error}): pip install 'triton>=3.7,<3.10'") from error
    if any(target.startswith("sm_") for target in targets) and not _cuobjdump().exists():
        raise MachineError(f"triton has no cuobjdump at {_cuobjdump()}: choose AMD targets, or another build of triton")


def aligned(rows: Sequence[Sequence[str]], words: Iterable[str]) -> str:
    """Format rows, headers first, in aligned columns: left if the header is in `words`, else right, for numbers."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    numeric = [header not in words for header in rows[0]]
    return "\n".join(
        "  ".join(c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric)).rstrip()
        for row in rows
    )


def write_json(file: Path | None, rows: list[dict[str, Any]]) -> None:
    """Write `rows` to `file` as JSON; None writes nothing."""
    if file is not None:
        file.write_text(json.dumps(rows, indent=1) + "\n")
