"""Checkpoints that are whole or not there: a temporary directory, checksums of every file, one rename.

    checkpoints/step_00000100/
        state/            parameters, optimizer and RNG state (trainer.engines.pieces)
        config.yaml       the resolved configuration
        progress.json     step and tokens
        callbacks.json    the state of each callback that has one, by its name, with its version
        tokenizer/        the tokenizer that the data was made with
        checksums.json    SHA-256 of every other file; a checkpoint without it was never finished

Every rank flushes and hashes the files that it has written; before a run goes on, every rank looks at a share of them.
A checkpoint that a run went back past, since it is damaged, is kept beside the others as `damaged_step_00000100`.
"""

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from trainer import checksums
from trainer.callbacks.base import Callback
from trainer.config import CheckpointConfig
from trainer.data.tokenizer import Tokenizer
from trainer.durable import flush_to_disk
from trainer.engines import pieces
from trainer.engines.base import Engine
from trainer.errors import ConfigError
from trainer.run_directory import checkpoint_path as checkpoint_path
from trainer.run_directory import list_checkpoints as list_checkpoints
from trainer.run_directory import step_of as step_of

_LOGGER = logging.getLogger("spiketrain")
_CALLBACKS = "callbacks.json"
_SECONDS_BETWEEN_LOOKS = 0.05
# What becomes of a checkpoint: it is written, it is about to be removed, it was found damaged.
_SAVING, _REMOVING, _DAMAGED = ".saving_", ".removing_", "damaged_"
_IS_DAMAGED = " is damaged and passed over: "


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


@dataclass(frozen=True)
class RunState:
    """What a checkpoint holds of a run beside the engine's state, as it is at the moment of the save.

    Attributes:
        progress: How far it has come.
        config_yaml: The resolved configuration.
        tokenizer: The one that the data was made with; None where it is not known.
        callbacks: States by name, each {"version", "state"} (trainer.callbacks.base.Callback).
    """

    progress: Progress
    config_yaml: str
    tokenizer: Tokenizer | None
    callbacks: dict[str, dict[str, Any]]

    @staticmethod
    def of_callbacks(callbacks: Iterable[Callback]) -> dict[str, dict[str, Any]]:
        """The states of those that have one, for `callbacks`."""
        return {
            callback.state_name: {"version": callback.state_version, "state": callback.state_dict()}
            for callback in callbacks
            if callback.state_name is not None
        }

    def write(self, directory: Path) -> None:
        """Write it into a checkpoint's directory."""
        (directory / "config.yaml").write_text(self.config_yaml)
        if self.tokenizer is not None:
            (directory / "tokenizer").mkdir()
            self.tokenizer.save(directory / "tokenizer")
        (directory / "progress.json").write_text(json.dumps(asdict(self.progress)) + "\n")
        (directory / _CALLBACKS).write_text(json.dumps(self.callbacks) + "\n")


@dataclass(frozen=True)
class Retention:
    """Which checkpoints of a run stay when there is a new one.

    Attributes:
        newest: So many of the newest; 0 all.
        steps: Those of the multiples of so many steps, too; 0 none.
    """

    newest: int = 0
    steps: int = 0

    @staticmethod
    def of(config: CheckpointConfig) -> "Retention":
        """What a configuration asks for."""
        return Retention(config.keep, config.every * config.keep_every)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None if every file is as it was written; one process reads them all."""
    try:
        listed = _listed(path)
    except ValueError as error:
        return str(error)
    return _mismatch(checksums.wrong_files(path, listed, listed))


def _listed(path: Path) -> dict[str, str]:
    """The digests of a checkpoint's files, among which are all that its parameters lie in.

    Raises:
        ValueError: what is wrong with it.
    """
    listed = checksums.read(path)
    if wrong := checksums.wrong_files(path, listed, [checksums.METADATA]):
        raise ValueError(_mismatch(wrong))
    for name in sorted(pieces.files_of(path / "state")):
        if f"state/{name}" not in listed:
            raise ValueError(f"{checksums.NAME} does not list state/{name}")
    return listed


def _mismatch(wrong: list[str]) -> str | None:
    return f"{wrong[0]} does not match its checksum" if wrong else None


def _damage_over_ranks(engine: Engine, path: Path) -> str | None:
    """As `damage`, each rank reading a share of the files. Every rank calls it."""
    found: tuple[dict[str, str], list[str]] | str = ""
    if engine.rank == 0:
        try:
            listed = _listed(path)
            # Dealt out like cards, so that the large ones are spread.
            found = listed, sorted(listed, key=lambda name: -(path / name).stat().st_size)
        except (ValueError, OSError) as error:
            found = str(error)
    found = engine.collectives.broadcast(found)
    if isinstance(found, str):
        return found
    listed, by_size = found
    wrong = set(checksums.wrong_files(path, listed, by_size[engine.rank :: engine.world_size]))
    is_wrong = engine.collectives.any_rank([name in wrong for name in by_size])
    return _mismatch([name for name, wrong_here in zip(by_size, is_wrong, strict=True) if wrong_here])


def find_latest(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and one line for each that was passed over, half-written ones included."""
    return _newest_whole(run_dir, list_checkpoints(run_dir), damage)


def find_latest_over_ranks(engine: Engine, run_dir: Path) -> tuple[Path | None, list[str]]:
    """As `find_latest`; every rank calls it, and all get the same."""
    paths = engine.collectives.broadcast(list_checkpoints(run_dir) if engine.rank == 0 else None)
    found = _newest_whole(run_dir, paths, partial(_damage_over_ranks, engine))
    return engine.collectives.broadcast(found)


def _newest_whole(
    run_dir: Path, paths: list[Path], damage_of: Callable[[Path], str | None]
) -> tuple[Path | None, list[str]]:
    unfinished = sorted((run_dir / "checkpoints").glob(f"{_SAVING}*"))
    complaints = [f"{path} was not finished and is passed over" for path in unfinished]
    for path in reversed(paths):
        reason = damage_of(path)
        if reason is None:
            return path, complaints
        complaints.append(f"{path}{_IS_DAMAGED}{reason}")
    return None, complaints


def damaged_ones(complaints: list[str]) -> list[str]:
    """Of the lines that `find_latest` gives those about damaged checkpoints, the newest first."""
    return [line for line in complaints if _IS_DAMAGED in line]


def set_damaged_aside(run_dir: Path, newest_whole: Path) -> list[Path]:
    """Give the checkpoints that a run goes back past other names; where they are now.

    Under their own they would count as newer than what the run saves next.
    """
    return [_set_aside(path) for path in list_checkpoints(run_dir) if step_of(path) > step_of(newest_whole)]


def _set_aside(path: Path) -> Path:
    target, number = path.with_name(f"{_DAMAGED}{path.name}"), 0
    while target.exists():
        number += 1
        target = path.with_name(f"{_DAMAGED}{path.name}.{number}")
    return path.rename(target)


def require_whole(engine: Engine, path: Path) -> None:
    """Look at a checkpoint that was named. Every rank calls it.

    Raises:
        ConfigError: it is damaged.
    """
    reason = _damage_over_ranks(engine, path)
    if reason:
        raise ConfigError(f"checkpoint.resume: {path} is damaged ({reason}); choose another checkpoint")


def read_progress(path: Path) -> Progress:
    """The progress that a checkpoint holds."""
    return Progress(**json.loads((path / "progress.json").read_text()))


def read_callbacks(path: Path, callbacks: Iterable[Callback]) -> list[tuple[Callback, dict[str, Any], int]]:
    """The states that a checkpoint has of these callbacks, each with its version; a callback without one begins anew.

    Raises:
        ConfigError: a state is of a later version than its callback's.
    """
    file = path / _CALLBACKS
    saved = json.loads(file.read_text()) if file.is_file() else {}
    found = []
    for callback in callbacks:
        if callback.state_name is None or (entry := saved.get(callback.state_name)) is None:
            continue
        if entry["version"] > callback.state_version:
            raise ConfigError(
                f"{file} has the state of {callback.state_name} in version {entry['version']}, and this version reads "
                f"up to {callback.state_version}; use the version that wrote it"
            )
        found.append((callback, entry["state"], entry["version"]))
    return found


def save(engine: Engine, run_dir: Path, state: RunState, keep: Retention) -> Path:
    """Save, then remove the checkpoints that need not stay. Every rank calls it.

    A crash at any point leaves the earlier checkpoints as they were, and at most a `.saving_` directory.
    """
    target = checkpoint_path(run_dir, state.progress.step)
    _open(engine, target, state)
    digests = engine.save(_unfinished(target) / "state")
    if engine.rank == 0:
        _publish(run_dir, target, keep, digests)
    engine.collectives.barrier()
    return target


class BackgroundSave:
    """A save of the state as it is now, written by threads while training goes on. Arguments as `save`.

    Every rank makes one and advances it between steps, where the ranks agree how far they are: all write, then rank 0
    seals and publishes. Till then there is a `.saving_` directory at most, and the earlier checkpoints stay.

    Attributes:
        path: Where the checkpoint will lie.
    """

    def __init__(self, engine: Engine, run_dir: Path, state: RunState, keep: Retention) -> None:
        self.path = checkpoint_path(run_dir, state.progress.step)
        self._engine = engine
        self._publish = partial(_publish, run_dir, self.path, keep)
        _open(engine, self.path, state)
        self._written = False
        self._work = _Work(engine.begin_save(_unfinished(self.path) / "state").write)

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
            if self._written:
                return True
            self._written = True
            self._work = _Work(partial(self._publish, self._work.result) if self._engine.rank == 0 else dict)

    def _agreed_that_all_have_ended(self) -> bool:
        ended, error = not self._work.is_alive(), self._work.error
        unfinished, failed = self._engine.collectives.any_rank([not ended, error is not None])
        if error is not None:
            raise error
        if failed:
            raise RuntimeError(f"{self.path} could not be written: another rank failed, and its log says why")
        return not unfinished


class _Work(threading.Thread):
    """A function that runs in a thread from now on; what it gave is its `result`, what it raised its `error`."""

    def __init__(self, function: Callable[[], Any]) -> None:
        # A daemon, for a run that fails must not wait for a write that may never end.
        super().__init__(name="checkpoint", daemon=True)
        self.result: Any = None
        self.error: BaseException | None = None
        self._function = function
        self.start()

    def run(self) -> None:
        try:
            self.result = self._function()
        except BaseException as error:
            self.error = error


def _unfinished(target: Path) -> Path:
    """Where a checkpoint lies until it is whole."""
    return target.with_name(f"{_SAVING}{target.name}")


def _open(engine: Engine, target: Path, state: RunState) -> None:
    """Make the unfinished checkpoint with all but the engine's part. Every rank calls it."""
    if engine.rank == 0:
        directory = _unfinished(target)
        shutil.rmtree(directory, ignore_errors=True)
        (directory / "state").mkdir(parents=True)
        state.write(directory)
    engine.collectives.barrier()


def _publish(run_dir: Path, target: Path, keep: Retention, digests: dict[str, str]) -> None:
    """Give a written checkpoint its checksums and its name, then remove those that need not stay.

    `digests` are those of the files in `state`, which their writers have flushed to the disk.
    """
    _seal(_unfinished(target), digests)
    if target.exists():
        # Only a damaged checkpoint can stand here: a run continues from its newest whole one.
        _set_aside(target)
    os.replace(_unfinished(target), target)
    for path in (target.parent, run_dir):
        flush_to_disk(path)
    _prune(run_dir, keep, target)


def _seal(directory: Path, digests: dict[str, str]) -> None:
    """Write the checksums last, everything flushed to the disk before the rename that publishes it."""
    # The state's files are known from those who wrote them: a listing may miss what another host has written.
    own = sorted(path for path in directory.rglob("*") if path.is_file() and directory / "state" not in path.parents)
    listed = {str(path.relative_to(directory)): checksums.digest(path) for path in own}
    for path in own:
        flush_to_disk(path)
    listed |= {f"state/{name}": digests[name] for name in sorted(digests)}
    (directory / checksums.NAME).write_text(json.dumps(listed, indent=1) + "\n")
    folders = sorted(path for path in directory.rglob("*") if path.is_dir())
    for path in (directory / checksums.NAME, *folders, directory):
        flush_to_disk(path)


def _prune(run_dir: Path, keep: Retention, newest: Path) -> None:
    """Remove what failed removals and saves have left, and the checkpoints before `newest` that need not stay."""
    for path in (*newest.parent.glob(f"{_REMOVING}*"), *newest.parent.glob(f"{_SAVING}*")):
        _remove(path)
    if keep.newest:
        # What lies after it, if anything does, is none of this run's.
        for path in [path for path in list_checkpoints(run_dir) if step_of(path) <= step_of(newest)][: -keep.newest]:
            if not keep.steps or step_of(path) % keep.steps:
                _remove(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint, which first loses its name. Training goes on where that fails; the next save tries again."""
    try:
        if not path.name.startswith("."):
            path = path.rename(path.with_name(f"{_REMOVING}{path.name}"))
        shutil.rmtree(path)
    except OSError as error:
        _LOGGER.warning("%s could not be removed, and is left for now: %s", path, error)
