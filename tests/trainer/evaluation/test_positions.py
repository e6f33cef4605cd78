"""Loss by position in the context, by hand."""

import numpy as np
import pytest

from trainer.data.batch import make_batch
from trainer.evaluation.positions import PositionSums

EOD = 0
TOKEN_BYTES = np.array([0, 1, 2, 3])


def rows(document_mask, mask=None):
    """Two documents in a row of eight tokens, each label with the loss 2^(its place)."""
    samples = np.array([[EOD, 1, 2, 3, EOD, 1, 1, 2, 3]])
    batch = make_batch(samples, EOD, document_mask, mask)
    sums = PositionSums(TOKEN_BYTES, EOD)
    sums.add(batch, 2.0 ** np.arange(8, dtype=np.float32))
    return {(row["first"], row["last"]): (row["tokens"], row["bytes"], row["loss"]) for row in sums.rows()}


def test_positions_count_what_has_been_read_of_the_document():
    assert rows(True) == {
        (0, 0): (2, 1 + 1, (1 + 16) / 2),
        (1, 1): (2, 2 + 1, (2 + 32) / 2),
        (2, 3): (4, 3 + 0 + 2 + 3, (4 + 8 + 64 + 128) / 4),
    }


def test_without_document_masks_they_count_what_has_been_read_of_the_row():
    found = rows(False)
    assert {key: value[0] for key, value in found.items()} == {(1, 1): 1, (2, 3): 2, (4, 7): 4, (8, 15): 1}
    assert found[8, 15] == (1, 3, 128)


def test_only_labels_that_count_are_counted():
    mask = np.array([[0, 1, 0, 0, 0, 0, 0, 0]], np.float32)
    assert rows(True, mask) == {(1, 1): (1, 2, pytest.approx(2))}
