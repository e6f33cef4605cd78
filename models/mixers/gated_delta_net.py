"""Gated delta net (Yang, Kautz, Hatamizadeh 2024, arXiv 2412.06464)."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.convolution import causal_conv1d
from kernels.linear_attention import gated_delta_rule
from kernels.norms import l2_norm
from models.config import ModelConfig
from models.layers import GatedRMSNorm, ShortConvolution
from models.mixers.base import LayerCache, Mixer, SequenceInfo, merge_heads, split_heads
from models.parallel import ColumnLinear, RowLinear


class GatedDeltaNet(Mixer):
    """S_t = a_t S_(t-1) (I - b_t k_t k_t^T) + b_t v_t k_t^T,  o_t = S_t q_t   (eq. 10; S is stored transposed, K x V).

    a_t = exp(-exp(A_log) softplus(W_a x_t + dt_bias)) per value head, b_t = sigmoid(W_b x_t);
    q, k, v pass a short convolution with SiLU, q and k are L2-normalised, the output is RMS-normalised and gated.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        gdn, d_model = config.gated_delta_net, config.hidden_size
        self.num_heads, self.num_v_heads = gdn.num_heads, gdn.value_heads
        self.beta_scale = 2.0 if gdn.allow_negative_eigenvalues else 1.0
        key_size, value_size = gdn.num_heads * gdn.head_dim, self.num_v_heads * gdn.head_v_dim
        self.q_proj = ColumnLinear(d_model, key_size, bias=False)
        self.k_proj = ColumnLinear(d_model, key_size, bias=False)
        self.v_proj = ColumnLinear(d_model, value_size, bias=False)
        self.q_conv1d = ShortConvolution(key_size, gdn.conv_size)
        self.k_conv1d = ShortConvolution(key_size, gdn.conv_size)
        self.v_conv1d = ShortConvolution(value_size, gdn.conv_size)
        self.a_proj = ColumnLinear(d_model, self.num_v_heads, bias=False)
        self.b_proj = ColumnLinear(d_model, self.num_v_heads, bias=False)
        self.g_proj = ColumnLinear(d_model, value_size, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.num_v_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_v_heads))
        self.o_norm = GatedRMSNorm(gdn.head_v_dim, config.norm_eps)
        self.o_proj = RowLinear(value_size, d_model, bias=False)

    # Decays are cut over tensor-parallel ranks with the heads they belong to.
    shard_axes: ClassVar = {"A_log": 0, "dt_bias": 0}

    def initialize_decay(self, generator: torch.Generator) -> None:
        """A ~ U(0, 16); dt log-uniform in [1e-3, 1e-1], dt_bias its inverse softplus (as the authors' code)."""
        heads = self.num_v_heads
        a = torch.empty(heads).uniform_(0, 16, generator=generator).clamp_(min=1e-3)
        low, high = math.log(1e-3), math.log(1e-1)
        dt = torch.empty(heads).uniform_(low, high, generator=generator).exp_().clamp_(min=1e-4)
        with torch.no_grad():
            self.A_log.copy_(a.log())
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def forward(self, x: Tensor, info: SequenceInfo, cache: LayerCache | None = None) -> Tensor:
        """Mix x [T, B, D]."""
        q = split_heads(self._convolve("q", self.q_proj(x), info, cache), self.num_heads)
        k = split_heads(self._convolve("k", self.k_proj(x), info, cache), self.num_heads)
        v = split_heads(self._convolve("v", self.v_proj(x), info, cache), self.num_v_heads)
        log_decay = -self.A_log.float().exp() * F.softplus(self.a_proj(x).float() + self.dt_bias.float())
        beta = self.beta_scale * self.b_proj(x).float().sigmoid()
        o, state = gated_delta_rule(
            l2_norm(q),
            l2_norm(k),
            v,
            log_decay.transpose(0, 1),
            beta.transpose(0, 1),
            initial_state=None if cache is None else cache.tensors.get("state"),
            output_final_state=cache is not None,
            cu_seqlens=info.cu_seqlens,
        )
        if cache is not None:
            cache.keep("state", state)
        gate = split_heads(self.g_proj(x), self.num_v_heads)
        return self.o_proj(merge_heads(self.o_norm(o, gate)))

    def _convolve(self, name: str, x_TBD: Tensor, info: SequenceInfo, cache: LayerCache | None) -> Tensor:
        weight = getattr(self, f"{name}_conv1d").weight
        y, state = causal_conv1d(
            x_TBD.transpose(0, 1),
            weight,
            initial_state=None if cache is None else cache.tensors.get(f"{name}_conv"),
            output_final_state=cache is not None,
            cu_seqlens=info.cu_seqlens,
        )
        if cache is not None:
            cache.keep(f"{name}_conv", state)
        return y.transpose(0, 1)
