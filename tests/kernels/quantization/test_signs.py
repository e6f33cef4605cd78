"""Masks of one bit an element."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.quantization import pack_signs, unpack_signs


@settings(max_examples=40, deadline=None)
@given(leading=st.lists(st.integers(0, 4), max_size=2), channels=st.integers(0, 40), seed=st.integers(0, 99))
def test_round_trip(leading: list[int], channels: int, seed: int) -> None:
    x = torch.randint(-2, 3, (*leading, channels), generator=torch.Generator().manual_seed(seed)).float()
    packed = pack_signs(x)
    assert packed.dtype == torch.uint8 and packed.shape == (*leading, -(-channels // 8))
    assert packed.untyped_storage().nbytes() == packed.numel()
    mask = unpack_signs(packed, channels)
    assert mask.dtype == torch.bool and torch.equal(mask, x > 0)


def test_the_mask_is_that_of_relu() -> None:
    x = torch.tensor([[-1.0, -0.0, 0.0, 1e-45, torch.inf, -torch.inf, torch.nan, 2.0, 3.0]], requires_grad=True)
    (grad,) = torch.autograd.grad(torch.relu(x).sum(), x)
    assert torch.equal(unpack_signs(pack_signs(x), 9), grad == 1)
    assert torch.equal(pack_signs(torch.relu(x)), pack_signs(x))


def test_views() -> None:
    x = torch.randn(5, 7, 30, generator=torch.Generator().manual_seed(0)).mT[..., 1:]
    assert torch.equal(unpack_signs(pack_signs(x), 6), x > 0)


def test_bytes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="channels=20 take 3 bytes, but the packed rows have 2"):
        unpack_signs(torch.zeros(4, 2, dtype=torch.uint8), 20)
