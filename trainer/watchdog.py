"""Names a rank that hangs, and ends the run. Imports neither torch nor megatron.

Ranks wait for each other in collectives, so a single hanging rank blocks all of them, and the rank whose collective
times out first is usually another one. Each rank's main thread therefore records its progress, and a separate thread
writes it to run.dir/ranks/RANK.json. When the main thread makes no progress for its phase's time limit, the notes of
all ranks show who is behind: a rank with less progress, a rank whose thread no longer writes (stopped process, dead
machine), or one whose main thread is not waiting for others.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType

from trainer import run_lock
from trainer.config import RunConfig
from trainer.peers import PeerWatch, leave_at_once
from trainer.runtime import rank

_DIRECTORY = "ranks"
# mcore files whose calls block without a Python frame of torch.distributed on the stack.
_WAITS_OF_MCORE = (
    "/megatron/core/pipeline_parallel/p2p_communication.py",
    "/megatron/core/pipeline_parallel/schedules.py",
    "/megatron/core/distributed/param_and_grad_buffer.py",
)
# A note is written this many times within the shortest time limit of a phase, and at least every so many seconds.
_NOTES, _MOST_SECONDS = 20, 10.0


def dump_stacks_on_request() -> None:
    """Dump all threads' stacks to stderr on SIGQUIT, then continue; also on an interpreter crash."""
    faulthandler.enable()
    faulthandler.register(signal.SIGQUIT, all_threads=True)


@dataclass(frozen=True)
class Note:
    """The progress of one rank.

    Attributes:
        rank: Its rank.
        host: Its host name.
        pid: Its process id.
        launch: Identifier of its launch.
        progress: Number of times its main thread has recorded progress; the same work gives the same number on all
            ranks.
        phase: Current phase.
        step: Steps taken.
        where: The function that its main thread is in.
        waits: Whether that function waits for other ranks.
        beat: Number of times the note has been written.
    """

    rank: int
    host: str
    pid: int
    launch: str
    progress: int = 0
    phase: str = "start"
    step: int = 0
    where: str = ""
    waits: bool = False
    beat: int = 0

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid}) on {self.host}"


class Watchdog:
    """Records this rank's progress, and ends the process when a rank hangs. The main thread must create it.

    With a single rank it does nothing.

    Args:
        run: Run directory, and time limit of each phase without progress.
        peers: Reports the ranks that hang.
    """

    def __init__(self, run: RunConfig, peers: PeerWatch) -> None:
        self._run, self._peers = run, peers
        self._directory = Path(run.dir) / _DIRECTORY
        self._world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._note = Note(rank(), socket.gethostname(), os.getpid(), run_lock.launch_id())
        # Only the main thread writes this tuple, and replaces it as a whole, so the watching thread needs no lock.
        self._progress, self._since = (0, "start", 0), time.monotonic()
        self._ended = threading.Event()
        self._main = threading.main_thread().ident
        self._interval = min(run.timeout_seconds / _NOTES, _MOST_SECONDS)
        if self._world_size > 1:
            self._directory.mkdir(parents=True, exist_ok=True)
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def enter(self, phase: str, step: int) -> None:
        """Record that the main thread has reached a phase. All ranks call it at the same points."""
        self._progress, self._since = (self._progress[0] + 1, phase, step), time.monotonic()
        self._peers.step = step

    def close(self) -> None:
        """Stop watching; the run has ended."""
        self._ended.set()
        if self._world_size > 1:
            self._path(rank()).unlink(missing_ok=True)
            # rmdir fails until the last rank has removed its note.
            with suppress(OSError):
                self._directory.rmdir()

    def _path(self, number: int) -> Path:
        return self._directory / f"{number:05d}.json"

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(self._interval):
            now = time.monotonic()
            if now - last > 5 * self._interval:
                # This process itself was suspended (Ctrl-Z), which is not a hang.
                self._since += now - last
            last = now
            self._write()
            if now - self._since > self._run.phase_seconds(self._progress[1]):
                self._end_unless_it_goes_on()

    def _write(self) -> None:
        where, waits = _innermost(sys._current_frames().get(self._main or 0))
        progress, phase, step = self._progress
        self._note = replace(
            self._note, progress=progress, phase=phase, step=step, where=where, waits=waits, beat=self._note.beat + 1
        )
        # No fsync: beside a save it may take long, and a late note looks like a hang.
        temporary = self._path(rank()).with_suffix(".tmp")
        # A full disk or an unreachable file server must not end the run here.
        with suppress(OSError):
            temporary.write_text(json.dumps(asdict(self._note)) + "\n")
            temporary.replace(self._path(rank()))

    def _end_unless_it_goes_on(self) -> None:
        """Report the ranks that are behind, once over all ranks, and exit."""
        stuck, before = self._progress, self._notes()
        # Every live rank has time to write another note.
        for _ in range(5):
            time.sleep(self._interval)
            self._write()
        after = self._notes()
        if self._progress != stuck:
            return
        behind = who_is_behind(before, after, self._world_size)
        if rank() in behind:
            faulthandler.dump_traceback(all_threads=True)
        healthy = [number for number, note in after.items() if number not in behind and _beats(before, note)]
        if rank() == min(healthy, default=rank()):
            _, phase, step = stuck
            self._peers.report(
                sorted(behind),
                f"no progress for {self._run.phase_seconds(phase):.0f} s in {phase}, step {step}: "
                f"{'; '.join(behind.values()) or 'every rank waits for others'} "
                f"(run.timeout_seconds={self._run.timeout_seconds:g})",
            )
        else:
            # Another rank reports. This one must not exit before the report is complete.
            time.sleep(5 * self._interval)
        leave_at_once()

    def _notes(self) -> dict[int, Note]:
        """The latest notes of this launch's ranks."""
        found = {}
        for number in range(self._world_size):
            with suppress(OSError, ValueError, TypeError):
                note = Note(**json.loads(self._path(number).read_text()))
                if note.launch == self._note.launch:
                    found[number] = note
        return found


def _beats(before: dict[int, Note], note: Note) -> bool:
    return note.rank not in before or before[note.rank].beat != note.beat


def who_is_behind(before: dict[int, Note], after: dict[int, Note], world_size: int) -> dict[int, str]:
    """The ranks that block the others, with a description of each, from two successive sets of notes.

    In order of precedence: ranks that no longer write notes; ranks with less progress than others; ranks that, unlike
    others, are not waiting.
    """
    silent = {number: f"rank {number} has not started" for number in range(world_size) if number not in after}
    for number, note in after.items():
        if not _beats(before, note):
            silent[number] = f"{note} does not respond since {note.phase}, step {note.step}"
    if silent:
        return silent
    farthest = max(note.progress for note in after.values())
    late = _described(note for note in after.values() if note.progress < farthest)
    if late:
        return late
    busy = _described(note for note in after.values() if not note.waits)
    # If all ranks wait, nobody is known to be at fault.
    return busy if len(busy) < world_size else {}


def _described(notes: Iterable[Note]) -> dict[int, str]:
    return {note.rank: f"{note} is behind, in {note.phase}, step {note.step}, in {note.where}" for note in notes}


def _innermost(frame: FrameType | None) -> tuple[str, bool]:
    """The function that a thread is in, and whether it waits for other ranks."""
    if frame is None:
        return "", False
    code = frame.f_code
    files = []
    while frame is not None:
        files.append(frame.f_code.co_filename)
        frame = frame.f_back
    return f"{code.co_name} ({Path(code.co_filename).name}:{code.co_firstlineno})", waits_for_others(files)


def waits_for_others(files: list[str]) -> bool:
    """Whether a stack, given as its file names from innermost to outermost, waits for other ranks."""
    # torch.distributed.checkpoint writes files: a rank that hangs there is the culprit, not a victim.
    within = ("/torch/distributed/" in file and "/torch/distributed/checkpoint/" not in file for file in files)
    return files[0].endswith(_WAITS_OF_MCORE) or any(within)
