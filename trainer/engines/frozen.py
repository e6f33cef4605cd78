"""Models that an objective reads beside the trained one, such as a teacher or a reference policy.

They use the engine's ranks and process groups and are sharded as the trained model is. They hold parameters only: no
gradients, no optimizer state, no DDP wrapper. `Engine.freeze` builds them; an objective lists them in `models`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from models.config import ModelConfig
from models.decoder import Decoder, build
from models.parameters import Groups
from trainer.config import ParallelConfig
from trainer.data.batch import Batch
from trainer.errors import ConfigError
from trainer.objectives.base import Outputs
from trainer.stored import teacher, weights


@dataclass(frozen=True)
class FrozenSpec:
    """A model to read without training it.

    Attributes:
        model: Its configuration. The trained model's layout must be able to shard it.
        vocab_size: Rows of its embedding, including padding. Must equal the trained model's.
        fill: Fills this rank's shard of the model, or of one of its stages, with values.
        precision: dtype of its parameters, bf16 or fp32.
        stages_as_trained: Split the layers over pipeline stages like the trained model's, which has as many. Otherwise
            evenly, because the head runs outside of the frozen model's schedule.
    """

    model: ModelConfig
    vocab_size: int
    fill: Callable[[Decoder], None]
    precision: str = "fp32"
    stages_as_trained: bool = False

    @classmethod
    def of_weights(
        cls,
        path: str | Path,
        precision: str = "fp32",
        stages_as_trained: bool = False,
        key: str = "train.objective.teacher",
    ) -> FrozenSpec:
        """Describe the model of weights, or of a checkpoint as an export has it. `key` names it in errors.

        Raises:
            ConfigError: the directory holds neither.
        """
        found = teacher.open_teacher(path, key)
        return cls(found.model, found.vocab_size, partial(weights.fill, weights=found), precision, stages_as_trained)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the parameters, except those that declare float32 (models.parameters)."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def require_fit(self, vocab_size: int, parallel: ParallelConfig) -> None:
        """Check the model against the trained model's vocabulary and layout.

        Raises:
            ConfigError: the embeddings differ in their number of rows.
            ValueError: the layout cannot shard the model.
        """
        # Objectives compare both models' distributions over the same tokens.
        if self.vocab_size != vocab_size:
            raise ConfigError(
                f"the frozen model has a vocabulary of {self.vocab_size} rows and the trained one {vocab_size}; both "
                "must have the same tokens, padded alike (model.vocab_multiple)"
            )
        # The frozen model has the trained one's layout, but its own heads, channels and experts.
        parallel.require_divisible(self.model)

    def build(self, layers: range, groups: Groups, device: torch.device) -> Decoder:
        """Build this rank's shard of consecutive layers."""
        decoder = build(self.model, self.vocab_size, layers, groups=groups, dtype=self.dtype, device=device)
        self.fill(decoder)
        # In evaluation mode routers add no noise, apply no capacity limit and no auxiliary losses, and count nothing.
        return decoder.eval().requires_grad_(False)


AfterStage = Callable[[int, int, Batch], None]


class FrozenModel:
    """One rank's shard of a model that is not trained.

    Args:
        decoders: Its pipeline stages on this rank, in order.
        run: The engine's forward pass through them. Returns the last stage's hidden states of every micro-batch,
            [T, B, D] each ([T/P, B, D] with sequence parallelism), and nothing on ranks without it. With a second
            argument other than None it calls that as `visit` says, and keeps nothing.
    """

    def __init__(
        self, decoders: Sequence[Decoder], run: Callable[[Sequence[Batch], AfterStage | None], Sequence[Tensor]]
    ) -> None:
        self.decoders = tuple(decoders)
        self._run = run

    def outputs(self, batches: Sequence[Batch]) -> list[Outputs]:
        """Return the model's outputs for every micro-batch on the last stage, and nothing on the other stages.

        All ranks that share these micro-batches call this, each with its own shard of them. The hidden states of all
        micro-batches are in memory at once.
        """
        with torch.no_grad():
            found = self._run(batches, None)
        # On ranks without the last stage `found` is empty, and the head below is never read.
        last = self.decoders[-1]
        return [Outputs(hidden, last.head_weight, last.groups) for hidden in found]

    def visit(self, batches: Sequence[Batch], after: AfterStage) -> None:
        """Run the model over micro-batches without keeping its outputs.

        After each stage of this rank and micro-batch, calls `after` with the number of the micro-batch, the number of
        the stage in `decoders`, and the micro-batch on its device. All ranks that share these micro-batches call this.
        """
        with torch.no_grad():
            self._run(batches, after)
