"""Llama, up to 3.x with its rotary scaling."""

from typing import ClassVar

from models.config import ModelConfig
from models.hub.llama_family import LlamaFamily


class Llama(LlamaFamily):
    """transformers' LlamaForCausalLM."""

    model_type: ClassVar = "llama"
    architecture: ClassVar = "LlamaForCausalLM"

    def require(self, model: ModelConfig) -> None:
        """Check that Llama can compute a model."""
        super().require(model)
        heads = model.attention.num_heads
        # transformers checks it even with a head_dim of its own.
        self.refuse(
            bool(model.hidden_size % heads),
            f"model.hidden_size={model.hidden_size}, no multiple of model.attention.num_heads={heads},",
        )
