"""Phases of a run: changes of length, data, batch, objective, learning rate or rotary base from a step on.

Imports no torch.

    phases:
      - from_step: 10000
        train: {seq_len: 4096, global_batch_size: 64}
        data: {blend: {data/books: 3, data/web: 1}}
        optim: {lr: 1.0e-4}
        model: {rope_theta: 500000}

Design. A phase is the whole configuration with some values replaced. An entry names the changed values; the others are
those of the previous phase. Code that reads a configuration therefore reads a phase. Each phase's layout is validated,
its data are checked and its step is planned as for a separate run, before a model is built.

The step counts through the whole run, and there is no other state. A batch is a function of (seed, step) and the
phase's length, batch size and data. A learning rate is a function of the step, the phase's schedule and `train.steps`,
the length of the whole run. Three facts follow. A new phase continues like a run that had the phase's values from its
beginning and has this run's parameters, optimizer state and step. The result equals that of two runs, the second of
which resumes from the first one's checkpoint (`checkpoint.resume`), and a resumed run needs only its step. A phase does
not know which documents earlier phases have read: the same data in another length or batch size come in an order of
their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

if TYPE_CHECKING:
    from trainer.config import PretrainConfig, TrainConfig
    from trainer.data.batch import Batch
    from trainer.data.dataset import Sampler

T = TypeVar("T")


@dataclass
class ObjectiveChanges:
    """Changes of trainer.config.ObjectiveConfig. null keeps the previous phase's value.

    Attributes:
        name: next_token, align or distill.
        teacher: Weights directory of the teacher.
        temperature: distill: divides the logits.
        kl_weight: distill: weight of the divergence.
        next_token_weight: distill: weight of the next-token loss.
    """

    name: Literal["next_token", "align", "distill"] | None = None
    teacher: str | None = None
    temperature: float | None = None
    kl_weight: float | None = None
    next_token_weight: float | None = None


@dataclass
class TrainChanges:
    """Changes of trainer.config.TrainConfig. null keeps the previous phase's value.

    Attributes:
        objective: Changes of what a step minimises.
        seq_len: Tokens per sample.
        micro_batch_size: Samples that a rank computes at a time.
        global_batch_size: Samples per optimizer step.
        trainable: Name patterns of the parameters to train; the others keep their values. Not with DeepSpeed.
    """

    objective: ObjectiveChanges = field(default_factory=ObjectiveChanges)
    seq_len: int | None = None
    micro_batch_size: int | None = None
    global_batch_size: int | None = None
    trainable: list[str] | None = None


@dataclass
class DataChanges:
    """Changes of trainer.config.DataConfig. null keeps the previous phase's value.

    Attributes:
        path: A single source. Replaces the previous phase's path or blend.
        blend: Several sources with their weights.
    """

    path: str | None = None
    blend: dict[str, float] | None = None


@dataclass
class OptimChanges:
    """Changes of trainer.config.OptimConfig. null keeps the previous phase's value. Schedules span the whole run.

    Attributes:
        lr: Peak learning rate.
        min_lr_ratio: The schedule ends at lr times this.
        schedule: cosine or wsd.
        warmup_steps: Steps of linear warm-up, from the beginning of the run.
        decay_fraction: The fraction of wsd that decays.
    """

    lr: float | None = None
    min_lr_ratio: float | None = None
    schedule: Literal["cosine", "wsd"] | None = None
    warmup_steps: int | None = None
    decay_fraction: float | None = None


@dataclass
class ModelChanges:
    """Changes of models.config.AttentionConfig. null keeps the previous phase's value. No parameter depends on them.

    Attributes:
        rope_theta: Base of the attention's rotary embedding.
    """

    rope_theta: float | None = None


@dataclass
class PhaseConfig:
    """The start of a phase and its changes.

    Attributes:
        from_step: Number of steps taken before the phase begins.
        from_tokens: Alternatively, tokens read before the phase begins. It begins with the first step that meets this.
        train: Changes of objective, length and batch.
        data: Changes of the data.
        optim: Changes of the learning rate.
        model: Changes of the rotary embedding.
    """

    from_step: int | None = None
    from_tokens: int | None = None
    train: TrainChanges = field(default_factory=TrainChanges)
    data: DataChanges = field(default_factory=DataChanges)
    optim: OptimChanges = field(default_factory=OptimChanges)
    model: ModelChanges = field(default_factory=ModelChanges)


Changes: TypeAlias = ObjectiveChanges | TrainChanges | DataChanges | OptimChanges | ModelChanges


@dataclass(frozen=True)
class Phase:
    """A phase of a run.

    Attributes:
        number: Its index, from 0.
        first: Number of steps before it.
        last: Number of steps at its end.
        config: The run's configuration in this phase, as that of a run without phases.
    """

    number: int
    first: int
    last: int
    config: PretrainConfig

    def __str__(self) -> str:
        return f"phase {self.number}, steps {self.first + 1} to {self.last}"


def expand(config: PretrainConfig) -> list[Phase]:
    """List the phases of a run. The first has the configuration's own values.

    Raises:
        ValueError: an entry has no start, starts at or before the previous phase or after the run, changes nothing, or
            sets an invalid value.
    """
    # A phase's configuration has no phases of its own, so it validates like a separate run.
    starts, configs = first_steps(config.train, config.phases), [replace(config, phases=[])]
    for number, entry in enumerate(config.phases, 1):
        if starts[number] >= config.train.steps:
            raise ValueError(
                f"phases: phase {number} begins at step {starts[number]}, and the run ends at train.steps="
                f"{config.train.steps}; let it begin earlier, or raise train.steps"
            )
        configs.append(_changed(configs[-1], entry, number))
    ends = [*starts[1:], config.train.steps]
    return [Phase(number, *rest) for number, rest in enumerate(zip(starts, ends, configs, strict=True))]


def first_steps(train: TrainConfig, entries: Sequence[PhaseConfig]) -> list[int]:
    """Return the number of steps before each phase, phase 0 included.

    Raises:
        ValueError: an entry has no start, or does not start after the previous phase.
    """
    starts, tokens = [0], 0
    for number, entry in enumerate(entries, 1):
        if (entry.from_step is None) == (entry.from_tokens is None):
            raise ValueError(f"phases: phase {number} needs one of from_step and from_tokens, which say when it begins")
        per_step = train.global_batch_size * train.seq_len
        first = entry.from_step
        if entry.from_tokens is not None:
            # Rounds up to whole steps, at the previous phase's tokens per step.
            first = starts[-1] - (tokens - entry.from_tokens) // per_step
        if first is None or first <= starts[-1]:
            raise ValueError(
                f"phases: phase {number} begins at step {first}, and the one before it at step {starts[-1]}; order "
                "them by their beginning"
            )
        tokens += (first - starts[-1]) * per_step
        starts.append(first)
        # Starts in tokens of later entries count with this phase's tokens per step.
        train = _replaced(train, entry.train, number)
    return starts


def _changed(before: PretrainConfig, entry: PhaseConfig, number: int) -> PretrainConfig:
    if not (given(entry.train) or given(entry.data) or given(entry.optim) or given(entry.model)):
        raise ValueError(f"phases: phase {number} changes nothing; name what changes, or leave it out")
    # A path replaces the previous blend.
    data = replace(before.data, blend={}) if entry.data.path is not None else before.data
    attention = before.model.attention
    if given(entry.model) and attention.rope_theta is None:
        raise ValueError(f"phases: phase {number} changes the base of the rotary embedding, and the model has none")
    return replace(
        before,
        model=replace(before.model, attention=_replaced(attention, entry.model, number)),
        train=_replaced(before.train, entry.train, number),
        data=_replaced(data, entry.data, number),
        optim=_replaced(before.optim, entry.optim, number),
    )


def _replaced(values: T, changes: Changes, number: int) -> T:
    new = given(changes)
    try:
        for name, inner in _sections(changes):
            new[name] = _replaced(getattr(values, name), inner, number)
        replaced: T = replace(values, **new)  # type: ignore[type-var]
        return replaced
    except ValueError as error:
        # A section's error has the phase already.
        message = str(error)
        raise ValueError(message if message.startswith("phases: ") else f"phases: in phase {number} {error}") from error


def given(changes: Changes) -> dict[str, Any]:
    """Return the changed values of a section by key; those of a section in it, if there are any, as a dictionary."""
    values = {item.name: getattr(changes, item.name) for item in fields(changes)}
    found = {name: value for name, value in values.items() if value is not None and not is_dataclass(value)}
    return found | {name: inner for name, section in _sections(changes) if (inner := given(section))}


def with_changes(values: dict[str, Any], changes: Changes) -> dict[str, Any]:
    """Return a section's plain values, as config.yaml has them, with the changed ones replaced."""
    inner = {name: with_changes(values.get(name, {}), section) for name, section in _sections(changes)}
    return values | given(changes) | inner


def _sections(changes: Changes) -> Iterator[tuple[str, Any]]:
    for item in fields(changes):
        if is_dataclass(section := getattr(changes, item.name)):
            yield item.name, section


def phase_at(phases: Sequence[Phase], step: int) -> Phase:
    """Return the phase of a training step (steps taken before it)."""
    return next(phase for phase in reversed(phases) if phase.first <= step)


class PhasedSampler:
    """Returns the batches of a run in phases, as a function of the step.

    Args:
        phases: The phases of the run.
        samplers: The sampler of each phase.
    """

    def __init__(self, phases: Sequence[Phase], samplers: Sequence[Sampler]) -> None:
        self._phases, self._samplers = phases, samplers

    def micro_batches(self, step: int, micro_batch_size: int, *, rank: int = 0, world: int = 1) -> list[Batch]:
        """See trainer.data.dataset.Sampler.micro_batches."""
        # Each phase's sampler counts the run's steps, not the phase's.
        sampler = self._samplers[phase_at(self._phases, step).number]
        return sampler.micro_batches(step, micro_batch_size, rank=rank, world=world)

    def metrics(self, result: Mapping[str, Any]) -> Mapping[str, Any]:
        """See trainer.loop.Source: the data say nothing about a step."""
        return result
