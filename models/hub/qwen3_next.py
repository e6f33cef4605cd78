"""Qwen3-Next: gated delta nets and gated, partly rotated softmax attention in turns, experts, zero-centered norms.

Its linear layers store queries, keys, values and output gates in one matrix, key head after key head, the write
strengths and step sizes in another, and one convolution for queries, keys and values. Its softmax layers store the
output gate's rows with those of the queries, head after head.
"""

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from models.config import GatedDeltaNetConfig, ModelConfig, MoEConfig
from models.hub import rope
from models.hub.llama_family import FULL
from models.hub.qwen3_moe import Qwen3MoE
from models.hub.tensors import Copy, everything, rows
from models.hub.tensors import whole as whole_tensor
from models.hub.values import whole

_LINEAR = "gated_delta_net"
_TYPES = {FULL: "full_attention", _LINEAR: "linear_attention"}
_KEYS = {
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
_SHARE = 0.25


class Qwen3Next(Qwen3MoE):
    """transformers' Qwen3NextForCausalLM."""

    model_type: ClassVar = "qwen3_next"
    architecture: ClassVar = "Qwen3NextForCausalLM"
    has_windows: ClassVar = False
    layer_types: ClassVar = _TYPES
    default_kv_heads: ClassVar = 2
    default_head_dim: ClassVar = 256
    default_experts: ClassVar = 512
    default_top_k: ClassVar = 10
    default_normalize: ClassVar = True
    default_expert_size: ClassVar = 512
    represented: ClassVar = (
        *(name for name in Qwen3MoE.represented if "sliding" not in name),
        *("partial_rotary_factor", "full_attention_interval", "shared_expert_intermediate_size"),
        *_KEYS,
    )

    def layers(self, config: Mapping[str, Any]) -> tuple[list[str], int | None]:
        """Softmax attention in every full_attention_interval-th layer; or as layer_types says."""
        count, given = whole(config, "num_hidden_layers"), config.get("layer_types")
        mixers = {name: mixer for mixer, name in _TYPES.items()}
        if isinstance(given, list) and len(given) == count and set(map(str, given)) <= mixers.keys():
            return [mixers[name] for name in given], None
        interval = whole(config, "full_attention_interval", 4)
        return [_LINEAR if (layer + 1) % interval else FULL for layer in range(count)], None

    def read(self, config: Mapping[str, Any]) -> ModelConfig:
        """Convert a checked config.json."""
        share, rest = rope.split_share(config, _SHARE)
        model = super().read(rest)
        model.attention.output_gate, model.attention.partial_rotary_factor = True, share
        sizes = {key: whole(config, key, default) for key, default in _KEYS.items()}
        model.gated_delta_net = GatedDeltaNetConfig(
            num_heads=sizes["linear_num_key_heads"],
            num_v_heads=sizes["linear_num_value_heads"],
            head_dim=sizes["linear_key_head_dim"],
            expand_v=sizes["linear_value_head_dim"] / sizes["linear_key_head_dim"],
            conv_size=sizes["linear_conv_kernel_dim"],
        )
        model.zero_centered_norms = True
        # Checked again with what has been added.
        model.__post_init__()
        return model

    def experts(self, config: Mapping[str, Any]) -> MoEConfig:
        """The experts, with one that every token visits through a gate."""
        moe = super().experts(config)
        if not moe.num_experts:
            return moe
        assert moe.expert_hidden_size is not None, "Qwen3-MoE gives one"
        width = whole(config, "shared_expert_intermediate_size", 512)
        moe.shared_experts, rest = divmod(width, moe.expert_hidden_size)
        if rest:
            raise ValueError(
                f"shared_expert_intermediate_size={width} is not supported; a multiple of "
                f"moe_intermediate_size={moe.expert_hidden_size} is"
            )
        moe.shared_expert_gate = True
        return moe

    def require(self, model: ModelConfig) -> None:
        """Check that Qwen3-Next can compute a model."""
        self.require_attention(model, (FULL, _LINEAR))
        attention, moe = model.attention, model.moe
        self.refuse(not model.zero_centered_norms, "model.zero_centered_norms=false")
        self.refuse(not attention.output_gate, "model.attention.output_gate=false")
        self.refuse(
            model.gated_delta_net.allow_negative_eigenvalues, "model.gated_delta_net.allow_negative_eigenvalues=true"
        )
        if moe.num_experts:
            self.require_experts(model)
            self.refuse(not moe.shared_expert_gate, "model.moe.shared_expert_gate=false")

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """The architecture's own keys of config.json."""
        linear, share = model.gated_delta_net, model.attention.partial_rotary_factor
        keys = super().write(model)
        if not model.moe.num_experts:
            keys["mlp_only_layers"] = list(range(model.num_layers))
        return keys | {
            "rope_parameters": keys["rope_parameters"] | {"partial_rotary_factor": share},
            "partial_rotary_factor": share,
            "layer_types": [_TYPES[mixer] for mixer in model.layer_mixers()],
            "shared_expert_intermediate_size": model.moe.shared_experts * model.expert_hidden_size,
            "linear_num_key_heads": linear.num_heads,
            "linear_num_value_heads": linear.value_heads,
            "linear_key_head_dim": linear.head_dim,
            "linear_value_head_dim": linear.head_v_dim,
            "linear_conv_kernel_dim": linear.conv_size,
        }

    def ignored(self, stored: Iterable[str]) -> set[str]:
        """The layers that predict further tokens, which transformers does not read either."""
        return {name for name in stored if name.startswith("mtp.")}

    def place(self, name: str, shape: Sequence[int], model: ModelConfig, stored: Container[str]) -> list[Copy]:
        """Where a parameter is stored."""
        if ".ffn.shared_expert" in name:
            _, layer, _, rest = name.split(".", 3)
            target = rest.replace("shared_experts.", "shared_expert.")
            return [whole_tensor(shape, f"model.layers.{layer}.mlp.{target}")]
        if ".mixer." not in name:
            return super().place(name, shape, model, stored)
        _, layer, _, part = name.split(".", 3)
        prefix = f"model.layers.{layer}"
        if model.layer_mixers()[int(layer)] == _LINEAR:
            return _place_linear(f"{prefix}.linear_attn", part, shape, model)
        if part in ("q_proj.weight", "g_proj.weight"):
            heads = model.attention.num_heads
            # Of each head the rows of the queries, then those of the gate.
            start = 0 if part.startswith("q") else model.attention_head_dim
            return _blocks(f"{prefix}.self_attn.q_proj.weight", shape, heads, 2 * model.attention_head_dim, start)
        return super().place(name, shape, model, stored)


def _blocks(stored: str, shape: Sequence[int], heads: int, block: int, start: int) -> list[Copy]:
    """A matrix whose rows are shared out over heads: those of head h begin at row h * block + start of `stored`."""
    size = shape[0] // heads
    return [
        Copy(
            rows(head * size, (head + 1) * size, shape),
            stored,
            rows(head * block + start, head * block + start + size, shape),
        )
        for head in range(heads)
    ]


def _place_linear(prefix: str, part: str, shape: Sequence[int], model: ModelConfig) -> list[Copy]:
    linear = model.gated_delta_net
    group = linear.value_heads // linear.num_heads
    key, value = linear.head_dim, group * linear.head_v_dim
    fused = {"q_proj.weight": 0, "k_proj.weight": key, "v_proj.weight": 2 * key, "g_proj.weight": 2 * key + value}
    if part in fused:
        return _blocks(f"{prefix}.in_proj_qkvz.weight", shape, linear.num_heads, 2 * (key + value), fused[part])
    if part in ("b_proj.weight", "a_proj.weight"):
        start = 0 if part.startswith("b") else group
        return _blocks(f"{prefix}.in_proj_ba.weight", shape, linear.num_heads, 2 * group, start)
    if part.endswith("_conv1d.weight"):
        keys = linear.num_heads * key
        first = {"q": 0, "k": keys, "v": 2 * keys}[part[0]]
        target = (slice(first, first + shape[0]), 0, slice(0, shape[1]))
        return [Copy(everything(shape), f"{prefix}.conv1d.weight", target)]
    renamed = {"o_norm.weight": "norm.weight", "o_proj.weight": "out_proj.weight"}
    return [whole_tensor(shape, f"{prefix}.{renamed.get(part, part)}")]
