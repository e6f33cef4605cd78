"""Next-token negative log-likelihood, for pretraining and, with weights in the loss mask, supervised fine-tuning."""

from torch import Tensor

from trainer.data.batch import Batch
from trainer.objectives.base import NO_MODELS, Outputs


class LanguageModel:
    """sum_t m_t · −log p(y_t), divided by the number of tokens with m_t other than 0.

    m is the batch's loss mask. 0 excludes a token (padding, a prompt); any other weight multiplies its loss.
    """

    metrics: tuple[str, ...] = ()
    models = NO_MODELS

    def count(self, batch: Batch) -> int:
        """Count the tokens in the loss mask."""
        return int(batch.loss_mask.count_nonzero())

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See trainer.objectives.base.Objective."""
        return outputs.nll_sum(batch.labels, batch.loss_mask), ()
