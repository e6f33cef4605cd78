"""What blocks are made of beside mixers: norms and the feed-forward."""

import torch
from torch import Tensor, nn

from kernels.activations import swiglu
from kernels.norms import Activation, gated_rms_norm, rms_norm
from models.config import ModelConfig
from models.parallel import ColumnLinear, RowLinear


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., size]."""
        return rms_norm(x, self.weight, self.eps)


class GatedRMSNorm(RMSNorm):
    """RMSNorm whose output is multiplied by silu or sigmoid of a gate: the output gate of the linear mixers."""

    def __init__(self, size: int, eps: float, activation: Activation = "silu") -> None:
        super().__init__(size, eps)
        self.activation: Activation = activation

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        """Normalise and gate x, both [..., size]."""
        return gated_rms_norm(x, gate, self.weight, self.eps, self.activation)


class ShortConvolution(nn.Module):
    """Weight of a causal depthwise convolution [channels, width]; without bias, followed by SiLU."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))


class SwiGLU(nn.Module):
    """Feed-forward down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d_model, d_ffn = config.hidden_size, config.ffn_hidden_size
        self.gate_proj = ColumnLinear(d_model, d_ffn, bias=False)
        self.up_proj = ColumnLinear(d_model, d_ffn, bias=False)
        self.down_proj = RowLinear(d_ffn, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform x [T, B, D]."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
