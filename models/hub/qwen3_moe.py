"""Qwen3-MoE: Qwen3 with experts in some layers. Sliding windows, if any, are in all layers."""

from collections.abc import Container, Mapping, Sequence
from typing import Any, ClassVar

from models.config import ModelConfig, MoEConfig, RouterConfig
from models.hub.experts import constant, place_experts, require_experts
from models.hub.llama_family import FULL, SLIDING, LlamaFamily
from models.hub.tensors import Copy
from models.hub.tensors import whole as whole_tensor
from models.hub.values import flag, indices, optional_whole, whole

_EXPERT = {name: name for name in ("gate_proj", "up_proj", "down_proj")}


class Qwen3MoE(LlamaFamily):
    """transformers' Qwen3MoeForCausalLM.

    Attributes:
        default_experts: num_experts if the key is missing.
        default_top_k: num_experts_per_tok if the key is missing.
        default_normalize: norm_topk_prob if the key is missing.
        default_expert_size: moe_intermediate_size if the key is missing.
    """

    model_type: ClassVar[str] = "qwen3_moe"
    architecture: ClassVar[str] = "Qwen3MoeForCausalLM"
    normed: ClassVar = True
    has_windows: ClassVar[bool] = True
    has_experts: ClassVar = True
    default_kv_heads: ClassVar[int | None] = 4
    default_experts: ClassVar[int] = 128
    default_top_k: ClassVar[int] = 8
    default_normalize: ClassVar[bool] = False
    default_expert_size: ClassVar[int] = 768
    represented: ClassVar[tuple[str, ...]] = (
        *LlamaFamily.represented,
        *("use_sliding_window", "sliding_window", "num_experts", "num_local_experts", "num_experts_per_tok"),
        *("moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"),
    )
    harmless: ClassVar[tuple[str, ...]] = ("output_router_logits",)
    in_training: ClassVar = {"router_aux_loss_coef": (0, None)}

    def layers(self, config: Mapping[str, Any]) -> tuple[list[str], int | None]:
        """A window in all layers, or in none."""
        window = optional_whole(config, "sliding_window", 4096) if flag(config, "use_sliding_window") else None
        return [FULL if window is None else SLIDING] * whole(config, "num_hidden_layers"), window

    def experts(self, config: Mapping[str, Any]) -> MoEConfig:
        """The experts, in every decoder_sparse_step-th layer that is not in mlp_only_layers."""
        layers, step = whole(config, "num_hidden_layers"), whole(config, "decoder_sparse_step", 1)
        only = indices("mlp_only_layers", config.get("mlp_only_layers") or [], layers)
        dense = [layer for layer in range(layers) if layer in only or (layer + 1) % step]
        name = "num_local_experts" if "num_local_experts" in config else "num_experts"
        if len(dense) == layers or config.get(name) == 0:
            return MoEConfig()
        normalized = flag(config, "norm_topk_prob", self.default_normalize)
        top_k = whole(config, "num_experts_per_tok", self.default_top_k)
        return MoEConfig(
            num_experts=whole(config, name, self.default_experts),
            expert_hidden_size=whole(config, "moe_intermediate_size", self.default_expert_size),
            dense_layers=dense,
            router=RouterConfig(top_k=top_k, normalize="after" if normalized else "before"),
        )

    def require(self, model: ModelConfig) -> None:
        """Check that Qwen3-MoE can compute a model."""
        super().require(model)
        self.require_experts(model)
        self.refuse(model.moe.shared_experts > 0, f"model.moe.shared_experts={model.moe.shared_experts}")
        self.refuse(len(model.used_mixers()) > 1, "a model with both full_attention and sliding_window_attention")

    def require_experts(self, model: ModelConfig) -> None:
        """Check that a model's router and experts are of this kind."""
        require_experts(self, model)

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """The architecture's own keys of config.json."""
        moe = model.moe
        keys = super().write(model) | {
            "num_experts": moe.num_experts,
            "num_experts_per_tok": moe.router.top_k,
            "moe_intermediate_size": model.expert_hidden_size,
            "norm_topk_prob": moe.router.normalize == "after",
            "decoder_sparse_step": 1,
            "mlp_only_layers": sorted(moe.dense_layers),
        }
        windows = SLIDING in model.used_mixers()
        return keys | ({"use_sliding_window": True, "sliding_window": model.attention.window} if windows else {})

    def constant(self, name: str, model: ModelConfig) -> float | None:
        """The router's load, which is not stored."""
        return constant(name, model)

    def place(self, name: str, shape: Sequence[int], model: ModelConfig, stored: Container[str]) -> list[Copy]:
        """Where a parameter is stored."""
        if ".ffn.router." in name:
            layer = name.split(".")[1]
            load = name.endswith(".load")
            return [] if load else [whole_tensor(shape, f"model.layers.{layer}.mlp.gate.weight")]
        if ".ffn.experts." in name:
            _, layer, _, _, kind, _ = name.split(".")
            prefix = f"model.layers.{layer}.mlp.experts"
            return place_experts(kind, shape, prefix, prefix, _EXPERT, stored)
        return super().place(name, shape, model, stored)
