"""Our models against transformers' on the same weights: an implementation that others wrote and use."""

import pytest
import torch

pytest.importorskip("transformers")

from models.config import AttentionConfig, GatedDeltaNetConfig, MixerLayoutConfig, ModelConfig
from models.decoder import Decoder, initialize
from models.mixers.base import SequenceInfo
from trainer.benchmarks.transformers_peer import build_peer, copy_weights

VOCAB, ROWS, TIME = 96, 2, 70


def _decoder(**changes) -> Decoder:
    config = ModelConfig(**{"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 160} | changes)
    decoder = Decoder(config, VOCAB)
    initialize(decoder, seed=3)
    with torch.no_grad():
        for parameter in decoder.parameters():
            # Norms and biases start where a wrong offset or a left-out bias would not show.
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    return decoder


def _inputs() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(VOCAB, (ROWS, TIME), generator=torch.Generator().manual_seed(0))
    return tokens, torch.arange(TIME).expand(ROWS, TIME)


@torch.no_grad()
def _logits_differ_by(decoder: Decoder) -> float:
    peer = build_peer(decoder.model_config, VOCAB, TIME)
    copy_weights(decoder, peer)
    tokens, positions = _inputs()
    ours, theirs = decoder(tokens, positions), peer(input_ids=tokens).logits
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_dense_logits_are_those_of_qwen2(tied, kv_heads):
    decoder = _decoder(tie_embeddings=tied, attention=AttentionConfig(4, kv_heads, qkv_bias=True))
    assert _logits_differ_by(decoder) < 1e-5


@pytest.mark.parametrize("value_heads", [2, 4])
def test_hybrid_logits_are_those_of_qwen3_next(value_heads):
    decoder = _decoder(
        num_layers=4,
        mixers=MixerLayoutConfig(linear_per_full=3),
        attention=AttentionConfig(4, 2, qk_norm=True),
        gated_delta_net=GatedDeltaNetConfig(num_heads=2, num_v_heads=value_heads, head_dim=16),
    )
    assert _logits_differ_by(decoder) < 1e-5


def test_gated_delta_net_layer_and_its_gradients_are_those_of_qwen3_next():
    decoder = _decoder(
        num_layers=1,
        mixers=MixerLayoutConfig(pattern="gated_delta_net"),
        gated_delta_net=GatedDeltaNetConfig(num_heads=2, num_v_heads=4, head_dim=16, expand_v=2.0),
    )
    peer = build_peer(decoder.model_config, VOCAB, TIME)
    copy_weights(decoder, peer)
    ours, theirs = decoder.layers["0"].mixer, peer.model.layers[0].linear_attn
    x = torch.randn(TIME, ROWS, 64, requires_grad=True)
    expected = theirs(x.transpose(0, 1)).transpose(0, 1)
    actual = ours(x, SequenceInfo())
    assert float((actual - expected).detach().norm() / expected.detach().norm()) < 1e-5
    grad = torch.randn_like(expected)
    x_ours, decay_ours = torch.autograd.grad(actual, (x, ours.A_log), grad)
    x_theirs, decay_theirs = torch.autograd.grad(expected, (x, theirs.A_log), grad)
    assert float((x_ours - x_theirs).norm() / x_theirs.norm()) < 1e-4
    assert float((decay_ours - decay_theirs).norm() / decay_theirs.norm()) < 1e-4


def test_losses_and_weight_gradients_are_those_of_qwen2():
    decoder = _decoder(attention=AttentionConfig(4, 2, qkv_bias=True))
    peer = build_peer(decoder.model_config, VOCAB, TIME)
    copy_weights(decoder, peer)
    tokens, positions = _inputs()
    labels = tokens.roll(-1, dims=1)
    loss_sum, _ = decoder(tokens, positions, None, labels)
    expected = peer(input_ids=tokens, labels=labels, shift_labels=labels).loss
    assert float(loss_sum.detach()) / labels.numel() == pytest.approx(float(expected), abs=1e-5)
    loss_sum.div(labels.numel()).backward()
    expected.backward()
    pairs = [
        (decoder.embedding.weight, peer.model.embed_tokens.weight),
        (decoder.layers["0"].mixer.k_proj.bias, peer.model.layers[0].self_attn.k_proj.bias),
        (decoder.layers["1"].ffn.gate_proj.weight, peer.model.layers[1].mlp.gate_proj.weight),
    ]
    for ours, theirs in pairs:
        assert float((ours.grad - theirs.grad).norm() / theirs.grad.norm()) < 1e-4
