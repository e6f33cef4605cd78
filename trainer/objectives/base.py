"""The interface between engines and objectives.

An engine runs the model up to the last stage's hidden states and passes an objective the `Outputs`. Nothing of the
vocabulary's size is computed until the objective asks for it. The objective returns the sum that backward starts from.
The gradient is that of this sum over the global batch, divided by the count. The engine reduces both over all ranks.

An objective may read other models beside the trained one, such as a teacher or a reference policy. It lists them in
`models`, and `Engine.freeze` builds them. For each micro-batch the engine runs them first, without gradients, and puts
their outputs into `Outputs.frozen` under the same names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from kernels.losses.distillation import Direction, distillation_kl
from kernels.losses.token_log_probs import IGNORE_LABEL, token_log_probs
from kernels.matmul import linear
from models.parallel import enter_region, gather_columns, vocabulary_loss
from models.parameters import Groups
from models.value_head import ValueHead
from trainer.data.batch import Batch

if TYPE_CHECKING:
    # That module imports this one.
    from trainer.engines.frozen import FrozenModel

# The `models` of an objective that reads no frozen model.
NO_MODELS: Mapping[str, FrozenModel] = MappingProxyType({})


@dataclass(frozen=True)
class Outputs:
    """The last pipeline stage's outputs for a micro-batch of B rows with T tokens each (of this context rank).

    Attributes:
        hidden: Hidden states after the final norm, [T, B, D]; [T/P, B, D] with sequence parallelism over P ranks.
        head: This tensor-parallel rank's rows of the output projection, [V/P, D].
        groups: The process groups over which the model is sharded.
        frozen: The frozen models' outputs for the same micro-batch, by name.
        value_head: The trained model's head for values, if it has one.
    """

    hidden: Tensor
    head: Tensor
    groups: Groups
    frozen: Mapping[str, Outputs] = field(default_factory=dict)
    value_head: ValueHead | None = None

    def nll_sum(self, labels: Tensor, weights: Tensor) -> Tensor:
        """Sum over tokens of weight times negative log-likelihood, in nats. Arguments: int64 and float32 [B, T]."""
        total, _ = vocabulary_loss(self.hidden, self.head, labels, weights, self.groups)
        return total

    def token_log_probs(
        self, tokens: Tensor, *, temperature: float = 1.0, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return the log-probability of each token and optionally the entropy at its position, nats, float32 [B, T].

        Args:
            tokens: int64 [B, T]; tokens of -100 are ignored.
            temperature: Divides the logits.
            entropy: Whether to compute the entropies. Otherwise the second result is None.
        """
        # Prompts are mostly longer than answers, and the head costs as much for a token that is ignored.
        chosen = (tokens != IGNORE_LABEL).flatten().nonzero().squeeze(1)
        log_probs, entropies = token_log_probs(
            self._hidden_ND()[chosen],
            self.head,
            tokens.flatten()[chosen],
            temperature=temperature,
            entropy=entropy,
            group=self.groups.tensor,
        )

        def at_places(values: Tensor) -> Tensor:
            return values.new_zeros(tokens.numel()).index_copy(0, chosen, values).view_as(tokens)

        return at_places(log_probs), None if entropies is None else at_places(entropies)

    def kl_sum(
        self, teacher: Outputs, weights: Tensor, *, direction: Direction = "forward", temperature: float = 1.0
    ) -> Tensor:
        """Sum over tokens of weight (float32 [B, T]) times the KL divergence from the teacher's distribution, in nats.

        See kernels.losses.distillation.distillation_kl for direction and temperature.
        """
        total, _ = distillation_kl(
            self._hidden_ND(),
            self.head,
            teacher._hidden_ND(),
            teacher.head,
            weights.flatten(),
            direction=direction,
            temperature=temperature,
            group=self.groups.tensor,
        )
        return total

    def logits(self, chosen: Tensor) -> Tensor:
        """Return the logits [n, V] of the n tokens that the mask `chosen`, bool [B, T], selects.

        V includes the vocabulary's padding. Every tensor-parallel rank gets all columns. For many tokens the result is
        as large as anything in the step; the other methods compute sums over tokens without ever holding it.
        """
        # Select rows before the product, so that only the chosen tokens get V columns.
        rows = self._hidden_ND()[chosen.flatten()]
        return gather_columns(linear(rows, self.head), self.groups.tensor)

    def values(self) -> Tensor:
        """Return the value head's numbers, float32 [B, T]."""
        assert self.value_head is not None, "EngineSpec.value_head asks for one"
        values: Tensor = self.value_head(self.hidden)
        return values

    def hidden_states(self) -> Tensor:
        """Return [B, T, D], whole on every tensor-parallel rank. Its gradient is summed over those ranks."""
        # The model computes time-major, [T, B, D]; labels and masks are [B, T].
        return enter_region(self.hidden, self.groups).transpose(0, 1)

    def _hidden_ND(self) -> Tensor:
        return self.hidden_states().flatten(0, 1)


class Objective(Protocol):
    """The quantity that a training step minimises: the sum of `forward` over the global batch, over that of `count`.

    Attributes:
        metrics: Names of the further sums that `forward` returns. Equal on every rank and stage.
        models: The frozen models that the objective reads. `forward` finds their outputs under the same names. The
            names are equal on every rank.
    """

    metrics: tuple[str, ...]
    models: Mapping[str, FrozenModel]

    def count(self, batch: Batch) -> int:
        """Return the micro-batch's contribution to the denominator. A context rank counts its own part."""

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the sum, a differentiable scalar, and one detached scalar per metric. All are divided by the count."""
