"""Atomic checkpoints: a temporary directory, checksums of every file, then one rename.

    checkpoints/step_00000100/
        state/            parameters, optimizer and RNG state (trainer.engines.pieces)
        config.yaml       the resolved configuration
        progress.json     step and tokens
        callbacks.json    state and version of each stateful callback, by name
        tokenizer/        the tokenizer of the training data
        checksums.json    SHA-256 of every other file; a checkpoint without this file is incomplete

Every rank flushes and hashes the files that it writes. Before a run resumes, the ranks verify the files, each a share.
If a run goes back past a damaged checkpoint, it renames that one to `damaged_step_00000100`.
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

from trainer.callbacks.base import Callback
from trainer.config import CheckpointConfig
from trainer.data.tokenizer import Tokenizer
from trainer.durable import flush_to_disk
from trainer.engines import pieces
from trainer.engines.base import Engine
from trainer.errors import ConfigError
from trainer.run_directory import CALLBACKS
from trainer.run_directory import checkpoint_path as checkpoint_path
from trainer.run_directory import list_checkpoints as list_checkpoints
from trainer.run_directory import step_of as step_of
from trainer.stored import checksums

_LOGGER = logging.getLogger("spiketrain")
_SECONDS_BETWEEN_LOOKS = 0.05
# Prefixes of checkpoints that are being written, are about to be removed, or were found damaged.
_SAVING, _REMOVING, _DAMAGED = ".saving_", ".removing_", "damaged_"
_IS_DAMAGED = " is damaged and passed over: "


@dataclass(frozen=True)
class Progress:
    """The position of a run.

    Attributes:
        step: Optimizer steps taken. The data position and the schedule follow from it.
        tokens: Tokens trained on.
        skipped: Steps skipped because of a non-finite loss or gradient.
    """

    step: int = 0
    tokens: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class RunState:
    """The run's state that a checkpoint stores beside the engine's state, captured when the save starts.

    Attributes:
        progress: The position of the run.
        config_yaml: The resolved configuration.
        tokenizer: The tokenizer of the training data. None if unknown.
        callbacks: States by name, each {"version", "state"} (trainer.callbacks.base.Callback).
    """

    progress: Progress
    config_yaml: str
    tokenizer: Tokenizer | None
    callbacks: dict[str, dict[str, Any]]

    @staticmethod
    def of_callbacks(callbacks: Iterable[Callback]) -> dict[str, dict[str, Any]]:
        """Collect the states of stateful callbacks, for `callbacks`."""
        return {
            callback.state_name: {"version": callback.state_version, "state": callback.state_dict()}
            for callback in callbacks
            if callback.state_name is not None
        }

    def write(self, directory: Path) -> None:
        """Write this state into a checkpoint's directory."""
        (directory / "config.yaml").write_text(self.config_yaml)
        if self.tokenizer is not None:
            (directory / "tokenizer").mkdir()
            self.tokenizer.save(directory / "tokenizer")
        (directory / "progress.json").write_text(json.dumps(asdict(self.progress)) + "\n")
        (directory / CALLBACKS).write_text(json.dumps(self.callbacks) + "\n")


@dataclass(frozen=True)
class Retention:
    """The checkpoints that a run keeps after a new save.

    Attributes:
        newest: Number of newest checkpoints to keep. 0 keeps all.
        steps: Also keep checkpoints at multiples of this step. 0 keeps none of them.
    """

    newest: int = 0
    steps: int = 0

    @staticmethod
    def of(config: CheckpointConfig) -> "Retention":
        """Derive the retention from a configuration."""
        return Retention(config.keep, config.every * config.keep_every)


def damage(path: Path) -> str | None:
    """Describe the damage of a checkpoint, or return None if all files match. A single process reads them all."""
    try:
        listed = _listed(path)
    except ValueError as error:
        return str(error)
    return _mismatch(checksums.wrong_files(path, listed, listed))


def _listed(path: Path) -> dict[str, str]:
    """Return the digests of a checkpoint's files, which include every file with parameters.

    Raises:
        ValueError: the checkpoint is damaged; the message describes the damage.
    """
    listed = checksums.read(path)
    # Verify the metadata first: it names the files that hold the parameters.
    if wrong := checksums.wrong_files(path, listed, [checksums.METADATA]):
        raise ValueError(_mismatch(wrong))
    for name in sorted(pieces.files_of(path / "state")):
        if f"state/{name}" not in listed:
            raise ValueError(f"{checksums.NAME} does not list state/{name}")
    return listed


def _mismatch(wrong: list[str]) -> str | None:
    return f"{wrong[0]} does not match its checksum" if wrong else None


def _damage_over_ranks(engine: Engine, path: Path) -> str | None:
    """Like `damage`, but each rank reads a share of the files. Every rank calls this."""
    found: tuple[dict[str, str], list[str]] | str = ""
    if engine.rank == 0:
        try:
            listed = _listed(path)
            # Sorted by size and dealt round-robin, which spreads the large files over the ranks.
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
    """Return the newest whole checkpoint, and a line about each skipped one, including unfinished ones."""
    return _newest_whole(run_dir, list_checkpoints(run_dir), damage)


def find_latest_over_ranks(engine: Engine, run_dir: Path) -> tuple[Path | None, list[str]]:
    """Like `find_latest`. Every rank calls this and gets the same result."""
    # The list comes from rank 0: on a shared filesystem the ranks may see different directory contents.
    paths = engine.collectives.broadcast(list_checkpoints(run_dir) if engine.rank == 0 else None)
    found = _newest_whole(run_dir, paths, partial(_damage_over_ranks, engine))
    return engine.collectives.broadcast(found)


def _newest_whole(
    run_dir: Path, paths: list[Path], damage_of: Callable[[Path], str | None]
) -> tuple[Path | None, list[str]]:
    # A crash during a save leaves such directories.
    unfinished = sorted((run_dir / "checkpoints").glob(f"{_SAVING}*"))
    complaints = [f"{path} was not finished and is passed over" for path in unfinished]
    for path in reversed(paths):
        reason = damage_of(path)
        if reason is None:
            return path, complaints
        complaints.append(f"{path}{_IS_DAMAGED}{reason}")
    return None, complaints


def damaged_ones(complaints: list[str]) -> list[str]:
    """Select from `find_latest`'s lines those about damaged checkpoints, newest first."""
    return [line for line in complaints if _IS_DAMAGED in line]


def set_damaged_aside(run_dir: Path, newest_whole: Path) -> list[Path]:
    """Rename the checkpoints that a run goes back past, and return their new paths.

    Under their old names they would count as newer than the run's next save.
    """
    return [_set_aside(path) for path in list_checkpoints(run_dir) if step_of(path) > step_of(newest_whole)]


def _set_aside(path: Path) -> Path:
    target, number = path.with_name(f"{_DAMAGED}{path.name}"), 0
    while target.exists():
        number += 1
        target = path.with_name(f"{_DAMAGED}{path.name}.{number}")
    return path.rename(target)


def require_whole(engine: Engine, path: Path) -> None:
    """Verify a checkpoint that the configuration names. Every rank calls this.

    Raises:
        ConfigError: the checkpoint is damaged.
    """
    reason = _damage_over_ranks(engine, path)
    if reason:
        raise ConfigError(f"checkpoint.resume: {path} is damaged ({reason}); choose another checkpoint")


def read_progress(path: Path) -> Progress:
    """Read a checkpoint's progress."""
    return Progress(**json.loads((path / "progress.json").read_text()))


def read_callbacks(path: Path, callbacks: Iterable[Callback]) -> list[tuple[Callback, dict[str, Any], int]]:
    """Read a checkpoint's states of these callbacks, with their versions. Callbacks without one there start fresh.

    Raises:
        ConfigError: a state has a later version than its callback.
    """
    file = path / CALLBACKS
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
    """Save, then remove the checkpoints that need not be kept. Every rank calls this.

    A crash at any point leaves the earlier checkpoints intact, and at most one `.saving_` directory.
    """
    target = checkpoint_path(run_dir, state.progress.step)
    _open(engine, target, state)
    digests = engine.save(_unfinished(target) / "state")
    if engine.rank == 0:
        _publish(run_dir, target, keep, digests)
    # On return the checkpoint is published, for every rank.
    engine.collectives.barrier()
    return target


class BackgroundSave:
    """A save of the current state, written by threads while training continues. Takes the arguments of `save`.

    Every rank creates one and calls `advance` between steps, where the ranks agree on its state. First all ranks write,
    then rank 0 seals and publishes. Until then at most a `.saving_` directory exists, and the earlier checkpoints stay.

    Attributes:
        path: Path of the finished checkpoint.
    """

    def __init__(self, engine: Engine, run_dir: Path, state: RunState, keep: Retention) -> None:
        self.path = checkpoint_path(run_dir, state.progress.step)
        self._engine = engine
        self._publish = partial(_publish, run_dir, self.path, keep)
        _open(engine, self.path, state)
        self._written = False
        self._work = _Work(engine.begin_save(_unfinished(self.path) / "state").write)

    def advance(self, wait: bool = False) -> bool:
        """Return whether the checkpoint is published. With `wait`, block until it is. Every rank calls this.

        Raises:
            Exception: this rank's write failed. If another rank's failed, a RuntimeError that says so.
        """
        while True:
            if wait:
                # With a timeout: a rank may wait for the write of a failed rank, and must learn of that failure.
                self._work.join(_SECONDS_BETWEEN_LOOKS)
            if not self._agreed_that_all_have_ended():
                if wait:
                    continue
                return False
            if self._written:
                return True
            # All ranks have written. Only rank 0 has work left; the others run an empty function.
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
    """A function that runs in a thread from construction on. Stores its `result`, or the `error` that it raised."""

    def __init__(self, function: Callable[[], Any]) -> None:
        # A daemon thread, because a failing run must not wait for a write that may never end.
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
    """Path of a checkpoint until it is complete."""
    return target.with_name(f"{_SAVING}{target.name}")


def _open(engine: Engine, target: Path, state: RunState) -> None:
    """Create the unfinished checkpoint with everything except the engine's state. Every rank calls this."""
    if engine.rank == 0:
        directory = _unfinished(target)
        # An earlier save of this step may have been interrupted.
        shutil.rmtree(directory, ignore_errors=True)
        (directory / "state").mkdir(parents=True)
        state.write(directory)
    engine.collectives.barrier()


def _publish(run_dir: Path, target: Path, keep: Retention, digests: dict[str, str]) -> None:
    """Seal a written checkpoint and rename it into place, then remove those that need not be kept.

    `digests` covers the files in `state`, which their writers have flushed to disk.
    """
    _seal(_unfinished(target), digests)
    if target.exists():
        # This can only be a damaged checkpoint, because a run continues from its newest whole one.
        _set_aside(target)
    os.replace(_unfinished(target), target)
    # A rename is durable only after its directories are flushed.
    for path in (target.parent, run_dir):
        flush_to_disk(path)
    _prune(run_dir, keep, target)


def _seal(directory: Path, digests: dict[str, str]) -> None:
    """Write the checksums last. Flush everything to disk before the rename publishes it."""
    # The writers report the state's files, because a directory listing may miss files from another host.
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
    """Remove leftovers of failed removals and saves, and the checkpoints before `newest` that need not be kept."""
    for path in (*newest.parent.glob(f"{_REMOVING}*"), *newest.parent.glob(f"{_SAVING}*")):
        _remove(path)
    if keep.newest:
        # Later checkpoints, if any, do not belong to this run.
        for path in [path for path in list_checkpoints(run_dir) if step_of(path) <= step_of(newest)][: -keep.newest]:
            if not keep.steps or step_of(path) % keep.steps:
                _remove(path)


def _remove(path: Path) -> None:
    """Rename a checkpoint, then delete it. On failure training continues, and the next save tries again."""
    try:
        if not path.name.startswith("."):
            path = path.rename(path.with_name(f"{_REMOVING}{path.name}"))
        shutil.rmtree(path)
    except OSError as error:
        _LOGGER.warning("%s could not be removed, and is left for now: %s", path, error)
