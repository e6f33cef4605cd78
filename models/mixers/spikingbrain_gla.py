"""SpikingBrain's linear attention (Pan et al. 2025, arXiv 2509.05276): grouped-query GLA with non-negative q and k.

Meant for models converted from softmax attention. Biases and grouped queries of the projections come from the base
model, and an output norm replaces the softmax denominator. There is no rotary embedding, convolution or output gate.
"""

import math
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from kernels.activations import relu
from kernels.autograd import exact
from kernels.linear_attention import gla, hgrn2
from models.config import ModelConfig
from models.layers import RMSNorm
from models.mixers.base import LayerCache, Mixer, SequenceInfo, merge_heads, run_recurrence, split_heads
from models.parallel import ColumnLinear, Linear, RowLinear
from models.parameters import Drawing, Placement


class _ConvertedAttention(Mixer):
    """The projections of the converted attention, and the added output norm."""

    head_counts: ClassVar = ("num_heads", "num_kv_heads")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        spiking, d_model = config.spikingbrain_gla, config.hidden_size
        self.num_heads, self.num_kv_heads = spiking.num_heads, spiking.num_kv_heads
        query_size, key_size = spiking.num_heads * spiking.head_dim, spiking.num_kv_heads * spiking.head_dim
        self.q_proj = ColumnLinear(d_model, query_size, bias=spiking.qkv_bias)
        self.k_proj = ColumnLinear(d_model, key_size, bias=spiking.qkv_bias)
        self.v_proj = ColumnLinear(d_model, key_size, bias=spiking.qkv_bias)
        self.g_norm = RMSNorm(spiking.head_dim, config.norm_eps)
        self.o_proj = RowLinear(query_size, d_model, bias=False)


def _xavier(block: Tensor, drawing: Drawing) -> None:
    """Xavier-uniform with gain 2^-2.5, as the authors' code initialises the parameters that conversion adds."""
    bound = 2**-2.5 * math.sqrt(6 / sum(drawing.shape))
    block.uniform_(-bound, bound, generator=drawing.generator)


class _GateLinear(Linear):
    placements: ClassVar = {**Linear.placements, "weight": Placement(_xavier)}


class _GateColumnLinear(ColumnLinear):
    placements: ClassVar = {**ColumnLinear.placements, "weight": Placement(_xavier, shard_axis=0)}


class SpikingBrainGLA(_ConvertedAttention):
    """S_t = Diag(a_t) S_(t-1) + relu(k_t) v_t^T,  o_t = RMSNorm(S_t^T relu(q_t) / sqrt(K)) per head (7B model).

    a_t = sigmoid(W_2 W_1 x_t + b) ** (1/16) per key-value head and channel; groups of query heads share it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        spiking = config.spikingbrain_gla
        self.gate_normalizer = spiking.gate_normalizer
        # The low-rank bottleneck is replicated on every tensor-parallel rank; the expansion is sharded with the heads.
        rank, key_size = spiking.gate_low_rank, spiking.num_kv_heads * spiking.head_dim
        down = _GateLinear(config.hidden_size, rank, bias=False)
        self.gk_proj = nn.Sequential(down, _GateColumnLinear(rank, key_size))

    def forward(self, x: Tensor, info: SequenceInfo, cache: LayerCache | None = None) -> Tensor:
        """Mix x [T, B, D]."""
        q = split_heads(relu(self.q_proj(x)), self.num_heads)
        k = split_heads(relu(self.k_proj(x)), self.num_kv_heads)
        v = split_heads(self.v_proj(x), self.num_kv_heads)
        rates = self.gk_proj(x)
        with exact():
            log_decay = F.logsigmoid(rates.float()) / self.gate_normalizer
        o = run_recurrence(gla, q, k, v, split_heads(log_decay, self.num_kv_heads), info=info, cache=cache)
        return self.o_proj(merge_heads(self.g_norm(o)))


class SpikingBrainTiedGLA(_ConvertedAttention):
    """S_t = Diag(1 - k_t) S_(t-1) + k_t v_t^T,  o_t = RMSNorm(S_t^T q_t / sqrt(K)) per head (76B model).

    q_t = sigmoid(W_q x_t + b), k_t = sigmoid(W_k x_t + b). The key equals the fraction that the decay removes, so the
    gate needs no parameters. The report gives the tied gate, the sigmoids and an output norm. Neither code nor weights
    of the 76B model are public, so biases, groups, scale and per-head norm follow the 7B model and are unverified.
    """

    def forward(self, x: Tensor, info: SequenceInfo, cache: LayerCache | None = None) -> Tensor:
        """Mix x [T, B, D]."""
        q = split_heads(self.q_proj(x).sigmoid(), self.num_heads)
        v = split_heads(self.v_proj(x), self.num_kv_heads)
        # log(1 - sigmoid(k)) = logsigmoid(-k), without the rounding of 1 - k.
        keys = self.k_proj(x)
        with exact():
            log_decay = split_heads(F.logsigmoid(-keys.float()), self.num_kv_heads)
        o = run_recurrence(hgrn2, q, v, log_decay, info=info, cache=cache)
        return self.o_proj(merge_heads(self.g_norm(o)))
