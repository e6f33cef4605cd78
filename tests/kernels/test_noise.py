"""The noise: uniform, independent in pairs, the same in every layout; what is rounded with it is unbiased."""

import pytest
import torch
from torch import Tensor

from kernels.noise import BITS, FIRST_FACTOR, GOLDEN, SECOND_FACTOR, uniform
from kernels.quantization import Noise, dequantize, noise_key, quantize

CPU = torch.device("cpu")
KEYS = 1000


def test_splitmix64() -> None:
    """The first outputs of seed 0, as the authors' code has them; ours drops all but their leading bits."""
    published = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC)
    assert (GOLDEN, FIRST_FACTOR, SECOND_FACTOR) == (-7046029254386353131, -4658895280553007687, -7723592293110705685)
    a_N1, _ = Noise(0, rows=1).terms(4, 1, CPU)
    assert [int(a * 2**BITS) for a in a_N1[:, 0]] == [z >> (64 - BITS) for z in published]


def test_keys_tell_every_name_apart() -> None:
    names = [(0, 0, "a", 0), (1, 0, "a", 0), (0, 1, "a", 0), (0, 0, "b", 0), (0, 0, "a", 1), (0, 0, "a0", 0)]
    keys = {noise_key(*name) for name in names}
    assert len(keys) == len(names)
    assert all(-(2**63) <= key < 2**63 for key in keys)
    # What is resumed or runs elsewhere draws the same: the number is fixed for good.
    assert noise_key(0, 1, "mixer.q", 2) == -288581113251484767


def test_every_layout_draws_the_same() -> None:
    """Parts of the rows in any order, parts of the channels, other blocks: the bits of the whole."""
    x = torch.randn(60, 64, generator=torch.Generator().manual_seed(0))
    whole = quantize(x, bits=8, group=16, noise=Noise(9, rows=100, first_channel=0))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))[:20]
    for rows in (order + 100, (order + 100).int()):
        part = quantize(x[order, 32:], bits=8, group=16, noise=Noise(9, rows=rows, first_channel=32))
        assert torch.equal(part.codes, whole.codes[order, 32:])
    later = quantize(x[50:], bits=8, group=16, noise=Noise(9, rows=150))
    assert torch.equal(later.codes, whole.codes[50:])
    other = quantize(x, bits=8, group=16, noise=Noise(10, rows=100))
    assert not torch.equal(other.codes, whole.codes)


def test_uniform_and_independent_in_pairs() -> None:
    """A patch of 5 x 7 numbers over many keys: every one is uniform, and no two of them have to do with each other.

    Neither cos(2πu) nor sin(2πu) of one is correlated with those of another, or with the other one of itself.
    """
    rows = torch.tensor([0, 1, 2, 77, 1 << 40])
    keys = [noise_key(0, 0, "x", step) for step in range(4 * KEYS)]
    u = torch.stack([uniform(Noise(key, rows=rows), 5, 7, CPU).flatten() for key in keys]).double()
    assert u.min() >= 0 and u.max() < 1
    counts = torch.stack([(column * 16).long().bincount(minlength=16) for column in u.T])
    chi_squared = ((counts - len(keys) / 16).square() / (len(keys) / 16)).sum(1)
    # 15 degrees of freedom: mean 15, variance 30; of 35 the largest is seldom over 35.
    assert chi_squared.max() < 45 and 12 < chi_squared.mean() < 18
    angles = 2 * torch.pi * u
    correlations = torch.corrcoef(torch.cat((angles.cos(), angles.sin()), 1).T).fill_diagonal_(0)
    assert correlations.abs().max() < 5 / len(keys) ** 0.5
    assert abs(float(correlations.square().mean()) * len(keys) - 1) < 0.1


@pytest.mark.parametrize("bits", [8, 4])
def test_unbiased_with_the_variance_of_independent_noise(bits: int) -> None:
    """Means over keys, of every element and of xᵀg, within their standard errors; those are what the theory says."""
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(40, 32, generator=generator), torch.randn(40, 8, generator=generator).double()
    draws, scale = [], None
    for step in range(KEYS):
        q = quantize(x, bits=bits, group=16, noise=Noise(noise_key(0, 0, "x", step)))
        scale = q.scale.double().repeat_interleave(16, dim=1)
        draws.append(dequantize(q).double())
    error = torch.stack(draws) - x.double()
    # P(up) (1 − P(up)) scale² of y = (x − min) / scale.
    y = (x - x.unflatten(1, (2, 16)).amin(2).repeat_interleave(16, dim=1)).double() / scale
    variance = y.frac() * (1 - y.frac()) * scale**2
    _assert_unbiased(error, variance)
    _assert_unbiased(error.mT @ grad, variance.T @ grad**2)


def _assert_unbiased(error: Tensor, variance: Tensor) -> None:
    """Of draws [K, ...]: their means are 0 and their squares the variance, within what K draws can tell."""
    moves = variance > 1e-4 * variance.mean()
    z = error.mean(0)[moves] / (variance[moves] / len(error)).sqrt()
    # Of so many standard normals.
    assert z.abs().max() < 5
    assert abs(float(z.square().mean()) - 1) < 5 * (2 / z.numel()) ** 0.5
    ratio = error.square().mean(0)[moves] / variance[moves]
    assert abs(float(ratio.mean()) - 1) < 0.02


def test_rounding_to_nearest_is_biased_and_as_near_as_can_be() -> None:
    """Without noise an error is half a step at most, and the same each time."""
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    q = quantize(x, bits=4, group=16)
    error = (dequantize(q) - x).abs().unflatten(1, (4, 16))
    assert (error <= 0.5001 * q.scale.float()[..., None]).all()
    assert torch.equal(q.codes, quantize(x, bits=4, group=16).codes)
