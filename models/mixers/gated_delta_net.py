"""Gated delta net (Yang, Kautz, Hatamizadeh 2024, arXiv 2412.06464)."""

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
from models.parallel import ColumnLinear
from models.parameters import Drawing


def _draw_decay(drawing: Drawing) -> tuple[Tensor, Tensor]:
    """A ~ U(0, 16); dt log-uniform in [1e-3, 1e-1] and dt_bias its inverse softplus (as in the authors' code)."""
    heads = drawing.config.gated_delta_net.value_heads
    # The clamp keeps log A finite.
    a = torch.empty(heads).uniform_(0, 16, generator=drawing.generator).clamp_(min=1e-3)
    return a.log(), draw_dt_bias(heads, drawing.generator)


class GatedDeltaNet(DeltaRuleMixer):
    """S_t = a_t S_(t-1) (I - b_t k_t k_t^T) + b_t v_t k_t^T,  o_t = S_t q_t   (eq. 10; S is stored transposed, K x V).

    a_t = exp(-exp(A_log) softplus(W_a x_t + dt_bias)) per value head, and b_t = sigmoid(W_b x_t). q, k, v pass a short
    convolution with SiLU, q and k are L2-normalised, and the output is RMS-normalised and gated.
    """

    placements: ClassVar = decay_placements(_draw_decay)

    def __init__(self, config: ModelConfig) -> None:
        gdn, d_model = config.gated_delta_net, config.hidden_size
        super().__init__(d_model, gdn, gdn.value_heads)
        self.a_proj = ColumnLinear(d_model, self.num_v_heads, bias=False)
        self.g_proj = ColumnLinear(d_model, self.num_v_heads * gdn.head_v_dim, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.num_v_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_v_heads))
        self.o_norm = GatedRMSNorm(gdn.head_v_dim, config.norm_eps)

    def forward(self, x: Tensor, info: SequenceInfo, cache: LayerCache | None = None) -> Tensor:
        """Mix x [T, B, D]."""
        q, k, v = self.queries_keys_values(x, info, cache)
        # float32: decays near 1 lose their digits in bfloat16.
        steps = self.a_proj(x)
        with exact():
            log_decay = -self.A_log.float().exp() * F.softplus(steps.float() + self.dt_bias.float())
        inputs = q, k, v, log_decay.transpose(0, 1), self.beta(x)
        o = run_recurrence(gated_delta_rule, *inputs, info=info, cache=cache)
        gate = split_heads(self.g_proj(x), self.num_v_heads)
        return self.o_proj(merge_heads(self.o_norm(o, gate)))
