"""Low-rank adapters: y = W x + s B A x, with A [r, in], B [out, r] and s of model.lora (LoRA, arXiv 2106.09685).

An adapter is a submodule `lora` of its linear layer, so its parameters are named `layers.0.mixer.q_proj.lora.a.weight`.
B begins at zero: the first output is that of the base model. Routed experts have adapters of their own, A [E, r, in]
and B [E, out, r].

Under tensor parallelism one factor is sharded as its layer is, and the other is replicated. A layer that is sharded by
outputs has its own rows of B; one that is sharded by inputs has its own columns of A, and its share of B A x joins its
share of W x before the sum over ranks. So no message is added to a region. Of the replicated factor each rank computes
a partial gradient, like that of any parameter inside a region (models.parameters.partial_gradients).

W' = W + s B A computes the same without adapters (`merged`). Whatever reads a checkpoint other than to resume it reads
W'.
"""

import difflib
import math
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.config import LoraConfig
from models.moe.layer import ExpertLinear
from models.parallel import Linear, Projection
from models.parameters import Drawing, Module, Placement, zeros

_A, _B = "lora.a.weight", "lora.b.weight"


def _draw_a(block: Tensor, drawing: Drawing) -> None:
    lora = drawing.config.lora
    if lora.init == "normal":
        block.normal_(std=1 / lora.rank, generator=drawing.generator)
    else:
        bound = 1 / math.sqrt(drawing.shape[-1])
        block.uniform_(-bound, bound, generator=drawing.generator)


_DOWN, _UP = Placement(_draw_a), Placement(zeros)


class _Down(Linear):
    """A [r, in]."""

    placements: ClassVar = {"weight": _DOWN}


class _SplitDown(Linear):
    """A [r, in], sharded by inputs."""

    placements: ClassVar = {"weight": replace(_DOWN, shard_axis=1)}


class _Up(Linear):
    """B [out, r]."""

    placements: ClassVar = {"weight": _UP}


class _SplitUp(Linear):
    """B [out, r], sharded by outputs."""

    placements: ClassVar = {"weight": replace(_UP, shard_axis=0)}


class _ExpertDown(ExpertLinear):
    """A [E, r, in]."""

    placements: ClassVar = {"weight": replace(_DOWN, expert=True)}


class _ExpertUp(ExpertLinear):
    """B [E, out, r]."""

    placements: ClassVar = {"weight": replace(_UP, expert=True)}


class Lora(Module):
    """The adapter of a linear layer: s B A x."""

    def __init__(self, config: LoraConfig, layer: Projection) -> None:
        super().__init__()
        self.scale = config.scale
        *experts, outputs, inputs = layer.weight.shape
        self.a: Projection
        self.b: Projection
        if experts:
            self.a = _ExpertDown(experts[0], inputs, config.rank)
            self.b = _ExpertUp(experts[0], config.rank, outputs)
        else:
            axis = layer.placements["weight"].shard_axis
            self.a = (_SplitDown if axis == 1 else _Down)(inputs, config.rank, bias=False)
            self.b = (_SplitUp if axis == 0 else _Up)(config.rank, outputs, bias=False)

    def forward(self, x: Tensor, *counts: Tensor) -> Tensor:
        """Map the layer's input x [..., in] to its addition to the output [..., out]; of experts, see ExpertLinear."""
        y: Tensor = self.b(self.a(x, *counts) * self.scale, *counts)
        return y


def add_adapters(layers: nn.ModuleDict, config: LoraConfig, is_whole: bool) -> None:
    """Give the linear layers that the configuration selects an adapter each.

    Args:
        layers: The blocks of a decoder or of one of its stages, by layer number.
        config: `model.lora`.
        is_whole: Whether these are all blocks of the model. If so, every pattern must match a linear layer.

    Raises:
        ValueError: a pattern matches no linear layer, or a selected layer has int8 weights.
    """
    if not config.is_on:
        return
    found = dict(_linear_layers(layers))
    if is_whole:
        _require_matches(config, list(found))
    for name, layer in found.items():
        if not config.picks(name):
            continue
        if layer.rounding is not None:
            raise ValueError(
                f"model.lora selects {name}, whose weight model.spiking.weights=int8 rounds: merged with its adapter "
                "it would be rounded to another one; use model.spiking.weights=float, or leave the layer out of "
                "model.lora.targets"
            )
        layer.lora = Lora(config, layer)
        # A bound method, as for neurons: its owner is registered once, as `lora`.
        layer.adapter = layer.lora.__call__


def _linear_layers(layers: nn.ModuleDict) -> Iterator[tuple[str, Projection]]:
    for name, module in layers.named_modules():
        if isinstance(module, Projection):
            yield f"layers.{name}", module


def _require_matches(config: LoraConfig, names: list[str]) -> None:
    for pattern in config.unmatched(names):
        close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
        kinds = sorted({name.split(".", 2)[2] for name in names})
        nearest = f"the closest names are {', '.join(close)}; " if close else ""
        raise ValueError(
            f"model.lora.targets: {pattern!r} matches no linear layer; {nearest}layers.N has {', '.join(kinds)}"
        )


def missing_adapters(model: nn.Module, stored: Container[str]) -> list[str]:
    """The names of the adapters' parameters that `stored` lacks."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, Lora)
        for name, _ in module.named_parameters()
        if f"{path}.{name}" not in stored
    ]


def factor_names(weight: str) -> tuple[str, str]:
    """The names of A and B of the adapter of a weight, by its name."""
    layer = weight.removesuffix("weight")
    return layer + _A, layer + _B


def factors_of_block(a: Tensor, b: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The parts of whole A and B that a block of W is merged with, given its first index in W and its shape."""
    *experts, rows, columns = (slice(first, first + size) for first, size in zip(offsets, sizes, strict=True))
    return a[(*experts, slice(None), columns)], b[(*experts, rows)]


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + s B A, computed in float32; all three [..., out, in], [..., r, in] and [..., out, r], or shards that fit."""
    return torch.add(weight.float(), b.float() @ a.float(), alpha=scale)
