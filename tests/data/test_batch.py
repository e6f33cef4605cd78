"""Batches: shapes, labels, document borders and positions, against the plain loop."""

import numpy as np
import pytest
import torch

from trainer.data.batch import make_batch

EOD = 3


def naive_borders(tokens: np.ndarray) -> list[int]:
    """A document ends after its end-of-document token, and where its row ends."""
    borders, place = [0], 0
    for row in tokens:
        for column, token in enumerate(row):
            place += 1
            if token == EOD or column == len(row) - 1:
                borders.append(place)
    return borders


@pytest.mark.parametrize("seed", range(20))
def test_packed_borders_and_positions(seed):
    rng = np.random.default_rng(seed)
    samples = rng.integers(0, 6, (int(rng.integers(1, 5)), int(rng.integers(2, 20)))).astype(np.uint16)
    batch = make_batch(samples, EOD)
    borders = naive_borders(samples[:, :-1])
    assert batch.documents.bounds == tuple(borders)
    assert batch.positions.flatten().tolist() == [place for a, b in zip(borders, borders[1:]) for place in range(b - a)]
    assert batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape == (1, samples[:, 1:].size)


@pytest.mark.parametrize("document_mask", [True, False])
def test_labels_are_the_next_tokens(document_mask):
    samples = np.array([[5, EOD, 7, 8], [8, 9, EOD, 1]])
    batch = make_batch(samples, EOD, document_mask)
    shape = (1, 6) if document_mask else (2, 3)
    assert batch.tokens.tolist() == samples[:, :-1].reshape(shape).tolist()
    assert batch.labels.tolist() == samples[:, 1:].reshape(shape).tolist()
    assert batch.loss_mask.dtype == torch.float32 and bool((batch.loss_mask == 1).all())
    assert batch.tokens.dtype == batch.labels.dtype == batch.positions.dtype == torch.int64


def test_rows_without_document_masks():
    batch = make_batch(np.arange(8).reshape(2, 4), None, document_mask=False)
    assert batch.documents is None
    assert batch.positions.tolist() == [[0, 1, 2], [0, 1, 2]]


def test_document_masks_need_an_eod():
    with pytest.raises(ValueError, match="end-of-document"):
        make_batch(np.zeros((1, 4)), None)


def test_move():
    batch = make_batch(np.arange(8).reshape(2, 4), EOD)
    moved = batch.to("meta")
    assert moved.tokens.device.type == moved.positions.device.type == "meta"
    assert moved.documents is batch.documents
