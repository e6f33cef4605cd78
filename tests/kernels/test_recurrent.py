"""The recurrent form for generation: one token after another in place is the chunked form."""

import pytest
import torch

from kernels.backend import generating
from kernels.convolution import causal_conv1d
from kernels.linear_attention import delta_rule, gated_delta_rule, gla, hgrn, hgrn2, retention

BATCH, HEADS, KEYS, VALUES, TIME = 3, 4, 8, 6, 21


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heads(count, width, seed):
    return draw(BATCH, TIME, count, width, seed=seed)


def inputs_of(name):
    """Inputs [B, T, ...] of a recurrence, with fewer key heads where it allows them."""
    q, k, v = heads(HEADS, KEYS, 0), heads(2, KEYS, 1), heads(2, VALUES, 2)
    k = torch.nn.functional.normalize(k, dim=-1)
    decay, per_head = -draw(BATCH, TIME, HEADS, KEYS, seed=3).exp(), -draw(BATCH, TIME, HEADS, seed=4).exp()
    beta = draw(BATCH, TIME, HEADS, seed=5).sigmoid()
    return {
        "gla": (gla, (q, k, v, decay)),
        "hgrn2": (hgrn2, (q, v, decay)),
        "retention": (retention, (q, k, v, -torch.tensor([0.1, 0.01, 1.0, 0.5]))),
        "delta_rule": (delta_rule, (q, k, v, beta)),
        "gated_delta_rule": (gated_delta_rule, (q, k, v, per_head, beta)),
        "kimi": (gated_delta_rule, (q, k, v, decay, beta)),
        "hgrn": (hgrn, (draw(BATCH, TIME, KEYS, seed=6), -draw(BATCH, TIME, KEYS, seed=7).exp())),
    }[name]


def part(inputs, first, last):
    """Some tokens of the inputs; a fixed decay has no tokens."""
    return [x if x.dim() == 1 else x[:, first:last] for x in inputs]


NAMES = ["gla", "hgrn2", "retention", "delta_rule", "gated_delta_rule", "kimi", "hgrn"]


@pytest.mark.parametrize("count", [1, 4, 7])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_pieces_in_place_are_the_chunked_form(name, count):
    kernel, inputs = inputs_of(name)
    expected, final = kernel(*inputs, output_final_state=True, backend="torch")
    _, state = kernel(*part(inputs, 0, 5), output_final_state=True, backend="torch")
    memory, outputs = state.data_ptr(), []
    for first in range(5, TIME, count):
        o, state = kernel(
            *part(inputs, first, first + count),
            initial_state=state,
            output_final_state=True,
            backend="recurrent",
            reuse_state=True,
        )
        outputs.append(o)
        assert state.data_ptr() == memory
    torch.testing.assert_close(torch.cat(outputs, 1), expected[:, 5:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_without_a_state_and_in_other_dtypes(name, dtype):
    kernel, inputs = inputs_of(name)
    # Decays, which are negative, stay in float32 as the kernels ask.
    inputs = [x if dtype == torch.bfloat16 and (x <= 0).all() else x.to(dtype) for x in inputs]
    expected, final = kernel(*inputs, output_final_state=True, backend="reference")
    o, state = kernel(*inputs, output_final_state=True, backend="recurrent")
    assert o.dtype == dtype and state.dtype == final.dtype
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-10
    torch.testing.assert_close(o, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state, final, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_state_is_only_overwritten_where_that_is_allowed(name):
    kernel, inputs = inputs_of(name)
    _, state = kernel(*inputs, output_final_state=True)
    before = state.clone()
    kernel(*part(inputs, 0, 1), initial_state=state, output_final_state=True, backend="recurrent")
    assert torch.equal(state, before)
    kernel(*part(inputs, 0, 1), initial_state=state, output_final_state=True, reuse_state=True)
    assert torch.equal(state, before), "outside of generation chunks are preferred"
    with generating():
        kernel(*part(inputs, 0, 1), initial_state=state, output_final_state=True, reuse_state=True)
    assert not torch.equal(state, before), "it is the preferred form for one token"


@pytest.mark.parametrize("name", NAMES)
def test_with_gradients_there_is_no_recurrent_form(name):
    kernel, inputs = inputs_of(name)
    with pytest.raises(ValueError, match="asks for 'recurrent'"):
        kernel(*inputs, backend="recurrent")


@pytest.mark.parametrize("width", [1, 2, 4])
@torch.no_grad()
def test_the_convolution_of_one_token(width):
    x, weight = draw(BATCH, TIME, KEYS, seed=0), draw(KEYS, width, seed=1)
    expected, final = causal_conv1d(x, weight, output_final_state=True)
    state = torch.zeros(BATCH, KEYS, width - 1)
    memory, outputs = state.data_ptr(), []
    for t in range(TIME):
        with generating():
            y, state = causal_conv1d(
                x[:, t : t + 1], weight, initial_state=state, output_final_state=True, reuse_state=True
            )
        outputs.append(y)
        assert state.data_ptr() == memory
    torch.testing.assert_close(torch.cat(outputs, 1), expected)
    torch.testing.assert_close(state, final)
