"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values, and sliding windows from some layer on."""

from collections.abc import Mapping
from typing import Any, ClassVar

from models.config import ModelConfig
from models.hub.llama_family import FULL, LAYER_TYPES, SLIDING, LlamaFamily
from models.hub.values import flag, optional_whole, whole


class Qwen2(LlamaFamily):
    """transformers' Qwen2ForCausalLM."""

    model_type: ClassVar = "qwen2"
    architecture: ClassVar = "Qwen2ForCausalLM"
    biased: ClassVar = True
    has_windows: ClassVar = True
    default_kv_heads: ClassVar = 32
    represented: ClassVar = (*LlamaFamily.represented, "use_sliding_window", "sliding_window", "max_window_layers")

    def layers(self, config: Mapping[str, Any]) -> tuple[list[str], int | None]:
        """Full attention below max_window_layers and windows above; or as layer_types says."""
        count = whole(config, "num_hidden_layers")
        window = optional_whole(config, "sliding_window", 4096) if flag(config, "use_sliding_window") else None
        types = {name: mixer for mixer, name in LAYER_TYPES.items()}
        given = config.get("layer_types")
        if window is None:
            # Qwen's classes read sliding_window only with use_sliding_window.
            return [FULL] * count, None
        if isinstance(given, list) and len(given) == count and set(map(str, given)) <= types.keys():
            return [types[name] for name in given], window
        full = min(whole(config, "max_window_layers", 28) if config.get("max_window_layers") != 0 else 0, count)
        return [FULL] * full + [SLIDING] * (count - full), window

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """The architecture's own keys of config.json."""
        mixers = model.layer_mixers()
        if SLIDING not in mixers:
            return super().write(model)
        return super().write(model) | {
            "use_sliding_window": True,
            "sliding_window": model.attention.window,
            # Programs that read no layer_types: right if the full layers come first.
            "max_window_layers": mixers.index(SLIDING),
            "layer_types": [LAYER_TYPES[mixer] for mixer in mixers],
        }
