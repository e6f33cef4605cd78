"""The formulas of an evaluation, for validation during a run and for `spiketrain evaluate` on a checkpoint.

The sums run over the micro-batches of a trainer.data.dataset.EvaluationStream, with labels y_t, loss mask m_t, the
model's p(y_t), and the number b(y_t) of bytes of UTF-8 text that a token stands for:

    loss          = −sum_t m_t log p(y_t) / sum_t m_t                 nats per token
    bits per byte = −sum_t m_t log p(y_t) / ln 2 / sum_t m_t b(y_t)
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from trainer.data.batch import Batch


@dataclass(frozen=True)
class EvaluationSums:
    """The sums of an evaluation so far.

    Attributes:
        nll: Negative log-likelihood, nats.
        tokens: Labels in the loss mask.
        text_bytes: Bytes of text of these labels. 0 if no tokenizer is known.
    """

    nll: float = 0.0
    tokens: float = 0.0
    text_bytes: float = 0.0

    @classmethod
    def of(cls, batches: Iterable["Batch"], nll: float, token_bytes: np.ndarray | None) -> "EvaluationSums":
        """Compute the sums of micro-batches.

        Args:
            batches: Micro-batches on the CPU.
            nll: The model's negative log-likelihood on them, nats.
            token_bytes: int64 [V], bytes of text per token (Tokenizer.token_bytes). None if unknown.
        """
        sums = cls(nll)
        for batch in batches:
            mask = batch.loss_mask.numpy()
            # A weight in the mask multiplies a label's bytes as it multiplies its loss.
            text_bytes = 0.0 if token_bytes is None else float((token_bytes[batch.labels.numpy()] * mask).sum())
            sums += cls(0.0, float(mask.sum()), text_bytes)
        return sums

    def __add__(self, other: "EvaluationSums") -> "EvaluationSums":
        return EvaluationSums(self.nll + other.nll, self.tokens + other.tokens, self.text_bytes + other.text_bytes)

    @property
    def loss(self) -> float:
        """Nats per token."""
        # An empty split has no tokens.
        return self.nll / max(self.tokens, 1.0)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of text. None if the number of bytes is unknown."""
        return self.nll / math.log(2) / self.text_bytes if self.text_bytes else None


def chunks(stream: Iterable["Batch"], size: int) -> Iterator[list["Batch"]]:
    """Group a stream of micro-batches into lists of `size`. The last may be shorter."""
    batches = iter(stream)
    while chunk := list(islice(batches, size)):
        yield chunk
