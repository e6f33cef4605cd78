"""What a training step receives: tokens, labels, loss mask, positions and document borders.

A sample is a row of T + 1 consecutive tokens of a stream; its first T are inputs and its last T are labels. With
document masks a micro-batch of B rows is packed into one row of B * T tokens, and `documents` holds the borders,
which attention and recurrences must not look across. Labels do look across: the label of an end-of-document token is
the first token of the next document.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from kernels.documents import Documents
from trainer.data.layout import NO_END


@dataclass(slots=True)
class Batch:
    """One micro-batch. Packed, the shapes below have B = 1 and T = rows * seq_len.

    Attributes:
        tokens: int64 `[B, T]`.
        labels: int64 `[B, T]`, the token after each of `tokens` in its stream.
        loss_mask: float32 `[B, T]`, 1 where the label counts. Padding and repeated context have 0.
        positions: int64 `[B, T]`, from 0 in each document (packed) or in each row.
        documents: those of the row, on the host; None where rows are not packed.
        extra: what an objective needs beside, by name: each `[B, T]`, in the order of `labels`.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    positions: torch.Tensor
    documents: Documents | None
    extra: dict[str, torch.Tensor] = field(default_factory=dict)

    def part(self, rank: int, ranks: int) -> Batch:
        """The consecutive tokens of every row that the `rank`-th of `ranks` has; `documents` stay the whole's."""
        size = self.tokens.shape[1] // ranks
        own = slice(rank * size, (rank + 1) * size)
        return replace(
            self,
            tokens=self.tokens[:, own],
            labels=self.labels[:, own],
            loss_mask=self.loss_mask[:, own],
            positions=self.positions[:, own],
            extra={name: tensor[:, own] for name, tensor in self.extra.items()},
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on `device`."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return Batch(
            move(self.tokens),
            move(self.labels),
            move(self.loss_mask),
            move(self.positions),
            self.documents,
            {name: move(tensor) for name, tensor in self.extra.items()},
        )


def document_borders(tokens: np.ndarray, eod_id: int) -> np.ndarray:
    """The borders of packed rows: a document ends after its end-of-document token, and at the end of its row.

    Args:
        tokens: integers `[B, T]`.
        eod_id: the end-of-document token.

    Returns:
        int32 `[N + 1]`, offsets into the flattened tokens.
    """
    rows, length = tokens.shape
    flat = tokens.reshape(-1)
    starts = np.zeros(flat.size + 1, dtype=bool)
    starts[1:] = flat == eod_id
    starts[::length] = True
    assert starts.size == rows * length + 1
    return np.flatnonzero(starts).astype(np.int32)


def make_batch(
    samples: np.ndarray, eod_id: int | None, document_mask: bool = True, loss_mask: np.ndarray | None = None
) -> Batch:
    """Turn samples into a micro-batch.

    Args:
        samples: integers `[B, T + 1]`.
        eod_id: the end-of-document token; needed with `document_mask`.
        document_mask: pack the rows and mark the borders of documents.
        loss_mask: float32 `[B, T]`; all ones if left out.

    Raises:
        ValueError: if `document_mask` is on without an `eod_id`.
    """
    if document_mask and eod_id is None:
        raise ValueError(NO_END)
    samples = np.asarray(samples, dtype=np.int64)
    rows, length = samples.shape[0], samples.shape[1] - 1
    tokens = np.ascontiguousarray(samples[:, :-1])
    labels = np.ascontiguousarray(samples[:, 1:])
    mask = np.ones((rows, length), np.float32) if loss_mask is None else np.ascontiguousarray(loss_mask, np.float32)
    if not document_mask:
        positions = np.broadcast_to(np.arange(length), (rows, length)).copy()
        return _batch((tokens, labels, mask, positions), None)
    assert eod_id is not None
    borders = document_borders(tokens, eod_id)
    lengths = np.diff(borders)
    positions = np.arange(rows * length) - np.repeat(borders[:-1], lengths)
    packed = tuple(array.reshape(1, -1) for array in (tokens, labels, mask, positions))
    return _batch(packed, Documents(tuple(borders.tolist())))


def _batch(arrays: tuple[np.ndarray, ...], documents: Documents | None) -> Batch:
    tokens, labels, loss_mask, positions = map(torch.from_numpy, arrays)
    return Batch(tokens, labels, loss_mask, positions, documents)
