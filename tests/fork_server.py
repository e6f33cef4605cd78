"""A process that has imported what ranks import, and forks: its children run scripts without importing it again.

    python -m tests.fork_server SOCKET CLIENT_PID MODULE...

A connection is one request: argv, environment, folder and number of ranks, with the files for stdout and stderr. Its
answer is the process to signal, then the exit code. A script runs as it would from a command line: as `__main__`, with
an environment of its own (in /proc, too), to a true exit code, atexit handlers included. Several ranks have a parent
that stands in for torchrun: when one fails it ends the others by SIGTERM and exits with 1.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

# Room for the environments of children, which /proc shows where the server's own was.
ROOM = "FORK_SERVER_ROOM"
ROOM_BYTES = 64 << 10
_LARGEST_REQUEST = 128 << 10
_SECONDS_TO_LEAVE = 30.0


def serve(path: str, client: int) -> dict[str, Any]:
    """Fork for every request while the client lives; returns in a process that is to run one, which it is given."""
    # Those that stand for torchrun answer for themselves.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"{path}.part")
        listener.listen(64)
        os.rename(f"{path}.part", path)
        while _lives(client):
            if not select.select([listener], [], [], 1.0)[0]:
                continue
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.setsid()
                return _answer(connection)
            connection.close()
    os._exit(0)


def _answer(connection: socket.socket) -> dict[str, Any]:
    """Start the ranks and report how they end; returns in each of them."""
    message, descriptors, _, _ = socket.recv_fds(connection, _LARGEST_REQUEST, 2)
    request = json.loads(message)
    request["streams"] = descriptors
    running: dict[int, int] = {}
    for environment in request["environments"]:
        pid = os.fork()
        if pid == 0:
            connection.close()
            return request | {"environment": environment}
        running[os.pidfd_open(pid)] = pid
    alone = len(running) == 1
    if not alone:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: _signal_all(running, number))
    for descriptor in descriptors:
        os.close(descriptor)
    connection.send(json.dumps(next(iter(running.values())) if alone else os.getpid()).encode())
    code = _wait(running, connection)
    with contextlib.suppress(OSError):  # the client may have gone
        connection.send(json.dumps(code if alone else int(code != 0)).encode())
    os._exit(0)


def _wait(running: dict[int, int], connection: socket.socket) -> int:
    """The first exit code that is not 0 of processes by their descriptors; a signal's is negative."""
    code, end, client = 0, None, [connection]
    while running:
        left = None if end is None else max(end - time.monotonic(), 0.0)
        ready = select.select([*client, *running], [], [], left)[0]
        if connection in ready or not ready:
            # Nobody waits for them any more, or they do not leave.
            _signal_all(running, signal.SIGKILL)
            client, end = [], None
        for descriptor in set(ready) & running.keys():
            ended = os.waitstatus_to_exitcode(os.waitpid(running.pop(descriptor), 0)[1])
            os.close(descriptor)
            if ended and not code:
                code, end = ended, time.monotonic() + _SECONDS_TO_LEAVE
                _signal_all(running, signal.SIGTERM)
    return code


def _signal_all(running: dict[int, int], number: int) -> None:
    for pid in list(running.values()):
        os.kill(pid, number)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def run(request: dict[str, Any]) -> NoReturn:
    """What `python ARGV...` does, but for taking the interpreter apart: with all that is imported it takes seconds."""
    try:
        _run_main(request)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run_main(request: dict[str, Any]) -> None:
    for stream, descriptor in enumerate(request["streams"], start=1):
        os.dup2(descriptor, stream)
        os.close(descriptor)
    # Ranks share a file: a line is written whole, whatever PYTHONUNBUFFERED says.
    for text in (sys.stdout, sys.stderr):
        text.reconfigure(line_buffering=True, write_through=False)
    os.chdir(request["folder"])
    _take_environment(request["environment"])
    arguments = request["arguments"]
    if arguments[0] == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(arguments[0]).parent)
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def _take_environment(environment: dict[str, str]) -> None:
    """Make it this process's, for those, too, who read it in /proc as peers do.

    Raises:
        ValueError: it is larger than the server's own.
    """
    # Clearing first leaves no pointer into the place that is overwritten.
    os.environ.clear()
    os.environ.update(environment)
    fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
    start, end = int(fields[47]), int(fields[48])  # env_start and env_end of proc(5)
    block = b"".join(f"{name}={value}".encode() + b"\0" for name, value in environment.items())
    if len(block) > end - start:
        raise ValueError(f"an environment of {len(block)} bytes does not fit into {end - start}")
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, block, len(block))


def main(path: str, client: str, *modules: str) -> None:
    """Import, then serve."""
    for module in modules:
        importlib.import_module(module)
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError(f"{modules} start threads, which children of fork would lack")
    gc.collect()
    # Collections of the children would copy every page otherwise.
    gc.freeze()
    run(serve(path, int(client)))


if __name__ == "__main__":
    main(*sys.argv[1:])
