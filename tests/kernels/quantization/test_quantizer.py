"""The quantizer: the torch path equals the reference bit by bit, errors stay within a step, nothing wraps."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.quantization import (
    Noise,
    Quantized,
    dequantize,
    dequantize_reference,
    group_bounds,
    noise_key,
    quantize,
    quantize_reference,
    quantized_bytes,
)
from kernels.quantization.quantizer import _grid, _round_up
from kernels.shapes import shapes_only

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BITS = st.sampled_from([8, 4])
NOISE = Noise(noise_key(1, 2, "ffn.gate", 3), rows=5, first_channel=7)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def grid_steps(q: Quantized) -> Tensor:
    """The scale of every element's group [..., D], float64."""
    groups = [min(q.group, q.shape[-1] - first) for first in range(0, q.shape[-1], q.group)]
    return q.scale.double().repeat_interleave(torch.tensor(groups, dtype=torch.int64), dim=1).reshape(q.shape)


def assert_same(a: Quantized, b: Quantized) -> None:
    """Bit by bit, the codes of groups that are not finite left out: they mean nothing."""
    assert (a.shape, a.dtype, a.bits, a.group) == (b.shape, b.dtype, b.bits, b.group)
    for ours, theirs in zip((a.scale, a.offset), (b.scale, b.offset)):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(a.codes, b.codes) or not a.scale.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("noise", [NOISE, None])
def test_torch_equals_the_reference_over_several_blocks(dtype: torch.dtype, bits: int, noise: Noise | None) -> None:
    # 150 rows of 1000 are more than one block and do not fill the last; 1000 channels are no multiple of 48.
    x = random(2, 75, 1000, dtype=dtype)
    q = quantize(x, bits=bits, group=48, noise=noise)
    assert_same(q, quantize_reference(x, bits=bits, group=48, noise=noise))
    assert torch.equal(dequantize(q), dequantize_reference(q))


@settings(max_examples=60, deadline=None)
@given(
    leading=st.lists(st.integers(0, 4), max_size=2),
    channels=st.integers(0, 20),
    group=st.integers(1, 9),
    bits=BITS,
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_shape(leading: list[int], channels: int, group: int, bits: int, dtype: torch.dtype, seed: int) -> None:
    x = random(*leading, channels, seed=seed, dtype=dtype)
    for backend in ("torch", "reference"):
        q = quantize(x, bits=bits, group=group, noise=Noise(seed), backend=backend)
        found = dequantize(q, backend=backend)
        assert (found.shape, found.dtype) == (x.shape, x.dtype)
        assert q.bytes == quantized_bytes(x.shape, dtype, bits=bits, group=group)
        assert_same(q, quantize(x, bits=bits, group=group, noise=Noise(seed)))
    # A step of the grid, and half of the last digit of what comes back.
    rounding = torch.finfo(dtype).eps * x.double().abs() + torch.finfo(dtype).tiny
    assert ((found.double() - x.double()).abs() <= 1.0001 * grid_steps(q) + 2 * rounding).all()


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(
        st.one_of(st.floats(width=32, allow_nan=False), st.sampled_from([0.0, 1e-45, -1e-45, 3e38, -3e38, 1.0])),
        min_size=1,
        max_size=12,
    ),
    bits=BITS,
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
@example(values=[0.0, -3.3895e38], bits=4, dtype=torch.float32, seed=0)
def test_any_numbers(values: list[float], bits: int, dtype: torch.dtype, seed: int) -> None:
    """Within a step whatever the magnitudes, the smallest ones within 2^-126; NaN if the range is too wide."""
    x = torch.tensor(values, dtype=torch.float32).to(dtype)[None]
    q = quantize(x, bits=bits, group=5, noise=Noise(seed))
    found = dequantize(q)[0]
    for part, back in zip(x[0].split(5), found.split(5)):
        wide = part.float()
        span = wide.double().amax() - wide.double().amin()
        half = torch.finfo(torch.float32).max / 2
        if not span <= half * 0.9999:
            # Right at the limit, which rounding moves, either will do.
            assert back.isnan().all() or span < half * 1.0001
            continue
        step = max(span.item() / (2**bits - 1) * (1 + 2**-7), 2**-126)
        close = (back.double() - wide.double()).abs() <= step * 1.0001 + torch.finfo(dtype).eps * wide.double().abs()
        # What would be beyond the largest number by its rounding upwards.
        edge = back.isinf() & (wide.double().abs() + step > torch.finfo(dtype).max * (1 - torch.finfo(dtype).eps))
        assert (close | edge).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_constant_groups_and_zeros_are_exact(dtype: torch.dtype, bits: int) -> None:
    numbers = (0.0, -0.0, 1.0, -3.14159, 1e4, -1e-40, torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal)
    x = torch.tensor(numbers, dtype=torch.float64).to(dtype).repeat_interleave(16)[None]
    assert torch.equal(dequantize(quantize(x, bits=bits, group=16, noise=NOISE)), x)
    assert dequantize(quantize(torch.zeros(3, 40, dtype=dtype), bits=bits, group=16, noise=NOISE)).count_nonzero() == 0


def test_scales_are_rounded_upwards_and_nan_stays() -> None:
    scales = torch.tensor([1.0, 1 + 2.0**-20, 1 + 2.0**-7, 2.0**-126])
    assert _round_up(scales).tolist() == [1.0, 1 + 2.0**-7, 1 + 2.0**-7, 2.0**-126]
    high = torch.tensor([math.inf, math.nan, 0.0])
    # A GPU's own NaN.
    high.view(torch.int32)[2] = torch.iinfo(torch.int32).max
    assert _grid(torch.zeros(3), high, torch.float32, 8, None)[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_smallest_ranges_are_unbiased(dtype: torch.dtype, backend: str) -> None:
    """Half of the least scale comes back as that scale or as 0, by tosses of a coin."""
    x = torch.tensor([[0.0, 2.0**-127]], dtype=dtype).repeat(400, 1)
    found = dequantize(quantize(x, bits=8, group=2, noise=NOISE, backend=backend), backend=backend)
    assert (found[:, 0] == 0).all()
    assert 150 < int((found[:, 1] == 2.0**-126).sum()) < 250


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_largest_numbers_of_float16_stay_finite(backend: str) -> None:
    x = torch.tensor([[65504.0, -65504.0, 3.0]], dtype=torch.float16).repeat(20, 1)
    for bits in (8, 4):
        found = dequantize(quantize(x, bits=bits, group=3, noise=NOISE, backend=backend), backend=backend)
        assert found.isfinite().all() and (found[:, 0] > 56000).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("wrong", [math.inf, -math.inf, math.nan, "all ones"])
def test_what_is_not_finite_makes_its_group_nan_and_is_named(
    dtype: torch.dtype, bits: int, bounded: bool, backend: str, wrong: float | str
) -> None:
    """A NaN of all ones is what GPUs make: a carry into its sign would make a 0 of it."""
    x = random(4, 24, dtype=dtype)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    ones = torch.tensor(torch.iinfo(integers).max, dtype=integers).view(dtype)
    x[2, 11] = ones if isinstance(wrong, str) else wrong
    options = {"bits": bits, "group": 8, "noise": NOISE, "backend": backend}
    options |= {"bounds": (torch.tensor(-9.0), torch.tensor(9.0))} if bounded else {}
    found = dequantize(quantize(x, **options), backend=backend)
    expected = torch.zeros(4, 24, dtype=torch.bool)
    expected[2, 8:16] = True
    assert torch.equal(found.isnan(), expected)
    assert found[~expected].isfinite().all()
    with pytest.raises(ValueError, match=r"layers\.3\.ffn has an infinity or a NaN, .* in group 1 of row 2"):
        quantize(x, check="layers.3.ffn", **options)
    quantize(torch.where(expected, 0.0, x), check="layers.3.ffn", **options)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_given_bounds_clamp_at_both_ends(bits: int, backend: str) -> None:
    x = torch.linspace(-4, 4, 64).repeat(3, 1)
    # A scale that bfloat16 has: the bounds are then numbers of the grid.
    high = -1.0 + (2**bits - 1) * 2.0**-6
    q = quantize(x, bits=bits, group=16, noise=NOISE, bounds=(torch.tensor(-1.0), torch.tensor(high)), backend=backend)
    found = dequantize(q, backend=backend)
    inside = (x > -1) & (x < high)
    assert (found[x <= -1] == -1).all() and (found[x >= high] == high).all()
    assert ((found - x).abs()[inside] <= 2.0**-6).all()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_ranges_that_run_on_change_nothing_that_is_kept(backend: str) -> None:
    x, low, high = random(8, 32), torch.full((2,), -3.0), torch.full((2,), 3.0)
    q = quantize(x, bits=8, group=16, noise=NOISE, bounds=(low, high), backend=backend)
    before = dequantize(q)
    low.mul_(2), high.mul_(2)
    assert torch.equal(dequantize(q), before)
    assert sum(x.untyped_storage().nbytes() for x in q.tensors) == q.bytes


def test_exact_bounds_as_given_ones() -> None:
    x = random(10, 70)
    low, high = group_bounds(x, 16)
    assert low.shape == (10, 5)
    assert torch.equal(low[:, 4], x[:, 64:].amin(1)) and torch.equal(high[:, 0], x[:, :16].amax(1))
    exact = quantize(x, bits=8, group=16, noise=NOISE)
    assert_same(exact, quantize(x, bits=8, group=16, noise=NOISE, bounds=(low, high)))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stored_grid_covers_its_group(bits: int, dtype: torch.dtype) -> None:
    """The rounding of what is stored clips nothing: the least is exact, the largest within the grid."""
    x = random(400, 128, dtype=dtype) + 100 * random(400, 1, seed=1).to(dtype)
    q = quantize(x, bits=bits, group=128)
    assert q.scale.dtype == torch.bfloat16 and q.offset.dtype == dtype
    low, high = group_bounds(x, 128)
    assert torch.equal(q.offset, low)
    top = q.offset.double() + (2**bits - 1) * q.scale.double()
    assert (top >= high.double()).all()
    assert (top - low.double() <= (high.double() - low.double()) * (1 + 2**-7)).all()


def test_views_and_inputs_that_are_left_alone() -> None:
    x = random(6, 40, 30)
    before = x.clone()
    for view in (x.mT, x[:, ::2], x[..., 3:20], x.transpose(0, 1)):
        same = view.contiguous()
        assert_same(quantize(view, bits=8, group=8, noise=NOISE), quantize(same, bits=8, group=8, noise=NOISE))
    assert torch.equal(x, before)
    leaf = x.clone().requires_grad_()
    q = quantize(leaf, bits=8, group=8, noise=NOISE)
    codes = q.codes.clone()
    assert not dequantize(q).requires_grad
    assert torch.equal(q.codes, codes)


def test_what_is_kept_holds_nothing_else() -> None:
    """Whole storages: a view would keep the memory of what it is a view of."""
    for shape, dtype in (((30, 256), torch.bfloat16), ((30, 250), torch.float32)):
        for bits in (8, 4):
            q = quantize(random(*shape, dtype=dtype), bits=bits, group=64, noise=NOISE)
            assert sum(x.untyped_storage().nbytes() for x in q.tensors) == q.bytes
    assert quantized_bytes(torch.Size((2, 256)), torch.bfloat16, bits=8, group=128) / 512 == 8.25 / 8
    assert quantized_bytes(torch.Size((2, 256)), torch.float32, bits=8, group=128) / 512 == 8.375 / 8


def test_shapes_alone() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with shapes_only(), FakeTensorMode():
        x = torch.empty(64, 3000, dtype=torch.bfloat16)
        q = quantize(x, bits=4, group=128, noise=NOISE)
        assert q.bytes == quantized_bytes(x.shape, x.dtype, bits=4, group=128)
        assert dequantize(q).shape == x.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 2}, "bits must be 8 or 4"),
        ({"group": 0}, "at least one channel"),
        ({"x": torch.zeros(3, 4, dtype=torch.int32)}, "must be floating"),
        ({"x": torch.tensor(1.0)}, "must be floating"),
        ({"noise": Noise(1, rows=torch.arange(4))}, "rows must be 3 integers"),
        ({"noise": Noise(1, rows=torch.ones(3))}, "rows must be 3 integers"),
        ({"bounds": (torch.zeros(2), torch.ones(2))}, "must be broadcastable"),
        ({"backend": "cuda"}, "does not exist for these inputs"),
    ],
)
def test_wrong_arguments(options: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"x": torch.zeros(3, 4), "bits": 8, "group": 4} | options
    with pytest.raises(ValueError, match=message):
        quantize(**arguments)
