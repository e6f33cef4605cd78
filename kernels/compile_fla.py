"""Compile flash-linear-attention's Triton kernels ahead of time, as it launches them: `kernels.compile --peer fla`.

FLA's public functions run forward and backward on tensors without storage, and every kernel launch is replaced by a
compilation. The arguments come from FLA's own code, the constants from its heuristics and autotuners. Of the
configurations that an autotuner offers for a launch, all with 4 warps are compiled (or with the nearest number to 4).
Only a GPU can tell which one is fastest. The table shows the one that spills least among those that fit in shared
memory, and the largest spill of any.

No GPU is needed, but FLA and Triton must see one. FLA reads the GPU's name, capability and shared memory at import, to
build its lists of configurations. Triton asks its driver for the target. Stand-ins answer both for the chosen target,
in separate processes. FLA's files and settings are not changed.
"""

# mypy: disable-error-code="import-untyped"

import argparse
import multiprocessing
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from itertools import groupby
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from kernels.compiler import MachineError, aligned, check_machine, try_to_compile, write_json

PREFERRED_WARPS = 4
# The same problem size as for our own kernels.
TOKENS, HEADS = 8192, 16
DTYPE = "bf16"  # the only dtype that FLA's delta rule supports


@dataclass(frozen=True)
class PeerReport:
    """One kernel in one configuration, as one of FLA's functions launches it; see `kernels.compile.Report`."""

    target: str
    head_dim: int
    dtype: str
    function: str
    kernel: str
    configuration: str
    num_warps: int
    num_stages: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    shared_limit: int
    matrix_instructions: int
    error: str = ""

    @property
    def cost(self) -> tuple[bool, bool, int, int]:
        """Sort key of a kernel's configurations; the lowest is shown."""
        return bool(self.error), self.shared_bytes > self.shared_limit, self.spilled_bytes, self.registers


@dataclass(frozen=True)
class Function:
    """A public function of FLA: its module, name and input shapes, where "THK" stands for `[B, T, H, K]`.

    Inputs in lower case (the decays) are float32, the others bfloat16.
    """

    module: str
    name: str
    shapes: tuple[str, ...]


FUNCTIONS = {
    "gated_delta_rule": Function(
        "fla.ops.gated_delta_rule", "chunk_gated_delta_rule", ("THK", "THK", "THK", "th", "TH")
    ),
    "kda": Function("fla.ops.kda", "chunk_kda", ("THK", "THK", "THK", "thk", "TH")),
    "gla": Function("fla.ops.gla", "chunk_gla", ("THK", "THK", "THK", "thk")),
    "delta_rule": Function("fla.ops.delta_rule", "chunk_delta_rule", ("THK", "THK", "THK", "TH")),
    "retention": Function("fla.ops.retention", "chunk_retention", ("THK", "THK", "THK")),
}

Task = tuple[str, str, int, str]


class _StandInDriver:
    """Stands in for Triton's driver on a GPU machine. Sufficient for compiling, not for launching."""

    def __init__(self, target: str, shared_bytes: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", int(target[3:]), 32)
        properties = {"max_shared_mem": shared_bytes, "multiprocessor_count": 132}  # as many as an H100 has
        self.utils = SimpleNamespace(get_device_properties=lambda _: properties)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


@contextmanager
def _gpu_stands_in(target: str, shared_bytes: int) -> Iterator[None]:
    """Context in which FLA and Triton see one GPU. FLA's modules keep the properties that they read at import."""
    import torch
    import triton

    triton.runtime.driver.set_active(_StandInDriver(target, shared_bytes))
    capability = divmod(int(target[3:]), 10)
    with (
        patch.object(torch.cuda, "device_count", lambda: 1),
        patch.object(torch.cuda, "get_device_name", lambda *_: target),
        patch.object(torch.cuda, "get_device_capability", lambda *_: capability),
    ):
        yield


class _Launches:
    """Replaces launches: compiles every configuration of each launched kernel, and collects the reports."""

    def __init__(self, report: Callable[..., PeerReport], target: str, wanted: Callable[[str], bool]) -> None:
        self.report, self.target, self.wanted = report, target, wanted
        self.reports: list[PeerReport] = []
        self.seen: list[tuple[str, ...]] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Context in which launches are compiled instead."""
        from triton.runtime.autotuner import Autotuner, Config
        from triton.runtime.jit import JITFunction

        compile_or_launch = JITFunction.run

        def autotuned(tuner: Any, *args: Any, **kwargs: Any) -> None:
            tuner.nargs = dict(zip(tuner.arg_names, args))  # pruning reads it; set as in Autotuner.run
            offered = tuner.prune_configs(kwargs)
            warps = min((config.num_warps for config in offered), key=lambda n: abs(n - PREFERRED_WARPS))
            launch(tuner.fn, [config for config in offered if config.num_warps == warps], *args, **kwargs)

        def plain(kernel: Any, *args: Any, **kwargs: Any) -> None:
            launch(kernel, [Config({})], *args, **kwargs)

        def launch(kernel: Any, configs: list[Any], *args: Any, **kwargs: Any) -> None:
            if self.wanted(kernel.__name__):
                kwargs["warmup"] = True
                runs = [partial(compile_or_launch, kernel, *args, **{**c.all_kwargs(), **kwargs}) for c in configs]
                self._compile(kernel.__name__, configs, runs)

        with patch.object(Autotuner, "run", autotuned), patch.object(JITFunction, "run", plain):
            yield

    def _compile(self, kernel: str, configs: list[Any], runs: Sequence[Callable[[], Any]]) -> None:
        compiled = [try_to_compile(run, self.target) for run in runs]
        # A function may launch a kernel several times. Identical code is reported once, different code separately.
        code = (kernel, *("" if binary is None else binary.hash for binary, _, _ in compiled))
        if code in self.seen:
            return
        self.seen.append(code)
        times = sum(name == kernel for name, *_ in self.seen)
        for config, (binary, resources, error) in zip(configs, compiled):
            options = config if binary is None else binary.metadata
            report = self.report(
                kernel=kernel if times == 1 else f"{kernel}#{times}",
                configuration=" ".join(f"{name}={value}" for name, value in config.kwargs.items()),
                num_warps=options.num_warps,
                num_stages=options.num_stages,
                error=error,
                **resources,
            )
            self.reports.append(report)


def compile_function(task: Task) -> list[PeerReport]:
    """Compile the launches of one task (function, target, head_dim, part of FUNCTION.KERNEL) and return the reports.

    Call it in a separate process, because FLA keeps the GPU properties that it reads at import.
    """
    import torch

    from kernels.triton.launch import SHARED_BYTES

    function, target, head_dim, name = task
    sizes = {"T": TOKENS, "H": HEADS, "K": head_dim}
    of_task = partial(PeerReport, target, head_dim, DTYPE, function, shared_limit=SHARED_BYTES[target])
    launches = _Launches(of_task, target, lambda kernel: name in f"{function}.{kernel}")
    with _gpu_stands_in(target, SHARED_BYTES[target]), launches.recorded():
        inputs = [
            torch.empty(
                1,
                *(sizes[axis.upper()] for axis in shape),
                dtype=torch.bfloat16 if shape.isupper() else torch.float32,
                device="meta",
                requires_grad=True,
            )
            for shape in FUNCTIONS[function].shapes
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # FLA warns at import and about these inputs
            o, _ = getattr(import_module(FUNCTIONS[function].module), FUNCTIONS[function].name)(*inputs)
            o.sum().backward()
    return launches.reports


def table(reports: Iterable[PeerReport]) -> str:
    """Format one line per kernel: the configuration that spills least, the number that spill, and the largest spill."""
    headers = ["target", "K", "dtype", "kernel", "configuration", "warps", "stages", "registers", "spilled"]
    rows = [[*headers, "shared/limit", "matrix", "configurations", "spilling", "worst", ""]]
    for _, group in groupby(reports, lambda r: (r.target, r.head_dim, r.dtype, r.function, r.kernel)):
        found = list(group)
        best = min(found, key=lambda report: report.cost)
        name = f"{best.function}.{best.kernel}"
        words = [best.target, best.head_dim, best.dtype, name, best.configuration or "-", best.num_warps]
        shared = f"{best.shared_bytes}/{best.shared_limit}"
        numbers = [best.num_stages, best.registers, best.spilled_bytes, shared, best.matrix_instructions]
        spilled = [report.spilled_bytes for report in found]
        errors = [report.error for report in found if report.error]
        verb = "does" if len(errors) == 1 else "do"
        note = f"{len(errors)} {verb} not compile: {errors[0]}" if errors else ""
        row = [*words, *numbers, len(found), sum(map(bool, spilled)), max(spilled), note]
        rows.append([str(cell) for cell in row])
    return aligned(rows, ("target", "dtype", "kernel", "configuration", ""))


def _compile_all(tasks: list[Task], jobs: int) -> list[PeerReport]:
    """Run each task in a separate process, `jobs` at a time, and return all reports."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, max_tasks_per_child=1) as pool:
        return [report for reports in pool.map(compile_function, tasks) for report in reports]


def _refuse(message: str) -> int:
    print(f"kernels.compile: {message}", file=sys.stderr)
    return 2


def main(options: argparse.Namespace) -> int:
    """Run the command with the options of `kernels.compile`, and return its exit code."""
    targets = options.target or ["sm_90"]
    head_dims = options.head_dim or [128]
    try:
        check_machine(targets)
    except MachineError as error:
        return _refuse(str(error))
    if find_spec("fla") is None:
        return _refuse("--peer fla: it is not installed: pip install 'fla-core>=0.6,<0.7'")
    # A name with a dot restricts the functions to run.
    of_function, point, _ = options.kernel.rpartition(".")
    functions = [name for name in FUNCTIONS if not point or name.endswith(of_function)]
    tasks = [
        (name, target, head_dim, options.kernel) for target in targets for head_dim in head_dims for name in functions
    ]
    try:
        reports = _compile_all(tasks, options.jobs)
    except BrokenProcessPool:
        return _refuse("--peer fla: the compiler's process died; --kernel and --jobs 1 help to find at which kernel")
    if not reports:
        return _refuse(f"--peer fla: no kernel has {options.kernel!r} in its name")
    print(f"fla-core {version('fla-core')}: compiled, not run; its choice among the configurations needs a GPU")
    print(table(reports))
    write_json(options.json, [asdict(report) for report in reports])
    return 0
