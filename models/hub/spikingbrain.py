"""SpikingBrain-7B (arXiv 2509.05276), as its authors publish it: linear attention and a sliding window in turns.

Its code calls flash-attn with a window of (sliding_window, 0), so that a query sees sliding_window + 1 keys.
"""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from models.config import AttentionConfig, MixerLayoutConfig, ModelConfig, SpikingBrainGLAConfig
from models.hub.fla_family import FlaFamily
from models.hub.llama_family import SLIDING
from models.hub.values import optional_whole, pattern_of, positive, whole

_LINEAR = "spikingbrain_gla"
_CLASSES = {"GLAswaConfig", "GLAswaForCausalLM", "GLAswaModel"}


class SpikingBrain(FlaFamily):
    """GLAswaForCausalLM, of BICLab/SpikingBrain-7B."""

    model_type: ClassVar = "gla_swa"
    architecture: ClassVar = "GLAswaForCausalLM"
    mixer: ClassVar = _LINEAR
    represented: ClassVar = (
        *("num_attention_heads", "num_key_value_heads", "sliding_window", "rope_theta", "auto_map"),
        *("gate_logit_normalizer", "gate_low_rank_dim"),
    )
    without: ClassVar = {
        "elementwise_affine": (True, None),
        "use_short_conv": (False, None),
        "rope_scaling": (None,),
        "enable_spike": (False, None),
    }

    def check(self, config: Mapping[str, Any]) -> None:
        """Refuse what models here do not compute. `auto_map` may name the authors' own classes."""
        super().check(config)
        code = config.get("auto_map") or {}
        classes = {str(name).rpartition(".")[2] for name in code.values()} if isinstance(code, dict) else {"?"}
        if not classes <= _CLASSES:
            raise ValueError(f"auto_map={config['auto_map']!r} is not supported; gla_swa with its authors' classes is")

    def read(self, config: Mapping[str, Any]) -> ModelConfig:
        """Convert a checked config.json."""
        heads, width = whole(config, "num_attention_heads", 28), whole(config, "hidden_size")
        kv_heads = optional_whole(config, "num_key_value_heads", 4) or heads
        layers = [_LINEAR if layer % 2 == 0 else SLIDING for layer in range(whole(config, "num_hidden_layers"))]
        return ModelConfig(
            **self.shape(config, whole(config, "intermediate_size")),
            mixers=MixerLayoutConfig(pattern=pattern_of(layers)),
            attention=AttentionConfig(
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=width // heads,
                rope_theta=positive("rope_theta", config.get("rope_theta", 1e6)),
                qkv_bias=True,
                window=whole(config, "sliding_window", 4096) + 1,
            ),
            spikingbrain_gla=SpikingBrainGLAConfig(
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=width // heads,
                gate_low_rank=whole(config, "gate_low_rank_dim", 16),
                gate_normalizer=positive("gate_logit_normalizer", config.get("gate_logit_normalizer", 16)),
            ),
        )

    def require(self, model: ModelConfig) -> None:
        """Check that SpikingBrain-7B's code can compute a model."""
        super().require(model)
        attention, linear = model.attention, model.spikingbrain_gla
        turns = [_LINEAR if layer % 2 == 0 else SLIDING for layer in range(model.num_layers)]
        self.refuse(model.layer_mixers() != turns, f"layers other than {_LINEAR} and {SLIDING} in turns")
        self.refuse(attention.window < 2, f"model.attention.window={attention.window}")
        self.refuse(not (attention.qkv_bias and linear.qkv_bias), "qkv_bias=false")
        shapes = [(section.num_heads, section.num_kv_heads) for section in (attention, linear)]
        same = shapes[0] == shapes[1] and linear.head_dim * linear.num_heads == model.hidden_size
        self.refuse(not same, "linear attention with other heads than the sliding window's")

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """The architecture's own keys of config.json."""
        attention, linear = model.attention, model.spikingbrain_gla
        return {
            "hidden_act": "swish",
            "num_attention_heads": attention.num_heads,
            "num_key_value_heads": attention.num_kv_heads,
            "sliding_window": attention.window - 1,
            "rope_theta": attention.rope_theta,
            "gate_low_rank_dim": linear.gate_low_rank,
            "gate_logit_normalizer": linear.gate_normalizer,
        }

    def ignored(self, stored: Iterable[str]) -> set[str]:
        """None; but the variant with int8 weights and spikes has scales."""
        if any(name.endswith(".weight_quantizer.scales") for name in stored):
            raise ValueError(
                "the tensors are those of W8ASpike, whose weights are rounded and whose gates are merged; import "
                "SpikingBrain-7B itself, and run spiketrain convert spike"
            )
        return set()
