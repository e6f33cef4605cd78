"""The mathematics of an evaluation, against numbers by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trainer.evaluation import EvaluationSums, chunks


def batch(labels, mask):
    return SimpleNamespace(labels=torch.tensor([labels]), loss_mask=torch.tensor([mask]))


def test_bytes_and_tokens_are_those_of_labels_that_count():
    token_bytes = np.array([0, 1, 3])
    sums = EvaluationSums.of([batch([1, 2, 2], [1.0, 0.0, 1.0]), batch([0, 2, 1], [1.0, 1.0, 0.0])], 7.0, token_bytes)
    assert sums == EvaluationSums(nll=7.0, tokens=4.0, text_bytes=1 + 3 + 0 + 3)
    assert sums.loss == 7 / 4
    assert sums.bits_per_byte == pytest.approx(7 / math.log(2) / 7)


def test_sums_add_up():
    assert EvaluationSums(1.0, 2.0, 3.0) + EvaluationSums(0.5, 1.0, 2.0) == EvaluationSums(1.5, 3.0, 5.0)


def test_without_a_tokenizer_there_are_no_bytes():
    sums = EvaluationSums.of([batch([1, 2], [1.0, 1.0])], 3.0, None)
    assert (sums.loss, sums.bits_per_byte) == (1.5, None)


def test_nothing_was_evaluated_yet():
    assert (EvaluationSums().loss, EvaluationSums().bits_per_byte) == (0.0, None)


def test_chunks_are_whole_but_for_the_last():
    assert list(chunks(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(chunks([], 3)) == []
