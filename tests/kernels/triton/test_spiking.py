"""The spike's kernels, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.spiking import spike, spike_reference
from tests.kernels.triton._compare import DEVICE, assert_matches, random, results

triton_spiking = pytest.importorskip("kernels.triton.spiking")
SETTINGS = settings(max_examples=10, deadline=None, derandomize=True)
SHAPES = st.sampled_from([(1, 1), (3, 7), (2, 5, 64), (70, 40), (2, 2100)])
PARAMETERS = st.sampled_from(["k", "learned k", "k per channel", "V", "learned V", "V per channel"])
GRADIENTS = st.sampled_from(["plain", "clipped", "surrogate"])
RANGES = st.sampled_from([None, (-3, 3), (0, 7)])


def on_a_grid(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    """Numbers whose mean magnitude is 1 to the last bit, and whose x / V is far from halves for the k and V below."""
    generator = torch.Generator().manual_seed(seed)
    sign = torch.randint(0, 2, shape, generator=generator) * 2.0 - 1
    x = 1 + 0.25 * (torch.arange(shape[-1]) % 2 * 2.0 - 1)
    x[-1] = 1.0 if shape[-1] % 2 else x[-1]
    return (sign * x).to(DEVICE, dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@SETTINGS
@given(shape=SHAPES, kind=PARAMETERS, gradient=GRADIENTS, count_range=RANGES, seed=st.integers(0, 99))
def test_spike(dtype, shape, kind, gradient, count_range, seed) -> None:
    inputs = [on_a_grid(shape, seed, dtype)]
    if "learned" in kind or "channel" in kind:
        size = (shape[-1],) if "channel" in kind else ()
        inputs.append((2.25 + torch.zeros(size, device=DEVICE)).requires_grad_())
    name = "k" if "k" in kind.split() else "threshold"
    options = {"count_range": count_range, "gradient": gradient}

    def run(function, x: Tensor, *learned: Tensor, **more: str) -> list[Tensor]:
        return [function(x, **{name: learned[0] if learned else 2.25}, **options, **more)]

    assert_matches(
        lambda *given: run(spike, *given, backend="triton"),
        lambda *given: run(spike_reference, *given),
        inputs,
        dtype,
        floor=1e-3,  # gradients of an all-silent token are zero
    )


def test_random_numbers_are_bitwise_those_of_torch_under_one_threshold() -> None:
    x, thresholds = random(33, 200, seed=0).detach() * 3, random(200, seed=1).detach().abs() + 0.01
    ours, torchs = (
        spike(x, threshold=thresholds, count_range=(-100, 90), backend=backend) for backend in ("triton", "torch")
    )
    assert torch.equal(ours, torchs)


def test_halves_go_to_the_even_side_and_large_counts_stay() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -2.5, 4194303.5, 8388607.5, 8388609.0, 3e9, -3e38], device=DEVICE)
    assert torch.equal(spike(x, threshold=1.0, backend="triton"), x.round())


def test_programs_that_walk_over_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_spiking, "_BACKWARD_PROGRAMS", 2)
    x, k = on_a_grid((150, 64), 3, torch.float32), torch.full((64,), 2.25, device=DEVICE, requires_grad=True)

    def run(x: Tensor, k: Tensor) -> list[Tensor]:
        return [spike(x, k=k, backend="triton")]

    assert_matches(run, lambda x, k: [spike_reference(x, k=k)], [x, k])
    for a, b in zip(results(run, [x, k]), results(run, [x, k]), strict=True):
        assert torch.equal(a, b)


def test_views_and_empty_inputs() -> None:
    whole = on_a_grid((6, 40), 0, torch.float32)

    def views(function, x: Tensor, **more: str) -> list[Tensor]:
        options = {"threshold": 0.3, "gradient": "surrogate"}
        return [function(view, **options, **more) for view in (x[:, 8:24], x.T)]

    assert_matches(lambda x: views(spike, x, backend="triton"), lambda x: views(spike_reference, x), [whole])
    empty = torch.zeros(0, 6, device=DEVICE, requires_grad=True)
    k = torch.tensor(3.0, device=DEVICE, requires_grad=True)
    y, dx, dk = results(lambda x, k: [spike(x, k=k, gradient="clipped", backend="triton")], [empty, k])
    assert y.shape == dx.shape == (0, 6) and dk.item() == 0.0
