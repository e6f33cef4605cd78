"""Which parameters a run trains (train.trainable), phase by phase. Imports torch only in `check`."""

from dataclasses import replace

from models.config import ADAPTERS, ModelConfig
from trainer.config import PretrainConfig
from trainer.errors import ConfigError
from trainer.phases import expand
from trainer.stored.on_disk import listed
from trainer.stored.teacher import aligned_layers, taught_phases


def trained(config: PretrainConfig) -> list[str]:
    """Return the patterns of the parameters that a phase trains, given its configuration.

    Raises:
        ConfigError: the teacher, which tells the mixers to align, cannot be read.
    """
    train, head = config.train, _head(config)
    if train.trainable is not None:
        return [*train.trainable, *head]
    has_adapters = config.model.lora.is_on
    if train.objective.name != "align":
        return [ADAPTERS, *head] if has_adapters else ["*"]
    layers = aligned_layers(config)
    if has_adapters:
        return [f"layers.{layer}.mixer{ADAPTERS}" for layer in layers]
    return [f"layers.{layer}.mixer.*" for layer in layers] + _bounds(config.model, layers)


def trained_in_any(config: PretrainConfig) -> list[str]:
    """Return the patterns of the parameters that any phase trains. The engine keeps their state throughout."""
    phases = expand(config)
    # Judged first, because a teacher of a phase that is over may be gone.
    if any(phase.config.train.trainable is None and phase.config.train.objective.name != "align" for phase in phases):
        return [ADAPTERS, *_head(config)] if config.model.lora.is_on else ["*"]
    return list(dict.fromkeys(pattern for phase in phases for pattern in trained(phase.config)))


def _head(config: PretrainConfig) -> list[str]:
    """The pattern of a value head, which every run that has one trains."""
    return [] if config.value_head is None else ["value_head.*"]


def to_plan(config: PretrainConfig) -> list[PretrainConfig]:
    """Return each phase's configuration for memory planning, with the optimizer state of all that any phase trains."""
    patterns = trained_in_any(config)
    return [replace(phase.config, train=replace(phase.config.train, trainable=patterns)) for phase in expand(config)]


def _bounds(model: ModelConfig, layers: list[int]) -> list[str]:
    """The lower bounds of decays, one parameter for all layers that have them, if all of these are aligned."""
    bounded = set(model.bounded_layers())
    return ["lower_bounds"] if bounded and bounded <= set(layers) else []


def check(config: PretrainConfig) -> None:
    """Check the patterns of train.trainable against the names of parameters. May import torch.

    Raises:
        ConfigError: a pattern matches no parameter, parameters would be trained that the objective does not reach,
            frozen experts are to be spawned, or DeepSpeed would have to change what is trained.
    """
    phases = [phase.config.train for phase in expand(config)]
    if all(train.trainable is None and train.objective.name != "align" for train in phases):
        return
    from models.decoder import shapes

    # Names do not depend on the vocabulary: one row is enough.
    names = [name for name, _ in shapes(config.model, 1).named_parameters()]
    names += [] if config.value_head is None else ["value_head.weight"]
    taught = {phase.number for phase in taught_phases(config)}
    for phase in expand(config):
        if phase.config.train.objective.name == "align" and phase.number not in taught:
            # It is over, and its teacher may be gone.
            continue
        _check_phase(phase.config, names)
        if config.engine.name != "megatron" and trained(phase.config) != trained(config):
            raise ConfigError(
                f"phases: phase {phase.number} changes the trained parameters: DeepSpeed has parameters of all kinds "
                "in one tensor, and updates all or none; set train.trainable, or use engine.name=megatron"
            )


def _check_phase(config: PretrainConfig, names: list[str]) -> None:
    from models.parameters import matches

    patterns = trained(config)
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            raise ConfigError(
                f"train.trainable: no parameter's name matches {pattern!r}; they are named as {names[0]} and "
                f"{names[len(names) // 2]}"
            )
    if config.model.lora.is_on and not any(matches(name, [ADAPTERS]) and matches(name, patterns) for name in names):
        raise ConfigError(
            f"train.trainable trains no adapter of model.lora; add {ADAPTERS}, or leave train.trainable out, which "
            "trains the adapters alone"
        )
    frozen = [name for name in names if ".experts." in name and not matches(name, patterns)]
    if config.model.moe.spawn_step is not None and frozen:
        raise ConfigError(
            f"train.trainable leaves {listed(frozen)} frozen, and model.moe.spawn_step="
            f"{config.model.moe.spawn_step} would write to them; train the experts, or leave spawn_step out"
        )
    if config.train.objective.name == "align":
        layers = aligned_layers(config)
        reached = [f"layers.{layer}.mixer{part}.*" for layer in layers for part in ("", "_norm")]
        reached += ["lower_bounds"] if set(layers) & set(config.model.bounded_layers()) else []
        others = [name for name in names if matches(name, patterns) and not matches(name, reached)]
        if others:
            raise ConfigError(
                f"train.trainable trains {listed(others)}, which train.objective.name=align does not reach: weight "
                "decay alone would change them; leave train.trainable out, which trains the mixers that are aligned"
            )
