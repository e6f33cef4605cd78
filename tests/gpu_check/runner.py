"""Runs cases in processes of their own, prints a line for each, and writes what is known so far to a file."""

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import torch

from kernels.triton.chunked import PLAN_VARIABLE
from kernels.triton.launch import known_faults, target_name
from tests.gpu_check.cases import REAL, TINY, Case, all_cases
from tests.gpu_check.work import Result, run_case

# Each alone, then all but the largest block together.
SWITCHES = ("num_warps=2", "block_key=64", "scan_warps=2", "chunk=32", "chunk=32,num_warps=2,scan_warps=2")
# A case that hangs is given up; compiling one case's kernels takes seconds, a minute at most.
CASE_SECONDS = 180
_GIB = 1 << 30


def cases(*, dry: bool) -> list[Case]:
    """All cases of this machine."""
    return all_cases(TINY if dry else REAL, flash=not dry and find_spec("flash_attn") is not None)


def _device(dry: bool) -> torch.device:
    return torch.device("cpu" if dry else "cuda")


def _prepare(dry: bool) -> torch.device:
    """The device, with full float32 products in what is compared with, and a GPU's rounding in the interpreter."""
    if dry:
        from tests.interpreter import round_to_nearest

        round_to_nearest()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return _device(dry)


def serve(known: Sequence[Case], *, dry: bool) -> int:
    """A worker: for each line of standard input, a case and a switch, one line with its result."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what compilers and libraries print is no answer
    device, by_name = _prepare(dry), {case.name: case for case in known}
    for line in sys.stdin:
        request = json.loads(line)
        result = run_case(by_name[request["case"]], device, request["switch"])
        print(json.dumps(result), file=answers, flush=True)
        if not _alive(device):
            return 1
    return 0


def _alive(device: torch.device) -> bool:
    """Whether the device still answers: after an illegal access a process has lost it for good."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.ones(1, device=device).item()
    except RuntimeError:
        return False
    return True


class Worker:
    """A process that runs one case after another, and a new one after a crash."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.process: subprocess.Popen[str] | None = None
        self.errors: IO[str] | None = None

    def _start(self) -> subprocess.Popen[str]:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, "-m", "tests.gpu_check", "--worker", *(["--dry-run"] if self.dry else [])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (_root(), os.getenv("PYTHONPATH"))))}
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment
        )

    def run(self, case: Case, switch: str = "") -> Result:
        """The case's result; "failed" if the process died or did not answer in time."""
        if self.process is None or self.process.poll() is not None:
            self.close()
            self.process = self._start()
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        started = time.monotonic()
        late = threading.Timer(CASE_SECONDS, process.kill)
        late.start()
        try:
            process.stdin.write(json.dumps({"case": case.name, "switch": switch}) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            late.cancel()
        if answer:
            found: Result = json.loads(answer)
            return found
        code, seconds = process.wait(), time.monotonic() - started
        reason = f"no answer in {CASE_SECONDS} s" if seconds >= CASE_SECONDS else f"the process died, exit code {code}"
        return _lost(case, f"{reason}: {self._last_line()}", seconds)

    def _last_line(self) -> str:
        assert self.errors is not None
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors.read().splitlines() if line.strip()]
        return lines[-1][:200] if lines else "it said nothing"

    def close(self) -> None:
        """Ends the process, which is done when its input is."""
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait()
        if self.errors is not None:
            self.errors.close()


def _lost(case: Case, message: str, seconds: float) -> Result:
    return {
        "case": case.name,
        "group": case.group,
        "state": "failed",
        "message": message,
        "seconds": round(seconds, 2),
    }


def _root() -> str:
    return str(Path(__file__).parents[2])


class Here:
    """In place of a worker: this process."""

    def __init__(self, dry: bool) -> None:
        self.device = _prepare(dry)

    def run(self, case: Case, switch: str = "") -> Result:
        """As `Worker.run`."""
        return run_case(case, self.device, switch)

    def close(self) -> None:
        """Nothing to end."""


class Report:
    """The table, a line as each case ends, and the file."""

    def __init__(self, file: Path, dry: bool) -> None:
        self.file = file
        self.results: list[Result] = []
        self.cures: dict[str, list[str]] = {}
        self.lock = threading.Lock()
        target = target_name(_device(dry))
        self.machine = {
            "device": "Triton's interpreter" if dry else torch.cuda.get_device_name(),
            "target": target,
            "torch": torch.__version__,
            "triton": version("triton"),
            "switches": os.environ.get(PLAN_VARIABLE, ""),
            "known_faults": [] if dry else known_faults(target, version("triton")),
        }

    def begin(self) -> None:
        """The head of the table."""
        machine = self.machine
        print(f"{machine['device']} ({machine['target']}), torch {machine['torch']}, Triton {machine['triton']}")
        for fault in machine["known_faults"]:
            print(f"known of this compiler: {fault}")
        print(f"{'case':56s} {'state':7s} {'largest error':>22s}  bitwise {'peak MB':>8s} {'s':>6s}", flush=True)

    def add(self, result: Result) -> None:
        """Prints the line, and writes the file anew."""
        with self.lock:
            self.results.append(result)
            print(_line(result), flush=True)
            self.write()

    def write(self) -> None:
        """The file as a whole, never half of it."""
        content = {"machine": self.machine, "cases": self.results, "cures": self.cures}
        partial = self.file.with_suffix(self.file.suffix + ".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(self.file)


def _line(result: Result) -> str:
    error = f"{result['worst']} {result['error']:.1e}" if "error" in result else ""
    bitwise = {True: "yes", False: "NO", None: ""}[result.get("bitwise")]
    peak = "" if result.get("peak_bytes") is None else f"{result['peak_bytes'] / 1e6:.0f}"
    line = f"{result['case']:56s} {result['state']:7s} {error:>22s}  {bitwise:7s} {peak:>8s} {result['seconds']:6.1f}"
    if "forward_ms" in result:
        line += f"  forward {result['forward_ms']:.2f} ms, backward {result['backward_ms']:.2f} ms"
    if "fla_forward_ms" in result:
        line += f"; fla {result['fla_forward_ms']:.2f} and {result['fla_backward_ms']:.2f} ms"
    elif "fla_message" in result:
        line += f"; fla: {result['fla_message']}"
    return f"{line}  {result['message']}".rstrip()


def _jobs(asked: int | None, dry: bool) -> int:
    """Compiling takes cores, and a case up to eight GiB."""
    if asked is not None:
        return asked
    if dry:
        return 1
    memory = torch.cuda.get_device_properties(0).total_memory
    return max(1, min(6, (os.cpu_count() or 2) // 2, memory // (8 * _GIB)))


def check(chosen: Sequence[Case], options: argparse.Namespace) -> int:
    """Runs the cases, says at the end what is wrong, and returns the exit code."""
    deadline = time.monotonic() + options.seconds
    report = Report(options.json, options.dry_run)
    report.begin()
    jobs = _jobs(options.jobs, options.dry_run)
    # Times are taken alone, when all else is done.
    together = [case for case in chosen if case.kind != "time"]
    alone = [case for case in chosen if case.kind == "time"]
    left = _run_all(together, jobs, deadline, report, options.dry_run)
    left += _run_all(alone, min(jobs, 1), deadline, report, options.dry_run)
    bad = [result for result in report.results if result["state"] != "ok"]
    if options.switches and bad:
        _try_switches([case for case in chosen if case.name in {x["case"] for x in bad}], jobs, report, options.dry_run)
    report.write()
    print(f"\n{len(report.results) - len(bad)} of {len(chosen)} cases hold; all figures in {options.json}")
    for result in bad:
        print(f"{result['state']}: {result['case']}: {result['message']}")
    for name, cures in report.cures.items():
        print(f"{name}: {PLAN_VARIABLE}={' or '.join(cures)} cures it" if cures else f"{name}: no switch cures it")
    if left:
        print(f"not run, for the time was over: {len(left)} cases from {left[0].name!r} on; --seconds gives more")
    return 1 if bad else 3 if left else 0


def _run_all(chosen: Sequence[Case], jobs: int, deadline: float, report: Report, dry: bool) -> list[Case]:
    """Runs the cases in `jobs` processes, in this one for 0; returns those that were not begun in time."""
    waiting: queue.SimpleQueue[Case] = queue.SimpleQueue()
    for case in chosen:
        waiting.put(case)

    def work() -> None:
        worker = Worker(dry) if jobs else Here(dry)
        while time.monotonic() < deadline:
            try:
                case = waiting.get_nowait()
            except queue.Empty:
                break
            report.add(worker.run(case))
        worker.close()

    if jobs:
        threads = [threading.Thread(target=work) for _ in range(min(jobs, len(chosen)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    else:
        work()
    left = []
    while not waiting.empty():
        left.append(waiting.get())
    return left


def _try_switches(failed: Sequence[Case], jobs: int, report: Report, dry: bool) -> None:
    """Runs the recurrences that failed with each switch, and notes which make them hold."""
    worker = Worker(dry) if jobs else Here(dry)
    for case in failed:
        if case.recurrent:
            cures = [switch for switch in SWITCHES if worker.run(case, switch)["state"] == "ok"]
            report.cures[case.name] = cures
    worker.close()
