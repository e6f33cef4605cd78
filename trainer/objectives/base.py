"""The seam between engines and what they minimise.

An engine runs the model up to the last stage's hidden states and hands an objective the `Outputs`; nothing of the
vocabulary's size is computed until the objective asks for it. The objective gives the sum that backward starts from.
Gradients are those of this sum over the whole global batch, divided by the count: the engine sums both over all ranks.

An objective may read other models beside the one that is trained, such as a teacher or a reference policy: those that
it names in `models`, made by `Engine.freeze`. The engine runs each over the micro-batch, without gradients, before the
trained one, and the objective finds what it puts out in `Outputs.frozen` under the same name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from kernels.losses.distillation import Direction, distillation_kl
from kernels.losses.token_log_probs import token_log_probs
from kernels.matmul import linear
from models.parallel import enter_region, gather_columns, vocabulary_loss
from models.parameters import Groups
from trainer.data.batch import Batch

if TYPE_CHECKING:
    from trainer.engines.frozen import FrozenModel

# Of an objective that reads none.
NO_MODELS: Mapping[str, FrozenModel] = MappingProxyType({})


@dataclass(frozen=True)
class Outputs:
    """What the last pipeline stage puts out for a micro-batch of B rows and T tokens a row (of this context rank).

    Attributes:
        hidden: After the final norm, [T, B, D]; [T/P, B, D] with sequence parallelism over P ranks.
        head: This tensor-parallel rank's rows of the output projection, [V/P, D].
        groups: The ranks over which the model is sharded.
        frozen: What the objective's frozen models put out for the same micro-batch, by their names.
    """

    hidden: Tensor
    head: Tensor
    groups: Groups
    frozen: Mapping[str, Outputs] = field(default_factory=dict)

    def nll_sum(self, labels: Tensor, weights: Tensor) -> Tensor:
        """Sum over tokens of weight times negative log-likelihood, nats. int64 and float32 [B, T]."""
        total, _ = vocabulary_loss(self.hidden, self.head, labels, weights, self.groups)
        return total

    def token_log_probs(
        self, tokens: Tensor, *, temperature: float = 1.0, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probability of each token and, if asked for, the entropy where it was drawn, nats, float32 [B, T].

        Args:
            tokens: int64 [B, T]; -100 counts nothing.
            temperature: Divides the logits.
            entropy: Whether the entropies are wanted.
        """
        log_probs, entropies = token_log_probs(
            self._hidden_ND(),
            self.head,
            tokens.flatten(),
            temperature=temperature,
            entropy=entropy,
            group=self.groups.tensor,
        )
        return log_probs.view_as(tokens), None if entropies is None else entropies.view_as(tokens)

    def kl_sum(
        self, teacher: Outputs, weights: Tensor, *, direction: Direction = "forward", temperature: float = 1.0
    ) -> Tensor:
        """Sum over tokens of weight (float32 [B, T]) times the divergence from the teacher's distribution, nats.

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
        """Logits [n, V] of the n tokens that the mask `chosen`, bool [B, T], names; padding of the vocabulary included.

        Every tensor-parallel rank gets all columns. Of many tokens they are as large as anything in the step: for sums
        over tokens the other methods never hold them.
        """
        rows = self._hidden_ND()[chosen.flatten()]
        return gather_columns(linear(rows, self.head), self.groups.tensor)

    def hidden_states(self) -> Tensor:
        """[B, T, D], whole on every tensor-parallel rank. Their gradient is the sum over those ranks."""
        return enter_region(self.hidden, self.groups).transpose(0, 1)

    def _hidden_ND(self) -> Tensor:
        return self.hidden_states().flatten(0, 1)


class Objective(Protocol):
    """What a training step minimises: `forward`'s sum over the global batch, divided by `count`'s.

    Attributes:
        metrics: Names of what `forward` counts beside the sum, the same on every rank and stage.
        models: The frozen models that it reads, by the names under which `forward` finds their outputs; the same names
            on every rank.
    """

    metrics: tuple[str, ...]
    models: Mapping[str, FrozenModel]

    def count(self, batch: Batch) -> int:
        """What the micro-batch adds to the denominator; of a context rank, its own part's."""

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """The sum, a scalar to differentiate, and one detached scalar for each of `metrics`, to be divided alike."""
