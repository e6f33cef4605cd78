"""Hybrids from softmax attention: where each parameter of a converted layer comes from.

SpikingBrain (arXiv 2509.05276, section 3.1) turns layers of softmax attention into linear ones that keep the matrices
W_q, W_k, W_v and W_o, and everything outside the mixers. This works because linear attention is softmax attention
without the softmax (arXiv 2006.16236): o_t = S_t^T q_t with S_t = sum over s <= t of k_s v_s^T, and decays or a delta
rule on top. What the linear mixer has besides is new. It is drawn as in a new model, or set to where it does least: a
short convolution to its last tap, a rate of decay to 1.

Of attention that has them, three things need care:

    grouped keys and values   are repeated for the query heads that share them, unless the mixer has groups
    norms of q and k          RMSNorm(x) w of a head has the direction of w x: w goes into the rows of W_q and W_k. The
                              length goes: delta rules normalise q and k, and an output norm cancels that of q
    biases                    are kept by mixers that can have them (models.config.conversion.drops_biases)
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from models.config import SOFTMAX_MIXERS, ModelConfig, branches
from models.decoder import Decoder
from models.parameters import draw_into

Read = Callable[[dict[str, Tensor]], None]
"""Fills tensors by their names in the model that is converted."""


@dataclass(frozen=True)
class _Attention:
    """The softmax attention of one layer, and the linear mixer that takes its matrices.

    Attributes:
        config: Configuration of the model.
        layer: Number of the layer.
        read: Reads its tensors.
        shapes: Shape of every tensor of the model.
        copies: How often the linear mixer has every value of a head.
    """

    config: ModelConfig
    layer: int
    read: Read
    shapes: Mapping[str, torch.Size]
    copies: int = 1

    def tensor(self, name: str) -> Tensor:
        """Read a tensor by its name within the mixer, float32."""
        whole = f"layers.{self.layer}.mixer.{name}"
        tensor = torch.empty(self.shapes[whole])
        self.read({whole: tensor})
        return tensor

    def heads(self, name: str, norm: str | None = None) -> Tensor:
        """Read rows by head, [H, K, ...]; with a norm over the channels of a head, times its weight."""
        rows = self.tensor(name).unflatten(0, (-1, self.config.attention_head_dim))
        if norm is not None and self.config.attention.qk_norm:
            weight_K = self.tensor(f"{norm}.weight") + self.config.zero_centered_norms
            rows = rows * weight_K.view(1, -1, *[1] * (rows.dim() - 2))
        return rows


# Called with the attention, the name within the projection (weight or bias) and the wanted shape.
_Make = Callable[[_Attention, str, torch.Size], Tensor]


class Origin(NamedTuple):
    """Where a parameter comes from.

    Attributes:
        words: The same in words, for the report.
        make: Computes it; None if it is drawn.
        is_new: Whether it has no part of the converted model.
    """

    words: str
    make: _Make | None
    is_new: bool


def _repeated(heads: Tensor, copies: int, shape: torch.Size) -> Tensor:
    """Repeat heads [H, K, ...] for the heads that share them, and each head's channels, up to the wanted rows."""
    times = shape[0] // (heads.shape[0] * heads.shape[1] * copies)
    return heads.repeat_interleave(times, 0).repeat(1, copies, *[1] * (heads.dim() - 2)).reshape(shape)


def _queries(attention: _Attention, name: str, shape: torch.Size) -> Tensor:
    return attention.heads(f"q_proj.{name}", "q_norm").reshape(shape)


def _keys(attention: _Attention, name: str, shape: torch.Size) -> Tensor:
    return _repeated(attention.heads(f"k_proj.{name}", "k_norm"), 1, shape)


def _negated_keys(attention: _Attention, name: str, shape: torch.Size) -> Tensor:
    return -_keys(attention, name, shape)


def _values(attention: _Attention, name: str, shape: torch.Size) -> Tensor:
    return _repeated(attention.heads(f"v_proj.{name}"), attention.copies, shape)


def _outputs(attention: _Attention, name: str, shape: torch.Size) -> Tensor:
    # Each copy of a value contributes its share.
    columns = attention.tensor(f"o_proj.{name}").unflatten(1, (-1, attention.config.attention_head_dim))
    return columns.repeat(1, 1, attention.copies).reshape(shape) / attention.copies


def _last_tap(attention: _Attention, name: str, shape: torch.Size) -> Tensor:
    taps = torch.zeros(shape)
    taps[:, -1] = 1
    return taps


def _zero(attention: _Attention, name: str, shape: torch.Size) -> Tensor:
    return torch.zeros(shape)


_Q = Origin("q_proj", _queries, False)
_K = Origin("k_proj", _keys, False)
_V = Origin("v_proj", _values, False)
_O = Origin("o_proj", _outputs, False)
# HGRN2's key is 1 - a_t = sigmoid(-W_f x), so this is the key sigmoid(W_k x) of SpikingBrain's tied gate.
_MINUS_K = Origin("-k_proj", _negated_keys, False)
_LAST_TAP = Origin("new: the last tap 1", _last_tap, True)
# Decays exp(-dt), with dt from 0.001 to 0.1: they remember for 10 to 1000 tokens.
_RATE_ONE = Origin("new: 0", _zero, True)
_DRAWN = Origin("new: drawn", None, True)

_PROJECTIONS = {"q_proj": _Q, "k_proj": _K, "v_proj": _V, "o_proj": _O}
_DELTA = _PROJECTIONS | {
    **dict.fromkeys(("q_conv1d", "k_conv1d", "v_conv1d"), _LAST_TAP),
    **dict.fromkeys(("b_proj", "g_proj", "o_norm"), _DRAWN),
}
# For every linear mixer its parameters, by the first part of their names. To add a mixer: a row here.
ORIGINS: dict[str, dict[str, Origin]] = {
    "gated_delta_net": _DELTA | {"a_proj": _DRAWN, "A_log": _RATE_ONE, "dt_bias": _DRAWN},
    "gated_linear_attention": _PROJECTIONS | dict.fromkeys(("g_proj", "gk_proj", "g_norm"), _DRAWN),
    "retention": _PROJECTIONS | dict.fromkeys(("g_proj", "g_norm"), _DRAWN),
    # Neither queries nor keys: the state is a vector.
    "hgrn": {"i_proj": _V, "o_proj": _O, **dict.fromkeys(("f_proj", "g_proj", "g_norm"), _DRAWN)},
    "hgrn2": {"q_proj": _Q, "f_proj": _MINUS_K, "i_proj": _V, "o_proj": _O, "g_norm": _DRAWN},
    "delta_net": _DELTA,
    "kimi_delta_attention": _DELTA | {"f_proj": _DRAWN, "A_log": _RATE_ONE, "dt_bias": _DRAWN},
    "spikingbrain_gla": _PROJECTIONS | dict.fromkeys(("gk_proj", "g_norm"), _DRAWN),
    "spikingbrain_tied_gla": _PROJECTIONS | {"g_norm": _DRAWN},
}
_KEPT = Origin("as it was", None, False)


class Place(NamedTuple):
    """A parameter of a hybrid.

    Attributes:
        origin: Where it comes from.
        source: Its name in the converted model; of a parameter of a linear mixer, within the mixer.
        layer: Its layer, if that was converted.
        mixer: Its linear mixer; None outside of one.
    """

    origin: Origin
    source: str
    layer: int | None = None
    mixer: str | None = None


def place(name: str, source: ModelConfig, hybrid: ModelConfig) -> Place:
    """Say where a parameter of a hybrid comes from, given its name and both configurations."""
    found = re.fullmatch(r"layers\.(\d+)\.mixer\.(?:branches\.(\d+)\.)?(.+)", name)
    if found is None:
        bounds, sinks = name == "lower_bounds", name.startswith("sinks.")
        is_new = (bounds and not source.bounded_layers()) or (sinks and not source.sink_tokens)
        return Place(_DRAWN if is_new else _KEPT, name)
    layer, branch, rest = int(found[1]), found[2], found[3]
    kind = hybrid.layer_mixers()[layer]
    if kind == source.layer_mixers()[layer]:
        return Place(_KEPT, name)
    if branch is None and len(branches(kind)) > 1:
        # The weights of parallel branches, and their norms.
        return Place(_DRAWN, name, layer)
    mixer = branches(kind)[int(branch or 0)]
    if mixer in SOFTMAX_MIXERS:
        return Place(_KEPT, f"layers.{layer}.mixer.{rest}", layer)
    return Place(ORIGINS[mixer][rest.split(".")[0]], rest, layer, mixer)


@torch.no_grad()
def fill(tensors: dict[str, Tensor], read: Read, source: Decoder, hybrid: Decoder, seed: int) -> None:
    """Fill tensors of a hybrid from the model that it is made of. One matrix is in memory at a time beside them.

    Args:
        tensors: The tensors by their names in the hybrid.
        read: Reads tensors of the model.
        source: The model, for its shapes and configuration.
        hybrid: The hybrid, for its shapes and configuration.
        seed: New parameters are drawn from (seed, name), as in a new model.
    """
    shapes = {name: tensor.shape for name, tensor in source.state_dict().items()}
    wanted = {name: tensor.shape for name, tensor in hybrid.state_dict().items()}
    config = source.model_config
    for name, tensor in tensors.items():
        origin, original, layer, mixer = place(name, config, hybrid.model_config)
        if origin is _KEPT:
            read({original: tensor})
        elif origin.make is None:
            draw_into({name: tensor}, hybrid, hybrid.model_config, seed)
        else:
            assert layer is not None and mixer is not None, "only parameters of converted mixers are computed"
            values = wanted[f"{name.removesuffix(original)}o_proj.weight"][1]
            size = config.attention.num_heads * config.attention_head_dim
            attention = _Attention(config, layer, read, shapes, values // size)
            tensor.copy_(origin.make(attention, original.rpartition(".")[2], tensor.shape))
