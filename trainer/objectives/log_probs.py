"""Weighted log-probabilities of given tokens, the form of every policy gradient."""

import torch
from torch import Tensor

from kernels.losses.token_log_probs import IGNORE_LABEL
from trainer.data.batch import Batch
from trainer.objectives.base import NO_MODELS, Outputs


class WeightedLogProbs:
    """−sum_t w_t log p(y_t) − c sum_t H_t, divided by the number of tokens in the loss mask.

    With the advantages as w, this is REINFORCE (Williams 1992, section 4).

    Args:
        weights: Name of the batch's extra tensor that holds w, float32 [B, T].
        temperature: Divides the logits. Should equal the sampler's temperature.
        entropy: c, the coefficient of the entropy bonus.
    """

    models = NO_MODELS

    def __init__(self, weights: str, temperature: float = 1.0, entropy: float = 0.0) -> None:
        self._weights, self._temperature, self._entropy = weights, temperature, entropy
        self.metrics: tuple[str, ...] = ("log_prob", *(("entropy",) if entropy else ()))

    def count(self, batch: Batch) -> int:
        """Count the tokens in the loss mask."""
        return int(batch.loss_mask.count_nonzero())

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See trainer.objectives.base.Objective. The metrics are the means of log p and of H over the tokens."""
        counts = batch.loss_mask != 0
        tokens = batch.labels.masked_fill(~counts, IGNORE_LABEL)
        log_probs, entropies = outputs.token_log_probs(
            tokens, temperature=self._temperature, entropy=bool(self._entropy)
        )
        # `where` instead of a product: a NaN in a masked token's weight must not spread.
        weights = torch.where(counts, batch.extra[self._weights], 0.0)
        loss, counted = -(weights * log_probs).sum(), [log_probs.detach().sum()]
        if entropies is not None:
            loss = loss - self._entropy * entropies.sum()
            counted.append(entropies.detach().sum())
        return loss, tuple(counted)
