"""What transformers' Llama and its descendants share: rotary softmax attention, SwiGLU, and the names of parameters."""

from collections.abc import Container, Mapping, Sequence
from typing import Any, ClassVar

from models.config import AttentionConfig, MixerLayoutConfig, ModelConfig, MoEConfig
from models.hub import rope
from models.hub.adapter import Adapter
from models.hub.tensors import Copy, whole
from models.hub.values import optional_whole, pattern_of
from models.hub.values import whole as whole_number

_OUTER = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head"}
_INNER = {
    "mixer_norm": "input_layernorm",
    "mixer": "self_attn",
    "ffn_norm": "post_attention_layernorm",
    "ffn": "mlp",
}
FULL, SLIDING = "full_attention", "sliding_window_attention"
# transformers' names of layers' attention in layer_types, by ours.
LAYER_TYPES = {FULL: "full_attention", SLIDING: "sliding_attention"}


class LlamaFamily(Adapter):
    """A decoder of transformers.

    Attributes:
        biased: Whether queries, keys and values have biases.
        normed: Whether queries and keys are normalised per head.
        has_windows: Whether it has sliding windows.
        has_experts: Whether it has experts.
        default_kv_heads: Key and value heads if the key is missing; None for as many as query heads.
        default_head_dim: Head size if the key is missing; None for hidden_size / num_attention_heads.
        default_theta: Base of the rotation if no place gives one.
        layer_types: Names of mixers in layer_types.
    """

    biased: ClassVar[bool] = False
    normed: ClassVar[bool] = False
    has_windows: ClassVar[bool] = False
    has_experts: ClassVar[bool] = False
    default_kv_heads: ClassVar[int | None] = None
    default_head_dim: ClassVar[int | None] = None
    default_theta: ClassVar[float] = 10000.0
    layer_types: ClassVar[Mapping[str, str]] = LAYER_TYPES
    represented: ClassVar[tuple[str, ...]] = (
        *("num_attention_heads", "num_key_value_heads", "head_dim", "layer_types"),
        *rope.REPRESENTED,
    )

    def layers(self, config: Mapping[str, Any]) -> tuple[list[str], int | None]:
        """The mixer of each layer, and the sliding layers' window; None if there are none."""
        return [FULL] * whole_number(config, "num_hidden_layers"), None

    def experts(self, config: Mapping[str, Any]) -> MoEConfig:
        """The experts; none in dense architectures."""
        return MoEConfig()

    def read(self, config: Mapping[str, Any]) -> ModelConfig:
        """Convert a checked config.json."""
        heads, width = whole_number(config, "num_attention_heads"), whole_number(config, "hidden_size")
        kv_heads = optional_whole(config, "num_key_value_heads", self.default_kv_heads or heads) or heads
        mixers, window = self.layers(config)
        self._require_layer_types(config, mixers)
        attention = AttentionConfig(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=optional_whole(config, "head_dim", self.default_head_dim) or width // heads,
            rope_theta=rope.read_theta(config, self.default_theta),
            rope_scaling=rope.read_scaling(config),
            qk_norm=self.normed,
            qkv_bias=self.biased,
        )
        attention.window = window or attention.window
        return ModelConfig(
            **self.shape(config, whole_number(config, "intermediate_size")),
            mixers=MixerLayoutConfig(pattern=pattern_of(mixers)),
            attention=attention,
            moe=self.experts(config),
        )

    def _require_layer_types(self, config: Mapping[str, Any], mixers: Sequence[str]) -> None:
        """Compare layer_types with what the other keys give, because programs differ in which of them they read."""
        given, own = config.get("layer_types"), [self.layer_types[mixer] for mixer in mixers]
        if given is not None and given != own:
            raise ValueError(
                f"layer_types={given!r} is not supported; with the other keys of config.json {pattern_of(own)!r} is"
            )

    def require(self, model: ModelConfig) -> None:
        """Check that this architecture can compute a model."""
        self.require_attention(model, (FULL, SLIDING) if self.has_windows else (FULL,))
        self.require_plain(model)
        self.refuse(bool(model.moe.num_experts) and not self.has_experts, f"num_experts={model.moe.num_experts}")

    def require_attention(self, model: ModelConfig, mixers: Sequence[str]) -> None:
        """Check the layers, of which these mixers are possible, and the softmax attention.

        Raises:
            ValueError: the architecture lacks a part, which the message names.
        """
        attention = model.attention
        for mixer in model.used_mixers():
            self.refuse(mixer not in mixers, f"a model with {mixer}")
        self.refuse(attention.rope_theta is None, "model.attention.rope_theta=null")
        for name, has in (("qkv_bias", self.biased), ("qk_norm", self.normed)):
            self.refuse(getattr(attention, name) != has, f"model.attention.{name}={str(not has).lower()}")

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """The architecture's own keys of config.json."""
        attention = model.attention
        assert attention.rope_theta is not None, "`require` has checked it"
        return {
            "num_attention_heads": attention.num_heads,
            "num_key_value_heads": attention.num_kv_heads,
            "head_dim": model.attention_head_dim,
            **rope.write(attention.rope_theta, attention.rope_scaling),
        }

    def place(self, name: str, shape: Sequence[int], model: ModelConfig, stored: Container[str]) -> list[Copy]:
        """Where a parameter is stored."""
        return [whole(shape, stored_name(name))]


def stored_name(name: str) -> str:
    """The name that transformers gives a parameter of Decoder, if it is stored as it is."""
    module, _, rest = name.partition(".")
    if module != "layers":
        return f"{_OUTER[module]}.{rest}"
    layer, part, rest = rest.split(".", 2)
    return f"model.layers.{layer}.{_INNER[part]}.{rest}"
