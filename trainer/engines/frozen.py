"""Models that an objective reads beside the one that is trained: a teacher, a reference policy.

They live on the ranks and process groups of the engine, sharded as the trained model is, and are nothing but
parameters: no gradients, no optimizer, no DDP around them. `Engine.freeze` makes them; an objective names them in
`models`.
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
from trainer import inference, weights
from trainer.config import ParallelConfig
from trainer.data.batch import Batch
from trainer.errors import ConfigError
from trainer.objectives.base import Outputs


@dataclass(frozen=True)
class FrozenSpec:
    """A model that is read and not trained.

    Attributes:
        model: Its shape: any that can be sharded as the trained model is.
        vocab_size: Rows of its embedding, padding included: as many as the trained model has.
        fill: Gives this rank's shard of the model, or of a stage of it, its values.
        precision: bf16 or fp32, of the parameters that it computes with.
    """

    model: ModelConfig
    vocab_size: int
    fill: Callable[[Decoder], None]
    precision: str = "fp32"

    @classmethod
    def of_weights(cls, path: str | Path, precision: str = "fp32") -> FrozenSpec:
        """The model in a directory of weights.

        Raises:
            ConfigError: there is none.
        """
        found = weights.open_weights(path)
        return cls(found.model, found.vocab_size, partial(weights.fill, weights=found), precision)

    @classmethod
    def of_checkpoint(cls, path: str | Path) -> FrozenSpec:
        """The model of a run directory's newest checkpoint, or of a checkpoint, of any layout, as it was trained.

        Raises:
            ConfigError: no usable checkpoint there.
        """
        stored = inference.open_checkpoint(path)
        return cls(stored.model, stored.vocab_size, stored.fill, "bf16" if stored.dtype == torch.bfloat16 else "fp32")

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters, but those that declare float32 (models.parameters)."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def require_fit(self, vocab_size: int, parallel: ParallelConfig) -> None:
        """Hold the model against the trained one's vocabulary and layout.

        Raises:
            ConfigError: the vocabularies differ in their rows.
            ValueError: it cannot be sharded so.
        """
        if self.vocab_size != vocab_size:
            raise ConfigError(
                f"the frozen model has a vocabulary of {self.vocab_size} rows and the trained one {vocab_size}; both "
                "must have the same tokens, padded alike (model.vocab_multiple)"
            )
        parallel.require_divisible(self.model)

    def build(self, layers: range, groups: Groups, device: torch.device) -> Decoder:
        """Make this rank's shard of consecutive layers."""
        decoder = build(self.model, self.vocab_size, layers, groups=groups, dtype=self.dtype, device=device)
        self.fill(decoder)
        # In evaluation mode routers have no noise, no capacity and no losses, and count nothing.
        return decoder.eval().requires_grad_(False)


class FrozenModel:
    """A model that is not trained: this rank's part of it.

    Args:
        decoders: Its stages on this rank, the last one last.
        hidden_states: The engine's way through them: the last stage's hidden states of every micro-batch, [T, B, D]
            each ([T/P, B, D] with sequence parallelism); none on ranks without the last stage.
    """

    def __init__(
        self, decoders: Sequence[Decoder], hidden_states: Callable[[Sequence[Batch]], Sequence[Tensor]]
    ) -> None:
        self.decoders = tuple(decoders)
        self._hidden_states = hidden_states

    def outputs(self, batches: Sequence[Batch]) -> list[Outputs]:
        """What it puts out for every micro-batch, on the last stage; nothing on the others.

        Every rank that shares the micro-batches' work calls it, with this rank's part of each. All hidden states are
        there at once.
        """
        with torch.no_grad():
            found = self._hidden_states(batches)
        last = self.decoders[-1]
        return [Outputs(hidden, last.head_weight, last.groups) for hidden in found]
