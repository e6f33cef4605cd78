"""Builds Hugging Face transformers models of equal shape, and renames our weights for them.

The dense peer is Qwen2. The hybrid peer is Qwen3-Next with dense feed-forwards. Its attention layers are replaced by
those of Qwen3, which have no output gate, so that both sides compute the same function.
"""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from models.config import ModelConfig
from models.decoder import Decoder
from models.hub.llama_family import stored_name
from models.mixers.gated_delta_net import GatedDeltaNet
from trainer.errors import ConfigError


def build_peer(config: ModelConfig, vocab_size: int, max_positions: int) -> nn.Module:
    """Build the transformers model that computes the same function as our Decoder, with random weights.

    Raises:
        ConfigError: transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError("the peer is Hugging Face transformers: pip install 'transformers>=5,<6'")
    shared = {
        "vocab_size": vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.attention.num_heads,
        "num_key_value_heads": config.attention.num_kv_heads,
        "head_dim": config.attention_head_dim,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": max_positions,
        "use_cache": False,
    }
    rope = {"rope_type": "default", "rope_theta": config.attention.rope_theta}
    if "gated_delta_net" not in config.layer_mixers():
        return _qwen2(shared, rope)
    return _qwen3_next(config, shared, rope)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Inside this context imports of transformers find neither fla nor causal_conv1d, and use plain torch code."""
    hidden = ("fla", "causal_conv1d")
    before = {name: sys.modules[name] for name in hidden if name in sys.modules}
    # Keep modules that are imported inside: a second import of a compiled module would abort.
    modules: dict[str, Any] = sys.modules
    modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        sys.modules.update(before)


def _qwen2(shared: dict[str, Any], rope: dict[str, Any]) -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**shared, rope_parameters=rope))


def _qwen3_next(config: ModelConfig, shared: dict[str, Any], rope: dict[str, Any]) -> nn.Module:
    with without_kernels():
        from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
        from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

    gdn, mixers = config.gated_delta_net, config.layer_mixers()
    peer_config = Qwen3NextConfig(
        **shared,
        # Qwen3-Next's default rotates only a part of each head; ours rotates all of it.
        rope_parameters={**rope, "partial_rotary_factor": 1.0},
        attention_bias=config.attention.qkv_bias,
        layer_types=["full_attention" if name == "full_attention" else "linear_attention" for name in mixers],
        linear_num_key_heads=gdn.num_heads,
        linear_num_value_heads=gdn.value_heads,
        linear_key_head_dim=gdn.head_dim,
        linear_value_head_dim=gdn.head_v_dim,
        linear_conv_kernel_dim=gdn.conv_size,
        # Dense feed-forwards.
        num_experts=0,
    )
    peer = Qwen3NextForCausalLM(peer_config)
    for i, layer in enumerate(peer.model.layers):
        if layer.block_type == "full_attention":
            layer.self_attn = Qwen3Attention(peer_config, i)
    return peer


@torch.no_grad()
def copy_weights(ours: Decoder, peer: nn.Module) -> None:
    """Overwrite every parameter of the peer with ours."""
    state = dict(_peer_weights(ours))
    names = {name for name, _ in peer.named_parameters()}
    assert names == set(state), f"unmatched parameters: {sorted(names ^ set(state))}"
    for name, parameter in peer.named_parameters():
        parameter.copy_(state[name].view_as(parameter))


def build_generating_peer(ours: Decoder, vocab_size: int) -> Any:
    """Build the peer of a softmax decoder, with its weights, to generate text of any length without an end."""
    peer: Any = build_peer(ours.model_config, vocab_size, 1 << 17).to(ours.head_weight.dtype).eval()
    copy_weights(ours, peer)
    peer.config.use_cache = peer.generation_config.use_cache = True
    peer.generation_config.eos_token_id = None
    return peer


def _peer_weights(ours: Decoder) -> Iterator[tuple[str, Tensor]]:
    delta_nets = {name: module for name, module in ours.named_modules() if isinstance(module, GatedDeltaNet)}
    # Qwen3-Next stores a norm's weight minus 1.
    offset = 1.0 if delta_nets else 0.0
    for name, parameter in ours.named_parameters():
        if not name.startswith(tuple(f"{path}." for path in delta_nets)):
            less = name.endswith(("mixer_norm.weight", "ffn_norm.weight", "final_norm.weight"))
            yield stored_name(name), parameter - offset if less else parameter
    for path, mixer in delta_nets.items():
        for name, weight in qwen3_next_delta_net(mixer).items():
            yield f"model.{path.removesuffix('mixer')}linear_attn.{name}", weight


def qwen3_next_delta_net(mixer: GatedDeltaNet) -> dict[str, Tensor]:
    """Pack our gated delta net's parameters as Qwen3-Next does: one projection, with rows grouped by key head."""

    def grouped(*projections: nn.Linear) -> Tensor:
        rows = [projection.weight.unflatten(0, (mixer.num_heads, -1)) for projection in projections]
        return torch.cat(rows, dim=1).flatten(0, 1)

    convolutions = (mixer.q_conv1d.weight, mixer.k_conv1d.weight, mixer.v_conv1d.weight)
    return {
        "in_proj_qkvz.weight": grouped(mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.g_proj),
        "in_proj_ba.weight": grouped(mixer.b_proj, mixer.a_proj),
        "conv1d.weight": torch.cat(convolutions)[:, None],
        "A_log": mixer.A_log,
        "dt_bias": mixer.dt_bias,
        "norm.weight": mixer.o_norm.weight,
        "out_proj.weight": mixer.o_proj.weight,
    }
