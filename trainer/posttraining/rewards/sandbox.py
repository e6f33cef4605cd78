"""Runs Python programs that nobody trusts: confined.py's process with its files, limits and end."""

import json
import os
import resource
import secrets
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError
from trainer.posttraining.rewards import confined

_SCRIPT = Path(confined.__file__)
# What a program needs of the system: shared libraries, time zones, devices without contents.
_SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
# The directory is measured this often, and the pipes are read this much at a time.
_SECONDS_BETWEEN_LOOKS, _CHUNK = 0.05, 1 << 16
_MOST_REPORT_BYTES = 4096


@dataclass(frozen=True)
class Limits:
    """Limits of one run.

    Attributes:
        seconds: Wall time; CPU time is the next whole second.
        memory_bytes: Address space. The interpreter itself takes 30 MB of it.
        output_bytes: What it writes to stdout.
        file_bytes: Largest file, and all files together.
        files: Files and directories that it makes.
        open_files: Files open at once.
    """

    seconds: float = 5.0
    memory_bytes: int = 512 << 20
    output_bytes: int = 1 << 20
    file_bytes: int = 16 << 20
    files: int = 1000
    open_files: int = 64

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ConfigError(f"{name} is {value}: it must be more than 0")


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        passed: Tests that passed; of a script 1, if it ended well.
        stdout: What it wrote.
        error: None, or one of base.ERRORS.
    """

    passed: int
    stdout: bytes
    error: str | None


def require_sandbox() -> None:
    """Refuse a machine without what the sandbox needs.

    Raises:
        ConfigError: it lacks something; says what.
    """
    lack = confined.missing()
    if lack is not None:
        raise ConfigError(f"there is no sandbox here: {lack}; sandbox: false runs the code with your own rights")


def run(
    program: str,
    tests: list[str] | None,
    stdin: bytes = b"",
    *,
    limits: Limits,
    sandbox: bool = True,
    packages: bool = False,
) -> Outcome:
    """Run a program in a process of its own, in an empty directory that is removed afterwards.

    Args:
        program: Python source.
        tests: Statements that run after it, each with a copy of its globals; None runs it as a script.
        stdin: What a script reads.
        limits: When it is ended.
        sandbox: Whether to confine it (see confined.py); without, only limits and its own directory remain.
        packages: Whether it may import what is installed beside this package.

    Returns:
        How it ended.

    Raises:
        ConfigError: it cannot be confined here.
    """
    folder = tempfile.mkdtemp(prefix="run-")
    try:
        return _run(program, tests, stdin, os.path.realpath(folder), limits, sandbox, packages)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(
    program: str, tests: list[str] | None, stdin: bytes, folder: str, limits: Limits, sandbox: bool, packages: bool
) -> Outcome:
    installed = [sysconfig.get_path(name) for name in ("purelib", "platlib")] if packages else []
    library = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]
    key = secrets.token_hex(16)
    read_end, write_end = os.pipe()
    request = {
        "program": program,
        "tests": tests,
        "key": key,
        "folder": folder,
        "parent": os.getpid(),
        "report": write_end,
        "sandbox": sandbox,
        "packages": installed,
        "readable": [*library, *installed, os.path.join(sys.base_prefix, "lib"), *_SYSTEM, *_DEVICES],
        "limits": _resource_limits(limits),
    }
    with tempfile.TemporaryFile() as asked, tempfile.TemporaryFile() as given, os.fdopen(read_end, "rb") as report:
        asked.write(json.dumps(request).encode())
        given.write(stdin)
        for file in (asked, given):
            file.seek(0)
        command = [sys.executable, "-I", "-S", "-B", str(_SCRIPT), str(asked.fileno())]
        process = subprocess.Popen(
            command,
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=(asked.fileno(), write_end),
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": folder, "TMPDIR": folder},
            process_group=0,
        )
        os.close(write_end)
        assert process.stdout is not None
        with process.stdout:
            try:
                stdout, said, error = _attend(process.stdout.fileno(), report.fileno(), folder, limits)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                code = process.wait()
    return _outcome(stdout, said, error, code, key)


def _resource_limits(limits: Limits) -> dict[str, int]:
    """Limits by the names of resource.RLIMIT_…."""
    values = {
        "CPU": int(limits.seconds) + 1,
        "AS": limits.memory_bytes,
        "FSIZE": limits.file_bytes,
        "NOFILE": limits.open_files,
        "CORE": 0,
    }
    return {name: value for name, value in values.items() if hasattr(resource, f"RLIMIT_{name}")}


def _attend(stdout: int, report: int, folder: str, limits: Limits) -> tuple[bytes, bytes, str | None]:
    """Read both pipes until they end or a limit is passed; what was read, and the kind of limit."""
    end = time.monotonic() + limits.seconds
    room = {stdout: limits.output_bytes, report: _MOST_REPORT_BYTES}
    read: dict[int, bytearray] = {stdout: bytearray(), report: bytearray()}
    opened, error = {stdout, report}, None
    looked = 0.0
    # A report is the end, whatever threads go on.
    while report in opened and error is None:
        left = end - time.monotonic()
        ready = select.select(list(opened), [], [], max(0.0, min(left, _SECONDS_BETWEEN_LOOKS)))[0]
        for pipe in ready:
            content = os.read(pipe, _CHUNK)
            read[pipe] += content
            if not content:
                opened.discard(pipe)
            if len(read[pipe]) > room[pipe]:
                error = "limit"
        if time.monotonic() >= end:
            error = error or "timeout"
        if time.monotonic() - looked > _SECONDS_BETWEEN_LOOKS:
            looked = time.monotonic()
            if _is_too_full(folder, limits):
                error = error or "limit"
    while error is None and stdout in opened and select.select([stdout], [], [], 0)[0]:
        content = os.read(stdout, _CHUNK)
        read[stdout] += content
        if not content:
            break
        if len(read[stdout]) > limits.output_bytes:
            error = "limit"
    return bytes(read[stdout][: limits.output_bytes]), bytes(read[report][:_MOST_REPORT_BYTES]), error


def _is_too_full(folder: str, limits: Limits) -> bool:
    """Whether the files of a run take more than they may. Links are not followed."""
    count = size = 0
    waiting = [folder]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    count += 1
                    if count > limits.files:
                        return True
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    else:
                        status = entry.stat(follow_symlinks=False)
                        # Sparse files take less than they are long.
                        size += status.st_blocks * 512
        # The program may remove it at the same time.
        except OSError:
            continue
    return size > limits.file_bytes


def _outcome(stdout: bytes, said: bytes, error: str | None, code: int, key: str) -> Outcome:
    if error is not None:
        return Outcome(0, stdout, error)
    report = _parsed(said)
    if code == confined.NOT_CONFINED and "failure" in report:
        raise ConfigError(f"the code cannot be confined here ({str(report['failure'])[:200]})")
    if report.get("key") != key:
        return Outcome(0, stdout, "timeout" if code == -signal.SIGXCPU else "crash")
    passed, kind = report.get("passed"), report.get("error")
    return Outcome(passed if isinstance(passed, int) else 0, stdout, kind if isinstance(kind, str) else None)


def _parsed(said: bytes) -> dict[str, Any]:
    try:
        report = json.loads(said)
    except (ValueError, RecursionError):
        return {}
    return report if isinstance(report, dict) else {}
