"""Reports which rank died, and ends the surviving ranks of the node. Imports neither torch nor megatron.

The launcher (torchrun, or launch/main.py) announces a death to the other ranks of a node by SIGTERM, and a requested
stop looks the same. The difference: a rank that died is no longer the launcher's child, while after a request all ranks
still are.
"""

import os
import select
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from trainer import run_lock
from trainer.events import EventLog
from trainer.runtime import EXIT_STOPPED, rank, write_status

# Signals that ask a run to stop. Batch systems send USR1 shortly before the time limit; unlike TERM, torchrun can be
# made to ignore it. HUP is sent when a terminal closes.
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

# Environment variable with the process id of a parent that passes signals on, and ends with this process.
WRAPPER = "SPIKETRAIN_WRAPPER"

# torchrun polls its ranks every 0.1 s, so this leaves ample time.
_SECONDS_FOR_LAUNCHER = 5.0


class PeerWatch:
    """Watches the ranks that the launcher started on this node. The main thread must create it, once per process.

    Before the training loop takes over the signals there is nothing to save, so a requested stop exits at once.

    Attributes:
        step: Steps taken, as far as is known.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self._run_dir, self._events = Path(run_dir), EventLog(run_dir)
        self.step = 0
        self._status_before = self._status_mark()
        # The runner of a recipe stands between the launcher and each rank, and lives as long as its rank.
        is_wrapped = os.environ.get(WRAPPER) == str(os.getppid())
        self._own = os.getppid() if is_wrapped else os.getpid()
        self._agent = _parent(self._own) if is_wrapped else os.getppid()
        first = rank() - int(os.environ.get("LOCAL_RANK", "0"))
        self._ranks = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self._pids = ranks_of(self._agent)
        self._nobody_died = threading.Event()
        # Without a launcher, or with a wrapper process in between that hides the other ranks, peers cannot be observed.
        self._sees_peers = len(self._ranks) > 1 and self._pids.get(rank()) == self._own
        if self._sees_peers:
            self._listen()
        else:
            self._nobody_died.set()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # nohup ignores SIGHUP; keep it that way.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._leave)

    def _listen(self) -> None:
        # A wakeup descriptor instead of a handler: handlers run on the main thread, which may be blocked on the dead
        # rank.
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        threading.Thread(target=self._serve, args=(read_end,), name="peer watch", daemon=True).start()

    def _serve(self, read_end: int) -> None:
        while True:
            # A rank that is still starting is not in the list yet.
            while len(self._pids) < len(self._ranks) and not select.select([read_end], [], [], 1.0)[0]:
                self._pids |= ranks_of(self._agent)
            if os.read(read_end, 1)[0] == signal.SIGTERM and (dead := self._dead()):
                # One of the surviving ranks of this node is enough to report the death.
                if rank() == min(set(self._ranks) - set(dead)):
                    self.report(dead, self._name(dead))
                # The main thread may never return from a collective.
                leave_at_once()
            self._nobody_died.set()

    def _dead(self) -> list[int]:
        """Ranks of this node whose exit the launcher has already collected."""
        if (os.getppid() if self._own == os.getpid() else _parent(self._own)) != self._agent:
            # The launcher itself has died: treat SIGTERM as a request to save and stop.
            return []
        self._pids = ranks_of(self._agent) | self._pids
        return [peer for peer in self._ranks if peer not in self._pids or _parent(self._pids[peer]) != self._agent]

    def _name(self, dead: list[int]) -> str:
        pids = [f"rank {peer}" + (f" (pid {self._pids[peer]})" if peer in self._pids else "") for peer in dead]
        return f"{', '.join(pids)} on {socket.gethostname()} died; the launcher's report has the exit code or signal"

    def report(self, ranks: list[int], message: str, state: str = "failed", exit_code: int = 1) -> None:
        """Record the reason that ended the run, and the ranks it concerns.

        Does nothing if a rank of this launch has already done so, or if another launch owns the run.
        """
        if self._has_been_told() or not run_lock.belongs_to_this_launch(self._run_dir):
            return
        # stderr first, because it cannot fail: the disk may be the cause.
        print(f"error: {message}", file=sys.stderr, flush=True)
        write_status(self._run_dir, state, exit_code, message, any_rank=True)
        with suppress(OSError), (self._run_dir / "run.log").open("a") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")
        if state == "failed":
            self.record_failure(ranks, message)

    def record_failure(self, ranks: list[int], message: str) -> None:
        """Record a failure of these ranks as an event, if the disk permits."""
        with suppress(OSError):
            self._events.record("failure", self.step, ranks=ranks, message=message)

    def report_own_failure(self, message: str, state: str = "failed", exit_code: int = 1) -> None:
        """Record a failure of this rank, unless the death of another rank caused it.

        Connections to a dead rank break immediately, slightly before the launcher announces the death, hence the wait.
        """
        if self._sees_peers:
            time.sleep(_SECONDS_FOR_LAUNCHER)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            message = f"rank {rank()} (pid {os.getpid()}) on {socket.gethostname()} failed: {message}"
        self.report([rank()], message, state, exit_code)

    def _has_been_told(self) -> bool:
        """Whether a rank of this launch has already recorded how the run ended."""
        return self._status_mark() != self._status_before

    def _status_mark(self) -> tuple[int, int] | None:
        path = self._run_dir / "status.json"
        return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None

    def _leave(self, number: int, frame: FrameType | None) -> NoReturn:
        # SIGTERM may announce a death: wait until the watching thread has ruled that out.
        self._nobody_died.wait(_SECONDS_FOR_LAUNCHER)
        if not self._has_been_told():
            message = "stopped before the first step"
            write_status(self._run_dir, "stopped", EXIT_STOPPED, message)
            if rank() == 0:
                with suppress(OSError):
                    self._events.record("stop", self.step, why=f"{signal.Signals(number).name}: {message}")
        sys.exit(EXIT_STOPPED)


def leave_at_once() -> NoReturn:
    """End this process as failed, even if its main thread is blocked."""
    # os._exit runs no `finally`, so the lock is released here.
    run_lock.release()
    os._exit(1)


def ranks_of(agent: int | None) -> dict[int, int]:
    """Process id of each rank that `agent` started; empty without /proc."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        pid = int(path.name)
        if _parent(pid) == agent and (number := environment(pid).get("RANK")) is not None:
            found[int(number)] = pid
    return found


def environment(pid: int) -> dict[str, str]:
    """The initial environment of a process; empty if it has ended or belongs to another user."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def _parent(pid: int) -> int | None:
    """Parent of a process; None if it has ended and been reaped."""
    try:
        # The name, in brackets, may contain spaces and brackets: split after the last one.
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return None
