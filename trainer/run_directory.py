"""What a run directory holds, and whether a configuration may go on in it. Imports neither torch nor megatron."""

import json
import os
import re
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import yaml

from trainer import checksums
from trainer.cli import from_mapping
from trainer.config import OptimConfig, PretrainConfig, TrainConfig
from trainer.errors import ConfigError
from trainer.optim import learning_rate
from trainer.phases import Phase, PhaseConfig, expand, first_steps, given, phase_at

_NAME = re.compile(r"step_(\d{8,})")
# What a run leaves that a new one would write over. The checkpoints last: till they have another name, the others are
# theirs, also where a kill comes in between.
_KEPT = ("metrics.jsonl", "events.jsonl", "tensorboard", "checkpoints")

# A run goes on only with the same model, the same data, the same batches and the same beginning.
_FIXED = (
    "model",
    "data",
    "train.seed",
    "train.seq_len",
    "train.global_batch_size",
    "train.precision",
    "engine.name",
    "checkpoint.init",
)
# A schedule that goes on at a rate this much higher than it would have had is worth a word.
_JUMP = 1.05
# Of these the keys that change no result: where the data `stdlib` is kept, which experts' activations are computed
# again, and which experts are copied to every rank.
_FREE = ("data.cache_dir", "model.moe.recompute_above", "model.moe.replicate_above")


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step in a checkpoint's name.

    Raises:
        ConfigError: it is no checkpoint's.
    """
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ConfigError(f"{path} is not a checkpoint: its name should look like step_00000100")
    return int(match[1])


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints of a run by name, oldest first, whole or not."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=step_of)


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Steps of the checkpoints of a run by name, whole or not, oldest first."""
    return [step_of(path) for path in list_checkpoints(run_dir)]


def read_config(directory: Path) -> dict[str, Any]:
    """The config.yaml of a run, or of a checkpoint, as nested values; empty where there is none.

    Raises:
        ConfigError: it is cut short, or no configuration.
    """
    path = directory / "config.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _unreadable(path, " ".join(str(error).split())) from error
    if not isinstance(values, dict):
        raise _unreadable(path, "it is empty" if values is None else "it holds no keys")
    return values


def _unreadable(path: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"{path} cannot be read ({reason}); put the config.yaml of a whole checkpoint of that run in its place"
    )


def starts_anew(config: PretrainConfig) -> bool:
    """Whether the run goes on from no checkpoint, by names alone."""
    resume = config.checkpoint.resume
    return resume == "never" or (resume == "auto" and not checkpoint_steps(Path(config.run.dir)))


def settle_restart(config: PretrainConfig) -> tuple[PretrainConfig, str | None]:
    """What a start goes by that the batch system or torchrun has made again, and a line about it if it is not as asked.

    Only the first start begins anew: a later one with the same arguments goes on from what that has saved.
    """
    counts = (os.environ.get(name, "") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    if config.checkpoint.resume != "never" or not any(count.isdigit() and int(count) for count in counts):
        return config, None
    goes_on = replace(config, checkpoint=replace(config.checkpoint, resume="auto"))
    return goes_on, "checkpoint.resume=never: this start is a restart, and goes on as with auto"


def set_aside(run_dir: Path) -> list[Path]:
    """Give what an earlier run has left other names, so that a new one can start; where it is now.

    They all get the same number, the first under which none of them is there. Without checkpoints the lines of metrics
    are worth keeping; an empty file is not.
    """
    found = [run_dir / name for name in _KEPT if (run_dir / name).exists()]
    metrics = run_dir / "metrics.jsonl"
    if run_dir / "checkpoints" not in found and not (metrics in found and metrics.stat().st_size):
        return []
    number = 1
    while any(_numbered(path, number).exists() for path in found):
        number += 1
    for path in found:
        path.rename(_numbered(path, number))
    return [_numbered(path, number) for path in found]


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}.{number}{path.suffix}")


def nothing_whole(run_dir: Path, newest: str) -> ConfigError:
    """The refusal of a run whose checkpoints cannot be read; `newest` says what is wrong with the newest of them."""
    return ConfigError(
        f"{run_dir} holds checkpoints, of which none can be read ({newest}); restore one of them, choose another "
        "run.dir, or start again with checkpoint.resume=never, which sets them aside"
    )


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by their dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _fixed(values: dict[str, Any]) -> dict[str, Any]:
    def counts(key: str) -> bool:
        return key not in _FREE and any(key == fixed or key.startswith(f"{fixed}.") for fixed in _FIXED)

    return {key: value for key, value in flatten(values).items() if counts(key)}


def differing_keys(run: Path, config: PretrainConfig) -> list[str]:
    """The keys in which a run, its directory or a checkpoint, differs from `config`, as `key: theirs -> ours`."""
    return _differing(read_config(run), config)


def _differing(values: dict[str, Any], config: PretrainConfig) -> list[str]:
    if not values:
        return []
    # A key that did not exist when the run began stands at its default.
    theirs = _fixed(asdict(PretrainConfig())) | _fixed(values)
    ours = _fixed(asdict(config))
    if config.train.precision == "auto":
        ours["train.precision"] = theirs["train.precision"]
    return differences(theirs, ours)


def _differing_phases(run_dir: Path, config: PretrainConfig, reached: int) -> list[str]:
    """The phases that began before a step, if they differ; those to come may still change."""
    saved = read_config(run_dir)
    if not saved:
        return []
    theirs = _begun(config, _saved_phases(saved), reached)
    ours = _begun(config, config.phases, reached)
    return differences({"phases": theirs}, {"phases": ours})


def settings_in_phase(values: dict[str, Any], step: int) -> dict[str, Any]:
    """The nested values of a config.yaml as they are in the phase of a step (steps taken before it)."""
    entries = _saved_phases(values)
    if not entries:
        return values
    starts = first_steps(from_mapping(TrainConfig, values["train"]), entries)
    values = dict(values)
    for entry, first in zip(entries, starts[1:], strict=True):
        for name in ("train", "data", "optim") if first <= step else ():
            values[name] = values[name] | given(getattr(entry, name))
        if first <= step:
            values["model"] = values["model"] | {"attention": values["model"]["attention"] | given(entry.model)}
    return values


def _saved_phases(values: dict[str, Any]) -> list[PhaseConfig]:
    return [from_mapping(PhaseConfig, entry) for entry in values.get("phases", [])]


def _expand_whatever_the_steps(config: PretrainConfig, entries: list[PhaseConfig]) -> list[Phase]:
    """As `expand`, of entries that were written for other `train.steps`."""
    return expand(replace(config, train=replace(config.train, steps=sys.maxsize), phases=entries))


def _begun(config: PretrainConfig, entries: list[PhaseConfig], reached: int) -> list[dict[str, Any]]:
    """What the phases that began before a step change."""
    phases = _expand_whatever_the_steps(config, entries)[1:]
    given = [asdict(entry) for entry, phase in zip(entries, phases, strict=True) if phase.first < reached]
    return [{key: value for key, value in flatten(entry).items() if value is not None} for entry in given]


def precision_of_the_run(config: PretrainConfig) -> str | None:
    """The precision of the run that `config` goes on with, by names alone; None where it begins one."""
    if starts_anew(config):
        return None
    run_dir = Path(config.run.dir)
    source = run_dir if checkpoint_steps(run_dir) else Path(config.checkpoint.resume)
    precision: str | None = flatten(read_config(source)).get("train.precision")
    return precision


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """The keys in which flat values differ, as `key: theirs -> ours`."""
    missing = object()
    return [
        f"{key}: {theirs.get(key)} -> {ours.get(key)}"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key, missing) != ours.get(key, missing)
    ]


def state_of(run_dir: Path) -> str | None:
    """How the last start in a run directory ended, as status.json says; None where nothing does."""
    try:
        return str(json.loads((run_dir / "status.json").read_text())["state"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def change_of_schedule(earlier: Path, config: PretrainConfig, step: int) -> str | None:
    """One line about a learning rate that goes on in another way than it was to; None if there is nothing to say.

    Args:
        earlier: Directory with the config.yaml of the steps taken so far.
        config: Of the steps to come.
        step: Steps taken.
    """
    try:
        saved = read_config(earlier)
        phases = _saved_phases(saved)
    except ConfigError:
        # Nothing to compare with is no reason to end the run.
        return None
    if not saved or not 0 < step < config.train.steps:
        return None
    known = {item.name for item in fields(OptimConfig)}
    begun_with = OptimConfig(**{name: value for name, value in saved.get("optim", {}).items() if name in known})
    steps = saved.get("train", {}).get("steps", config.train.steps)
    theirs = _expand_whatever_the_steps(replace(config, optim=begun_with), phases)
    optim, ours = phase_at(theirs, step).config.optim, phase_at(expand(config), step).config.optim
    changes = differences(flatten(asdict(optim), "optim."), flatten(asdict(ours), "optim."))
    last = learning_rate(phase_at(theirs, step - 1).config.optim, step - 1, steps)
    following = learning_rate(ours, step, config.train.steps)
    if steps != config.train.steps:
        changes.append(f"train.steps: {steps} -> {config.train.steps}")
    # The next step's rate under the earlier settings: past their end, that of their last step.
    expected = learning_rate(optim, step, steps)
    as_planned = expected / _JUMP <= following <= expected * _JUMP
    if not changes or (as_planned and optim == ours):
        return None
    return (
        f"the learning rate goes from {last:.2e} ({last / optim.lr:.2f} of the peak) at step {step} to {following:.2e} "
        f"({following / ours.lr:.2f} of the peak) at step {step + 1}, for the settings have changed: "
        f"{'; '.join(changes)}"
    )


def check(config: PretrainConfig) -> bool:
    """Decide from names, checksum lists and status.json whether the run can start or go on; True if it has finished.

    A run whose last step is saved, but whose last validation was interrupted, has not finished.

    Raises:
        ConfigError: going on would lose what is there, or would not be the same run.
    """
    run_dir = Path(config.run.dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"run.dir: {run_dir} is a file; name a directory")
    existing = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(f"run.dir: {run_dir} cannot be written under {existing}; name another directory")
    steps = checkpoint_steps(run_dir)
    if not steps or config.checkpoint.resume == "never":
        _check_source(config)
        return False
    differing = [*differing_keys(run_dir, config), *_differing_phases(run_dir, config, steps[-1])]
    if differing:
        raise ConfigError(
            f"{run_dir} holds another run ({'; '.join(differing)}); restore these keys, or choose another run.dir"
        )
    if config.checkpoint.resume == "auto":
        reached = _reached(run_dir, steps)
        if reached > config.train.steps:
            raise ConfigError(
                f"run.dir: the run in {run_dir} has reached step {reached}, past train.steps={config.train.steps}; "
                f"set train.steps to {reached} or more, or choose another run.dir"
            )
        return reached == config.train.steps and state_of(run_dir) == "done"
    source = Path(config.checkpoint.resume).resolve()
    if source.parent != (run_dir / "checkpoints").resolve():
        raise ConfigError(
            f"checkpoint.resume: {run_dir} holds checkpoints of its own up to step {steps[-1]}, which going on from "
            f"{source} would overwrite; choose another run.dir, or checkpoint.resume=auto to go on"
        )
    if source.name != f"step_{steps[-1]:08d}":
        raise ConfigError(
            f"checkpoint.resume: {run_dir} holds the newer step {steps[-1]}, which going back to {source.name} would "
            "overwrite; choose another run.dir"
        )
    return False


def _reached(run_dir: Path, steps: list[int]) -> int:
    """The step of the newest checkpoint that is whole, as far as can be said without reading what was trained.

    Raises:
        ConfigError: there is none.
    """
    complaints = []
    for step in reversed(steps):
        path = checkpoint_path(run_dir, step)
        try:
            checksums.read(path)
            return step
        except ValueError as error:
            complaints.append(f"{path.name}: {error}")
    raise nothing_whole(run_dir, complaints[0])


def _check_source(config: PretrainConfig) -> None:
    """Hold the model against that of a checkpoint of another run, which a fresh run directory goes on from.

    Raises:
        ConfigError: they differ: parameters would be read that mean something else.
    """
    if config.checkpoint.resume in ("auto", "never"):
        return
    source = Path(config.checkpoint.resume)
    values = read_config(source)
    if values.get("phases"):
        step = json.loads((source / "progress.json").read_text())["step"]
        values = settings_in_phase(values, max(step - 1, 0))
    differing = [key for key in _differing(values, config) if key.startswith("model.")]
    if differing:
        raise ConfigError(
            f"checkpoint.resume: {source} is of another model ({'; '.join(differing)}); restore these keys, or choose "
            "another checkpoint"
        )
