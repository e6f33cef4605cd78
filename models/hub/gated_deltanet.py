"""FLA's Gated DeltaNet (arXiv 2412.06464) and Kimi delta attention (arXiv 2510.26692)."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from models.config import GatedDeltaNetConfig, KimiDeltaAttentionConfig, ModelConfig
from models.hub.fla_family import FlaFamily, drop
from models.hub.values import flag, optional_whole, positive, whole


class _Grouped(FlaFamily):
    """A delta rule with decays, whose value heads may be a multiple of its query and key heads."""

    default_heads: ClassVar[int]
    default_head_dim: ClassVar[int]
    default_expand_v: ClassVar[float]
    represented: ClassVar[tuple[str, ...]] = (
        *FlaFamily.represented,
        *("num_v_heads", "head_dim", "expand_v", "conv_size", "allow_neg_eigval"),
    )

    def heads(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of the section that both mixers have."""
        return {
            "num_heads": whole(config, "num_heads", self.default_heads),
            "num_v_heads": optional_whole(config, "num_v_heads"),
            "head_dim": whole(config, "head_dim", self.default_head_dim),
            "expand_v": positive("expand_v", config.get("expand_v", self.default_expand_v)),
            "conv_size": whole(config, "conv_size", 4),
            "allow_negative_eigenvalues": flag(config, "allow_neg_eigval"),
        }

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """The architecture's own keys of config.json."""
        section: GatedDeltaNetConfig | KimiDeltaAttentionConfig = getattr(model, self.mixer)
        return super().write(model) | {
            "num_heads": section.num_heads,
            "num_v_heads": section.num_v_heads,
            "head_dim": section.head_dim,
            "expand_v": section.expand_v,
            "conv_size": section.conv_size,
            "use_short_conv": True,
            "allow_neg_eigval": section.allow_negative_eigenvalues,
        }


class GatedDeltaNet(_Grouped):
    """FLA's GatedDeltaNetForCausalLM."""

    model_type: ClassVar = "gated_deltanet"
    architecture: ClassVar = "GatedDeltaNetForCausalLM"
    mixer: ClassVar = "gated_delta_net"
    default_heads: ClassVar = 6
    default_head_dim: ClassVar = 256
    default_expand_v: ClassVar = 2.0
    without: ClassVar = {
        **FlaFamily.without,
        "use_short_conv": (True, None),
        "use_gate": (True, None),
        "output_gate_activation": ("swish", "silu", None),
    }

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The section of the linear mixer."""
        return {"gated_delta_net": GatedDeltaNetConfig(**self.heads(config))}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """The architecture's own keys of config.json."""
        return super().write(model) | {"use_gate": True}

    def ignored(self, stored: Iterable[str]) -> set[str]:
        """`D`, which early versions of FLA stored and never read."""
        return drop(stored, ".attn.D")


class KDA(_Grouped):
    """FLA's KDAForCausalLM. Its gate is bounded if there is a `lower_bound`."""

    model_type: ClassVar = "kda"
    architecture: ClassVar = "KDAForCausalLM"
    mixer: ClassVar = "kimi_delta_attention"
    default_heads: ClassVar = 16
    default_head_dim: ClassVar = 128
    default_expand_v: ClassVar = 1.0
    represented: ClassVar = (*_Grouped.represented, "safe_gate", "lower_bound")
    without: ClassVar = {**FlaFamily.without, "use_short_conv": (True, None)}

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The section of the linear mixer."""
        bound = config.get("lower_bound")
        section = KimiDeltaAttentionConfig(**self.heads(config))
        if bound is not None:
            if not isinstance(bound, int | float):
                raise ValueError(f"lower_bound={bound!r} is not a negative number; correct it")
            section.gate, section.min_log_decay = "bounded", -positive("-lower_bound", -bound)
        return {"kimi_delta_attention": section}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """The architecture's own keys of config.json."""
        section = model.kimi_delta_attention
        bound = section.min_log_decay if section.gate == "bounded" else None
        return super().write(model) | {"safe_gate": bound is not None, "lower_bound": bound}
