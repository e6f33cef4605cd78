"""Reads a run directory and decides whether a configuration may continue there. Imports neither torch nor megatron."""

import json
import os
import re
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from trainer.cli import from_mapping
from trainer.config import OptimConfig, PretrainConfig, TrainConfig
from trainer.errors import ConfigError
from trainer.optim import learning_rate
from trainer.phases import Phase, PhaseConfig, expand, first_steps, given, phase_at, with_changes
from trainer.stored import checksums

C = TypeVar("C", bound=PretrainConfig)

# File of a checkpoint with the states of callbacks.
CALLBACKS = "callbacks.json"
_NAME = re.compile(r"step_(\d{8,})")
# Files that a new run would overwrite. The checkpoints are renamed last: until then the other files belong to them,
# even if a kill interrupts the renaming.
_KEPT = (
    "metrics.jsonl",
    "events.jsonl",
    "tensorboard",
    "rollouts",
    "samples",
    "rehearsal",
    "prompt_filter.json",
    "checkpoints",
)

# A run may continue only with the same model, data, batches, objective and initial weights.
_FIXED = (
    "model",
    "data",
    "train.seed",
    "train.objective",
    "train.seq_len",
    "train.global_batch_size",
    "train.precision",
    "engine.name",
    "checkpoint.init",
    # Of post-training.
    "stage",
    "rows",
    "dpo",
    "rl",
    "prompt_filter",
    "rehearsal",
    "gate",
    "rewards",
)
# Report a change of schedule only if the learning rate is off by more than this factor.
_JUMP = 1.05
# Keys among them that change no result: the location of the data `stdlib`, that of a teacher (a checkpoint has its
# digest), which experts' activations are recomputed, which are replicated on every rank, and what is sampled at once.
_FREE = (
    "rl.slots",
    "data.cache_dir",
    "train.objective.teacher",
    "model.moe.recompute_above",
    "model.moe.replicate_above",
)


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Path of the checkpoint of a step."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def step_of(path: Path) -> int:
    """Parse the step in a checkpoint's name.

    Raises:
        ConfigError: the name is not that of a checkpoint.
    """
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ConfigError(f"{path} is not a checkpoint: its name should look like step_00000100")
    return int(match[1])


def list_checkpoints(run_dir: Path) -> list[Path]:
    """List a run's checkpoints by name, oldest first. They may be damaged."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=step_of)


def checkpoint_steps(run_dir: Path) -> list[int]:
    """List the steps of a run's checkpoints by name, oldest first. They may be damaged."""
    return [step_of(path) for path in list_checkpoints(run_dir)]


def read_config(directory: Path) -> dict[str, Any]:
    """Read the config.yaml of a run or a checkpoint as nested values. Empty if there is none.

    Raises:
        ConfigError: the file is truncated, or holds no configuration.
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
    """Whether the run resumes from no checkpoint, judged by file names alone."""
    resume = config.checkpoint.resume
    return resume == "never" or (resume == "auto" and not checkpoint_steps(Path(config.run.dir)))


def continues(run_dir: Path, resume: str) -> bool:
    """Whether a start with this checkpoint.resume continues the run in a directory, judged by file names alone."""
    return bool(checkpoint_steps(run_dir)) and (resume != "never" or _is_restart())


def _is_restart() -> bool:
    counts = (os.environ.get(name, "") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    return any(count.isdigit() and int(count) for count in counts)


def settle_restart(config: C) -> tuple[C, str | None]:
    """Adjust a configuration for an automatic restart by the batch system or torchrun. Also returns a line to log.

    Only the first start begins from scratch. A restart with the same arguments continues from its checkpoints.
    """
    if config.checkpoint.resume != "never" or not _is_restart():
        return config, None
    goes_on = replace(config, checkpoint=replace(config.checkpoint, resume="auto"))
    return goes_on, "checkpoint.resume=never: this start is a restart, and goes on as with auto"


def set_aside(run_dir: Path) -> list[Path]:
    """Rename an earlier run's files so that a new run can start, and return the new paths.

    All get the same number, the first that is free for every one of them. Without checkpoints they are renamed only if
    metrics.jsonl has lines: otherwise there is nothing worth keeping.
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
    """Build the error for a run without a readable checkpoint. `newest` describes the damage of the newest one."""
    return ConfigError(
        f"{run_dir} holds checkpoints, of which none can be read ({newest}); restore one of them, choose another "
        "run.dir, or start again with checkpoint.resume=never, which sets them aside"
    )


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested values to dotted keys."""
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
    """List the keys in which a run or a checkpoint differs from `config`, as `key: theirs -> ours`."""
    return _differing(read_config(run), config)


def _differing(values: dict[str, Any], config: PretrainConfig) -> list[str]:
    if not values:
        return []
    # A key that is younger than the run has its default.
    theirs = _fixed(asdict(type(config)())) | _fixed(values)
    ours = _fixed(asdict(config))
    # An automatic choice follows the run that it continues.
    if config.train.precision == "auto":
        ours["train.precision"] = theirs["train.precision"]
    return differences(theirs, ours)


def _differing_phases(run_dir: Path, config: PretrainConfig, reached: int) -> list[str]:
    """List differences among the phases that began before step `reached`. Later phases may still change."""
    saved = read_config(run_dir)
    if not saved:
        return []
    theirs = _begun(config, _saved_phases(saved), reached)
    ours = _begun(config, config.phases, reached)
    return differences({"phases": theirs}, {"phases": ours})


def settings_in_phase(values: dict[str, Any], step: int) -> dict[str, Any]:
    """Return a config.yaml's nested values as they are in the phase of a step (steps taken before it)."""
    entries = _saved_phases(values)
    if not entries:
        return values
    starts = first_steps(from_mapping(TrainConfig, values["train"]), entries)
    values = dict(values)
    for entry, first in zip(entries, starts[1:], strict=True):
        for name in ("train", "data", "optim") if first <= step else ():
            values[name] = with_changes(values[name], getattr(entry, name))
        if first <= step:
            values["model"] = values["model"] | {"attention": values["model"]["attention"] | given(entry.model)}
    return values


def last_step(checkpoint: Path) -> int:
    """Read the number of the last training step that a checkpoint contains, from 0."""
    return max(json.loads((checkpoint / "progress.json").read_text())["step"] - 1, 0)


def settings_of(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's config.yaml as nested values, as they are in the phase of its last step."""
    return settings_in_phase(read_config(checkpoint), last_step(checkpoint))


def _saved_phases(values: dict[str, Any]) -> list[PhaseConfig]:
    return [from_mapping(PhaseConfig, entry) for entry in values.get("phases", [])]


def _expand_whatever_the_steps(config: PretrainConfig, entries: list[PhaseConfig]) -> list[Phase]:
    """Like `expand`, for entries that were written for other `train.steps`."""
    return expand(replace(config, train=replace(config.train, steps=sys.maxsize), phases=entries))


def _begun(config: PretrainConfig, entries: list[PhaseConfig], reached: int) -> list[dict[str, Any]]:
    """Return the changes of each phase that began before step `reached`."""
    phases = _expand_whatever_the_steps(config, entries)[1:]
    given = [asdict(entry) for entry, phase in zip(entries, phases, strict=True) if phase.first < reached]
    flat = [flatten(entry) for entry in given]
    return [{key: value for key, value in one.items() if value is not None and key not in _FREE} for one in flat]


def precision_of_the_run(config: PretrainConfig) -> str | None:
    """Read the precision of the run that `config` continues, by file names alone. None for a new run."""
    if starts_anew(config):
        return None
    run_dir = Path(config.run.dir)
    source = run_dir if checkpoint_steps(run_dir) else Path(config.checkpoint.resume)
    precision: str | None = flatten(read_config(source)).get("train.precision")
    return precision


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """List the keys in which flat values differ, as `key: theirs -> ours`."""
    missing = object()
    return [
        f"{key}: {theirs.get(key)} -> {ours.get(key)}"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key, missing) != ours.get(key, missing)
    ]


def state_of(run_dir: Path) -> str | None:
    """Read from status.json how a run directory's last start ended. None if unreadable."""
    try:
        return str(json.loads((run_dir / "status.json").read_text())["state"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def change_of_schedule(earlier: Path, config: PretrainConfig, step: int) -> str | None:
    """Describe an unexpected change of the learning rate in a line. None if there is nothing to report.

    Args:
        earlier: Directory with the config.yaml of the steps taken so far.
        config: Configuration of the steps to come.
        step: Number of steps taken.
    """
    try:
        saved = read_config(earlier)
        phases = _saved_phases(saved)
    except ConfigError:
        # A missing comparison is no reason to end the run.
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
    # The next step's rate under the earlier settings. Past their end, the rate of their last step.
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
    """Decide from names, checksum lists and status.json whether the run can start or continue. True if it is finished.

    A run that has saved its last step, but whose last validation was interrupted, has not finished.

    Raises:
        ConfigError: continuing would lose existing files, or would not be the same run.
    """
    run_dir = Path(config.run.dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"run.dir: {run_dir} is a file; name a directory")
    # The nearest existing ancestor decides whether the directory can be created.
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
        # status.json distinguishes a finished run from an interrupted last validation.
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
    """Return the step of the newest checkpoint that looks whole, without reading its parameters.

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
    """Compare the model with that of another run's checkpoint, from which a fresh run directory resumes.

    Raises:
        ConfigError: they differ, so its parameters would mean something else.
    """
    if config.checkpoint.resume in ("auto", "never"):
        return
    source = Path(config.checkpoint.resume)
    values = read_config(source)
    # The last step that the checkpoint contains decides the phase.
    if values.get("phases"):
        values = settings_of(source)
    differing = [key for key in _differing(values, config) if key.startswith("model.")]
    if differing:
        raise ConfigError(
            f"checkpoint.resume: {source} is of another model ({'; '.join(differing)}); restore these keys, or choose "
            "another checkpoint"
        )
