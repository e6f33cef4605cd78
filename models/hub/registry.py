"""The adapters: which one reads a config.json, and which one computes a model."""

from collections.abc import Mapping
from typing import Any

from models.config import LINEAR_MIXERS, ModelConfig
from models.hub.adapter import LEARNED_EOD, Adapter
from models.hub.delta_net import DeltaNet
from models.hub.fla_family import FlaFamily
from models.hub.gated_deltanet import KDA, GatedDeltaNet
from models.hub.gla import GLA
from models.hub.hgrn import HGRN, HGRN2
from models.hub.llama import Llama
from models.hub.llama_family import SLIDING
from models.hub.mistral import Mistral
from models.hub.mixtral import Mixtral
from models.hub.qwen2 import Qwen2
from models.hub.qwen3 import Qwen3
from models.hub.qwen3_moe import Qwen3MoE
from models.hub.qwen3_next import Qwen3Next
from models.hub.retnet import RetNet
from models.hub.spikingbrain import SpikingBrain

_FLA: tuple[FlaFamily, ...] = (GLA(), RetNet(), HGRN(), HGRN2(), DeltaNet(), GatedDeltaNet(), KDA(), SpikingBrain())
_TRANSFORMERS = (Llama(), Qwen2(), Qwen3(), Mistral(), Mixtral(), Qwen3MoE(), Qwen3Next())
ADAPTERS: dict[str, Adapter] = {adapter.model_type: adapter for adapter in (*_TRANSFORMERS, *_FLA)}
# model_types that are known, and refused with the reason.
_REFUSED = {
    "sse_swa_moba": "SpikingBrain 2 needs sparse state expansion (SSE) and mixture of block attention (MoBA), which no "
    "mixer here computes; gla_swa, SpikingBrain-7B, is supported",
}


def adapter_of(config: Mapping[str, Any]) -> Adapter:
    """The adapter of a config.json.

    Raises:
        ValueError: there is none.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ValueError(f"model_type={kind!r} is not known here; {', '.join(ADAPTERS)} are")
    if kind in _REFUSED:
        raise ValueError(f"model_type={kind!r} is not supported: {_REFUSED[kind]}")
    if kind not in ADAPTERS:
        raise ValueError(f"model_type={kind!r} is not known here; {', '.join(ADAPTERS)} are")
    return ADAPTERS[kind]


def from_hub(config: Mapping[str, Any]) -> ModelConfig:
    """Convert a config.json into a ModelConfig. Missing keys take the architecture's own defaults.

    Raises:
        ValueError: the architecture is unsupported, or the model needs an unsupported feature.
        KeyError: a number without a default is missing.
    """
    adapter = adapter_of(config)
    adapter.check(config)
    return adapter.read(config)


def adapter_for(model: ModelConfig) -> Adapter:
    """The adapter of the architecture that computes a model.

    Raises:
        ValueError: there is none. The message names the part of the model that none has.
    """
    if model.spiking.is_used:
        raise ValueError("model.spiking has no Hugging Face layout: its architectures compute with floats")
    if model.sink_tokens:
        raise ValueError(f"model.sink_tokens={model.sink_tokens} has no Hugging Face layout: no architecture has them")
    if parallel := [layer for layer in model.layer_mixers() if " + " in layer]:
        raise ValueError(f"layers with {parallel[0]} in parallel have no Hugging Face layout")
    linear = [mixer for mixer in model.used_mixers() if mixer in LINEAR_MIXERS]
    if len(linear) > 1:
        raise ValueError(f"{' and '.join(linear)} in one model have no Hugging Face layout; one linear mixer has")
    # Only Qwen3-Next has such norms, gates or rotations, or linear attention with experts.
    is_next = model.zero_centered_norms or model.attention.output_gate or model.moe.num_experts
    if is_next and linear == ["gated_delta_net"]:
        found = ADAPTERS["qwen3_next"]
    else:
        found = _linear_adapter(linear[0]) if linear else _softmax_adapter(model)
    found.require(model)
    return found


def _linear_adapter(mixer: str) -> Adapter:
    found = next((adapter for adapter in _FLA if adapter.mixer == mixer), None)
    if found is None:
        raise ValueError(f"layers with {mixer} have no Hugging Face layout; no architecture has them")
    return found


def _softmax_adapter(model: ModelConfig) -> Adapter:
    """The closest of transformers' decoders; its `require` says what it lacks."""
    attention = model.attention
    if model.zero_centered_norms or attention.output_gate:
        return ADAPTERS["qwen3_next"]
    if model.moe.num_experts:
        return ADAPTERS["qwen3_moe" if attention.qk_norm else "mixtral"]
    if attention.qk_norm:
        return ADAPTERS["qwen3"]
    if attention.qkv_bias:
        return ADAPTERS["qwen2"]
    return ADAPTERS["mistral" if SLIDING in model.used_mixers() else "llama"]


def to_hub(
    model: ModelConfig, vocab_size: int, dtype: str, max_positions: int, eos_token_id: int | None = LEARNED_EOD
) -> dict[str, Any]:
    """The config.json of a model.

    The keys of special tokens are always present, null where unknown: transformers assumes 2 and 1 for missing ones.
    An export replaces them with its tokenizer's special tokens (trainer.stored.hub_files).

    Args:
        model: The model's configuration.
        vocab_size: Rows of its embedding.
        dtype: Dtype as named by torch.
        max_positions: Length of the longest sequence in training, in tokens.
        eos_token_id: The end-of-text token; by default that of tokenizers trained by prepare_data.

    Raises:
        ValueError: no supported architecture computes this model.
    """
    return adapter_for(model).to_hub(model, vocab_size, dtype, max_positions, eos_token_id)
