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
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.cli import ConfigError
from trainer.data.tokenizer import Tokenizer
from trainer.engines.base import Engine

_NAME = re.compile(r"step_(\d{8,})")
_CHECKSUMS = "checksums.json"


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
    temporary = target.with_name(f".saving_{target.name}")
    if engine.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "state").mkdir(parents=True)
        (temporary / "config.yaml").write_text(config_yaml)
        if tokenizer is not None:
            (temporary / "tokenizer").mkdir()
            tokenizer.save(temporary / "tokenizer")
        (temporary / "progress.json").write_text(json.dumps(asdict(progress)) + "\n")
    engine.barrier()
    engine.save(temporary / "state")
    engine.barrier()
    if engine.rank == 0:
        _seal(temporary)
        if target.exists():
            # Only a damaged checkpoint can stand here: a run continues from its newest whole one.
            shutil.rmtree(target)
        os.replace(temporary, target)
        _sync(target.parent)
        _prune(run_dir, keep)
    engine.barrier()
    return target


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
