"""Mixtral: Mistral with experts in every layer; the weights of the chosen ones are normalised."""

from collections.abc import Container, Mapping, Sequence
from typing import Any, ClassVar

from models.config import ModelConfig, MoEConfig, RouterConfig
from models.hub.experts import constant, place_experts, require_experts
from models.hub.mistral import Mistral
from models.hub.tensors import Copy
from models.hub.tensors import whole as whole_tensor
from models.hub.values import whole

_EXPERT = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


class Mixtral(Mistral):
    """transformers' MixtralForCausalLM."""

    model_type: ClassVar = "mixtral"
    architecture: ClassVar = "MixtralForCausalLM"
    has_experts: ClassVar = True
    default_window: ClassVar = None
    default_theta: ClassVar = 1e6
    default_eps: ClassVar = 1e-5
    represented: ClassVar = (*Mistral.represented, "num_experts_per_tok", "num_local_experts", "num_experts")
    harmless: ClassVar = ("output_router_logits",)
    in_training: ClassVar = {"router_aux_loss_coef": (0, None), "router_jitter_noise": (0, None)}

    def experts(self, config: Mapping[str, Any]) -> MoEConfig:
        """The experts."""
        count = whole(config, "num_experts" if "num_experts" in config else "num_local_experts", 8)
        router = RouterConfig(top_k=whole(config, "num_experts_per_tok", 2), normalize="after")
        return MoEConfig(num_experts=count, router=router)

    def require(self, model: ModelConfig) -> None:
        """Check that Mixtral can compute a model."""
        super().require(model)
        require_experts(self, model)
        self.refuse(bool(model.moe.dense_layers), f"model.moe.dense_layers={model.moe.dense_layers}")
        self.refuse(model.moe.shared_experts > 0, f"model.moe.shared_experts={model.moe.shared_experts}")
        normalize = model.moe.router.normalize
        self.refuse(normalize != "after", f"model.moe.router.normalize={normalize}")

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """The architecture's own keys of config.json."""
        return super().write(model) | {
            "intermediate_size": model.expert_hidden_size,
            "num_local_experts": model.moe.num_experts,
            "num_experts_per_tok": model.moe.router.top_k,
        }

    def constant(self, name: str, model: ModelConfig) -> float | None:
        """The router's load, which is not stored."""
        return constant(name, model)

    def place(self, name: str, shape: Sequence[int], model: ModelConfig, stored: Container[str]) -> list[Copy]:
        """Where a parameter is stored."""
        if ".ffn." not in name:
            return super().place(name, shape, model, stored)
        _, layer, _, module, rest = name.split(".", 4)
        prefix = f"model.layers.{layer}"
        if module == "router":
            ours, fused = f"{prefix}.block_sparse_moe.gate.weight", f"{prefix}.mlp.gate.weight"
            return [] if rest == "load" else [whole_tensor(shape, fused if fused in stored else ours)]
        kind = rest.partition(".")[0]
        single = f"{prefix}.block_sparse_moe.experts"
        return place_experts(kind, shape, f"{prefix}.mlp.experts", single, _EXPERT, stored)
