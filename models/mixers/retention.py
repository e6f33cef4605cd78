"""Retention (Sun et al. 2023, arXiv 2307.08621)."""

import math
from typing import ClassVar

import torch
from torch import Tensor

from kernels.linear_attention import retention
from kernels.rotary import apply_rotary
from models.config import ModelConfig
from models.layers import GatedRMSNorm
from models.mixers.base import LayerCache, Mixer, SequenceInfo, merge_heads, run_recurrence, split_heads
from models.parallel import ColumnLinear, RowLinear
from models.parameters import local_part


class Retention(Mixer):
    """S_t = g_h S_(t-1) + k_t v_t^T,  o_t = S_t^T q_t / sqrt(K)   (eq. 6), with g_h = 1 - 2^(-5-h) fixed (eq. 8).

    q and k are rotated (arXiv 2104.09864). The output is RMS-normalised per head and gated by silu(W_g x).
    """

    head_counts: ClassVar = ("num_heads",)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d_model = config.hidden_size
        self.num_heads, head_k_dim, head_v_dim = config.state_shape("retention")
        # Kept because `set_groups` divides num_heads, while the decays depend on the head's global index.
        self.all_heads = self.num_heads
        self.rotary = config.rotary("retention")
        key_size, value_size = self.num_heads * head_k_dim, self.num_heads * head_v_dim
        self.q_proj = ColumnLinear(d_model, key_size, bias=False)
        self.k_proj = ColumnLinear(d_model, key_size, bias=False)
        self.v_proj = ColumnLinear(d_model, value_size, bias=False)
        self.g_proj = ColumnLinear(d_model, value_size, bias=False)
        self.g_norm = GatedRMSNorm(head_v_dim, config.norm_eps)
        self.o_proj = RowLinear(value_size, d_model, bias=False)

    def forward(self, x: Tensor, info: SequenceInfo, cache: LayerCache | None = None) -> Tensor:
        """Mix x [T, B, D]."""
        assert info.cos is not None and info.sin is not None, "a layer gets the tables that its `rotary` names"
        q = apply_rotary(split_heads(self.q_proj(x), self.num_heads), info.cos, info.sin)
        k = apply_rotary(split_heads(self.k_proj(x), self.num_heads), info.cos, info.sin)
        v = split_heads(self.v_proj(x), self.num_heads)
        o = run_recurrence(retention, q, k, v, self.log_decay(x.device), info=info, cache=cache)
        gate = split_heads(self.g_proj(x), self.num_heads)
        return self.o_proj(merge_heads(self.g_norm(o, gate)))

    def log_decay(self, device: torch.device) -> Tensor:
        """The log decay log g_h of this rank's heads, float32 [H].

        Computed in every call: a buffer would lose its values when a model is built on the meta device.
        """
        head_H = torch.arange(self.all_heads, dtype=torch.float32, device=device)
        head_H = local_part(head_H, self.groups.tensor)
        # log1p, because 1 - 2^(-5-h) would round in float32.
        return torch.log1p(-torch.exp(-math.log(2) * (5 + head_H)))
