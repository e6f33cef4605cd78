"""The seam between engines and what they minimise.

An engine runs the model up to the last stage's hidden states and hands an objective the `Outputs`; nothing of the
vocabulary's size is computed until the objective asks for it. The objective gives the sum that backward starts from.
Gradients are those of this sum over the whole global batch, divided by the count: the engine sums both over all ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kernels.losses.token_log_probs import token_log_probs
from models.parallel import enter_region, vocabulary_loss
from models.parameters import Groups
from trainer.data.batch import Batch


@dataclass(frozen=True)
class Outputs:
    """What the last pipeline stage puts out for a micro-batch of B rows and T tokens a row (of this context rank).

    Attributes:
        hidden: After the final norm, [T, B, D]; [T/P, B, D] with sequence parallelism over P ranks.
        head: This tensor-parallel rank's rows of the output projection, [V/P, D].
        groups: The ranks over which the model is sharded.
    """

    hidden: Tensor
    head: Tensor
    groups: Groups

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

    def hidden_states(self) -> Tensor:
        """[B, T, D], whole on every tensor-parallel rank. Their gradient is the sum over those ranks."""
        return enter_region(self.hidden, self.groups).transpose(0, 1)

    def _hidden_ND(self) -> Tensor:
        return self.hidden_states().flatten(0, 1)


class Objective(Protocol):
    """What a training step minimises: `forward`'s sum over the global batch, divided by `count`'s.

    Attributes:
        metrics: Names of what `forward` counts beside the sum, the same on every rank and stage.
    """

    metrics: tuple[str, ...]

    def count(self, batch: Batch) -> int:
        """What the micro-batch adds to the denominator; of a context rank, its own part's."""

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """The sum, a scalar to differentiate, and one detached scalar for each of `metrics`, to be divided alike."""
