"""Several mixers in parallel in one layer, as in SpikingBrain-76B (Pan et al. 2025, arXiv 2509.05276)."""

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
    """Initialise to the mean of the normalised outputs."""
    block.fill_(1 / drawing.shape[0])


class WeightedSum(Module):
    """o = sum over i of w_i RMSNorm_i(o_i)   (eq. 6), where each norm has its own weight.

    It operates on the residual stream, after the branches' output projections, and so outside tensor-parallel regions.
    """

    in_region: ClassVar = False
    placements: ClassVar = {"weight": Placement(_mean, decayed=False)}

    def __init__(self, terms: int, size: int, eps: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(RMSNorm(size, eps) for _ in range(terms))
        self.weight = nn.Parameter(torch.empty(terms))

    def forward(self, outputs: Sequence[Tensor]) -> Tensor:
        """Sum the branches' outputs, each [..., size]."""
        terms = zip(self.weight.unbind(), self.norms, outputs, strict=True)
        return reduce(torch.add, (w * norm(o) for w, norm, o in terms))


class ParallelBranches(Mixer):
    """Mixers that read the same x, whose normalised outputs are added with learned weights.

    The report gives eq. 6 and states that both outputs are normalised. Neither code nor weights of the 76B model are
    public, so three choices are unverified: the weights are learned scalars initialised to 1/2; the norms span the full
    width and follow the output projections; branches share no parameters.
    """

    def __init__(self, mixers: Sequence[Mixer], config: ModelConfig) -> None:
        super().__init__()
        self.branches = nn.ModuleList(mixers)
        self.merge = WeightedSum(len(mixers), config.hidden_size, config.norm_eps)
        # The configuration has checked that all rotating branches use the same rotary embedding.
        self.rotary = next((mixer.rotary for mixer in mixers if mixer.rotary is not None), None)

    def forward(self, x: Tensor, info: SequenceInfo, cache: LayerCache | None = None) -> Tensor:
        """Mix x [T, B, D]."""
        outputs = []
        for i, branch in enumerate(self.branches):
            # Mixers decide by `cos` whether to rotate, so branches without rotary embedding must not see it.
            own_info = info if branch.rotary is not None else replace(info, cos=None, sin=None)
            own_cache = None if cache is None else cache.branches.setdefault(i, LayerCache())
            outputs.append(branch(x, own_info, own_cache))
        merged: Tensor = self.merge(outputs)
        return merged
