"""The quantizer's kernels against the torch path: the same bits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.quantization import Noise, Quantized, dequantize, noise_key, quantize
from tests.kernels.triton._compare import DEVICE, random

pytest.importorskip("kernels.triton.quantization")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NOISE = Noise(noise_key(1, 2, "ffn.gate", 3), rows=5, first_channel=7)


def both(x: torch.Tensor, **options: object) -> Quantized:
    """What the kernels keep, which must be what torch keeps; what comes back of it must agree, too."""
    q, expected = (quantize(x, backend=backend, **options) for backend in ("triton", "torch"))
    for name in ("codes", "scale", "offset"):
        ours, theirs = getattr(q, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
    back = dequantize(q, backend="triton")
    assert back.dtype == x.dtype and torch.equal(back, dequantize(q, backend="torch"))
    return q


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("noise", [NOISE, None])
def test_the_bits_of_torch(dtype: torch.dtype, bits: int, noise: Noise | None) -> None:
    both(random(2, 35, 200, seed=0, dtype=dtype), bits=bits, group=64, noise=noise)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    leading=st.lists(st.integers(0, 4), max_size=2),
    channels=st.integers(0, 20),
    group=st.integers(1, 9),
    bits=st.sampled_from([8, 4]),
    dtype=st.sampled_from(DTYPES),
    key=st.integers(-(2**63), 2**63 - 1),
)
def test_any_shape_and_key(
    leading: list[int], channels: int, group: int, bits: int, dtype: torch.dtype, key: int
) -> None:
    both(random(*leading, channels, seed=0, dtype=dtype), bits=bits, group=group, noise=Noise(key))


def test_numbers_of_rows() -> None:
    rows = torch.tensor([3, 1 << 40, 0, 3], device=DEVICE)
    x = random(1, 40, seed=0).repeat(4, 1)
    q = both(x, bits=8, group=16, noise=Noise(7, rows=rows, first_channel=1 << 20))
    assert torch.equal(q.codes[0], q.codes[3]) and not torch.equal(q.codes[0], q.codes[1])
    both(x, bits=8, group=16, noise=Noise(7, rows=rows.int()))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, of a tile's rows that do not exist
@pytest.mark.parametrize("bits", [8, 4])
def test_bounds_views_and_small_numbers(bits: int) -> None:
    x = random(6, 40, 30, seed=0)
    bounds = (torch.tensor(-1.1, device=DEVICE), torch.linspace(0, 2, 4, device=DEVICE))
    both(x.bfloat16(), bits=bits, group=8, noise=NOISE, bounds=bounds)
    for view in (x.mT, x[:, ::2], x[..., 3:20]):
        both(view, bits=bits, group=8, noise=NOISE)
    for scale in (0.0, 1e-44, 1e-38, 1e-36, 1e35):
        both(x[:2] * scale, bits=bits, group=8, noise=NOISE)
    constant = torch.full((3, 20), 0.1, device=DEVICE)
    assert torch.equal(dequantize(both(constant, bits=bits, group=8, noise=NOISE)), constant)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, of infinities and NaN
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_makes_its_group_nan(bits: int, dtype: torch.dtype) -> None:
    """NaN in every form, too: a GPU's own is all ones but for its sign."""
    clean = random(6, 24, seed=0, dtype=dtype).detach()
    x = clean.clone()
    wrong = torch.tensor([math.inf, -math.inf, math.nan], device=DEVICE).to(dtype)
    x[1, 11], x[2, 8], x[3, 15] = wrong
    integers = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    x[4, 9:10] = torch.full((1,), torch.iinfo(integers).max, dtype=integers, device=DEVICE).view(dtype)
    bad = torch.zeros(x.shape, dtype=torch.bool, device=DEVICE)
    bad[1:5, 8:16] = True
    for bounds in (None, (torch.tensor(-9.0, device=DEVICE), torch.tensor(9.0, device=DEVICE))):
        options = {"bits": bits, "group": 8, "noise": NOISE, "bounds": bounds}
        for backend in ("triton", "torch"):
            back = dequantize(quantize(x, backend=backend, **options), backend=backend)
            assert torch.equal(back.isnan(), bad), backend
            expected = dequantize(quantize(clean, backend="torch", **options), backend="torch")
            assert torch.equal(back[~bad], expected[~bad]), backend
        with pytest.raises(ValueError, match=r"ffn has an infinity or a NaN, .* in group 1 of row 1"):
            quantize(x, backend="triton", check="ffn", **options)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, of a range that overflows
def test_ranges_beyond_the_largest_number() -> None:
    x = torch.tensor([[-3e38, 3e38, 0.0, 1.0], [8e37, -8e37, 0.0, 1.0]], device=DEVICE)
    back = dequantize(quantize(x, bits=8, group=4, backend="triton"), backend="triton")
    assert back[0].isnan().all() and back[1].isfinite().all()
    both(x[1:].repeat(5, 1), bits=4, group=4, noise=NOISE)
    largest = torch.tensor([[65504.0, -65504.0, 0.0, 65504.0]], device=DEVICE).half()
    both(largest.repeat(20, 1), bits=8, group=4, noise=NOISE)
    assert dequantize(quantize(largest, bits=8, group=4, noise=NOISE, backend="triton")).isfinite().all()
