"""Triton's interpreter rounds to bfloat16 as a GPU does, and is left as it was after each launch."""

import numpy as np
import pytest
import torch

from tests.interpreter import from_bfloat16, to_bfloat16
from tests.kernels.triton._compare import DEVICE

triton = pytest.importorskip("triton")
tl = triton.language


@triton.jit
def _cast(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i).to(tl.bfloat16))


def test_casts_are_torch_s_to_the_last_bit() -> None:
    drawn = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    inf = torch.inf
    # Ties of both kinds, a carry into the exponent, into infinity, subnormal numbers.
    special = [1 + 2**-8, 1 + 3 * 2**-8, 1.9999999, 3.4028235e38, inf, -inf, 0.0, -0.0, 1e-40, -9.2e-41, 5e-39, 0.1]
    x = torch.cat([drawn, drawn * 1e-38, torch.tensor([*special, *([2.0] * 36)])]).to(DEVICE)
    y = torch.empty(2048, dtype=torch.bfloat16, device=DEVICE)
    _cast[(1,)](x, y, N=2048)
    assert torch.equal(y, x.bfloat16())
    x[7] = torch.nan
    _cast[(1,)](x, y, N=2048)
    assert y.isnan().nonzero().tolist() == [[7]]


def test_every_nan_stays_one() -> None:
    bits = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001], dtype=np.uint32)
    narrow = to_bfloat16(bits.view(np.float32)).astype(np.uint32) << 16
    assert np.isnan(narrow.view(np.float32)).all()


def test_every_bfloat16_keeps_its_number() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    expected = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float()
    assert np.array_equal(from_bfloat16(bits).view(np.uint32), expected.numpy().view(np.uint32))


@triton.jit
def _doubled(x):
    return x + tl.sum(tl.where(tl.arange(0, 4) == 0, x, 0.0), axis=0)


@triton.jit
def _calls(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    total = tl.zeros([N], dtype=tl.float32)
    for k in tl.range(0, 2):
        total += _doubled(tl.load(x + i)) * (k + 1)
    tl.store(y + i, total)


def test_functions_that_call_others_do_so_in_every_launch() -> None:
    before = tl.arange, tl.range, tl.sum, tl.tensor.__add__, tl.math.exp
    x = torch.arange(1.0, 5.0, device=DEVICE)
    for _ in range(2):
        y = torch.empty_like(x)
        _calls[(1,)](x, y, N=4)
        assert torch.equal(y, 3 * (x + 1))
        assert (tl.arange, tl.range, tl.sum, tl.tensor.__add__, tl.math.exp) == before
