"""Rows with a common prefix, which is computed once: the same hidden states and gradients as rows by themselves."""

import pytest
import torch

from models.decoder import Decoder, initialize
from tests.helpers import VOCABULARY, tiny_model_config

ROWS, PREFIX, TIME = 3, 11, 7
MIXERS = (
    "full_attention",
    "sliding_window_attention",
    "gated_delta_net",
    "gated_linear_attention",
    "retention",
    "hgrn",
    "hgrn2",
    "delta_net",
    "kimi_delta_attention",
    "spikingbrain_gla",
)
CASES = {name: {"pattern": name} for name in MIXERS}
CASES["hybrid"] = {"pattern": "hgrn, full_attention"}
CASES["branches"] = {"pattern": "gated_delta_net + sliding_window_attention + full_attention"}
CASES["sinks"] = {"pattern": "full_attention, sliding_window_attention", "sink_tokens": 3}
CASES["one token"] = {"pattern": "gated_delta_net, sliding_window_attention"}


def found(model, run):
    """Hidden states [rows, TIME, D] by `run`, and the gradients of a sum of them."""
    model.zero_grad()
    hidden = run()
    weights = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)
    (hidden * weights).sum().backward()
    return hidden.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("case", CASES)
def test_a_prefix_is_as_if_every_row_had_it(case):
    model = Decoder(tiny_model_config(**CASES[case]), VOCABULARY).double()
    initialize(model, seed=1)
    length = 1 if case == "one token" else PREFIX
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(VOCABULARY, (ROWS, TIME), generator=generator)
    prefix = torch.randint(VOCABULARY, (1, length), generator=generator)
    positions = torch.arange(length + TIME).expand(ROWS, -1)

    def together():
        return model.hidden_states(tokens, positions[:, length:], prefix=prefix).transpose(0, 1)

    def apart():
        whole = torch.cat((prefix.expand(ROWS, -1), tokens), 1)
        return model.hidden_states(whole, positions).transpose(0, 1)[:, length:]

    ours, our_gradients = found(model, together)
    theirs, their_gradients = found(model, apart)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(together(), theirs, rtol=1e-5, atol=1e-6)
