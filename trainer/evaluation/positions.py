"""Loss by position in the context: it shows how far back a model still gains from what it has read.

A label has position p if the model has read p tokens of its document in this window before it predicts the label. The
first token of a document has position 0: nothing but the end of another document precedes it. Positions fall into the
buckets 0, 1, 2-3, 4-7, … (Kaplan et al. 2020, arXiv 2001.08361, appendix D.5, plot the same on a logarithmic axis). A
model that uses its context has a loss that decreases along the buckets. Where it no longer does, more context is of no
use to it.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from trainer.evaluation.sums import EvaluationSums

if TYPE_CHECKING:
    from trainer.data.batch import Batch

# Of positions below 2^62.
_BUCKETS = 63


class PositionSums:
    """The sums of an evaluation by position in the context.

    Args:
        token_bytes: int64 [V], bytes of text per token (Tokenizer.token_bytes).
        eod_id: The end-of-document token.
    """

    def __init__(self, token_bytes: np.ndarray, eod_id: int) -> None:
        self._token_bytes, self._eod_id = token_bytes, eod_id
        self._sums = np.zeros((3, _BUCKETS))

    def add(self, batch: "Batch", losses: np.ndarray) -> None:
        """Add a micro-batch on the CPU.

        Args:
            batch: The micro-batch.
            losses: The negative log-likelihoods of its labels, nats, float32 [B*T].
        """
        mask = batch.loss_mask.numpy().ravel().astype(np.float64)
        # The token at position 0 has been read when its label, the next token, is predicted.
        read = batch.positions.numpy().ravel() + 1
        if batch.documents is not None:
            read[batch.tokens.numpy().ravel() == self._eod_id] = 0
        # The exponent is 0 for 0, and k + 1 from 2^k to 2^(k+1) - 1, exactly, unlike a rounded logarithm.
        buckets = np.frexp(read.astype(np.float64))[1]
        text_bytes = self._token_bytes[batch.labels.numpy().ravel()]
        weighted = (losses * mask, mask, text_bytes * mask)
        self._sums += np.stack([np.bincount(buckets, values, minlength=_BUCKETS) for values in weighted])

    def rows(self) -> list[dict[str, Any]]:
        """One row per bucket with labels: its first and last position, labels, bytes, nats per token, bits per byte."""
        found = []
        for bucket, (nll, tokens, text_bytes) in enumerate(self._sums.T):
            if tokens:
                sums = EvaluationSums(float(nll), float(tokens), float(text_bytes))
                found.append(
                    {
                        "first": (1 << bucket) >> 1,
                        "last": (1 << bucket) - 1,
                        "tokens": round(sums.tokens),
                        "bytes": round(sums.text_bytes),
                        "loss": sums.loss,
                        "bits_per_byte": sums.bits_per_byte,
                    }
                )
        return found


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the rows of PositionSums."""
    table = Table(title="by position in the context", title_justify="left")
    for title in ("position", "tokens", "nats a token", "bits a byte"):
        table.add_column(title, justify="right")
    for row in rows:
        place = str(row["first"]) if row["first"] == row["last"] else f"{row['first']}-{row['last']}"
        bits = row["bits_per_byte"]
        table.add_row(place, f"{row['tokens']:,}", f"{row['loss']:.4f}", "-" if bits is None else f"{bits:.4f}")
    Console().print(table)
