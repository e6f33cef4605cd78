"""Run directory ownership: one rank 0 of one launch, named in `run.dir/lock`. Imports neither torch nor megatron.

The lock file is created exclusively, which is atomic on network file systems too, and holds the owner as JSON. A thread
renews its modification time every HEARTBEAT_SECONDS, even during a long step or save. A lock is stale, and may be taken
over, if

- its process has ended (checked only on the same machine, where a killed run can therefore restart at once);
- its owner is on another machine and has not renewed it for STALE_SECONDS, by the file server's clock;
- it belongs to an earlier start of the same SLURM job, which has been requeued.
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
# Upper bound on the takeover of a stale lock, which takes milliseconds.
_TAKEOVER_SECONDS = 30.0
_LOCK, _TAKEOVER = "lock", "lock.takeover"


@dataclass(frozen=True)
class Owner:
    """The owner of a run directory.

    Attributes:
        host: Host name.
        pid: Process id of rank 0.
        machine: Scope within which the pid is unique: host, boot and pid namespace.
        began: Start time of the process in clock ticks since boot, from /proc, because pids are reused.
        launch: Identifier that all ranks of a launch share.
        job: SLURM job id; empty outside a job.
        restarts: Number of times SLURM has restarted the job.
        since: Local time at which the lock was taken.
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
        """The owner that rank 0 of this launch represents."""
        host, pid = socket.gethostname(), os.getpid()
        machine, began = _machine(), _process_began(pid) or 0
        job, restarts = os.environ.get("SLURM_JOB_ID", ""), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        return Owner(host, pid, machine, began, launch_id(), job, restarts, time.strftime("%Y-%m-%d %H:%M:%S"))

    def is_same_process(self, other: "Owner") -> bool:
        """Whether both are the same process."""
        return (self.machine, self.pid, self.began) == (other.machine, other.pid, other.began)

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}" + (f" (SLURM job {self.job})" if self.job else "")


def _machine() -> str:
    parts = [socket.gethostname()]
    # macOS has neither file: there the host name has to do.
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def launch_id() -> str:
    """An identifier shared by all ranks of a launch and by no other running launch."""
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SPIKETRAIN_LAUNCH")
    if "MASTER_PORT" in os.environ:
        address = os.environ.get("MASTER_ADDR", "")
        # A loopback address exists on every machine, so the host name is needed to tell launches apart; all ranks are
        # local.
        machine = [socket.gethostname()] if address in ("localhost", "::1") or address.startswith("127.") else []
        return " ".join([*machine, *(os.environ.get(name, "") for name in names)])
    return f"{_machine()} {os.getpid()} {_process_began(os.getpid())}"


def _process_began(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; 0 without /proc; None if the process has ended."""
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            return 0
        return 0
    try:
        # The second field, the name in brackets, may contain anything, so split after it. The next field is the 3rd
        # (state); the start time is the 22nd.
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    # Z and X: a zombie or dead process holds nothing.
    return None if fields[0] in "ZX" else int(fields[19])


class _Lock:
    """The lock file of a run directory, and the thread that renews it."""

    def __init__(self, directory: Path) -> None:
        self.path, self.owner = directory / _LOCK, Owner.this_process()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="run lock", daemon=True)

    def hold(self) -> None:
        """Start renewing the lock."""
        self._thread.start()

    def _renew(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            try:
                os.utime(self.path)
            except FileNotFoundError:
                # Someone removed the file by hand. We still own the run, unless another process takes it or we have
                # released it.
                with suppress(OSError):
                    if not self._ended.is_set():
                        _create(self.path, self.owner)
            except OSError:
                # The file server may be unreachable for a moment; retry at the next heartbeat.
                continue
            current = _read(self.path)
            if current is not None and not current.is_same_process(self.owner):
                print(f"error: {self.path}: {current} has taken this run over; ending", file=sys.stderr, flush=True)
                os._exit(1)

    def release(self) -> None:
        """Remove the lock file if it is still ours."""
        self._ended.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
        _remove_if_owned(self.path, self.owner)


_held: dict[Path, _Lock] = {}


@contextmanager
def owned(run_dir: str | Path) -> Iterator[None]:
    """Own a run directory, creating it if necessary. A nested `owned` of the same directory does nothing.

    Only rank 0 takes the lock: if rank 0 is refused, its whole launch ends.

    Raises:
        ConfigError: another process owns the directory, or it cannot be created.
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
    """Release every lock of this process, for exits that run no `finally`."""
    while _held:
        _held.popitem()[1].release()


def belongs_to_this_launch(run_dir: str | Path) -> bool:
    """Whether no other launch owns the directory, so that a rank may record how the run ended."""
    current = _read(Path(run_dir) / _LOCK)
    return current is None or current.launch == launch_id()


def other_owner(run_dir: str | Path) -> Owner | None:
    """The owner of the directory if it is another process that is alive; None otherwise."""
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
    """A lock as found on disk: its owner (None if unreadable) and the seconds since its last renewal."""

    owner: Owner | None
    age: float

    def why_stale(self, ours: Owner) -> str | None:
        """The reason why `ours` may take the lock over; None if it may not."""
        owner = self.owner
        if owner is not None and owner.job and owner.job == ours.job and owner.restarts < ours.restarts:
            return f"it was held by an earlier start of SLURM job {owner.job}"
        if owner is not None and owner.machine == ours.machine:
            return None if _process_began(owner.pid) == owner.began else f"{owner} has ended without giving it back"
        if self.age <= STALE_SECONDS:
            return None
        return f"{owner or 'its unknown owner'} has not renewed it for {self.age:.0f} s"


def _look(directory: Path) -> _State | None:
    """Read the lock of a directory; None if there is none."""
    path = directory / _LOCK
    try:
        owner, renewed = _read(path), path.stat().st_mtime
    except FileNotFoundError:
        return None
    return _State(owner, _server_time(directory) - renewed)


def _server_time(directory: Path) -> float:
    """The current time by the file server's clock, which sets modification times."""
    # The clocks of two machines may differ by more than STALE_SECONDS, so a probe file asks the server.
    probe = directory / f".clock.{socket.gethostname()}.{os.getpid()}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _read(path: Path) -> Owner | None:
    """Read a lock file; None if it is missing or unreadable."""
    try:
        return Owner(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _remove_if_owned(path: Path, owner: Owner) -> None:
    current = _read(path)
    if current is not None and current.is_same_process(owner):
        path.unlink(missing_ok=True)


def _create(path: Path, owner: Owner) -> None:
    """Create a lock file exclusively.

    Raises:
        FileExistsError: the file exists already.
    """
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(json.dumps(asdict(owner)) + "\n")
    except OSError:
        # On a full disk: an empty lock file would only block later launches.
        path.unlink(missing_ok=True)
        raise


def _take(directory: Path) -> None:
    """Create the lock, taking over a stale one if necessary.

    Raises:
        ConfigError: another live process owns the directory.
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
        # Several processes may find the lock stale. The takeover lock lets one at a time remove it, after a second
        # look.
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
                # The process that created the takeover lock was killed before it removed it.
                _clear(path, seen)
            time.sleep(0.05)
    try:
        yield
    finally:
        _remove_if_owned(path, ours)


def _mark(path: Path) -> tuple[int, int] | None:
    """Inode and modification time, which distinguish successive files of the same name; None if there is no file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _clear(path: Path, seen: tuple[int, int] | None) -> None:
    """Remove the takeover file `seen` and no other. If several processes try, one succeeds."""
    # rename is atomic; unlink could hit a newer file that another process has created since.
    aside = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}")
    with suppress(FileNotFoundError):
        path.rename(aside)
        if _mark(aside) != seen:
            # Another process was faster, and this file is its new takeover lock: put it back.
            with suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()
