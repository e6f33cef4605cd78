"""Distillation: a student learns the next-token distributions of a teacher (Hinton et al. 2015, arXiv:1503.02531)."""

import torch
from torch import Tensor

from kernels.losses.distillation import Direction
from trainer.data.batch import Batch
from trainer.engines.frozen import FrozenModel
from trainer.objectives.base import Outputs


class Distillation:
    """sum_t m_t [c τ² KL_t − (1 − c) log q_t(y_t)], divided by the number of tokens with m_t other than 0.

    KL_t is the divergence of teacher and student at temperature τ. The factor τ² compensates for the smaller gradient
    of the divided logits (Hinton et al. 2015, section 2). q_t is the student's distribution at temperature 1, and m is
    the batch's loss mask, as in trainer.objectives.language_model.

    Args:
        teacher: The teacher. It has the student's vocabulary, with the same padding.
        direction: forward, KL(teacher || student), or reverse, KL(student || teacher).
        temperature: τ, above 0.
        mix: c, from 0 to 1.

    Raises:
        ValueError: mix is not in 0 to 1. Temperature and direction are checked at their first use.
    """

    metrics: tuple[str, ...] = ("kl", "nll")

    def __init__(
        self, teacher: FrozenModel, direction: Direction = "forward", temperature: float = 1.0, mix: float = 1.0
    ) -> None:
        if not 0 <= mix <= 1:
            raise ValueError(f"Distillation: mix must be from 0 to 1, not {mix}")
        self.models = {"teacher": teacher}
        self._direction, self._temperature, self._mix = direction, temperature, mix

    def count(self, batch: Batch) -> int:
        """Count the tokens in the loss mask."""
        return int(batch.loss_mask.count_nonzero())

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See trainer.objectives.base.Objective. The metrics are the means of m KL, without τ², and of −m log q(y)."""
        teacher, weights = outputs.frozen["teacher"], batch.loss_mask
        kl = outputs.kl_sum(teacher, weights, direction=self._direction, temperature=self._temperature)
        # As a metric alone it needs no gradient, which would have the size of the head.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._mix < 1):
            nll = outputs.nll_sum(batch.labels, weights)
        loss = self._mix * self._temperature**2 * kl + (1 - self._mix) * nll
        return loss, (kl.detach(), nll.detach())
