"""Mistral: Llama with a sliding window in every layer. `sliding_window` counts the keys with the query's own."""

from collections.abc import Mapping
from typing import Any, ClassVar

from models.config import ModelConfig
from models.hub.llama_family import FULL, SLIDING, LlamaFamily
from models.hub.values import optional_whole, whole


class Mistral(LlamaFamily):
    """transformers' MistralForCausalLM.

    Attributes:
        default_window: sliding_window if the key is missing; null is full attention.
    """

    model_type: ClassVar[str] = "mistral"
    architecture: ClassVar[str] = "MistralForCausalLM"
    has_windows: ClassVar = True
    default_kv_heads: ClassVar = 8
    default_window: ClassVar[int | None] = 4096
    represented: ClassVar[tuple[str, ...]] = (*LlamaFamily.represented, "sliding_window")

    def layers(self, config: Mapping[str, Any]) -> tuple[list[str], int | None]:
        """A window in all layers, or in none."""
        window = optional_whole(config, "sliding_window", self.default_window)
        return [FULL if window is None else SLIDING] * whole(config, "num_hidden_layers"), window

    def require(self, model: ModelConfig) -> None:
        """Check that Mistral can compute a model."""
        super().require(model)
        self.refuse(len(model.used_mixers()) > 1, "a model with both full_attention and sliding_window_attention")

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """The architecture's own keys of config.json."""
        window = model.attention.window if SLIDING in model.used_mixers() else None
        return super().write(model) | {"sliding_window": window}
