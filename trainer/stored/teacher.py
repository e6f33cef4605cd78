"""Teachers: the weights that train.objective.teacher names, their checks, and their digests in checkpoints.

A teacher is no part of a checkpoint. A resumed run reads it again from its directory, which may have moved, and refuses
one whose content is not that of the steps taken. Imports no torch, but for `check_tensors`.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from trainer.config import ObjectiveConfig, ParallelConfig, PretrainConfig
from trainer.errors import ConfigError
from trainer.phases import Phase, expand
from trainer.run_directory import CALLBACKS, checkpoint_path, checkpoint_steps, step_of
from trainer.stored import checksums
from trainer.stored.checkpoint_weights import require_whole
from trainer.stored.on_disk import CONFIG_NAME, Weights
from trainer.stored.opening import open_weights

# Key of the digests among the states of callbacks in a checkpoint.
STATE = "teachers"
_KEY = "train.objective.teacher"
# A digest covers the headers, and of the tensors this many blocks of so many bytes, spread evenly over each file:
# other values of the same shapes do not stay unnoticed, and a large model is not read whole.
_BLOCKS, _BLOCK_BYTES = 16, 1 << 16


def open_teacher(path: str | Path, key: str = _KEY) -> Weights:
    """Read the headers of a teacher's weights, or of a checkpoint. `key` names it in errors.

    Raises:
        ConfigError: the directory holds neither.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        raise ConfigError(
            f"{key}: {path} is a GGUF file; write weights first: spiketrain convert import --source {path} --output "
            "weights/NAME"
        )
    return open_weights(path, key)


def taught_phases(config: PretrainConfig) -> list[Phase]:
    """List the phases of a run that have a teacher and are not over, judged by the names of its checkpoints."""
    resume, steps = config.checkpoint.resume, checkpoint_steps(Path(config.run.dir))
    if resume == "never" or not steps:
        steps = [0] if resume in ("auto", "never") else [step_of(Path(resume))]
    return [phase for phase in expand(config) if phase.config.train.objective.needed_teacher and phase.last > steps[-1]]


def check(config: PretrainConfig, vocab_size: int) -> None:
    """Check the teachers of a run against its configuration and its newest checkpoint.

    Args:
        config: The run's configuration.
        vocab_size: Rows of the trained model's embedding.

    Raises:
        ConfigError: settings of a teacher have no effect, a teacher cannot be read or has another vocabulary, its
            layers do not divide over the layout's ranks, or it is not the one that the run has learned from.
    """
    _check_effect(config)
    recorded = _recorded(config)
    for phase in taught_phases(config):
        found = open_teacher(phase.config.train.objective.teacher or "")
        _require_rows(found, vocab_size)
        if phase.config.train.objective.name == "align":
            aligned_layers(phase.config)
        require_layout(found, phase.config)
        require_whole(found, _KEY)
        if recorded.get(str(phase.number), digest(found)) != digest(found):
            raise ConfigError(
                f"{_KEY}: {found.path} does not hold the weights that the run in {config.run.dir} has learned from; "
                "restore them, or choose another run.dir"
            )


def _check_effect(config: PretrainConfig) -> None:
    objectives = [phase.config.train.objective for phase in expand(config)]
    if any(one.teacher is not None for one in objectives) and not any(one.needed_teacher for one in objectives):
        raise ConfigError(
            f"{_KEY} has no effect with train.objective.name=next_token; set train.objective.name, or leave it out"
        )
    for name in ("temperature", "kl_weight", "next_token_weight"):
        changed = any(getattr(one, name) != getattr(ObjectiveConfig(), name) for one in objectives)
        if changed and not any(one.name == "distill" for one in objectives):
            raise ConfigError(
                f"train.objective.{name} has no effect without train.objective.name=distill; set it, or leave {name} "
                "out"
            )


def aligned_layers(config: PretrainConfig) -> list[int]:
    """Return the layers whose mixers differ from the teacher's, for train.objective.name=align.

    Raises:
        ConfigError: the teacher cannot be read, has another width or depth, or no mixer differs.
    """
    found, model = open_teacher(config.train.objective.teacher or ""), config.model
    for name in ("hidden_size", "num_layers"):
        own, theirs = getattr(model, name), getattr(found.model, name)
        if own != theirs:
            raise ConfigError(
                f"{_KEY}: {found.path} has {name}={theirs}, and model.{name} is {own}: train.objective.name=align "
                f"compares layer by layer; set model.{name}={theirs}, or use distill"
            )
    layers = model.differing_mixers(found.model)
    if not layers:
        raise ConfigError(
            f"{_KEY}: every mixer is that of {found.path} already, so train.objective.name=align has nothing to do; "
            "change model.mixers, or use distill"
        )
    return layers


def layout_of(config: PretrainConfig) -> ParallelConfig:
    """Return the layout of the teacher of a phase, given its configuration.

    Its layers are split evenly over pipeline stages, because the head runs outside of its schedule; to be aligned with,
    as those of the trained model.
    """
    if config.train.objective.name == "align":
        return config.parallel
    return replace(config.parallel, pipeline_layers=None)


def require_layout(found: Weights, config: PretrainConfig) -> None:
    """Check that a teacher of a phase can be sharded as the trained model is.

    Raises:
        ConfigError: its heads, channels, experts or layers do not divide.
    """
    try:
        parallel = layout_of(config)
        parallel.require_divisible(found.model)
        parallel.stage_layers(found.model.num_layers)
    except ValueError as error:
        raise ConfigError(f"{_KEY}: {found.path} does not fit the layout: {error}") from error


def _require_rows(found: Weights, vocab_size: int) -> None:
    if found.vocab_size != vocab_size:
        raise ConfigError(
            f"{_KEY}: {found.path} has {found.vocab_size} rows of vocabulary and the run, padded to "
            f"model.vocab_multiple, {vocab_size}; both models must have the same tokens: use the teacher's tokenizer "
            f"(data.tokenizer), or set model.vocab_size={found.vocab_size}"
        )


def check_tensors(config: PretrainConfig) -> None:
    """Check the names and shapes of the teachers' tensors. Imports torch if there are any.

    Raises:
        ConfigError: tensors are missing, unexpected or of the wrong shape.
    """
    for path in {phase.config.train.objective.teacher or "" for phase in taught_phases(config)}:
        from models.decoder import shapes

        found = open_teacher(path)
        found.require(shapes(found.model, found.vocab_size))


def digests(config: PretrainConfig) -> dict[int, str]:
    """Return the digests of the teachers of the phases that are not over, by phase."""
    return {
        phase.number: digest(open_teacher(phase.config.train.objective.teacher or ""))
        for phase in taught_phases(config)
    }


def digest(weights: Weights) -> str:
    """SHA-256 of config.json, and of the headers and a sample of the tensors of every file; or of a list of them."""
    if weights.is_checkpoint:
        return checksums.digest(weights.path / checksums.NAME)
    found = hashlib.sha256((weights.path / CONFIG_NAME).read_bytes())
    for file in sorted({tensor.file for tensor in weights.tensors.values()}):
        found.update(_digest_of_file(file, file.stat().st_size, file.stat().st_mtime_ns))
    return found.hexdigest()


@lru_cache
def _digest_of_file(file: Path, size: int, changed: int) -> bytes:
    """Digest of a file of this size, last changed at this time: both are keys of the cache."""
    del changed
    found = hashlib.sha256(file.name.encode())
    with file.open("rb") as stream:
        # The header begins with its length, 8 bytes (the format of safetensors).
        found.update(stream.read(int.from_bytes(stream.read(8), "little")))
        for start in _starts(size):
            stream.seek(start)
            found.update(stream.read(_BLOCK_BYTES))
    return found.digest()


def _starts(size: int) -> Iterator[int]:
    """Offsets of the blocks of a file, the last of which ends with the file."""
    last = max(size - _BLOCK_BYTES, 0)
    yield from sorted({last * number // (_BLOCKS - 1) for number in range(_BLOCKS)})


def _recorded(config: PretrainConfig) -> dict[str, str]:
    """The digests in the newest checkpoint of the run directory, by phase; none for a new run."""
    run_dir = Path(config.run.dir)
    steps = [] if config.checkpoint.resume == "never" else checkpoint_steps(run_dir)
    file = checkpoint_path(run_dir, steps[-1]) / CALLBACKS if steps else None
    if file is None or not file.is_file():
        return {}
    try:
        states = json.loads(file.read_text())
    except ValueError:
        # A damaged checkpoint, which the start passes over or reports.
        return {}
    found: dict[str, str] = states.get(STATE, {}).get("state", {})
    return found
