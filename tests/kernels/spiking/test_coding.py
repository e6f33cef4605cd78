"""Codings of counts: lossless, with the dense product's numbers, and clear about what they cannot hold."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.spiking import (
    CODINGS,
    Coding,
    count_range,
    decode,
    encode,
    event_linear,
    integrate_and_fire,
    spike_counts,
    spiking_linear,
    step_weights,
)

NO_SIGN = ("binary", "bitwise")


@st.composite
def coded_counts(draw) -> tuple[Tensor, Coding, int | None]:
    """Counts within the range of a coding, which steps hold."""
    coding = draw(st.sampled_from(CODINGS))
    steps = draw(st.integers(1, 12 if coding in ("binary", "ternary") else 31))
    low, high = count_range(coding, steps)
    shape = [*draw(st.lists(st.integers(1, 3), max_size=2)), draw(st.integers(1, 20))]
    numbers = st.lists(st.integers(low, high), min_size=math.prod(shape), max_size=math.prod(shape))
    counts = torch.tensor(draw(numbers), dtype=torch.int64).view(shape)
    return counts, coding, draw(st.sampled_from([steps, None]))


@settings(max_examples=150, deadline=None)
@given(coded_counts())
def test_encoding_loses_nothing(drawn) -> None:
    counts, coding, steps = drawn
    train = encode(counts, coding, steps)
    assert torch.equal(decode(train), counts)
    assert train.packed.dtype == torch.uint8
    planes = 2 if coding in ("ternary", "bidirectional") else 1
    assert train.packed.shape == (train.steps, planes, *counts.shape[:-1], -(-counts.shape[-1] // 8))
    if steps is None and train.steps > (2 if coding == "twos_complement" else 1):
        with pytest.raises(ValueError, match="outside"):
            encode(counts, coding, train.steps - 1)


def test_the_spikes_of_each_coding() -> None:
    def spikes(counts: list[int], coding: Coding, steps: int | None = None) -> list[list[int]]:
        train = encode(torch.tensor(counts, dtype=torch.int8), coding, steps)
        return [train.spikes(t).tolist() for t in range(train.steps)]

    assert spikes([2, 0, 3], "binary") == [[1, 0, 1], [1, 0, 1], [0, 0, 1]]
    assert spikes([-2, 1], "ternary") == [[-1, 1], [-1, 0]]
    assert spikes([5, 2], "bitwise") == [[1, 0], [0, 1], [1, 0]]
    assert spikes([-5, 2], "bidirectional") == [[-1, 0], [0, 1], [-1, 0]]
    assert spikes([-4, 3, -1], "twos_complement") == [[1, 0, 1], [0, 1, 1], [0, 1, 1]]
    assert step_weights("twos_complement", 3) == (-4, 2, 1)
    assert step_weights("bidirectional", 3) == (4, 2, 1) and step_weights("ternary", 2) == (1, 1)


@pytest.mark.parametrize("coding", CODINGS)
def test_counts_without_a_sign_and_silent_ones(coding: Coding) -> None:
    for counts in (
        torch.tensor([[0, 3, 1]]),
        torch.zeros(2, 9, dtype=torch.int32),
        torch.zeros(0, 4, dtype=torch.int8),
    ):
        assert torch.equal(decode(encode(counts, coding)), counts.int())
    assert encode(torch.zeros(3, dtype=torch.int8), coding).steps == (2 if coding == "twos_complement" else 1)


@pytest.mark.parametrize("coding", CODINGS)
def test_the_ends_of_the_range(coding: Coding) -> None:
    steps = {"binary": 5, "ternary": 5, "twos_complement": 32}.get(coding, 31)
    low, high = count_range(coding, steps)
    assert decode(encode(torch.tensor([low, high]), coding)).tolist() == [low, high]
    for wrong in (low - 1, high + 1):
        with pytest.raises(
            ValueError, match=f"a count of {wrong} at place 1 of 2 is outside {low} to {high}, .*{coding}"
        ):
            encode(torch.tensor([0, wrong]), coding, steps)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(
        ValueError, match="a count of -3 at place 2 of 3 is outside 0 to 4, the range of binary in 4 steps"
    ):
        encode(torch.tensor([1, 4, -3]), "binary")
    with pytest.raises(ValueError, match=r"a count of -3 .* outside 0 to 1, the range of bitwise in 1 step$"):
        encode(torch.tensor([1, -3]), "bitwise")
    with pytest.raises(ValueError, match=r"a count of 70000 .* outside -65536 to 65536, the range of ternary"):
        encode(torch.tensor([70_000]), "ternary")
    with pytest.raises(ValueError, match="integers"):
        encode(torch.ones(3), "binary")
    with pytest.raises(ValueError, match="one of binary, ternary"):
        encode(torch.ones(3, dtype=torch.int8), "rate")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps are 32: they must be from 1 to 31"):
        count_range("bitwise", 32)
    with pytest.raises(ValueError, match="steps are 0"):
        encode(torch.ones(3, dtype=torch.int8), "binary", 0)
    train, x = encode(torch.ones(2, 3, dtype=torch.int8), "binary"), torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"must be \[O, 3\]"):
        spiking_linear(train, x.T)
    with pytest.raises(ValueError, match=r"must be \[3, O\]"):
        event_linear(torch.ones(2, 3, dtype=torch.int8), x)
    for call in (lambda v: spiking_linear(train, x, v), lambda v: event_linear(decode(train), x.T.contiguous(), v)):
        with pytest.raises(ValueError, match="into the weight"):
            call(torch.ones(3))


def random_counts(seed: int, *shape: int, low: int, high: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(low, high + 1, shape, generator=generator)
    return counts * (torch.rand(shape, generator=generator) < 0.6)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(CODINGS), st.integers(0, 99), st.lists(st.integers(0, 4), max_size=2), st.integers(1, 40))
def test_products_equal_the_dense_one_bitwise(coding: Coding, seed: int, leading: list[int], width: int) -> None:
    counts = random_counts(seed, *leading, width, low=0 if coding in NO_SIGN else -9, high=9)
    # Numbers of bfloat16, whose sums float64 holds exactly.
    weight = torch.randn(7, width, generator=torch.Generator().manual_seed(seed)).bfloat16().double()
    thresholds = torch.rand(*leading, 1, dtype=torch.float64)
    dense = torch.nn.functional.linear(counts.double(), weight)
    train = encode(counts, coding)
    assert torch.equal(spiking_linear(train, weight), dense)
    assert torch.equal(spiking_linear(train, weight, thresholds), dense * thresholds)
    if math.prod(leading):
        assert torch.equal(event_linear(counts, weight.T.contiguous(), thresholds), dense * thresholds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_in_narrow_dtypes(dtype: torch.dtype) -> None:
    counts = random_counts(0, 2, 5, 300, low=-20, high=20)
    counts[0, 1] = 0  # a silent token, which no bag has a row for
    counts[1, 4] = 0
    weight = torch.randn(64, 300, generator=torch.Generator().manual_seed(1)).to(dtype)
    dense = counts.double() @ weight.double().T
    for y in (spiking_linear(encode(counts, "bidirectional"), weight), event_linear(counts, weight.T.contiguous())):
        assert y.dtype == dtype and y.shape == (2, 5, 64)
        assert (y.double() - dense).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * dense.norm()
        assert not y[0, 1].any() and not y[1, 4].any()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.integers(1, 6), st.booleans(), st.floats(0.2, 5))
def test_neurons_fire_the_counts(seed: int, steps: int, signed: bool, k: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    drives = torch.randn(steps, 3, 11, generator=generator, dtype=torch.float64)
    drives = drives if signed else drives.abs()
    x = drives.sum(0)
    counts, thresholds = spike_counts(x, k=k)
    spikes, membrane = integrate_and_fire(drives, thresholds, signed=signed)
    assert torch.equal(spikes.sum(0), counts.long())
    assert ((membrane >= 0) & (membrane < thresholds)).all()
    floors, _ = integrate_and_fire(drives, thresholds, initial=0.0, signed=signed)
    assert torch.equal(floors.sum(0), (x / thresholds).floor().long())
    # So many steps, no more: a neuron that is cut off keeps what it has not fired.
    cut, rest = integrate_and_fire(drives, thresholds, signed=signed, steps=1)
    assert len(cut) == 1
    torch.testing.assert_close(rest + cut[0] * thresholds, drives[0] + 0.5 * thresholds)
    if len(spikes):
        assert len(integrate_and_fire(drives, thresholds, signed=signed, steps=len(spikes))[0]) == len(spikes)


def test_a_constant_drive_spreads_its_spikes() -> None:
    spikes, membrane = integrate_and_fire(torch.full((6, 1), 0.5), torch.tensor(1.0), initial=0.0)
    assert spikes[:, 0].tolist() == [0, 1, 0, 1, 0, 1] and membrane.item() == 0
    with pytest.raises(ValueError, match="finite"):
        integrate_and_fire(torch.tensor([[math.inf]]), torch.tensor(1.0))
    with pytest.raises(ValueError, match="positive"):
        integrate_and_fire(torch.ones(1, 2), torch.tensor([1.0, 0.0]))
