"""Distillation: a student learns the next-token distributions of a teacher (Hinton et al. 2015, arXiv:1503.02531)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from kernels.losses.distillation import Direction
from trainer.data.batch import Batch
from trainer.engines.frozen import FrozenModel
from trainer.objectives.base import Outputs


class Distillation:
    """sum_t m_t [a τ² KL_t − b log q_t(y_t)], divided by the number of tokens with m_t other than 0.

    KL_t is the divergence of teacher and student at temperature τ. The factor τ² compensates for the smaller gradient
    of the divided logits (Hinton et al. 2015, section 2). q_t is the student's distribution at temperature 1, and m is
    the batch's loss mask, as in trainer.objectives.language_model.

    Args:
        teacher: The teacher. It has the student's vocabulary, with the same padding.
        direction: forward, KL(teacher || student), or reverse, KL(student || teacher).
        temperature: τ, above 0.
        kl_weight: a, not negative.
        next_token_weight: b, not negative.

    Raises:
        ValueError: a weight is negative. Temperature and direction are checked at their first use.
    """

    metrics: tuple[str, ...] = ("kl", "nll")

    def __init__(
        self,
        teacher: FrozenModel,
        direction: Direction = "forward",
        temperature: float = 1.0,
        kl_weight: float = 1.0,
        next_token_weight: float = 0.0,
    ) -> None:
        if not (kl_weight >= 0 and next_token_weight >= 0):
            raise ValueError(f"Distillation: weights must not be negative, as in {kl_weight}, {next_token_weight}")
        self.models: Mapping[str, FrozenModel] = {"teacher": teacher}
        self._direction, self._temperature = direction, temperature
        self._kl_weight, self._next_token_weight = kl_weight, next_token_weight

    def count(self, batch: Batch) -> int:
        """Count the tokens in the loss mask."""
        return int(batch.loss_mask.count_nonzero())

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See trainer.objectives.base.Objective. The metrics are the means of m KL, without τ², and of −m log q(y)."""
        teacher, weights = outputs.frozen["teacher"], batch.loss_mask
        kl = outputs.kl_sum(teacher, weights, direction=self._direction, temperature=self._temperature)
        # As a metric alone it needs no gradient, which would have the size of the head.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._next_token_weight > 0):
            nll = outputs.nll_sum(batch.labels, weights)
        loss = self._kl_weight * self._temperature**2 * kl + self._next_token_weight * nll
        return loss, (kl.detach(), nll.detach())
