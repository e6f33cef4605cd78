"""A run directory has one owner: rank 0 of one launch, named in `run.dir/lock`. Imports neither torch nor megatron.

The file is created exclusively, which file servers do atomically, too, and holds the owner as JSON. A thread renews its
modification time every HEARTBEAT_SECONDS, also while a step or a save takes long. A lock is stale, and taken over, if

- its process is gone: this is asked on the same machine only, where a killed run can be started again at once;
- on another machine it was not renewed for STALE_SECONDS, by the clock of the file server;
- it is of an earlier start of the same SLURM job, which has been queued again.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.errors import ConfigError
from trainer.runtime import rank

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 120.0
# A process that takes over a stale lock needs milliseconds for it.
_TAKEOVER_SECONDS = 30.0
_LOCK, _TAKEOVER = "lock", "lock.takeover"


@dataclass(frozen=True)
class Owner:
    """Who has a run directory.

    Attributes:
        host: Name of the machine.
        pid: Process of rank 0.
        machine: What a process id means something on: host, boot and pid namespace.
        began: When the process began, in clock ticks since boot, as /proc tells it: process ids are used again.
        launch: The same for every rank of a launch.
        job: SLURM's job id; empty outside of a job.
        restarts: How often SLURM has started the job again.
        since: When the lock was taken, local time.
    """

    host: str
    pid: int
    machine: str
    began: int
    launch: str
    job: str
    restarts: int
    since: str

    @staticmethod
    def this_process() -> "Owner":
        """The owner that rank 0 of this launch is."""
        host, pid = socket.gethostname(), os.getpid()
        machine, began = _machine(), _process_began(pid) or 0
        job, restarts = os.environ.get("SLURM_JOB_ID", ""), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        return Owner(host, pid, machine, began, launch_id(), job, restarts, time.strftime("%Y-%m-%d %H:%M:%S"))

    def is_same_process(self, other: "Owner") -> bool:
        """Whether both are one process."""
        return (self.machine, self.pid, self.began) == (other.machine, other.pid, other.began)

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}" + (f" (SLURM job {self.job})" if self.job else "")


def _machine() -> str:
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def launch_id() -> str:
    """The same for every rank of a launch, and for no other launch that still runs."""
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SPIKETRAIN_LAUNCH")
    if "MASTER_PORT" in os.environ:
        address = os.environ.get("MASTER_ADDR", "")
        # Every machine has such an address: then all ranks are on this one.
        machine = [socket.gethostname()] if address in ("localhost", "::1") or address.startswith("127.") else []
        return " ".join([*machine, *(os.environ.get(name, "") for name in names)])
    return f"{_machine()} {os.getpid()} {_process_began(os.getpid())}"


def _process_began(pid: int) -> int | None:
    """When a process began, in clock ticks since boot; 0 without /proc; None if it has ended."""
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            return 0
        return 0
    try:
        # The name, in brackets, may hold anything. Then the state, the 3rd field; the beginning is the 22nd.
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


class _Lock:
    """The lock file of a run directory and its renewal."""

    def __init__(self, directory: Path) -> None:
        self.path, self.owner = directory / _LOCK, Owner.this_process()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="run lock", daemon=True)

    def hold(self) -> None:
        """Renew the lock from now on."""
        self._thread.start()

    def _renew(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            try:
                os.utime(self.path)
            except FileNotFoundError:
                # Somebody removed it by hand; it is ours until another has it, or until it is given back.
                with suppress(OSError):
                    if not self._ended.is_set():
                        _create(self.path, self.owner)
            except OSError:
                # A file server that is away for a moment: the next time may do.
                continue
            current = _read(self.path)
            if current is not None and not current.is_same_process(self.owner):
                print(f"error: {self.path}: {current} has taken this run over; ending", file=sys.stderr, flush=True)
                os._exit(1)

    def release(self) -> None:
        """Give the lock back, if it is still ours."""
        self._ended.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
        _remove_if_owned(self.path, self.owner)


_held: dict[Path, _Lock] = {}


@contextmanager
def owned(run_dir: str | Path) -> Iterator[None]:
    """Own a run directory, which is made if it is not there; within another `owned` of it this does nothing.

    Only rank 0 takes the lock: the launch that it belongs to ends if rank 0 is refused.

    Raises:
        ConfigError: another process has it, or it cannot be made.
    """
    directory = Path(run_dir).absolute()
    if rank() != 0 or directory in _held:
        yield
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _take(directory)
    except OSError as error:
        raise ConfigError(f"run.dir: {run_dir} cannot be written ({error.strerror}); name another directory") from error
    lock = _held[directory] = _Lock(directory)
    lock.hold()
    try:
        yield
    finally:
        release()


def release() -> None:
    """Give back what this process owns: before an exit that runs no `finally`."""
    while _held:
        _held.popitem()[1].release()


def belongs_to_this_launch(run_dir: str | Path) -> bool:
    """Whether no other launch has the directory: a rank may write down how the run ended."""
    current = _read(Path(run_dir) / _LOCK)
    return current is None or current.launch == launch_id()


def other_owner(run_dir: str | Path) -> Owner | None:
    """The other process that has the directory and is alive, if there is one."""
    directory = Path(run_dir)
    try:
        state = _look(directory)
    except OSError:
        return None
    if state is None or state.owner is None or state.owner.is_same_process(Owner.this_process()):
        return None
    return None if state.why_stale(Owner.this_process()) else state.owner


@dataclass(frozen=True)
class _State:
    """A lock as it was found: its owner, None where it cannot be read, and the seconds since it was renewed."""

    owner: Owner | None
    age: float

    def why_stale(self, ours: Owner) -> str | None:
        """Why `ours` may take it over; None if it may not."""
        owner = self.owner
        if owner is not None and owner.job and owner.job == ours.job and owner.restarts < ours.restarts:
            return f"it was held by an earlier start of SLURM job {owner.job}"
        if owner is not None and owner.machine == ours.machine:
            return None if _process_began(owner.pid) == owner.began else f"{owner} has ended without giving it back"
        if self.age <= STALE_SECONDS:
            return None
        return f"{owner or 'its unknown owner'} has not renewed it for {self.age:.0f} s"


def _look(directory: Path) -> _State | None:
    """The lock of a directory; None where there is none."""
    path = directory / _LOCK
    try:
        owner, renewed = _read(path), path.stat().st_mtime
    except FileNotFoundError:
        return None
    return _State(owner, _server_time(directory) - renewed)


def _server_time(directory: Path) -> float:
    """Now, by the clock that modification times are given by."""
    probe = directory / f".clock.{socket.gethostname()}.{os.getpid()}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _read(path: Path) -> Owner | None:
    """What a lock says; None where there is none, or it cannot be read."""
    try:
        return Owner(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _remove_if_owned(path: Path, owner: Owner) -> None:
    current = _read(path)
    if current is not None and current.is_same_process(owner):
        path.unlink(missing_ok=True)


def _create(path: Path, owner: Owner) -> None:
    """Create a lock file.

    Raises:
        FileExistsError: there is one.
    """
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(json.dumps(asdict(owner)) + "\n")
    except OSError:
        # A full disk: an empty lock would only be in the way.
        path.unlink(missing_ok=True)
        raise


def _take(directory: Path) -> None:
    """Create the lock, over a stale one if need be.

    Raises:
        ConfigError: another process has it.
    """
    ours, path = Owner.this_process(), directory / _LOCK
    while True:
        try:
            _create(path, ours)
            return
        except FileExistsError:
            state = _look(directory)
        if state is None:
            continue
        reason = state.why_stale(ours)
        if reason is None:
            raise ConfigError(_in_use(directory, state))
        # Of several that find it stale one at a time may remove it, and looks again before it does.
        with _taking_over(directory):
            again = _look(directory)
            reason = None if again is None else again.why_stale(ours)
            if reason is None:
                continue
            print(f"{path} is taken over: {reason}", file=sys.stderr, flush=True)
            path.unlink(missing_ok=True)


def _in_use(directory: Path, state: _State) -> str:
    owner = state.owner
    who = "another process" if owner is None else f"{owner}, since {owner.since}"
    return (
        f"run.dir: {directory} is in use by {who}, last heard of {max(state.age, 0):.0f} s ago; stop that run, or "
        f"choose another run.dir (a lock that is not renewed for {STALE_SECONDS:.0f} s is taken over)"
    )


@contextmanager
def _taking_over(directory: Path) -> Iterator[None]:
    path, ours = directory / _TAKEOVER, Owner.this_process()
    seen, end = None, 0.0
    while True:
        try:
            _create(path, ours)
            break
        except FileExistsError:
            current = _mark(path)
            if current != seen:
                seen, end = current, time.monotonic() + _TAKEOVER_SECONDS
            elif time.monotonic() > end:
                # Whoever made it was killed in between.
                _clear(path, seen)
            time.sleep(0.05)
    try:
        yield
    finally:
        _remove_if_owned(path, ours)


def _mark(path: Path) -> tuple[int, int] | None:
    """What tells a file from another that comes after it under the same name; None where there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _clear(path: Path, seen: tuple[int, int] | None) -> None:
    """Remove the takeover file that was `seen`, and no other: of several processes that try one succeeds."""
    aside = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}")
    with suppress(FileNotFoundError):
        path.rename(aside)
        if _mark(aside) != seen:
            # Another process was faster, and this is its own.
            with suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()
