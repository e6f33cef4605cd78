"""The mathematics of an evaluation, whether a run validates or `spiketrain evaluate` reads a checkpoint.

Over the micro-batches of a trainer.data.dataset.EvaluationStream, with labels y_t, their loss mask m_t, the model's
p(y_t) and the bytes of UTF-8 text b(y_t) that a token stands for:

    loss          = −sum_t m_t log p(y_t) / sum_t m_t                 nats per token
    bits per byte = −sum_t m_t log p(y_t) / ln 2 / sum_t m_t b(y_t)
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from trainer.data.batch import Batch


@dataclass(frozen=True)
class EvaluationSums:
    """What has been evaluated so far.

    Attributes:
        nll: Negative log-likelihood, nats.
        tokens: Labels that count.
        text_bytes: Bytes of text that these stand for; 0 where no tokenizer is known.
    """

    nll: float = 0.0
    tokens: float = 0.0
    text_bytes: float = 0.0

    @classmethod
    def of(cls, batches: Iterable[Batch], nll: float, token_bytes: np.ndarray | None) -> "EvaluationSums":
        """Of micro-batches and what a model makes of them.

        Args:
            batches: On the CPU.
            nll: Their negative log-likelihood, nats.
            token_bytes: int64 [V], the bytes of text of each token (Tokenizer.token_bytes); None if not known.
        """
        sums = cls(nll)
        for batch in batches:
            mask = batch.loss_mask.numpy()
            text_bytes = 0.0 if token_bytes is None else float((token_bytes[batch.labels.numpy()] * mask).sum())
            sums += cls(0.0, float(mask.sum()), text_bytes)
        return sums

    def __add__(self, other: "EvaluationSums") -> "EvaluationSums":
        return EvaluationSums(self.nll + other.nll, self.tokens + other.tokens, self.text_bytes + other.text_bytes)

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nll / max(self.tokens, 1.0)

    @property
    def bits_per_byte(self) -> float | None:
        """None where the bytes are not known."""
        return self.nll / math.log(2) / self.text_bytes if self.text_bytes else None


def chunks(stream: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """The micro-batches, `size` at a time."""
    batches = iter(stream)
    while chunk := list(islice(batches, size)):
        yield chunk
