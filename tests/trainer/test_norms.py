"""The norm of a gradient against float64, whatever the size of a shard and however it is cut."""

import math

import pytest
import torch

from trainer.engines.norms import sum_of_squares

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 1_000_000, 8_000_003])
def test_is_that_of_float64(size):
    """torch.norm in float32 is off by 4e-5 at a million elements, and by more beyond."""
    gradient = torch.randn(size, generator=torch.Generator().manual_seed(1)).abs() + 0.1
    exact = float(gradient.double().square().sum())
    assert float(sum_of_squares([gradient], CPU)) == pytest.approx(exact, rel=1e-6)


def test_does_not_depend_on_the_cut():
    gradient = torch.randn(300, 7001, generator=torch.Generator().manual_seed(2))
    whole = float(sum_of_squares([gradient], CPU))
    for parts in ([gradient[:13], gradient[13:]], list(gradient.t()), [gradient.flatten()]):
        assert float(sum_of_squares(parts, CPU)) == pytest.approx(whole, rel=1e-7)


def test_nothing_is_nothing_and_what_is_no_number_stays_none():
    assert float(sum_of_squares([], CPU)) == float(sum_of_squares([torch.empty(0)], CPU)) == 0
    for number in (math.nan, math.inf):
        gradient = torch.ones(5000)
        gradient[4999] = number
        assert not math.isfinite(float(sum_of_squares([gradient], CPU)))
