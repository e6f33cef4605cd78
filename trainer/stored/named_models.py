"""The models that a configuration names: initial weights and teachers. A run directory becomes one of its checkpoints.

This happens once, as a run starts, and the run's configuration records it: when the run goes on, its models are still
the same, whatever the other run has saved since. Imports no torch.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from trainer.errors import ConfigError
from trainer.run_directory import continues, read_config
from trainer.stored.checkpoint_weights import is_at, newest
from trainer.stored.opening import are_at

Keys = tuple[str | int, ...]
INIT = ("checkpoint", "init")
# The last two parts of their keys, of which a phase may have some.
_NAMED = (INIT, ("objective", "teacher"), ("distillation", "teacher"))


def named(values: Any, prefix: Keys = ()) -> Iterator[tuple[Keys, str]]:
    """Yield keys and paths of the models that a configuration names, given as nested values."""
    if prefix[-2:] in _NAMED and isinstance(values, str):
        yield prefix, values
    children = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in children:
        yield from named(value, (*prefix, key))


def recorded(run_dir: Path, resume: str) -> dict[Keys, str]:
    """The paths in the configuration of the run that a start continues, by keys; none for a new run."""
    return dict(named(read_config(run_dir))) if continues(run_dir, resume) else {}


def settled(path: str, keys: Keys, run_dir: Path, before: dict[Keys, str]) -> str:
    """The path to record for a model: of a run directory that of a checkpoint.

    Args:
        path: The path that was given.
        keys: Its key.
        run_dir: The run that is to start or go on.
        before: What `recorded` found there.

    Raises:
        ConfigError: the run directory holds no complete checkpoint, or is that of the run itself.
    """
    folder, key = Path(path), ".".join(map(str, keys))
    if are_at(folder) or not is_at(folder):
        return path
    own = folder.parent.parent if (folder / "state").is_dir() else folder
    if keys == INIT and own.resolve() == run_dir.resolve():
        raise ConfigError(f"{key}: {path} is of the run itself; choose another run.dir, or leave {key} out to go on")
    if own != folder:
        return path
    earlier = Path(before.get(keys, ""))
    if earlier.parent.resolve() == (folder / "checkpoints").resolve():
        return str(earlier)
    return str(newest(folder, key))


def settle(namespace: Namespace) -> None:
    """Replace run directories by checkpoints, in place.

    Raises:
        ConfigError: see `settled`.
    """
    run_dir, found = Path(namespace["run.dir"]), list(named(namespace.as_dict()))
    before = recorded(run_dir, namespace["checkpoint.resume"]) if found else {}
    for keys, path in found:
        node: Any = namespace
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = settled(path, keys, run_dir, before)
