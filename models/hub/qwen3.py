"""Qwen3: Qwen2 with norms on queries and keys in place of the biases."""

from typing import ClassVar

from models.hub.qwen2 import Qwen2


class Qwen3(Qwen2):
    """transformers' Qwen3ForCausalLM."""

    model_type: ClassVar = "qwen3"
    architecture: ClassVar = "Qwen3ForCausalLM"
    biased: ClassVar = False
    normed: ClassVar = True
    default_head_dim: ClassVar = 128
