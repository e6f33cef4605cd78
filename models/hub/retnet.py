"""FLA's RetNet: retention (arXiv 2307.08621)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from models.config import ModelConfig, RetentionConfig
from models.hub.fla_family import SwishGatedFla
from models.hub.values import positive, whole

# The base in FLA's layer, for which its configuration has no key.
_THETA = 10000.0


class RetNet(SwishGatedFla):
    """FLA's RetNetForCausalLM."""

    model_type: ClassVar = "retnet"
    architecture: ClassVar = "RetNetForCausalLM"
    mixer: ClassVar = "retention"
    default_hidden_ratio: ClassVar = 2
    represented: ClassVar = (*SwishGatedFla.represented, "expand_k", "expand_v")

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The section of the linear mixer."""
        section = RetentionConfig(
            num_heads=whole(config, "num_heads", 8),
            expand_k=positive("expand_k", config.get("expand_k", 1.0)),
            expand_v=positive("expand_v", config.get("expand_v", 2.0)),
            rope_theta=_THETA,
        )
        return {"retention": section}

    def require(self, model: ModelConfig) -> None:
        """Check that FLA's RetNet can compute a model."""
        super().require(model)
        theta = model.retention.rope_theta
        self.refuse(theta != _THETA, f"model.retention.rope_theta={theta}")

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """The architecture's own keys of config.json."""
        retention = model.retention
        return super().write(model) | {
            "num_heads": retention.num_heads,
            "expand_k": retention.expand_k,
            "expand_v": retention.expand_v,
            "use_output_gate": True,
        }
