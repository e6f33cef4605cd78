"""Errors of gradients that read rounded activations: linear operators are unbiased, ReLU and spikes exact."""

import math
from functools import partial

import pytest
import torch

from kernels.quantization import Noise, dequantize, noise_key, quantize
from models.saved_activations import Kept, as_it_is, compressing
from trainer.benchmarks.compressed_operators import OPERATORS, Drawing, Moments, Sizes, measure, rounding

SIZES = Sizes(tokens=24, channels=32, head_dim=16, outlier_every=16, outlier_factor=8.0)
GROUP = 16


def operator_of(name):
    return OPERATORS[name](Drawing(SIZES, 0))


def draws_of(name, bits):
    return partial(rounding, name, bits, GROUP)


def noisy(noise_of):
    """The codec of each draw, by the noise of a draw and a place."""

    def codec_of(draw):
        def store(x, place):
            q = quantize(x, bits=4, group=GROUP, noise=noise_of(draw, place))
            return Kept((dequantize(q),), torch.Tensor.clone)

        return store

    return codec_of


@pytest.mark.parametrize(
    ("name", "bits", "unbiased"),
    [
        ("linear", 8, {"weight"}),
        ("linear", 4, {"weight"}),
        ("experts", 8, {"gates", "weight"}),
        ("experts", 4, {"gates", "weight"}),
        ("rms_norm", 4, {"weight"}),
        ("gla", 4, {"q", "k", "v", "log_decay"}),
    ],
)
def test_what_is_linear_in_each_tensor_is_unbiased(name, bits, unbiased):
    """The mean of 1,000 draws is the exact gradient, to a tenth of a draw's error; what reads nothing is exact."""
    operator = operator_of(name)
    found = measure(operator, draws_of(name, bits), 1000)
    assert operator.unbiased == unbiased
    for of in unbiased:
        assert found[of].is_unbiased, of
        # One chunk of gated linear attention has exact scores, and so an exact gradient of the values.
        assert found[of].noise > 0.005 or of == "v"
        assert found[of].least <= found[of].noise / 10, of
    for of in operator.exact:
        assert found[of].is_exact, of


@pytest.mark.parametrize(
    "noise_of",
    [
        lambda draw, place: None,
        lambda draw, place: Noise(noise_key(0, 0, place, 0)),
        lambda draw, place: Noise(noise_key(0, 0, place, draw % 20)),
    ],
    ids=["to nearest", "one noise", "noise that comes again"],
)
def test_bias_is_found(noise_of):
    """Rounding to nearest, and noise that draws share, leave an error that no number of draws averages out."""
    found = measure(operator_of("linear"), noisy(noise_of), 1000)["weight"]
    assert not found.is_unbiased and found.bias > 0.01


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["relu", "spike"])
def test_signs_and_counts_are_exact(name, bits):
    for of, found in measure(operator_of(name), draws_of(name, bits), 4).items():
        assert found.is_exact and found.bias == found.noise == 0, of


@pytest.mark.parametrize("name", ["gelu", "swiglu", "gated_rms_norm", "convolution"])
def test_four_bits_bias_what_is_not_linear(name):
    """17 times coarser steps: about 17 times the noise, and a bias that 8 bits do not show."""
    operator = operator_of(name)
    eight, four = (measure(operator, draws_of(name, bits), 400) for bits in (8, 4))
    assert any(not found.is_unbiased for found in four.values())
    for of, found in four.items():
        assert 5 * eight[of].noise < found.noise < 50 * eight[of].noise, of
        assert eight[of].bias < 0.001, of


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_round_what_they_say(name):
    """As many tensors as are named go through the codec; forward is exact, and so are gradients of unrounded ones."""
    operator, places = operator_of(name), []

    def keep(x, place):
        places.append(place)
        return as_it_is(x)

    found = measure(operator, lambda draw: keep, 4)
    assert len(places) == 4 * len(operator.rounded) and all(errors.is_exact for errors in found.values())
    arguments = [1 * x.clone().requires_grad_() for x in (*operator.inputs.values(), *operator.weights.values())]
    with compressing(rounding(name, 4, GROUP, 0)):
        rounded = operator.function(*arguments)
    assert torch.equal(rounded, operator.function(*arguments))


def sums_of(samples, exact):
    moments = Moments(exact)
    for sample in samples:
        moments.add(sample)
    return moments.errors()


def test_moments_are_those_of_the_draws():
    """Normal errors of known variances, with and without a bias: noise, bias, z and degrees of freedom."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(50, generator=generator, dtype=torch.float64)
    deviations = torch.linspace(0.1, 1.0, 50, dtype=torch.float64)
    bias = 0.2 * torch.randn(50, generator=generator, dtype=torch.float64)
    draws, trace = 4000, float(deviations.square().sum())
    errors = torch.randn(draws, 50, generator=generator, dtype=torch.float64) * deviations
    found = sums_of(exact + bias + errors, exact)
    size = float(exact.square().sum())
    expected_bias = float(bias.norm()) / math.sqrt(size)
    assert found.noise == pytest.approx(math.sqrt((trace + float(bias.square().sum())) / size), rel=0.01)
    assert found.bias == pytest.approx(expected_bias, rel=0.1)
    assert found.z == pytest.approx(1 + float(bias.square().sum()) / (trace / draws), rel=0.1)
    assert found.freedom == pytest.approx(trace**2 / float(deviations.pow(4).sum()), rel=0.15)
    assert not found.is_unbiased and found.least < expected_bias


def test_z_without_bias():
    """Over many runs z is 1 on average, spread by (2 / ν)^½, and never beyond its limit; the bias is about 0."""
    generator = torch.Generator().manual_seed(0)
    deviations, exact = torch.linspace(0.1, 1.0, 30), torch.ones(30)
    errors = [torch.randn(60, 30, generator=generator) * deviations for _ in range(300)]
    found = [sums_of(exact + error, exact) for error in errors]
    z = torch.tensor([each.z for each in found])
    freedom = float(deviations.square().sum() ** 2 / deviations.pow(4).sum())
    assert float(z.mean()) == pytest.approx(1, abs=0.05)
    assert float(z.std()) == pytest.approx(math.sqrt(2 / freedom), rel=0.15)
    assert all(each.is_unbiased for each in found)
    # The estimate of the squared bias is 0 half of the time, else what z is above 1.
    assert sum(each.bias == 0 for each in found) > 100
    assert sum(each.bias**2 for each in found) < 0.3 * sum(each.chance for each in found)


def test_too_few_draws_are_refused():
    with pytest.raises(ValueError, match="at least 4"):
        measure(operator_of("relu"), draws_of("relu", 8), 3)
