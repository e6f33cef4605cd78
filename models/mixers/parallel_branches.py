"""Mixers side by side in one layer, as in the 76B model of SpikingBrain (Pan et al. 2025, arXiv 2509.05276)."""

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.config import ModelConfig
from models.layers import RMSNorm
from models.mixers.base import LayerCache, Mixer, SequenceInfo
from models.parameters import Drawing, Module, Placement


def _mean(block: Tensor, drawing: Drawing) -> None:
    """Begin as the mean of the normalised outputs."""
    block.fill_(1 / drawing.shape[0])


class WeightedSum(Module):
    """o = sum over i of w_i RMSNorm_i(o_i)   (eq. 6), each norm with its own weight.

    It takes the residual stream that the branches' output projections leave, not what is inside their regions.
    """

    in_region: ClassVar = False
    placements: ClassVar = {"weight": Placement(_mean, decayed=False)}

    def __init__(self, terms: int, size: int, eps: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(RMSNorm(size, eps) for _ in range(terms))
        self.weight = nn.Parameter(torch.empty(terms))

    def forward(self, outputs: Sequence[Tensor]) -> Tensor:
        """Add up the branches' outputs, each [..., size]."""
        terms = zip(self.weight.unbind(), self.norms, outputs, strict=True)
        return reduce(torch.add, (w * norm(o) for w, norm, o in terms))


class ParallelBranches(Mixer):
    """Mixers that read the same x; their outputs are normalised and added up by learned weights.

    The report gives eq. 6 and that both outputs are normalised. Unverified, for neither code nor weights of the 76B
    model are public: that the weights are learned scalars that start at 1/2, that the norms are over the full width
    and stand behind the output projections, and that branches share no parameters.
    """

    def __init__(self, mixers: Sequence[Mixer], config: ModelConfig) -> None:
        super().__init__()
        self.branches = nn.ModuleList(mixers)
        self.merge = WeightedSum(len(mixers), config.hidden_size, config.norm_eps)
        # Those that rotate do it alike, which the configuration has checked.
        self.rotary = next((mixer.rotary for mixer in mixers if mixer.rotary is not None), None)

    def forward(self, x: Tensor, info: SequenceInfo, cache: LayerCache | None = None) -> Tensor:
        """Mix x [T, B, D]."""
        outputs = []
        for i, branch in enumerate(self.branches):
            own_info = info if branch.rotary is not None else replace(info, cos=None, sin=None)
            own_cache = None if cache is None else cache.branches.setdefault(i, LayerCache())
            outputs.append(branch(x, own_info, own_cache))
        merged: Tensor = self.merge(outputs)
        return merged
