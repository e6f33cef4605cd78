"""FLA's DeltaNet (arXiv 2406.06484)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from models.config import DeltaNetConfig, ModelConfig
from models.hub.fla_family import FlaFamily, expansion, heads_of
from models.hub.values import flag, positive, whole


class DeltaNet(FlaFamily):
    """FLA's DeltaNetForCausalLM."""

    model_type: ClassVar = "delta_net"
    architecture: ClassVar = "DeltaNetForCausalLM"
    mixer: ClassVar = "delta_net"
    represented: ClassVar = (
        *FlaFamily.represented,
        "expand_k",
        "expand_v",
        "conv_size",
        "use_gate",
        "allow_neg_eigval",
    )
    without: ClassVar = {
        **FlaFamily.without,
        "use_short_conv": (True, None),
        "use_beta": (True, None),
        "use_output_norm": (True, None),
        "qk_norm": ("l2", None),
        "qk_activation": ("silu", None),
    }

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The section of the linear mixer."""
        heads, width = whole(config, "num_heads", 16), whole(config, "hidden_size")
        key, value = (
            heads_of(name, width * positive(name, config.get(name, 1.0)), heads) for name in ("expand_k", "expand_v")
        )
        section = DeltaNetConfig(
            num_heads=heads,
            head_dim=key,
            expand_v=value / key,
            conv_size=whole(config, "conv_size", 4),
            allow_negative_eigenvalues=flag(config, "allow_neg_eigval"),
            output_gate=flag(config, "use_gate"),
        )
        return {"delta_net": section}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """The architecture's own keys of config.json."""
        delta = model.delta_net
        return super().write(model) | {
            "num_heads": delta.num_heads,
            "expand_k": expansion("expand_k", delta.num_heads * delta.head_dim, model.hidden_size),
            "expand_v": expansion("expand_v", delta.num_heads * delta.head_v_dim, model.hidden_size),
            "conv_size": delta.conv_size,
            "use_short_conv": True,
            "use_gate": delta.output_gate,
            "allow_neg_eigval": delta.allow_negative_eigenvalues,
        }
