"""The interface between the training loop and an engine. The loop is the same for every engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from models.config import ModelConfig
from models.decoder import Decoder
from trainer.data.batch import Batch
from trainer.objectives.alignment import AnyObjective

if TYPE_CHECKING:
    # These modules import this one.
    from trainer.engines.common import Collectives
    from trainer.engines.frozen import FrozenModel, FrozenSpec


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank.

    Attributes:
        loss: The objective's sum over the global batch divided by its count. Language models: nats per token.
        grad_norm: L2 norm of the global gradient before clipping.
        tokens: The count that divides the loss. Language models: the tokens in the loss mask.
        skipped: The loss or the gradient was not finite, so nothing was updated.
        metrics: Further entries of the step's line in metrics.jsonl, by key.
        seconds: This rank's time per phase (trainer.engines.timing.PHASES). Equality of results ignores it.
    """

    loss: float
    grad_norm: float
    tokens: int
    skipped: bool
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class PendingSave:
    """A snapshot of the training state on every rank, to be written while training continues.

    Attributes:
        write: Writes this rank's snapshot and returns the same as `Engine.save`. It may run in a thread, because it
            shares no process group with training.
    """

    write: Callable[[], dict[str, str]]


class Engine(Protocol):
    """Parameters, optimizer and process groups of one run.

    Attributes:
        model: This rank's shard of the model. With several pipeline stages on the rank, the first of them.
        model_is_whole: Whether this rank could generate text with `model` alone.
        collectives: Small messages between all ranks of the run.
    """

    model: Decoder
    model_is_whole: bool
    device: torch.device
    rank: int
    world_size: int
    data_parallel_rank: int
    data_parallel_size: int
    collectives: Collectives

    def train_step(self, batches: Sequence[Batch], objective: AnyObjective, lr: float, step: int = 0) -> StepResult:
        """Run forward and backward over this rank's micro-batches, then one update at learning rate `lr`.

        Args:
            batches: This rank's micro-batches. Every data-parallel rank passes the same number.
            objective: The objective to minimise. Its metrics, divided by its count, enter the result's metrics.
            lr: Learning rate of the update.
            step: Number of steps taken before this one. The model's schedules depend on it.
        """

    def begin_phase(self, model: ModelConfig, trainable: Sequence[str]) -> None:
        """Start a phase of the run. The loop calls this for the first phase as well.

        Args:
            model: The configuration to compute with. It may differ from the engine's only in the rotary embedding.
            trainable: Name patterns of the parameters to train in this phase. The remaining parameters of
                EngineSpec.trainable keep their values.
        """

    def evaluate(self, batches: Sequence[Batch], objective: AnyObjective) -> list[float]:
        """Return the objective's sum over this rank's micro-batches, then the sum of each metric, without gradients."""

    def freeze(self, spec: FrozenSpec) -> FrozenModel:
        """Build a model that objectives read beside the trained one, and return this rank's shard of it.

        Every rank calls this.

        Raises:
            ValueError: the model has another vocabulary, or this layout cannot shard it.
        """

    def save(self, directory: Path) -> dict[str, str]:
        """Write parameters, optimizer and RNG state into an existing empty directory. Every rank calls this.

        Returns:
            On rank 0 the SHA-256 of every written file by name, after a flush to disk. Empty on other ranks.
        """

    def begin_save(self, directory: Path) -> PendingSave:
        """Snapshot the state that `save` would write. Training may continue at once. Every rank calls this."""

    def load(self, directory: Path) -> None:
        """Load a checkpoint that `save` wrote under any layout.

        Raises:
            ConfigError: the checkpoint has another format version, or belongs to another model.
        """

    def close(self) -> None:
        """Destroy the process groups."""
