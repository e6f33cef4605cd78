"""Norms, short convolution weights and the feed-forward: the parts of a block besides its mixer."""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.activations import swiglu
from kernels.norms import Activation, gated_rms_norm, rms_norm
from models.config import ModelConfig
from models.parallel import ColumnLinear, RowLinear, sum_over
from models.parameters import Drawing, Groups, Module, Placement, ones, zeros


class RMSNorm(Module):
    """Root-mean-square norm over the last dimension (arXiv 1910.07467)."""

    placements: ClassVar[Mapping[str, Placement]] = {"weight": Placement(ones, decayed=False)}

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., size]."""
        return rms_norm(x, self.weight, self.eps)


class ZeroCenteredRMSNorm(RMSNorm):
    """RMSNorm times 1 + weight, whose weight begins at zero (Gemma, Qwen3-Next)."""

    placements: ClassVar = {"weight": Placement(zeros, decayed=False)}

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., size]."""
        # float32: near 1, bfloat16 would drop small weights.
        return rms_norm(x, 1 + self.weight.float(), self.eps)


def residual_norm(config: ModelConfig, size: int) -> RMSNorm:
    """The norm of a model's residual stream, queries and keys, over `size` channels."""
    kind = ZeroCenteredRMSNorm if config.zero_centered_norms else RMSNorm
    return kind(size, config.norm_eps)


class GatedRMSNorm(RMSNorm):
    """RMSNorm whose output is multiplied by silu or sigmoid of a gate: the output gate of linear mixers."""

    def __init__(self, size: int, eps: float, activation: Activation = "silu") -> None:
        super().__init__(size, eps)
        self.activation: Activation = activation

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        """Normalise and gate x, both [..., size]."""
        return gated_rms_norm(x, gate, self.weight, self.eps, self.activation)


class FullWidthRMSNorm(RMSNorm):
    """RMSNorm over the channels of all heads, which are sharded over tensor-parallel ranks together with the heads."""

    placements: ClassVar = {"weight": Placement(ones, shard_axis=0, decayed=False)}

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., size], or this rank's shard of its channels."""
        if self.groups.tensor is None:
            return super().forward(x)
        return _norm_of_part(x, self.weight, self.eps, self.groups).to(x.dtype)


class FullWidthGatedRMSNorm(GatedRMSNorm):
    """GatedRMSNorm over the channels of all heads, sharded like FullWidthRMSNorm; the gate is silu."""

    placements: ClassVar = FullWidthRMSNorm.placements

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        """Normalise and gate x, both [..., size], or this rank's shard of their channels."""
        if self.groups.tensor is None:
            return super().forward(x, gate)
        normed = _norm_of_part(x, self.weight, self.eps, self.groups)
        return (normed * F.silu(gate.to(normed.dtype))).to(x.dtype)


def _norm_of_part(x: Tensor, weight: Tensor, eps: float, groups: Groups) -> Tensor:
    """RMSNorm over a sharded last dimension, in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # Shards are of equal size, so the mean over all channels is the mean of the ranks' means.
    mean_square = sum_over(wide.square().mean(-1, keepdim=True), groups.tensor) / dist.get_world_size(groups.tensor)
    return wide * torch.rsqrt(mean_square + eps) * weight.to(wide.dtype)


def _uniform_by_width(block: Tensor, drawing: Drawing) -> None:
    """Uniform in ±width^-0.5, like torch's initialisation of a depthwise convolution."""
    # The fan-in of a depthwise convolution is its width.
    bound = drawing.shape[1] ** -0.5
    block.uniform_(-bound, bound, generator=drawing.generator)


class ShortConvolution(Module):
    """Weight [channels, width] of a causal depthwise convolution without bias, followed by SiLU."""

    placements: ClassVar = {"weight": Placement(_uniform_by_width, shard_axis=0)}

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))


class SwiGLU(Module):
    """Feed-forward down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    in_region: ClassVar = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d_model, d_ffn = config.hidden_size, config.ffn_hidden_size
        self.gate_proj = ColumnLinear(d_model, d_ffn, bias=False)
        self.up_proj = ColumnLinear(d_model, d_ffn, bias=False)
        self.down_proj = RowLinear(d_ffn, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform x [T, B, D]."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
