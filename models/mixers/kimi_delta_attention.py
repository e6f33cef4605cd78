"""Kimi delta attention (Kimi team 2025, arXiv 2510.26692): the gated delta net with one decay per key channel."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.autograd import exact
from kernels.linear_attention import gated_delta_rule
from models.config import ModelConfig
from models.layers import GatedRMSNorm
from models.mixers.base import (
    LayerCache,
    SequenceInfo,
    decay_placements,
    draw_dt_bias,
    merge_heads,
    run_recurrence,
    split_heads,
)
from models.mixers.delta_net import DeltaRuleMixer
from models.parallel import ColumnLinear, Linear
from models.parameters import Drawing


def _draw_decay(drawing: Drawing) -> tuple[Tensor, Tensor]:
    """A ~ U(1, 16), or 1 for the bounded gate; dt log-uniform in [1e-3, 1e-1], dt_bias its inverse softplus.

    No source specifies dt_bias for the bounded gate. This initialisation starts it at decays of about exp(-5 dt).
    """
    kda = drawing.config.kimi_delta_attention
    a = torch.ones(kda.value_heads)
    if kda.gate == "softplus":
        a.uniform_(1, 16, generator=drawing.generator)
    return a.log(), draw_dt_bias(kda.value_heads * kda.head_dim, drawing.generator)


class KimiDeltaAttention(DeltaRuleMixer):
    """S_t = (I - b_t k_t k_t^T) Diag(a_t) S_(t-1) + b_t k_t v_t^T,  o_t = S_t^T q_t / sqrt(K),  S in R^(K x V).

    a_t, per value head and key channel, is computed from the low-rank f_t = W_2 W_1 x_t in one of two ways:

        softplus:  log a_t = -exp(A_log) softplus(f_t + dt_bias)                       Kimi Linear's
        bounded:   log a_t = min_log_decay sigmoid(exp(A_log) (f_t + dt_bias))         Kimi K3's

    with one A_log per head and one dt_bias per channel. The bounded form keeps the decay over 16 tokens within the
    range of bfloat16 products. q, k, v pass a short convolution with SiLU, and q and k are L2-normalised. The output is
    RMS-normalised per head and gated by a sigmoid of a low-rank projection.
    """

    placements: ClassVar = decay_placements(_draw_decay)

    def __init__(self, config: ModelConfig) -> None:
        kda, d_model = config.kimi_delta_attention, config.hidden_size
        super().__init__(d_model, kda, kda.value_heads)
        self.gate, self.min_log_decay = kda.gate, kda.min_log_decay
        # The low-rank bottlenecks are replicated on every tensor-parallel rank; the expansions are sharded with the
        # heads.
        rank, decays = kda.head_v_dim, self.num_v_heads * kda.head_dim
        self.f_proj = nn.Sequential(Linear(d_model, rank, bias=False), ColumnLinear(rank, decays, bias=False))
        self.g_proj = nn.Sequential(
            Linear(d_model, rank, bias=False), ColumnLinear(rank, self.num_v_heads * kda.head_v_dim)
        )
        self.A_log = nn.Parameter(torch.empty(self.num_v_heads))
        self.dt_bias = nn.Parameter(torch.empty(decays))
        self.o_norm = GatedRMSNorm(kda.head_v_dim, config.norm_eps, activation="sigmoid")

    def forward(self, x: Tensor, info: SequenceInfo, cache: LayerCache | None = None) -> Tensor:
        """Mix x [T, B, D]."""
        q, k, v = self.queries_keys_values(x, info, cache)
        inputs = q, k, v, self._log_decay(x), self.beta(x)
        o = run_recurrence(gated_delta_rule, *inputs, info=info, cache=cache)
        gate = split_heads(self.g_proj(x), self.num_v_heads)
        return self.o_proj(merge_heads(self.o_norm(o, gate)))

    def _log_decay(self, x: Tensor) -> Tensor:
        """The log decay log a_t, float32 [B, T, HV, K]."""
        rates = self.f_proj(x)
        with exact():
            steps = split_heads(rates.float() + self.dt_bias.float(), self.num_v_heads)
            rate_H1 = self.A_log.float().exp()[:, None]
            if self.gate == "bounded":
                return self.min_log_decay * torch.sigmoid(rate_H1 * steps)
            return -rate_H1 * F.softplus(steps)
