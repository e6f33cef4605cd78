"""The adaptive-threshold spike: its numbers, its gradients' rules, and what is not finite or does not fit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.shapes import shapes_only
from kernels.spiking import spike, spike_counts, spike_reference
from tests.processes import run_ranks

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
GRADIENTS = ["plain", "clipped", "surrogate"]
RANGES = [None, (-7, 7), (0, 3)]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameters(width: int) -> dict[str, dict[str, float | Tensor]]:
    """K and V as a number, a learned scalar and learned for each channel; float64, in reach of the data."""
    per_channel = 0.2 + draw(width, seed=9).abs()
    return {
        "k": {"k": 3.0},
        "k learned": {"k": torch.tensor(2.5, dtype=torch.float64)},
        "k per channel": {"k": 1 + per_channel},
        "V": {"threshold": 0.3},
        "V learned": {"threshold": torch.tensor(0.4, dtype=torch.float64)},
        "V per channel": {"threshold": per_channel},
    }


def results(function, x: Tensor, grad: Tensor, given: dict, **options) -> list[Tensor]:
    """x̂ and the gradients of x and of what is learned."""
    x = x.detach().clone().requires_grad_()
    given = {name: v.clone().requires_grad_() if isinstance(v, Tensor) else v for name, v in given.items()}
    out = function(x, **given, **options)
    out.backward(grad)
    return [out.detach(), x.grad, *(v.grad for v in given.values() if isinstance(v, Tensor))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("kind", parameters(1))
def test_matches_reference_over_several_blocks(kind: str, gradient: str, dtype: torch.dtype) -> None:
    # 2 x 75 rows of 1024 are more than two blocks and do not fill the last.
    x, grad, given = draw(2, 75, 1024, dtype=dtype), draw(2, 75, 1024, seed=1, dtype=dtype), parameters(1024)[kind]
    for count_range in RANGES:
        options = {"count_range": count_range, "gradient": gradient}
        actual = results(spike, x, grad, given, backend="torch", **options)
        expected = results(spike_reference, x, grad, given, **options)
        assert len(actual) == 3 - isinstance(next(iter(given.values())), float)
        for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert a.dtype == b.dtype and a.shape == b.shape
            if index < 2:
                assert torch.equal(a, b), f"tensor {index}, {count_range}"
            else:  # sums over tokens, in another order
                wanted = 1e-12 if dtype == torch.float64 else 1e-5
                assert (a - b).norm() <= wanted * b.norm(), f"tensor {index}, {count_range}"


def test_the_formula_by_hand() -> None:
    x = torch.tensor([[1.0, -2.0, 0.5, -0.5], [0.0, 0.0, 0.0, 0.0]])
    # mean|x| = 1 and k = 2: V = 1/2; of a silent token V is its least.
    counts, thresholds = spike_counts(x, k=2)
    assert counts.tolist() == [[2, -4, 1, -1], [0, 0, 0, 0]] and counts.dtype == torch.int8
    assert thresholds.tolist() == [[0.5], [pytest.approx(1e-5)]]
    # Halves go to the even side, and V is within the published limits.
    assert spike_counts(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5]), threshold=1)[0].tolist() == [0, 2, 2, 0, -2]
    assert spike_counts(torch.tensor([3e9]), threshold=1e9)[0].item() == 300_000
    assert spike(x, k=2).tolist() == x.tolist()
    assert spike(x, k=2, count_range=(0, 1)).tolist() == [[0.5, 0, 0.5, 0], [0, 0, 0, 0]]


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(DTYPES), st.lists(st.integers(1, 5), max_size=2), st.integers(1, 130), st.floats(0.1, 9), st.data()
)
def test_counts_times_thresholds_are_the_spike(dtype, leading, width, k, data) -> None:
    x = draw(*leading, width, seed=data.draw(st.integers(0, 99)), dtype=dtype)
    count_range = data.draw(st.sampled_from(RANGES))
    counts, thresholds = spike_counts(x, k=k, count_range=count_range)
    x_hat = spike(x, k=k, count_range=count_range)
    assert torch.equal((counts * thresholds).to(dtype), x_hat + 0.0)
    if count_range is None:
        # No more than half a step off, but for the rounding of the result.
        assert ((x_hat.double() - x.double()).abs() <= 0.5 * thresholds * (1 + 0.02) + 1e-2 * x.abs()).all()


def test_gradients_of_k_and_of_thresholds_are_exact() -> None:
    x, weights = draw(6, 40), draw(6, 40, seed=1)
    for kind, parameter in parameters(40).items():
        ((name, value),) = parameter.items()
        if not isinstance(value, Tensor):
            continue
        step = 1e-9  # small enough for no count to change
        direction = draw(*value.shape, seed=2)
        high, low = ((spike(x, **{name: value + sign * step * direction}) * weights).sum() for sign in (1, -1))
        found = results(spike, x, weights, parameter)[2]
        assert (high - low) / (2 * step) == pytest.approx((found * direction).sum().item(), rel=1e-5), kind


def test_what_is_clamped_has_no_gradient() -> None:
    x, ones = torch.tensor([[1.0, 3.0], [1e-7, -1e-7]]), torch.ones(2, 2)
    # The second token's V is the least there is: k has no part in it. dx̂/dk = −s V / k of the first, (1 + 3) / 2.
    assert results(spike, x, ones, {"k": torch.tensor(2.0)})[2].item() == -2.0
    assert results(spike, x, ones, {"threshold": torch.tensor([1e-6, 1.0])})[2].tolist() == [0.0, 3.0]


def test_rules_of_the_gradient() -> None:
    x, ones = torch.tensor([[0.25, 0.5, 1.2, 9.0, -9.0]]), torch.ones(1, 5)
    for gradient, expected in (
        ("plain", [1, 1, 1, 1, 1]),
        ("clipped", [1, 1, 1, 0, 0]),
        ("surrogate", [1, 2, 0.8, 0, 0]),
    ):
        options = {"gradient": gradient, "count_range": (-4, 4)}
        found = results(spike, x, ones, {"threshold": 1.0}, **options)[1]
        torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float32))
    # On average over a step, the surrogate is the slope of the staircase.
    steps = torch.linspace(-2, 2, 4001, dtype=torch.float64)[:-1]
    found = results(spike, steps, torch.ones(4000), {"threshold": 1.0}, gradient="surrogate")[1]
    assert found.mean().item() == pytest.approx(1.0, abs=1e-3)


def test_a_plain_spike_of_fixed_threshold_saves_nothing() -> None:
    x, saved = draw(4, 8).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        spike(x, k=3.0)
        assert not saved
        spike(x, k=3.0, gradient="clipped")
    assert [tuple(t.shape) for t in saved] == [(), (4, 8), (4, 1)]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, of infinity times 0
@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("count_range", RANGES)
def test_what_is_not_finite_stays_so(backend: str, bad: float, count_range: tuple[int, int] | None) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    x = torch.ones(3, 5)
    x[1, 2] = bad
    adaptive = spike(x, k=3.0, count_range=count_range, backend=backend)
    assert adaptive.isnan().tolist() == [[False] * 5, [True] * 5, [False] * 5]
    given = spike(x, threshold=0.5, count_range=count_range, backend=backend)
    assert given.isnan().sum() == 1 and given[1, 2].isnan()
    for options in ({"k": 3.0}, {"threshold": 0.5}):
        with pytest.raises(ValueError, match="not finite"):
            spike_counts(x, count_range=count_range, **options)


def test_counts_do_not_wrap() -> None:
    x = torch.tensor([[127.0, 0.0]])
    for scale, dtype in ((1, torch.int8), (2, torch.int16), (300, torch.int32)):
        counts, _ = spike_counts(scale * x, threshold=1.0)
        assert (counts.dtype, counts[0, 0].item()) == (dtype, 127 * scale)
    with pytest.raises(ValueError, match=r"a count of 1e\+14 is above int32's range"):
        spike_counts(torch.tensor([1e9]), threshold=1e-5)
    assert spike_counts(draw(3, 4), k=3.0, count_range=(-200, 7))[0].dtype == torch.int16


def test_strided_and_empty_inputs_and_shapes_alone() -> None:
    x, grad = draw(6, 4, 10), draw(4, 6, 10, seed=1)
    for a, b in zip(
        results(spike, x.transpose(0, 1), grad, {"k": 3.0}, gradient="surrogate"),
        results(spike_reference, x.transpose(0, 1), grad, {"k": 3.0}, gradient="surrogate"),
    ):
        assert torch.equal(a, b)
    assert spike(torch.zeros(0, 4), k=3.0).shape == spike_counts(torch.zeros(0, 4), k=3.0)[0].shape == (0, 4)
    with shapes_only():
        assert spike(torch.empty(3, 4, device="meta"), k=3.0).shape == (3, 4)


@pytest.mark.parametrize("world", [2, 4])
def test_channels_over_ranks_give_the_numbers_of_one(world: int) -> None:
    run_ranks(world, "-m", "tests.kernels.spiking.neuron_ranks", imported="torch")


def test_errors() -> None:
    x = torch.zeros(2, 4)
    for options, message in (
        ({}, "give either k"),
        ({"k": 3.0, "threshold": 1.0}, "give either k"),
        ({"k": 0.0}, "k is 0.0: it must be positive"),
        ({"threshold": math.inf}, "threshold is inf"),
        ({"k": torch.ones(3)}, r"k must be a number or a floating tensor \[\] or \[4\]"),
        ({"k": 3.0, "gradient": "ste"}, "plain, clipped or surrogate, not 'ste'"),
        ({"k": 3.0, "count_range": (1, 0)}, r"count_range \(1, 0\)"),
        ({"k": 3.0, "count_range": (0, 1 << 25)}, "count_range"),
    ):
        with pytest.raises(ValueError, match=message):
            spike(x, **options)
    with pytest.raises(ValueError, match="x must be floating"):
        spike(x.long(), k=3.0)
