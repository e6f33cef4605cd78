"""FLA's GLA: gated linear attention (arXiv 2312.06635)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from models.config import GatedLinearAttentionConfig, ModelConfig
from models.hub.fla_family import SwishGatedFla
from models.hub.values import positive, whole

# FLA's layer has these two as defaults, and its configuration no keys for them.
_RANK, _NORMALIZER = 16, 16.0


class GLA(SwishGatedFla):
    """FLA's GLAForCausalLM."""

    model_type: ClassVar = "gla"
    architecture: ClassVar = "GLAForCausalLM"
    mixer: ClassVar = "gated_linear_attention"
    represented: ClassVar = (*SwishGatedFla.represented, "expand_k", "expand_v")
    without: ClassVar = {
        **SwishGatedFla.without,
        "clamp_min": (None,),
        "use_gk": (True, None),
        "use_gv": (False, None),
        "gate_low_rank_dim": (_RANK,),
        "gate_logit_normalizer": (_NORMALIZER,),
    }

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The section of the linear mixer."""
        section = GatedLinearAttentionConfig(
            num_heads=whole(config, "num_heads", 4),
            expand_k=positive("expand_k", config.get("expand_k", 0.5)),
            expand_v=positive("expand_v", config.get("expand_v", 1.0)),
            gate_low_rank=_RANK,
            gate_normalizer=_NORMALIZER,
        )
        return {"gated_linear_attention": section}

    def require(self, model: ModelConfig) -> None:
        """Check that FLA's GLA can compute a model."""
        super().require(model)
        gla, prefix = model.gated_linear_attention, "model.gated_linear_attention"
        self.refuse(gla.gate_low_rank != _RANK, f"{prefix}.gate_low_rank={gla.gate_low_rank}")
        self.refuse(gla.gate_normalizer != _NORMALIZER, f"{prefix}.gate_normalizer={gla.gate_normalizer}")

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """The architecture's own keys of config.json."""
        gla = model.gated_linear_attention
        return super().write(model) | {
            "num_heads": gla.num_heads,
            "expand_k": gla.expand_k,
            "expand_v": gla.expand_v,
            "use_output_gate": True,
        }
