"""Gated linear attention (Yang et al. 2023, arXiv 2312.06635)."""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from kernels.autograd import exact
from kernels.linear_attention import gla
from models.config import ModelConfig
from models.layers import GatedRMSNorm
from models.mixers.base import LayerCache, Mixer, SequenceInfo, merge_heads, run_recurrence, split_heads
from models.parallel import ColumnLinear, Linear, RowLinear


class GatedLinearAttention(Mixer):
    """S_t = Diag(a_t) S_(t-1) + k_t v_t^T,  o_t = S_t^T q_t / sqrt(K)   (eq. 3).

    a_t = sigmoid(W_2 W_1 x_t + b) ** (1/16) per key channel, with W_1 and W_2 of low rank. The output is RMS-normalised
    per head and gated.
    """

    head_counts: ClassVar = ("num_heads",)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        gla_config, d_model = config.gated_linear_attention, config.hidden_size
        self.num_heads = gla_config.num_heads
        self.gate_normalizer = gla_config.gate_normalizer
        key_size, value_size = int(d_model * gla_config.expand_k), int(d_model * gla_config.expand_v)
        self.q_proj = ColumnLinear(d_model, key_size, bias=False)
        self.k_proj = ColumnLinear(d_model, key_size, bias=False)
        self.v_proj = ColumnLinear(d_model, value_size, bias=False)
        self.g_proj = ColumnLinear(d_model, value_size, bias=False)
        # The low-rank bottleneck is replicated on every tensor-parallel rank; the expansion is sharded with the heads.
        rank = gla_config.gate_low_rank
        self.gk_proj = nn.Sequential(Linear(d_model, rank, bias=False), ColumnLinear(rank, key_size))
        self.g_norm = GatedRMSNorm(value_size // self.num_heads, config.norm_eps)
        self.o_proj = RowLinear(value_size, d_model, bias=False)

    def forward(self, x: Tensor, info: SequenceInfo, cache: LayerCache | None = None) -> Tensor:
        """Mix x [T, B, D]."""
        rates = self.gk_proj(x)
        with exact():
            log_decay = F.logsigmoid(rates.float()) / self.gate_normalizer
        inputs = (split_heads(y, self.num_heads) for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x), log_decay))
        o = run_recurrence(gla, *inputs, info=info, cache=cache)
        gate = split_heads(self.g_proj(x), self.num_heads)
        return self.o_proj(merge_heads(self.g_norm(o, gate)))
