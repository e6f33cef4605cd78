"""The input of a training step: tokens, labels, loss mask, positions and document bounds.

A sample is a row of T + 1 consecutive tokens of a stream; its first T are inputs and its last T are labels. With
document masks, a micro-batch of B rows is packed into one row of B * T tokens, and `documents` holds the bounds that
attention and recurrences must not cross. Labels do cross them: the label of an end-of-document token is the first token
of the next document.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from kernels.documents import Documents
from models.compression import Origin
from trainer.data.layout import NO_END

EXPERTS = "experts"
"""Name of the extra tensor with the experts that routers are to choose, int16 `[B, T, layers with experts, k]`."""


@dataclass(slots=True)
class Batch:
    """One micro-batch. Packed batches have B = 1 and T = rows * seq_len in the shapes below.

    Attributes:
        tokens: int64 `[B, T]`.
        labels: int64 `[B, T]`, the next token in the stream for each of `tokens`.
        loss_mask: float32 `[B, T]`, 1 where the label counts; 0 for padding and repeated context.
        positions: int64 `[B, T]`, from 0 in each document (packed) or in each row.
        documents: Bounds of the row's documents, on the host; None if rows are not packed.
        origin: Where the tokens lie in the batch of their step.
        extra: Further inputs of an objective, or of the model, by name, each `[B, T, ...]` and aligned with `labels`.
        prefix: int64 `[1, P]`, tokens in front of every row, which all rows have in common; None without. `positions`
            count them. No label counts among them.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    positions: torch.Tensor
    documents: Documents | None
    origin: Origin = field(default_factory=Origin)
    extra: dict[str, torch.Tensor] = field(default_factory=dict)
    prefix: torch.Tensor | None = None

    def part(self, rank: int, ranks: int) -> Batch:
        """The contiguous tokens of every row that context rank `rank` of `ranks` computes; `documents` stay whole."""
        size = self.tokens.shape[1] // ranks
        own = slice(rank * size, (rank + 1) * size)
        return replace(
            self,
            tokens=self.tokens[:, own],
            labels=self.labels[:, own],
            loss_mask=self.loss_mask[:, own],
            positions=self.positions[:, own],
            origin=self.origin.part(size, self.tokens.shape[1], rank),
            extra={name: tensor[:, own] for name, tensor in self.extra.items()},
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Copy the batch to `device`; the document bounds stay on the host."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return replace(
            self,
            tokens=move(self.tokens),
            labels=move(self.labels),
            loss_mask=move(self.loss_mask),
            positions=move(self.positions),
            extra={name: move(tensor) for name, tensor in self.extra.items()},
            prefix=None if self.prefix is None else move(self.prefix),
        )


def document_borders(tokens: np.ndarray, eod_id: int) -> np.ndarray:
    """Bounds of the documents in packed rows: a document ends after its end-of-document token, and at the end of its
    row.

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
    # A document never continues into the next row, which is another sample. This also marks the end of the last row.
    starts[::length] = True
    assert starts.size == rows * length + 1
    return np.flatnonzero(starts).astype(np.int32)


def make_batch(
    samples: np.ndarray,
    eod_id: int | None,
    document_mask: bool = True,
    loss_mask: np.ndarray | None = None,
    *,
    step: int = 0,
    first_sample: int = 0,
) -> Batch:
    """Build a micro-batch from samples.

    Args:
        samples: integers `[B, T + 1]`.
        eod_id: the end-of-document token; required with `document_mask`.
        document_mask: pack the rows and record the document bounds.
        loss_mask: float32 `[B, T]`; all ones by default.
        step: of training.
        first_sample: the number of the first sample in the batch of the step.

    Raises:
        ValueError: if `document_mask` is set without an `eod_id`.
    """
    if document_mask and eod_id is None:
        raise ValueError(NO_END)
    # Token files hold uint16 or int32; batches are int64, which torch's index operations expect.
    samples = np.asarray(samples, dtype=np.int64)
    rows, length = samples.shape[0], samples.shape[1] - 1
    tokens = np.ascontiguousarray(samples[:, :-1])
    labels = np.ascontiguousarray(samples[:, 1:])
    origin = Origin(step, first_sample * length)
    mask = np.ones((rows, length), np.float32) if loss_mask is None else np.ascontiguousarray(loss_mask, np.float32)
    if not document_mask:
        # Copied, because broadcast_to gives a read-only view, which torch.from_numpy warns about.
        positions = np.broadcast_to(np.arange(length), (rows, length)).copy()
        return _batch((tokens, labels, mask, positions), None, origin)
    assert eod_id is not None
    borders = document_borders(tokens, eod_id)
    lengths = np.diff(borders)
    positions = np.arange(rows * length) - np.repeat(borders[:-1], lengths)
    packed = tuple(array.reshape(1, -1) for array in (tokens, labels, mask, positions))
    return _batch(packed, Documents(tuple(borders.tolist())), origin)


def _batch(arrays: tuple[np.ndarray, ...], documents: Documents | None, origin: Origin) -> Batch:
    tokens, labels, loss_mask, positions = map(torch.from_numpy, arrays)
    return Batch(tokens, labels, loss_mask, positions, documents, origin)
