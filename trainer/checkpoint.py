"""Checkpoints that are whole or not there: a temporary directory, checksums of every file, one rename.

    checkpoints/step_00000100/
        state/            parameters, optimizer and RNG state, in the engine's own format
        config.yaml       the resolved configuration
        progress.json     step and tokens
        tokenizer/        the tokenizer that the data was made with
        checksums.json    SHA-256 of every other file; a checkpoint without it was never finished

The engine's format contains pickles: load checkpoints from runs that you trust.
"""

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from trainer.cli import ConfigError
from trainer.data.tokenizer import Tokenizer
from trainer.engines.base import Engine, PendingSave

_NAME = re.compile(r"step_(\d{8,})")
_CHECKSUMS = "checksums.json"
_SECONDS_BETWEEN_LOOKS = 0.05


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: Optimizer steps taken; the data's position and the schedule follow from it.
        tokens: Tokens trained on.
        skipped: Steps skipped for a non-finite loss or gradient.
    """

    step: int = 0
    tokens: int = 0
    skipped: int = 0


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints of a run by name, oldest first, whole or not."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ConfigError(f"{path} is not a checkpoint: its name should look like step_00000100")
    return int(match.group(1))


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None if every file is as it was written."""
    try:
        checksums: dict[str, str] = json.loads((path / _CHECKSUMS).read_text())
    except FileNotFoundError:
        return f"{_CHECKSUMS} is missing: the save did not finish"
    except ValueError:
        return f"{_CHECKSUMS} is not readable"
    for name, digest in checksums.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _digest(path / name) != digest:
            return f"{name} does not match its checksum"
    return None


def find_latest(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and one line for each that was passed over, half-written ones included."""
    complaints = [
        f"{path} was not finished and is passed over" for path in sorted((run_dir / "checkpoints").glob(".saving_*"))
    ]
    for path in reversed(list_checkpoints(run_dir)):
        reason = damage(path)
        if reason is None:
            return path, complaints
        complaints.append(f"{path} is damaged and passed over: {reason}")
    return None, complaints


def read_progress(path: Path) -> Progress:
    """The progress that a checkpoint holds."""
    return Progress(**json.loads((path / "progress.json").read_text()))


def save(
    engine: Engine, run_dir: Path, progress: Progress, config_yaml: str, tokenizer: Tokenizer | None, keep: int
) -> Path:
    """Save, then remove all but the newest `keep` checkpoints (0 keeps all). Every rank calls it.

    A crash at any point leaves the earlier checkpoints as they were, and at most a `.saving_` directory.
    """
    target = checkpoint_path(run_dir, progress.step)
    _open(engine, target, progress, config_yaml, tokenizer)
    engine.save(_unfinished(target) / "state")
    engine.barrier()
    if engine.rank == 0:
        _publish(run_dir, target, keep)
    engine.barrier()
    return target


class BackgroundSave:
    """A save of the state as it is now, written by threads while training goes on. Arguments as `save`.

    Every rank makes one and advances it between steps, where the ranks agree how far they are: all write, then rank 0
    seals and publishes. Till then there is a `.saving_` directory at most, and the earlier checkpoints stay.

    Attributes:
        path: Where the checkpoint will lie.
    """

    def __init__(
        self,
        engine: Engine,
        run_dir: Path,
        progress: Progress,
        config_yaml: str,
        tokenizer: Tokenizer | None,
        keep: int,
    ) -> None:
        self.path = checkpoint_path(run_dir, progress.step)
        self._engine = engine
        self._publish = partial(_publish, run_dir, self.path, keep)
        _open(engine, self.path, progress, config_yaml, tokenizer)
        self._pending: PendingSave | None = engine.begin_save(_unfinished(self.path) / "state")
        self._work = _Work(self._pending.write)

    def advance(self, wait: bool = False) -> bool:
        """Whether the checkpoint is published; with `wait`, once it is. Every rank calls it.

        Raises:
            Exception: what a write raised, on its rank; on the others that it failed.
        """
        while True:
            if wait:
                # Not for ever: a rank whose write waits for that of a rank that failed has to hear of it.
                self._work.join(_SECONDS_BETWEEN_LOOKS)
            if not self._agreed_that_all_have_ended():
                if wait:
                    continue
                return False
            if self._pending is None:
                return True
            self._pending.finish()
            self._pending = None
            self._work = _Work(self._publish if self._engine.rank == 0 else lambda: None)

    def _agreed_that_all_have_ended(self) -> bool:
        ended, error = not self._work.is_alive(), self._work.error
        unfinished, failed = self._engine.all_reduce([float(not ended), float(error is not None)])
        if error is not None:
            raise error
        if failed > 0:
            raise RuntimeError(f"{self.path} could not be written: another rank failed, and its log says why")
        return unfinished == 0


class _Work(threading.Thread):
    """A function that runs in a thread from now on; what it raised is its `error`."""

    def __init__(self, function: Callable[[], None]) -> None:
        # A daemon, for a run that fails must not wait for a write that may never end.
        super().__init__(name="checkpoint", daemon=True)
        self.error: BaseException | None = None
        self._function = function
        self.start()

    def run(self) -> None:
        try:
            self._function()
        except BaseException as error:
            self.error = error


def _unfinished(target: Path) -> Path:
    """Where a checkpoint lies until it is whole."""
    return target.with_name(f".saving_{target.name}")


def _open(engine: Engine, target: Path, progress: Progress, config_yaml: str, tokenizer: Tokenizer | None) -> None:
    """Make the unfinished checkpoint with all but the engine's part. Every rank calls it."""
    if engine.rank == 0:
        directory = _unfinished(target)
        shutil.rmtree(directory, ignore_errors=True)
        (directory / "state").mkdir(parents=True)
        (directory / "config.yaml").write_text(config_yaml)
        if tokenizer is not None:
            (directory / "tokenizer").mkdir()
            tokenizer.save(directory / "tokenizer")
        (directory / "progress.json").write_text(json.dumps(asdict(progress)) + "\n")
    engine.barrier()


def _publish(run_dir: Path, target: Path, keep: int) -> None:
    """Give a written checkpoint its checksums and its name, then remove those that are too many."""
    _seal(_unfinished(target))
    if target.exists():
        # Only a damaged checkpoint can stand here: a run continues from its newest whole one.
        shutil.rmtree(target)
    os.replace(_unfinished(target), target)
    _sync(target.parent)
    _prune(run_dir, keep)


def _seal(directory: Path) -> None:
    """Write the checksums last, everything flushed to the disk before the rename that publishes it."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    checksums = {str(path.relative_to(directory)): _digest(path) for path in files}
    for path in files:
        _sync(path)
    (directory / _CHECKSUMS).write_text(json.dumps(checksums, indent=1) + "\n")
    for path in (directory / _CHECKSUMS, directory / "state", directory):
        _sync(path)


def _prune(run_dir: Path, keep: int) -> None:
    if keep:
        for path in list_checkpoints(run_dir)[:-keep]:
            shutil.rmtree(path)
    for path in (run_dir / "checkpoints").glob(".saving_*"):
        shutil.rmtree(path)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
