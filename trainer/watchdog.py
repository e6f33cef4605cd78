"""A rank that hangs is named, and the run ends. Imports neither torch nor megatron.

Ranks wait for each other in collectives, so one that hangs holds all of them, and the one whose collective times out
first is any of the others. Here each rank's main thread notes its progress, and a thread of its own writes the note to
run.dir/ranks/RANK.json. Where the main thread makes no progress for as long as its phase may take, the notes of all
ranks tell who is behind: who has not come as far, whose thread does not write either (a stopped process, a dead
machine), or whose main thread is not waiting for others.
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
# Where mcore's main thread waits in a call that has no Python frame of its own.
_WAITS_OF_MCORE = (
    "/megatron/core/pipeline_parallel/p2p_communication.py",
    "/megatron/core/pipeline_parallel/schedules.py",
    "/megatron/core/distributed/param_and_grad_buffer.py",
)
# Notes are written this often in the shortest time that a phase may take, at most every so many seconds.
_NOTES, _MOST_SECONDS = 20, 10.0


def dump_stacks_on_request() -> None:
    """Write every thread's stack to stderr on SIGQUIT, going on afterwards, and on a crash of the interpreter."""
    faulthandler.enable()
    faulthandler.register(signal.SIGQUIT, all_threads=True)


@dataclass(frozen=True)
class Note:
    """How far a rank has come.

    Attributes:
        rank: Which.
        host: Its machine.
        pid: Its process.
        launch: The launch that it belongs to.
        progress: How often its main thread has noted progress; the same work gives the same number on every rank.
        phase: What it does.
        step: Steps taken.
        where: The function that its main thread is in.
        waits: Whether that is a wait for other ranks.
        beat: How often this was written.
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
    """Notes this rank's progress, and ends the process when a rank hangs. To be made by the main thread.

    With one rank there is nobody to wait for, and it does nothing.

    Args:
        run: Has the run directory and the time that each phase may take without progress.
        peers: Writes down who hangs.
    """

    def __init__(self, run: RunConfig, peers: PeerWatch) -> None:
        self._run, self._peers = run, peers
        self._directory = Path(run.dir) / _DIRECTORY
        self._world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._note = Note(rank(), socket.gethostname(), os.getpid(), run_lock.launch_id())
        # Written by the main thread alone, and replaced as a whole: progress, phase, step.
        self._progress, self._since = (0, "start", 0), time.monotonic()
        self._ended = threading.Event()
        self._main = threading.main_thread().ident
        self._interval = min(run.timeout_seconds / _NOTES, _MOST_SECONDS)
        if self._world_size > 1:
            self._directory.mkdir(parents=True, exist_ok=True)
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def enter(self, phase: str, step: int) -> None:
        """The main thread has come this far. Every rank calls it at the same points."""
        self._progress, self._since = (self._progress[0] + 1, phase, step), time.monotonic()
        self._peers.step = step

    def close(self) -> None:
        """The run has ended."""
        self._ended.set()
        if self._world_size > 1:
            self._path(rank()).unlink(missing_ok=True)
            # The last one to leave takes the directory along.
            with suppress(OSError):
                self._directory.rmdir()

    def _path(self, number: int) -> Path:
        return self._directory / f"{number:05d}.json"

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(self._interval):
            now = time.monotonic()
            if now - last > 5 * self._interval:
                # This process itself was stopped (Ctrl-Z), which is not a hang.
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
        # Not flushed to the disk: that may take long beside a save, and a note that is late is taken for a hang.
        temporary = self._path(rank()).with_suffix(".tmp")
        # A full disk or an absent file server must not end the run from here.
        with suppress(OSError):
            temporary.write_text(json.dumps(asdict(self._note)) + "\n")
            temporary.replace(self._path(rank()))

    def _end_unless_it_goes_on(self) -> None:
        """Say who is behind, once over all ranks, and leave."""
        stuck, before = self._progress, self._notes()
        # Time for every rank that lives to write again.
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
            # The report is another's, and must not come after the end of this one.
            time.sleep(5 * self._interval)
        leave_at_once()

    def _notes(self) -> dict[int, Note]:
        """What the ranks of this launch have written last."""
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
    """The ranks that the others wait for, each with what is known of it, from their notes at two times.

    Those that do not write any more; else those that have come less far than others; else those that, unlike others,
    are not waiting.
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
    """Whether a stack, given by its files from the innermost out, is that of a rank that waits for others."""
    # torch.distributed.checkpoint writes files: a rank that hangs there is the one that the others wait for.
    within = ("/torch/distributed/" in file and "/torch/distributed/checkpoint/" not in file for file in files)
    return files[0].endswith(_WAITS_OF_MCORE) or any(within)
