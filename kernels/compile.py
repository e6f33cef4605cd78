"""Compile every Triton kernel ahead of time, without a GPU, and report the GPU resources it uses.

    python -m kernels.compile --all
    python -m kernels.compile --target sm_90 --target gfx942 --head-dim 128 --dtype bf16 --json kernels.json
    python -m kernels.compile --target sm_90 --kernel gla.scan
    python -m kernels.compile --peer fla

`specs(target, head_dim, dtype)` of a module in kernels/triton/ lists its kernels with the arguments of their launches.
The table shows for each kernel: registers per thread, bytes spilled to memory, shared memory and the target's limit,
matrix instructions, and the bytes and FLOPs of the stated problem. Resources are read from the compiled code: NVIDIA's
by cuobjdump, AMD's from metadata in the assembly. `--peer fla` does the same with the comparable kernels of
flash-linear-attention (see kernels/compile_fla.py).

Exit codes: 0; 1 if a kernel does not compile, spills, needs more shared memory than the target has, or multiplies
matrices without a matrix instruction (a peer's kernels never cause 1); 2 for wrong arguments or a machine that cannot
compile.
"""

# mypy: disable-error-code="import-untyped"

import argparse
import multiprocessing
import os
import pkgutil
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from kernels.compiler import (
    NO_RESOURCES,
    MachineError,
    aligned,
    check_machine,
    try_to_compile,
    write_json,
)

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942", "gfx950")
HEAD_DIMS = (64, 128, 256)
DTYPES = ("bf16", "fp32")
PEERS = ("fla",)


@dataclass(frozen=True)
class Report:
    """One kernel for one target. If it does not compile, `error` is the compiler's last line, and resources are 0."""

    target: str
    head_dim: int
    dtype: str
    module: str
    kernel: str
    num_warps: int
    num_stages: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    shared_limit: int
    matrix_instructions: int
    multiplies: bool
    bytes: float
    flops: float
    error: str = ""

    def problems(self) -> list[str]:
        """Return the reasons why the kernel is unfit for the target; empty if it is fit."""
        if self.error:
            return [f"does not compile: {self.error}"]
        found = []
        if self.spilled_bytes:
            found.append(f"spills {self.spilled_bytes} bytes")
        if self.shared_bytes > self.shared_limit:
            found.append(f"wants {self.shared_bytes} bytes of shared memory of {self.shared_limit}")
        if self.multiplies and not self.matrix_instructions:
            found.append("multiplies matrices without a matrix instruction")
        return found


def kernel_modules() -> list[str]:
    """Return the names of the modules in kernels/triton/ that define `specs`."""
    package = import_module("kernels.triton")
    names = sorted(info.name for info in pkgutil.iter_modules(package.__path__))
    return [name for name in names if hasattr(import_module(f"kernels.triton.{name}"), "specs")]


def compile_spec(module: str, spec: Any, target: str, head_dim: int, dtype: str, error: str = "") -> Report:
    """Compile one `KernelSpec` and read its resources. A compiler error is reported, not raised.

    A given `error` is reported without compiling.
    """
    from kernels.triton.launch import SHARED_BYTES  # lazily: --help and wrong arguments need no Triton

    if error:
        found = dict(NO_RESOURCES)
    else:
        _, found, error = try_to_compile(lambda: _compile(spec, target), target)
    return Report(
        target=target,
        head_dim=head_dim,
        dtype=dtype,
        module=module,
        kernel=spec.name,
        num_warps=spec.num_warps,
        num_stages=spec.num_stages,
        shared_limit=SHARED_BYTES[target],
        multiplies=spec.multiplies,
        bytes=spec.bytes,
        flops=spec.flops,
        error=error,
        **found,
    )


def _compile(spec: Any, target: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    gpu = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    unknown = [name for name in (*spec.signature, *spec.constexprs) if name not in spec.fn.arg_names]
    missing = [name for name in spec.fn.arg_names if name not in spec.signature and name not in spec.constexprs]
    if unknown or missing:
        raise ValueError(f"the specification lacks the arguments {missing} and has the unknown arguments {unknown}")
    signature, attributes = {}, {}
    for index, name in enumerate(spec.fn.arg_names):
        kind, _, multiple = spec.signature.get(name, "constexpr").partition(":")
        signature[name] = kind
        # A launch would detect these divisibilities. torch's allocator aligns pointers to more than 16 bytes.
        if kind.startswith("*") or multiple == "16":
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(spec.fn, signature, dict(spec.constexprs), attributes)
    return triton.compile(source, target=gpu, options={"num_warps": spec.num_warps, "num_stages": spec.num_stages})


Task = tuple[str, int, str, int, str]


def _tasks(targets: list[str], head_dims: list[int], dtypes: list[str], name: str) -> list[Task]:
    """Return (module, index in its `specs`, target, head_dim, dtype) of the kernels with `name` in their name."""
    modules = kernel_modules()
    return [
        (module, index, target, head_dim, dtype)
        for target in targets
        for head_dim in head_dims
        for dtype in dtypes
        for module in modules
        for index, spec in enumerate(import_module(f"kernels.triton.{module}").specs(target, head_dim, dtype))
        if name in f"{module}.{spec.name}"
    ]


def _run(task: Task, error: str = "") -> Report:
    module, index, target, head_dim, dtype = task
    spec = import_module(f"kernels.triton.{module}").specs(target, head_dim, dtype)[index]
    return compile_spec(module, spec, target, head_dim, dtype, error)


def _pool(jobs: int) -> ProcessPoolExecutor:
    # Spawned, not forked: the compiler has threads, which do not survive a fork.
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))


def _run_alone(task: Task) -> Report:
    """`_run` in a separate process. If the process dies, the report blames this kernel."""
    with _pool(1) as pool:
        try:
            return pool.submit(_run, task).result()
        except BrokenProcessPool:
            return _run(task, "the compiler's process died")


def compile_all(targets: list[str], head_dims: list[int], dtypes: list[str], jobs: int, name: str = "") -> list[Report]:
    """Compile the kernels with `name` in their name (default: all) in `jobs` processes.

    Prints progress to standard error. The order of the reports is fixed.
    """
    tasks = _tasks(targets, head_dims, dtypes, name)
    reports: dict[Task, Report] = {}

    def note(task: Task, report: Report) -> None:
        reports[task] = report
        # A terminal gets one updating line, a file a line per 50 kernels.
        if sys.stderr.isatty():
            print(f"\r{len(reports)}/{len(tasks)} kernels", end="", file=sys.stderr, flush=True)
        elif len(reports) % 50 == 0 or len(reports) == len(tasks):
            print(f"{len(reports)}/{len(tasks)} kernels", file=sys.stderr, flush=True)

    with _pool(jobs) as pool:
        futures = {pool.submit(_run, task): task for task in tasks}
        for future in as_completed(futures):
            # A compiler that aborts breaks the whole pool. The remaining kernels then run one by one, to find which.
            if not isinstance(future.exception(), BrokenProcessPool):
                note(futures[future], future.result())
    for task in tasks:
        if task not in reports:
            note(task, _run_alone(task))
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return [reports[task] for task in tasks]


def table(reports: Iterable[Report]) -> str:
    """Format the reports as aligned columns."""
    rows = [
        ["target", "K", "dtype", "kernel", "warps", "registers", "spilled", "shared/limit", "matrix", "MB", "GFLOP", ""]
    ]
    for report in reports:
        shared = f"{report.shared_bytes}/{report.shared_limit}"
        numbers = [report.num_warps, report.registers, report.spilled_bytes, shared, report.matrix_instructions]
        analytic = [f"{report.bytes / 1e6:.1f}", f"{report.flops / 1e9:.2f}", "; ".join(report.problems())]
        row = [report.target, report.head_dim, report.dtype, f"{report.module}.{report.kernel}", *numbers, *analytic]
        rows.append([str(cell) for cell in row])
    return aligned(rows, ("target", "dtype", "kernel", ""))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m kernels.compile", description="Compile all Triton kernels without a GPU."
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--target", action="append", choices=TARGETS, help="may be given several times")
    choice.add_argument("--all", action="store_true", help="every target")
    parser.add_argument("--head-dim", type=int, nargs="+", choices=HEAD_DIMS, help="default: all; with --peer: 128")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: all; with --peer: bf16 only")
    parser.add_argument("--kernel", default="", metavar="TEXT", help="only kernels with this in their name")
    parser.add_argument("--peer", choices=PEERS, help="another project's kernels, for sm_90 unless a target is given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the reports here as well")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile at once")
    options = parser.parse_args(arguments)
    if not (options.target or options.all or options.peer):
        parser.error("choose targets, with --target or --all")
    if options.peer and (options.all or any(target.startswith("gfx") for target in options.target or ())):
        parser.error("--peer: only NVIDIA's targets, as --target sm_90")
    if options.peer and options.dtype not in (None, ["bf16"]):
        parser.error("--peer: only --dtype bf16; fla's delta rule takes no float32")
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json: there is no directory {options.json.parent}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parse(arguments)
    # Triton 3.9 warns that this default will change. Set the current one explicitly, which launches also use.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    if options.peer:
        from kernels import compile_fla  # lazily: only --peer needs it

        return compile_fla.main(options)
    targets = list(TARGETS) if options.all else options.target
    try:
        check_machine(targets)
    except MachineError as error:
        print(f"kernels.compile: {error}", file=sys.stderr)
        return 2
    head_dims, dtypes = options.head_dim or list(HEAD_DIMS), options.dtype or list(DTYPES)
    reports = compile_all(targets, head_dims, dtypes, options.jobs, options.kernel)
    if not reports:
        print(f"kernels.compile: no kernel has {options.kernel!r} in its name", file=sys.stderr)
        return 2
    print(table(reports))
    write_json(options.json, [asdict(report) | {"problems": report.problems()} for report in reports])
    unfit = [report for report in reports if report.problems()]
    for report in unfit:
        where = f"{report.target}, head size {report.head_dim}, {report.dtype}"
        print(f"{report.module}.{report.kernel} ({where}): {'; '.join(report.problems())}", file=sys.stderr)
    return 1 if unfit else 0


if __name__ == "__main__":
    sys.exit(main())
