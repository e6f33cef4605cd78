"""What flash-linear-attention's models share: the names of parameters, SwiGLU, and softmax attention in some layers.

A hybrid's `attn` names the layers with softmax attention and its heads. Its window counts the keys with the query's
own. Biases, head size (hidden_size / num_heads) and the rotation are the same for all of them.
"""

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from models.config import AttentionConfig, MixerLayoutConfig, ModelConfig
from models.hub.adapter import Adapter
from models.hub.llama_family import FULL, SLIDING
from models.hub.tensors import Copy, everything, whole
from models.hub.values import flag, indices, optional_whole, pattern_of, positive
from models.hub.values import whole as whole_number

_OUTER = {"embedding": "model.embeddings", "final_norm": "model.norm", "lm_head": "lm_head"}
_INNER = {"mixer_norm": "attn_norm", "mixer": "attn", "ffn_norm": "mlp_norm", "ffn": "mlp"}
_ATTENTION_KEYS = ("layers", "num_heads", "num_kv_heads", "qkv_bias", "window_size", "rope_theta")
_DEFAULT_THETA = 10000.0


class FlaFamily(Adapter):
    """A model of flash-linear-attention.

    Attributes:
        mixer: Its linear mixer.
        default_hidden_ratio: hidden_ratio if the key is missing.
    """

    mixer: ClassVar[str]
    default_hidden_ratio: ClassVar[int] = 4
    eps_key: ClassVar = "norm_eps"
    represented: ClassVar[tuple[str, ...]] = ("attn", "hidden_ratio", "num_heads")
    without: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "elementwise_affine": (True, None),
        "use_short_conv": (False, None),
        "use_output_gate": (True, None),
        "feature_map": (None,),
        "num_kv_heads": (None,),
        # Residuals that attend to earlier layers' outputs.
        "attnres_block_size": (None,),
    }
    # How FLA computes, not what.
    harmless: ClassVar[tuple[str, ...]] = (
        *("attn_mode", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy", "conv_size"),
        "use_l2warp",
    )

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The section of the linear mixer, as a field of ModelConfig."""
        return {}

    def read(self, config: Mapping[str, Any]) -> ModelConfig:
        """Convert a checked config.json."""
        mixers, attention = self.layers(config)
        return ModelConfig(
            **self.shape(config, self._ffn_hidden_size(config)),
            mixers=MixerLayoutConfig(pattern=pattern_of(mixers)),
            attention=attention,
            **self.settings(config),
        )

    def layers(self, config: Mapping[str, Any]) -> tuple[list[str], AttentionConfig]:
        """The mixer of each layer, and the softmax layers' settings.

        Raises:
            ValueError: `attn` has an unknown key, or layers of different settings.
        """
        mixers = [self.mixer] * whole_number(config, "num_hidden_layers")
        given = config.get("attn")
        found: list[AttentionConfig] = []
        windows: list[int] = []
        for spec in given if isinstance(given, list) else [] if given is None else [given]:
            attention, window = _attention(spec, config)
            found.append(attention)
            windows += [] if window is None else [window]
            for layer in indices("attn: layers", spec["layers"], len(mixers)):
                if mixers[layer] != self.mixer:
                    raise ValueError(f"attn={given!r} names layer {layer} twice; correct it")
                mixers[layer] = FULL if window is None else SLIDING
        if any(attention != found[0] for attention in found) or len(set(windows)) > 1:
            raise ValueError(f"attn={given!r} is not supported; softmax layers with equal settings are")
        attention = found[0] if found else AttentionConfig()
        if windows:
            attention.window = windows[0]
        return mixers, attention

    def _ffn_hidden_size(self, config: Mapping[str, Any]) -> int:
        given = optional_whole(config, "intermediate_size")
        if given is not None:
            return given
        # null has another default than a missing key, in some models.
        ratio = positive("hidden_ratio", config.get("hidden_ratio", self.default_hidden_ratio) or 4)
        # FLA's GatedMLP: two thirds of the ratio, rounded up to a multiple of 256.
        return 256 * -(-int(whole_number(config, "hidden_size") * ratio * 2 / 3) // 256)

    def require(self, model: ModelConfig) -> None:
        """Check that this architecture can compute a model."""
        self.require_plain(model)
        self.refuse(bool(model.moe.num_experts), f"model.moe.num_experts={model.moe.num_experts}")
        if not {FULL, SLIDING} & set(model.used_mixers()):
            return
        attention = model.attention
        self.refuse(attention.rope_theta is None, "model.attention.rope_theta=null")
        self.refuse(attention.qk_norm, "model.attention.qk_norm=true")
        self.refuse(
            attention.rope_scaling.kind != "none", f"model.attention.rope_scaling={attention.rope_scaling.kind}"
        )
        self.refuse(
            model.attention_head_dim * attention.num_heads != model.hidden_size,
            f"model.attention.head_dim={model.attention_head_dim}, not hidden_size / num_heads,",
        )

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """The architecture's own keys of config.json."""
        return {"hidden_act": "swish", "attn": _attention_to_hub(model)}

    def place(self, name: str, shape: Sequence[int], model: ModelConfig, stored: Container[str]) -> list[Copy]:
        """Where a parameter is stored. Convolutions are stored as torch's Conv1d has them, [channels, 1, width]."""
        target = self.stored_name(name, stored)
        if not name.endswith("_conv1d.weight"):
            return [whole(shape, target)]
        channels, width = everything(shape)
        return [Copy((channels, width), target, (channels, 0, width))]

    def stored_name(self, name: str, stored: Container[str]) -> str:
        """FLA's name of a parameter of Decoder."""
        if name == "lower_bounds":
            return "model.lower_bounds"
        module, _, rest = name.partition(".")
        if module != "layers":
            return f"{_OUTER[module]}.{rest}"
        layer, part, rest = rest.split(".", 2)
        return f"model.layers.{layer}.{_INNER[part]}.{rest}"


class SwishGatedFla(FlaFamily):
    """A model whose output gate and norm are one module, g_norm_swish_gate, unless `fuse_norm` is false: g_norm."""

    def stored_name(self, name: str, stored: Container[str]) -> str:
        """FLA's name of a parameter of Decoder."""
        target = super().stored_name(name, stored)
        return target if target in stored else target.replace(".attn.g_norm.", ".attn.g_norm_swish_gate.")


def _attention(spec: Any, config: Mapping[str, Any]) -> tuple[AttentionConfig, int | None]:
    """The settings of some softmax layers, and their window; None for full attention."""
    if not isinstance(spec, dict) or not {"layers", "num_heads"} <= spec.keys():
        raise ValueError(f"attn={spec!r} is not supported; an object with layers and num_heads is")
    for key, value in spec.items():
        if key not in _ATTENTION_KEYS and value not in (None, False):
            raise ValueError(f"attn: {key}={value!r} is not supported; {', '.join(_ATTENTION_KEYS)} are")
    heads, width = whole_number(spec, "num_heads"), whole_number(config, "hidden_size")
    attention = AttentionConfig(
        num_heads=heads,
        num_kv_heads=optional_whole(spec, "num_kv_heads") or heads,
        head_dim=width // heads,
        rope_theta=positive("attn: rope_theta", spec.get("rope_theta", _DEFAULT_THETA)),
        qkv_bias=flag(spec, "qkv_bias"),
    )
    return attention, optional_whole(spec, "window_size")


def _attention_to_hub(model: ModelConfig) -> Any:
    """`attn` of a model: null without softmax layers, one object, or two if only some of them have a window."""
    mixers, attention = model.layer_mixers(), model.attention
    specs = [
        {
            "layers": [layer for layer, mixer in enumerate(mixers) if mixer == kind],
            "num_heads": attention.num_heads,
            "num_kv_heads": attention.num_kv_heads,
            "qkv_bias": attention.qkv_bias,
            "window_size": window,
            "rope_theta": attention.rope_theta,
        }
        for kind, window in ((FULL, None), (SLIDING, attention.window))
        if kind in mixers
    ]
    return specs if len(specs) > 1 else specs[0] if specs else None


def heads_of(name: str, total: float, heads: int) -> int:
    """The size of a head: that of all of them, which FLA rounds down, over their number.

    Raises:
        ValueError: it is no whole number.
    """
    size, rest = divmod(int(total), heads)
    if rest:
        raise ValueError(f"{name} gives {int(total)} channels, which num_heads={heads} does not divide; correct it")
    return size


def expansion(name: str, channels: int, width: int) -> float:
    """The factor by which FLA multiplies the width to get this number of channels.

    Raises:
        ValueError: no floating-point number gives it.
    """
    factor = channels / width
    if int(width * factor) != channels:
        raise ValueError(f"{name}: no factor of {width} gives {channels} channels in FLA's arithmetic")
    return factor


def drop(stored: Iterable[str], ending: str) -> set[str]:
    """The stored tensors whose names end so."""
    return {name for name in stored if name.endswith(ending)}
