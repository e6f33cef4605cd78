"""The next token's negative log-likelihood: pretraining, and with weights in the loss mask supervised fine-tuning."""

from torch import Tensor

from trainer.data.batch import Batch
from trainer.objectives.base import NO_MODELS, Outputs


class LanguageModel:
    """sum_t m_t · −log p(y_t), over the number of tokens with m_t other than 0.

    m is the batch's loss mask: 0 leaves a token out (padding, a prompt), any other weight multiplies its loss.
    """

    metrics: tuple[str, ...] = ()
    models = NO_MODELS

    def count(self, batch: Batch) -> int:
        """Tokens that count."""
        return int(batch.loss_mask.count_nonzero())

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See trainer.objectives.base.Objective."""
        return outputs.nll_sum(batch.labels, batch.loss_mask), ()
