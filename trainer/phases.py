"""Phases of one run: from a step on other lengths, data, batches, learning rates or rotary bases. Imports no torch.

    phases:
      - from_step: 10000
        train: {seq_len: 4096, global_batch_size: 64}
        data: {blend: {data/books: 3, data/web: 1}}
        optim: {lr: 1.0e-4}
        model: {rope_theta: 500000}

Design. A phase is the whole configuration with some of its values replaced: those that an entry names, the others as in
the phase before. So what reads a configuration reads a phase: its layout is validated, its data are looked at and its
step is planned like those of a run of its own, before a model is built.

The step counts through the whole run, and nothing else is kept: a batch is a function of (seed, step) and the phase's
length, batch size and data, a learning rate one of the step, the phase's schedule and `train.steps`, which stays the
whole. From this follows what a change of phase means: the run goes on as one would that has the phase's values from its
beginning, and the parameters, the optimizer's state and the step of this one. It equals two runs, the second of which
goes on from the first one's checkpoint (`checkpoint.resume`), and a resumed run needs to know only its step. It also
follows that a phase does not know which documents earlier ones have read: one with the same data in another length or
batch size reads them in an order of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

if TYPE_CHECKING:
    from trainer.config import PretrainConfig, TrainConfig
    from trainer.data.batch import Batch
    from trainer.data.dataset import Sampler

T = TypeVar("T")


@dataclass
class TrainChanges:
    """See trainer.config.TrainConfig; null keeps what the phase before has.

    Attributes:
        seq_len: Tokens in a sample.
        micro_batch_size: Samples that one rank computes at a time.
        global_batch_size: Samples in an optimizer step.
        trainable: Patterns of the names of the parameters that are trained; the others rest. Not with DeepSpeed.
    """

    seq_len: int | None = None
    micro_batch_size: int | None = None
    global_batch_size: int | None = None
    trainable: list[str] | None = None


@dataclass
class DataChanges:
    """See trainer.config.DataConfig; null keeps what the phase before has.

    Attributes:
        path: A single source, in place of the phase before's path or blend.
        blend: Several sources with their weights.
    """

    path: str | None = None
    blend: dict[str, float] | None = None


@dataclass
class OptimChanges:
    """See trainer.config.OptimConfig; null keeps what the phase before has. Schedules are over the whole run.

    Attributes:
        lr: Peak learning rate.
        min_lr_ratio: The schedule ends at lr times this.
        schedule: cosine or wsd.
        warmup_steps: Steps of linear warm-up, from the beginning of the run.
        decay_fraction: The decaying part of wsd.
    """

    lr: float | None = None
    min_lr_ratio: float | None = None
    schedule: Literal["cosine", "wsd"] | None = None
    warmup_steps: int | None = None
    decay_fraction: float | None = None


@dataclass
class ModelChanges:
    """See models.config.AttentionConfig; null keeps what the phase before has. No parameter depends on it.

    Attributes:
        rope_theta: Base of the rotary embedding of attention.
    """

    rope_theta: float | None = None


@dataclass
class PhaseConfig:
    """What changes, and when.

    Attributes:
        from_step: Steps taken before the phase begins.
        from_tokens: In its place, tokens read: it begins with the first step that has as many before it.
        train: Length and batch.
        data: What is read.
        optim: The learning rate.
        model: The rotary embedding.
    """

    from_step: int | None = None
    from_tokens: int | None = None
    train: TrainChanges = field(default_factory=TrainChanges)
    data: DataChanges = field(default_factory=DataChanges)
    optim: OptimChanges = field(default_factory=OptimChanges)
    model: ModelChanges = field(default_factory=ModelChanges)


Changes: TypeAlias = TrainChanges | DataChanges | OptimChanges | ModelChanges


@dataclass(frozen=True)
class Phase:
    """A part of a run.

    Attributes:
        number: Which, from 0.
        first: Steps before it.
        last: Steps after its last one.
        config: The run's configuration as it is in this phase, of a run that has no phases.
    """

    number: int
    first: int
    last: int
    config: PretrainConfig

    def __str__(self) -> str:
        return f"phase {self.number}, steps {self.first + 1} to {self.last}"


def expand(config: PretrainConfig) -> list[Phase]:
    """The phases of a run, the first of which is the configuration's own.

    Raises:
        ValueError: an entry does not say when it begins, begins at a step that has passed, or changes nothing or to
            what cannot be.
    """
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
    """Steps before each phase, the run's own among them.

    Raises:
        ValueError: an entry does not say when it begins, or not later than the one before.
    """
    starts, tokens = [0], 0
    for number, entry in enumerate(entries, 1):
        if (entry.from_step is None) == (entry.from_tokens is None):
            raise ValueError(f"phases: phase {number} needs one of from_step and from_tokens, which say when it begins")
        per_step = train.global_batch_size * train.seq_len
        first = entry.from_step
        if entry.from_tokens is not None:
            first = starts[-1] - (tokens - entry.from_tokens) // per_step
        if first is None or first <= starts[-1]:
            raise ValueError(
                f"phases: phase {number} begins at step {first}, and the one before it at step {starts[-1]}; order "
                "them by their beginning"
            )
        tokens += (first - starts[-1]) * per_step
        starts.append(first)
        train = _replaced(train, entry.train, number)
    return starts


def _changed(before: PretrainConfig, entry: PhaseConfig, number: int) -> PretrainConfig:
    if not (given(entry.train) or given(entry.data) or given(entry.optim) or given(entry.model)):
        raise ValueError(f"phases: phase {number} changes nothing; name what changes, or leave it out")
    # A path takes the place of the blend before.
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
    try:
        replaced: T = replace(values, **given(changes))  # type: ignore[type-var]
        return replaced
    except ValueError as error:
        raise ValueError(f"phases: in phase {number} {error}") from error


def given(changes: Changes) -> dict[str, Any]:
    """What changes, by the keys of the section."""
    values = {item.name: getattr(changes, item.name) for item in fields(changes)}
    return {name: value for name, value in values.items() if value is not None}


def phase_at(phases: Sequence[Phase], step: int) -> Phase:
    """The phase of a training step (steps taken before it)."""
    return next(phase for phase in reversed(phases) if phase.first <= step)


def trained_in_any(config: PretrainConfig) -> list[str]:
    """The patterns of the parameters that any phase trains: those for which an engine keeps state throughout."""
    return list(dict.fromkeys(pattern for phase in expand(config) for pattern in phase.config.train.trainable))


def to_plan(config: PretrainConfig) -> list[PretrainConfig]:
    """The configuration of each phase as memory has it, with the state of all that any phase trains."""
    trained = trained_in_any(config)
    return [replace(phase.config, train=replace(phase.config.train, trainable=trained)) for phase in expand(config)]


class PhasedSampler:
    """The batches of a run in phases, as a function of the step.

    Args:
        phases: Of the run.
        samplers: Of each phase.
    """

    def __init__(self, phases: Sequence[Phase], samplers: Sequence[Sampler]) -> None:
        self._phases, self._samplers = phases, samplers

    def micro_batches(self, step: int, micro_batch_size: int, *, rank: int = 0, world: int = 1) -> list[Batch]:
        """See trainer.data.dataset.Sampler.micro_batches."""
        sampler = self._samplers[phase_at(self._phases, step).number]
        return sampler.micro_batches(step, micro_batch_size, rank=rank, world=world)
