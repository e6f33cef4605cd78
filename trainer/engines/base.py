"""What the training loop asks of an engine. The loop never asks which one it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from models.config import ModelConfig
from models.decoder import Decoder
from trainer.data.batch import Batch
from trainer.objectives.base import Objective

if TYPE_CHECKING:
    from trainer.engines.common import Collectives
    from trainer.engines.frozen import FrozenModel, FrozenSpec


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank.

    Attributes:
        loss: The objective's sum over the global batch, divided by its count: of a language model nats per token.
        grad_norm: L2 norm of the whole gradient before clipping.
        tokens: What the objective divides by: of a language model the tokens that counted in the loss.
        skipped: The loss or the gradient was not finite; nothing was updated.
        metrics: What else goes into the step's line of metrics.jsonl, by its key.
        seconds: Of this rank's phases (trainer.engines.timing.PHASES); no part of what makes two results equal.
    """

    loss: float
    grad_norm: float
    tokens: int
    skipped: bool
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class PendingSave:
    """A copy of the state of every rank, to be written beside the training.

    Attributes:
        write: Writes this rank's copy, and gives what `Engine.save` does; from a thread, for it shares no collective
            with the training.
    """

    write: Callable[[], dict[str, str]]


class Engine(Protocol):
    """Parameters, optimizer and process groups of one run.

    Attributes:
        model: This rank's part of the model; of several stages the first.
        model_is_whole: Whether this rank could generate with it alone.
        collectives: Messages between all ranks of the run.
    """

    model: Decoder
    model_is_whole: bool
    device: torch.device
    rank: int
    world_size: int
    data_parallel_rank: int
    data_parallel_size: int
    collectives: Collectives

    def train_step(self, batches: Sequence[Batch], objective: Objective, lr: float, step: int = 0) -> StepResult:
        """Forward and backward over this rank's micro-batches, one update at learning rate `lr`.

        Args:
            batches: As many micro-batches on every data-parallel rank.
            objective: What is minimised. Its metrics go into the result's, divided by its count.
            lr: Learning rate of the update.
            step: Steps before this one: what the model does by schedule goes by it.
        """

    def begin_phase(self, model: ModelConfig, trainable: Sequence[str]) -> None:
        """Begin a phase of the run, the first one too.

        Args:
            model: The configuration of the same model to compute by: with another rotary embedding.
            trainable: Patterns of the parameters to train; the others of EngineSpec.trainable rest.
        """

    def evaluate(self, batches: Sequence[Batch], objective: Objective) -> list[float]:
        """Without gradients: the objective's sum over this rank's micro-batches, then that of each of its metrics."""

    def freeze(self, spec: FrozenSpec) -> FrozenModel:
        """Make a model for objectives to read beside the one that is trained, and give this rank's part.

        Every rank calls it.

        Raises:
            ValueError: its vocabulary is another, or this layout cannot shard it.
        """

    def save(self, directory: Path) -> dict[str, str]:
        """Write parameters, optimizer and RNG state into an existing empty directory; every rank calls it.

        Returns:
            On rank 0 the SHA-256 of every file that was written, flushed to the disk, by its name.
        """

    def begin_save(self, directory: Path) -> PendingSave:
        """Copy what `save` would write; training may go on at once. Every rank calls it."""

    def load(self, directory: Path) -> None:
        """Read what `save` wrote, under this layout or another.

        Raises:
            ConfigError: it is another version's, or another model's.
        """

    def close(self) -> None:
        """Leave the process groups."""
