"""Sink tokens: against one dense mask over sinks and tokens; packed, token by token, and where they do not count."""

import math

import pytest
import torch

from kernels.activations import swiglu
from kernels.rotary import apply_rotary, rotary_tables
from models.config import MoEConfig
from models.decoder import Decoder, initialize
from models.mixers.base import LayerCache
from models.moe.statistics import begin_step, collect
from models.saved_activations import RECOMPUTE, BlockPolicy, Policy
from tests.helpers import VOCABULARY, draw_tokens, pack, rows, tiny_decoder, tiny_model_config

SINKS, TIME = 3, 14
SOFTMAX = "sliding_window_attention, full_attention"
HYBRID = "sliding_window_attention, hgrn + full_attention, gated_delta_net"


def sink_decoder(pattern=SOFTMAX, **changes):
    return tiny_decoder(pattern, num_layers=pattern.count(",") + 1, sink_tokens=SINKS, **changes).double()


def attended(mixer, x, visible):
    """Rotary attention of one sequence x [T, D] under a mask [T, T]."""
    rotary = rotary_tables(torch.arange(len(x)), *mixer.rotary)
    heads = [proj(x).unflatten(-1, (-1, 8)) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj)]
    q, k = (apply_rotary(y[None], *rotary)[0] for y in heads[:2])
    k, v = (y.repeat_interleave(2, 1) for y in (k, heads[2]))
    scores = torch.einsum("thk,shk->hts", q, k) / math.sqrt(8)
    probabilities = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return mixer.o_proj(torch.einsum("hts,shk->thk", probabilities, v).flatten(1))


def logits_by_mask(model, tokens):
    """The logits of tokens [T] behind the sinks, as one sequence under one mask."""
    place = torch.arange(SINKS + len(tokens))
    query, key = place[:, None], place[None]
    x = torch.cat((model.sinks.weight, model.embedding.weight[tokens]))
    for layer in model.layers.values():
        window = layer.mixer.window or len(place)
        visible = torch.where(query < SINKS, key < SINKS, (key < SINKS) | ((key <= query) & (key > query - window)))
        x = x + attended(layer.mixer, layer.mixer_norm(x), visible)
        normed = layer.ffn_norm(x)
        x = x + layer.ffn.down_proj(swiglu(layer.ffn.gate_proj(normed), layer.ffn.up_proj(normed)))
    return model.final_norm(x[SINKS:]) @ model.head_weight.T


def test_logits_and_gradients_are_those_of_one_mask():
    model, tokens = sink_decoder(), draw_tokens(1, TIME)
    ours, expected = model(*rows(tokens))[0], logits_by_mask(model, tokens[0])
    torch.testing.assert_close(ours, expected)
    parameters = dict(model.named_parameters())
    grads = [torch.autograd.grad(x.sin().sum(), parameters.values()) for x in (ours, expected)]
    for name, mine, theirs in zip(parameters, *grads, strict=True):
        assert theirs.norm() > 0, name
        torch.testing.assert_close(mine, theirs, msg=name)


@pytest.mark.parametrize("pattern", [SOFTMAX, HYBRID])
@torch.no_grad()
def test_packed_documents_are_as_run_alone(pattern):
    model, documents = sink_decoder(pattern), [draw_tokens(length, seed=length) for length in (5, 1, 9)]
    tokens, positions, bounds = pack(documents)
    packed = model(tokens, positions, bounds)[0].split([len(document) for document in documents])
    for document, ours in zip(documents, packed, strict=True):
        torch.testing.assert_close(ours, model(*rows(document[None]))[0])


@pytest.mark.parametrize("pattern", [SOFTMAX, HYBRID])
@torch.no_grad()
def test_token_by_token(pattern):
    model, tokens = sink_decoder(pattern), draw_tokens(2, TIME)
    expected, caches = model(*rows(tokens)), [LayerCache() for _ in model.layers]
    pieces = [model.hidden_states(tokens[:, t : t + 1], torch.full((2, 1), t), caches=caches) for t in range(TIME)]
    torch.testing.assert_close(torch.cat(pieces).transpose(0, 1) @ model.head_weight.T, expected)


@torch.no_grad()
def test_stages_hand_the_sinks_on():
    model, tokens = sink_decoder(HYBRID), draw_tokens(2, TIME)
    stages = [
        Decoder(model.model_config, VOCABULARY, layers).double() for layers in (range(1), range(1, 2), range(2, 3))
    ]
    hidden = None
    for stage in stages:
        stage.load_state_dict({name: model.state_dict()[name] for name in stage.state_dict()})
        hidden = stage.hidden_states(*rows(tokens), entering=hidden)
    torch.testing.assert_close(hidden, model.hidden_states(*rows(tokens)))


def test_recomputation_changes_nothing():
    model, tokens = sink_decoder(HYBRID), draw_tokens(2, TIME)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(*rows(tokens)).sin().sum(), parameters)
    for part in ("block", "mixer", "ffn"):
        model.keep(Policy(BlockPolicy(**{part: RECOMPUTE})))
        for mine, theirs in zip(torch.autograd.grad(model(*rows(tokens)).sin().sum(), parameters), expected):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_sinks_do_not_count_among_the_tokens_of_experts():
    moe = MoEConfig(num_experts=4)
    tokens = draw_tokens(2, TIME)

    model = Decoder(tiny_model_config(SOFTMAX, moe=moe, sink_tokens=SINKS), VOCABULARY)
    initialize(model, 0)
    begin_step([model], 0)
    model(*rows(tokens)).sum().backward()
    loads = torch.tensor(collect([model], model.model_config)).view(2, -1)[:, :4]
    assert loads.sum(1).tolist() == [2 * tokens.numel()] * 2, "two experts for every token"


def test_a_model_in_which_no_layer_sees_them_is_refused():
    with pytest.raises(ValueError, match="no layer would see them"):
        tiny_model_config("hgrn", sink_tokens=2)
    with pytest.raises(ValueError, match="must not be negative"):
        tiny_model_config("full_attention", sink_tokens=-1)
