"""Processes and ranks for tests, forked from one that has imported torch and megatron-core already."""

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.main import free_port
from tests import fork_server
from tests.helpers import WAIT

ROOT = Path(__file__).resolve().parents[1]
# The folder of this session's servers: all processes of pytest share them.
SERVERS = "TEST_FORK_SERVERS"
IMPORTED = {
    # What the commands that read a checkpoint import, but for the parts that each alone needs.
    "torch": ("trainer.stored.inference",),
    # torch's optimizers import its compiler as the first of them is made.
    "megatron": ("trainer.pretrain", "trainer.engines.megatron", "torch._dynamo"),
    "deepspeed": (
        "trainer.pretrain",
        "trainer.engines.megatron",
        "trainer.engines.deepspeed",
        "deepspeed",
        "deepspeed.comm.torch",
        "torch._dynamo",
    ),
}
# A process that has looked for a GPU cannot fork others that use it.
_HAS_GPU = any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd"))
QUIET = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}


class Process:
    """What tests use of subprocess.Popen. Of several ranks it is the parent, which stands in for torchrun."""

    def __init__(self, connection: socket.socket, arguments: Sequence[str], output: Any, errors: Any) -> None:
        self._connection, self._output, self._errors, self.args = connection, output, errors, arguments
        self.returncode: int | None = None
        self.pid: int = self._receive(WAIT)

    def _receive(self, timeout: float | None) -> Any:
        if not select.select([self._connection], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        message = self._connection.recv(64)
        assert message, f"the fork server has ended: {self.output()}"
        return json.loads(message)

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; that of a signal is negative.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        if self.returncode is None:
            self.returncode = self._receive(timeout)
            self._connection.close()
        return self.returncode

    def output(self) -> str:
        """What it has written so far, errors among it."""
        return _content(self._output)

    def errors(self) -> str:
        """What it has written to stderr so far, if that was to be apart."""
        return _content(self._errors)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait; all that it has written."""
        self.wait(timeout)
        return self.output(), None

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it and all its ranks."""
        if self.poll() is None:
            self._connection.close()
            self.returncode = -signal.SIGKILL


def _content(file: Any) -> str:
    file.seek(0)
    return file.read().decode()


def start(
    *arguments: object,
    ranks: int | None = None,
    folder: Path = ROOT,
    imported: str = "megatron",
    errors_apart: bool = False,
    **environment: str,
) -> Process:
    """Run `python ARGUMENTS...` in a fork; as so many ranks, of which torch.distributed finds each other, if given.

    The server that has `imported` is started where this session has none yet.
    """
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | QUIET | environment
    request = {
        "arguments": list(map(str, arguments)),
        "folder": str(folder),
        "environments": [own] if ranks is None else [own | of_rank for of_rank in _of_ranks(ranks)],
    }
    connection = _connect(imported)
    output = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process that has it
    errors = tempfile.TemporaryFile() if errors_apart else output  # noqa: SIM115  as above
    socket.send_fds(connection, [json.dumps(request).encode()], [output.fileno(), errors.fileno()])
    return Process(connection, request["arguments"], output, errors)


def _of_ranks(ranks: int) -> list[dict[str, str]]:
    port = free_port()
    return [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        for rank in range(ranks)
    ]


def _connect(imported: str) -> socket.socket:
    folder = Path(os.environ[SERVERS])
    path = folder / imported
    with (folder / f"{imported}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _start_server(path, ("torch",) if _HAS_GPU else IMPORTED[imported])
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(str(path))
    return connection


def _start_server(path: Path, modules: Sequence[str]) -> None:
    client = path.parent.name.rsplit(".", 1)[1]
    environment = os.environ | QUIET | {"DS_ACCELERATOR": "cpu", fork_server.ROOM: "x" * fork_server.ROOM_BYTES}
    command = [sys.executable, "-m", "tests.fork_server", str(path), client, *modules]
    with path.with_suffix(".log").open("w") as log:
        server = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    end = time.monotonic() + WAIT
    while not path.exists():
        assert server.poll() is None and time.monotonic() < end, path.with_suffix(".log").read_text()
        time.sleep(0.02)


def finish(process: Any, timeout: float = WAIT) -> tuple[int, str]:
    """Exit code and output of a started process."""
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def run_ranks(ranks: int, *arguments: object, imported: str = "megatron") -> str:
    """Run `python ARGUMENTS...` as so many ranks, all of which are to succeed; their output."""
    code, output = finish(start(*arguments, ranks=ranks, imported=imported))
    assert code == 0, output
    return output
