"""Symmetric int8: codes, scales, groups, gradients, and the clipping that suits the inputs."""

import pytest
import torch

from kernels.quantization.int8 import clip_int8_weight, decode_int8, encode_int8, fake_int8, fake_int8_weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_by_the_definition_and_decode_to_what_is_faked(dtype):
    x = (torch.randn(3, 5, 2, 16) * torch.logspace(-8, 5, 5)[:, None, None]).to(dtype)
    codes, scale = encode_int8(x)
    assert codes.dtype == torch.int8 and scale.shape == (3, 5, 2, 1) and scale.dtype == torch.float32
    expected = (x.float().abs().amax(-1, keepdim=True) / 127).clamp(1e-5, 1e4)
    torch.testing.assert_close(scale, expected, rtol=1e-6, atol=0)
    assert torch.equal(codes.float(), (x.float() / scale).round().clamp(-128, 127))
    assert torch.equal(fake_int8(x), decode_int8(codes, scale, dtype))
    assert int(codes.float().abs().max()) == 127


@pytest.mark.parametrize("shape", [(6, 256), (6, 300), (6, 40), (2, 3, 130)])
def test_weights_are_rounded_in_groups_of_inputs(shape):
    weight, found = torch.randn(shape), []
    for part in weight.split(128, -1):
        scale = part.abs().amax(-1, keepdim=True) / 127
        found.append((part / scale).round() * scale)
    rounded = fake_int8_weight(weight, 128)
    torch.testing.assert_close(rounded, torch.cat(found, -1), rtol=1e-6, atol=1e-9)
    assert 1e-4 < (rounded - weight).norm() / weight.norm() < 1e-2
    assert not fake_int8_weight(torch.zeros(2, 8), 128).any()


@pytest.mark.parametrize("rounding", [fake_int8, lambda x: fake_int8_weight(x, 4)])
def test_gradients_pass_straight_through(rounding):
    x = torch.randn(3, 8, requires_grad=True)
    grad = torch.randn(3, 8)
    rounding(x).backward(grad)
    assert torch.equal(x.grad, grad)


def test_clipping_goes_by_the_inputs():
    """An outlier that no input reads is clipped; one that all read is not; Ŵ is rounded to itself."""
    weight = torch.rand(4, 256, generator=torch.Generator().manual_seed(0)) * 0.2
    weight[:, 0] = weight[:, 130] = 1.0
    moments = torch.ones(256)
    moments[0] = 0.0
    moments[130] = 1e4
    rounded, errors = clip_int8_weight(weight, moments, (1.0, 0.75, 0.5), 128)
    torch.testing.assert_close(rounded[:, 0], torch.full((4,), 0.5))
    torch.testing.assert_close(rounded[:, 130], torch.ones(4))
    torch.testing.assert_close(fake_int8_weight(rounded, 128), rounded, rtol=1e-6, atol=0)
    plain = fake_int8_weight(weight, 128)
    measured = [((weight - w).double().square() * moments).sum() for w in (rounded, plain)]
    torch.testing.assert_close(errors, torch.stack(measured), rtol=1e-4, atol=0)
    assert errors[0] < errors[1]


def test_every_choice_of_clipping_is_the_best_there_is():
    generator = torch.Generator().manual_seed(1)
    weight, moments = torch.randn(3, 200, generator=generator), torch.rand(200, generator=generator)
    ratios = (1.0, 0.9, 0.7)
    chosen, _ = clip_int8_weight(weight, moments, ratios, 128)
    for start in (0, 128):
        part = slice(start, start + 128)
        errors = []
        for ratio in ratios:
            scale = ratio * weight[:, part].abs().amax(-1, keepdim=True) / 127
            rounded = (weight[:, part] / scale).round().clamp(-127, 127) * scale
            errors.append(((weight[:, part] - rounded).square() * moments[part]).sum(-1))
        own = ((weight[:, part] - chosen[:, part]).square() * moments[part]).sum(-1)
        torch.testing.assert_close(own, torch.stack(errors).amin(0), rtol=1e-4, atol=0)
