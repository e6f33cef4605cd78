"""When a rank dies, the ranks beside it say which one it was, and end. Imports neither torch nor megatron.

Their launcher (torchrun, or launch/main.py) tells the ranks of a node of a death by SIGTERM, which is also what a stop
on request looks like. The one that died is then no longer the launcher's child; on request all of them still are.
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

# These ask a run to stop. USR1 is the batch system's word that the time is nearly up: unlike TERM, torchrun can be made
# to ignore it. HUP comes when a terminal closes.
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

# torchrun looks at its ranks every 0.1 s.
_SECONDS_FOR_LAUNCHER = 5.0


class PeerWatch:
    """Watches over the ranks that the launcher started on this node. To be made once, by the main thread.

    Until the training loop takes the signals over there is nothing to save: a stop on request leaves at once.

    Attributes:
        step: Steps taken, as far as is known.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self._run_dir, self._events = Path(run_dir), EventLog(run_dir)
        self.step = 0
        self._status_before = self._status_mark()
        self._agent = os.getppid()
        first = rank() - int(os.environ.get("LOCAL_RANK", "0"))
        self._ranks = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self._pids = ranks_of(self._agent)
        self._nobody_died = threading.Event()
        # Without a launcher above, or with a wrapper in between, which hides the others, there is nothing to see.
        self._sees_peers = len(self._ranks) > 1 and self._pids.get(rank()) == os.getpid()
        if self._sees_peers:
            self._listen()
        else:
            self._nobody_died.set()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # Under nohup the end of the terminal is none of the run's business.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._leave)

    def _listen(self) -> None:
        # By a descriptor, since a handler waits for the main thread, which may be waiting for the dead rank.
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        threading.Thread(target=self._serve, args=(read_end,), name="peer watch", daemon=True).start()

    def _serve(self, read_end: int) -> None:
        while True:
            # A rank that is only just being started is not to be seen yet.
            while len(self._pids) < len(self._ranks) and not select.select([read_end], [], [], 1.0)[0]:
                self._pids |= ranks_of(self._agent)
            if os.read(read_end, 1)[0] == signal.SIGTERM and (dead := self._dead()):
                # Of those that are left on this node, one is enough to say it.
                if rank() == min(set(self._ranks) - set(dead)):
                    self.report(dead, self._name(dead))
                # The main thread may never come back from a collective.
                leave_at_once()
            self._nobody_died.set()

    def _dead(self) -> list[int]:
        """Ranks of this node that the launcher has taken the exit code of."""
        if os.getppid() != self._agent:
            # The launcher itself has died: to stop and save is the best that is left.
            return []
        self._pids = ranks_of(self._agent) | self._pids
        return [peer for peer in self._ranks if peer not in self._pids or _parent(self._pids[peer]) != self._agent]

    def _name(self, dead: list[int]) -> str:
        pids = [f"rank {peer}" + (f" (pid {self._pids[peer]})" if peer in self._pids else "") for peer in dead]
        return f"{', '.join(pids)} on {socket.gethostname()} died; the launcher's report has the exit code or signal"

    def report(self, ranks: list[int], message: str, state: str = "failed", exit_code: int = 1) -> None:
        """Write down what ended the run, and on which ranks, unless a rank of this start has already said so, or
        another has the run.
        """
        if self._has_been_told() or not run_lock.belongs_to_this_launch(self._run_dir):
            return
        # First where it cannot fail: the disk may be what failed.
        print(f"error: {message}", file=sys.stderr, flush=True)
        write_status(self._run_dir, state, exit_code, message, any_rank=True)
        with suppress(OSError), (self._run_dir / "run.log").open("a") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")
        if state == "failed":
            self.record_failure(ranks, message)

    def record_failure(self, ranks: list[int], message: str) -> None:
        """Write the event of a failure of these ranks, where the disk lets it."""
        with suppress(OSError):
            self._events.record("failure", self.step, ranks=ranks, message=message)

    def report_own_failure(self, message: str, state: str = "failed", exit_code: int = 1) -> None:
        """Write down a failure of this rank, unless it follows from the death of another.

        Connections to a rank that died break at once, a little before the launcher says that it did.
        """
        if self._sees_peers:
            time.sleep(_SECONDS_FOR_LAUNCHER)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            message = f"rank {rank()} (pid {os.getpid()}) on {socket.gethostname()} failed: {message}"
        self.report([rank()], message, state, exit_code)

    def _has_been_told(self) -> bool:
        """Whether a rank of this start has already written how it ended."""
        return self._status_mark() != self._status_before

    def _status_mark(self) -> tuple[int, int] | None:
        path = self._run_dir / "status.json"
        return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None

    def _leave(self, number: int, frame: FrameType | None) -> NoReturn:
        self._nobody_died.wait(_SECONDS_FOR_LAUNCHER)
        if not self._has_been_told():
            message = "stopped before the first step"
            write_status(self._run_dir, "stopped", EXIT_STOPPED, message)
            if rank() == 0:
                with suppress(OSError):
                    self._events.record("stop", self.step, why=f"{signal.Signals(number).name}: {message}")
        sys.exit(EXIT_STOPPED)


def leave_at_once() -> NoReturn:
    """End this process as failed, whatever its main thread is waiting for."""
    run_lock.release()
    os._exit(1)


def ranks_of(agent: int) -> dict[int, int]:
    """The process of each rank that `agent` started; empty where that cannot be seen (without /proc)."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        pid = int(path.name)
        if _parent(pid) == agent and (number := environment(pid).get("RANK")) is not None:
            found[int(number)] = pid
    return found


def environment(pid: int) -> dict[str, str]:
    """The environment that a process was started with; empty where it has ended or is another user's."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def _parent(pid: int) -> int | None:
    """The parent of a process; None where it has ended and been waited for."""
    try:
        # The name, in brackets, may hold anything.
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return None
