"""What an adapter says about its architecture, and the checks of config.json that all of them share.

Every key of a config.json falls into one of five classes: a number of our model (`represented`); a request for a
different function, which is refused (`without`); no effect on the function (`harmless`); of training only
(`in_training`) or unknown, both of which are reported as left out.
"""

from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from models.config import ModelConfig
from models.hub.tensors import Copy
from models.hub.values import flag, positive, whole

# The end-of-document token of tokenizers trained by launch/prepare_data.py.
LEARNED_EOD = 0

# Features that configurations can request and models here lack, with the values that request nothing. transformers
# itself ignores some of these keys for some types, but other programs read them, and copies of other models contain
# them. An adapter that represents one of them says so.
_WITHOUT: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (None, 1.0),
    "rotary_pct": (None, 1.0),
    "no_rope_layers": (None, []),
    "rope_interleaved": (None, False),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "attention_multiplier": (None,),
    "attention_chunk_size": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "n_routed_experts": (None, 0),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
    "compression_config": (None,),
    # Custom code, which may compute anything.
    "auto_map": (None, {}),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
}
# Keys that do not affect the computed function, or that other files hold, such as special token ids.
_HARMLESS = (
    "architectures",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "max_position_embeddings",
    "max_window_layers",
    "original_max_position_embeddings",
    "initializer_range",
    # Computes the products in slices, with the same sum.
    "pretraining_tp",
    "use_cache",
    "chunk_size_feed_forward",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
    "is_decoder",
    "id2label",
    "label2id",
    "problem_type",
)
# Matter only in training; models here have no dropout.
_IN_TRAINING: dict[str, tuple[Any, ...]] = {"attention_dropout": (0, None)}
_REPRESENTED = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")


class Adapter(ABC):
    """A Hugging Face architecture.

    Attributes:
        model_type: Its model_type.
        architecture: Its class for causal language models.
        represented: Keys with a counterpart in ModelConfig.
        without: Further keys that can ask for what models here lack, with the values that ask for nothing.
        harmless: Further keys that do not affect the function.
        in_training: Further keys that matter only in training, with the values that change nothing.
        eps_key: Key of the norms' epsilon.
        default_eps: Its value if the key is missing.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    represented: ClassVar[tuple[str, ...]] = ()
    without: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    harmless: ClassVar[tuple[str, ...]] = ()
    in_training: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    eps_key: ClassVar[str] = "rms_norm_eps"
    default_eps: ClassVar[float] = 1e-6

    @abstractmethod
    def read(self, config: Mapping[str, Any]) -> ModelConfig:
        """Convert a checked config.json. Missing keys take the architecture's own defaults."""

    @abstractmethod
    def require(self, model: ModelConfig) -> None:
        """Check that this architecture can compute a model.

        Raises:
            ValueError: it lacks a part of it, which the message names.
        """

    @abstractmethod
    def write(self, model: ModelConfig) -> dict[str, Any]:
        """The architecture's own keys of config.json, for a model that passed `require`."""

    @abstractmethod
    def place(self, name: str, shape: Sequence[int], model: ModelConfig, stored: Container[str]) -> list[Copy]:
        """Where a parameter is stored; nowhere if the list is empty (see `constant`).

        Args:
            name: The parameter's name in Decoder.
            shape: Its shape.
            model: The model's configuration.
            stored: Names of the tensors in the files, for architectures with several spellings; empty in an export.
        """

    def constant(self, name: str, model: ModelConfig) -> float | None:
        """The value of a tensor of ours that this architecture does not store; None if it stores it."""
        return None

    def ignored(self, stored: Iterable[str]) -> set[str]:
        """Stored tensors that the architecture's own code does not read either.

        Raises:
            ValueError: a tensor belongs to another model than this architecture.
        """
        return set()

    def check(self, config: Mapping[str, Any]) -> None:
        """Refuse what models here do not compute.

        Raises:
            ValueError: a key asks for it.
        """
        for name, values in {**_WITHOUT, **self.without}.items():
            value = config.get(name, values[0])
            if value not in values and name not in self.represented:
                raise ValueError(f"{name}={value!r} is not supported; {self.model_type} with {name}={values[0]!r} is")
        named = config.get("architectures")
        # The earliest conversions spelled Llama's LLaMAForCausalLM.
        if named and [str(name).lower() for name in named] != [self.architecture.lower()]:
            raise ValueError(
                f"architectures={named!r} is not supported; {self.model_type} with "
                f"architectures={[self.architecture]!r} is"
            )

    def left_out(self, config: Mapping[str, Any]) -> list[str]:
        """Keys that have no counterpart here, or that matter only in training, as `key=value`."""
        training = {**_IN_TRAINING, **self.in_training}
        known = {*_REPRESENTED, *self.represented, *_WITHOUT, *self.without, *_HARMLESS, *self.harmless, *training}
        known |= {self.eps_key, "tie_word_embeddings"}
        unknown = [key for key in config if key not in known and not key.startswith("_")]
        dropped = [key for key, values in training.items() if key in config and config[key] not in values]
        return [f"{key}={config[key]!r}" for key in sorted(unknown + dropped)]

    def to_hub(
        self, model: ModelConfig, vocab_size: int, dtype: str, max_positions: int, eos_token_id: int | None
    ) -> dict[str, Any]:
        """The config.json of a model that passed `require`; see models.hub.registry.to_hub."""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "dtype": dtype,
            "vocab_size": vocab_size,
            "hidden_size": model.hidden_size,
            "intermediate_size": model.ffn_hidden_size,
            "num_hidden_layers": model.num_layers,
            "hidden_act": "silu",
            self.eps_key: model.norm_eps,
            "tie_word_embeddings": model.tie_embeddings,
            "max_position_embeddings": max_positions,
            **self.write(model),
            "bos_token_id": None,
            "eos_token_id": eos_token_id,
            "pad_token_id": None,
        }

    def shape(self, config: Mapping[str, Any], ffn_hidden_size: int) -> dict[str, Any]:
        """The fields of ModelConfig that all architectures have."""
        vocab_size = whole(config, "vocab_size")
        return {
            "num_layers": whole(config, "num_hidden_layers"),
            "hidden_size": whole(config, "hidden_size"),
            "ffn_hidden_size": ffn_hidden_size,
            "vocab_size": vocab_size,
            # Whole multiples of 64 keep tensor parallelism possible; otherwise the rows must not be padded.
            "vocab_multiple": 64 if vocab_size % 64 == 0 else 1,
            "tie_embeddings": flag(config, "tie_word_embeddings"),
            "norm_eps": positive(self.eps_key, config.get(self.eps_key, self.default_eps)),
        }

    def require_plain(self, model: ModelConfig) -> None:
        """Check that a plain architecture can compute a model's norms, rotation and gates.

        Raises:
            ValueError: it cannot.
        """
        attention, moe = model.attention, model.moe
        self.refuse(model.zero_centered_norms, "model.zero_centered_norms=true")
        self.refuse(attention.output_gate, "model.attention.output_gate=true")
        share = attention.partial_rotary_factor
        self.refuse(share != 1, f"model.attention.partial_rotary_factor={share}")
        self.refuse(moe.shared_expert_gate, "model.moe.shared_expert_gate=true")

    def refuse(self, is_lacking: bool, part: str) -> None:
        """Refuse a model because of a part of it.

        Raises:
            ValueError: `is_lacking`.
        """
        if is_lacking:
            raise ValueError(f"{part} has no place in {self.model_type}, the Hugging Face layout of such models")
