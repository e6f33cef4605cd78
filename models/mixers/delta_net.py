"""Delta net (Yang et al. 2024, arXiv 2406.06484), and the projections that all delta-rule mixers share."""

from typing import ClassVar

from torch import Tensor

from kernels.autograd import exact
from kernels.linear_attention import delta_rule
from kernels.norms import l2_norm
from models.config import DeltaNetConfig, GatedDeltaNetConfig, KimiDeltaAttentionConfig, ModelConfig
from models.layers import GatedRMSNorm, RMSNorm, ShortConvolution
from models.mixers.base import (
    LayerCache,
    Mixer,
    SequenceInfo,
    merge_heads,
    run_convolution,
    run_recurrence,
    split_heads,
)
from models.parallel import ColumnLinear, RowLinear


class DeltaRuleMixer(Mixer):
    """q, k, v = SiLU(conv(W x)) with q and k L2-normalised per head; write strength b_t = sigmoid(W_b x_t)."""

    head_counts: ClassVar = ("num_heads", "num_v_heads")

    def __init__(
        self,
        d_model: int,
        config: DeltaNetConfig | GatedDeltaNetConfig | KimiDeltaAttentionConfig,
        num_v_heads: int,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_v_heads = config.num_heads, num_v_heads
        # The transition I - b k k^T has the eigenvalue 1 - b: with b up to 2 it reaches -1 (arXiv 2411.12537).
        self.beta_scale = 2.0 if config.allow_negative_eigenvalues else 1.0
        key_size, value_size = config.num_heads * config.head_dim, num_v_heads * config.head_v_dim
        self.q_proj = ColumnLinear(d_model, key_size, bias=False)
        self.k_proj = ColumnLinear(d_model, key_size, bias=False)
        self.v_proj = ColumnLinear(d_model, value_size, bias=False)
        self.q_conv1d = ShortConvolution(key_size, config.conv_size)
        self.k_conv1d = ShortConvolution(key_size, config.conv_size)
        self.v_conv1d = ShortConvolution(value_size, config.conv_size)
        self.b_proj = ColumnLinear(d_model, num_v_heads, bias=False)
        self.o_proj = RowLinear(value_size, d_model, bias=False)

    def queries_keys_values(
        self, x: Tensor, info: SequenceInfo, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute from x [T, B, D]: q and k [B, T, H, K] of norm 1, v [B, T, HV, V]."""
        q = run_convolution(self.q_proj(x), self.q_conv1d.weight, "q_conv", info, cache)
        k = run_convolution(self.k_proj(x), self.k_conv1d.weight, "k_conv", info, cache)
        v = run_convolution(self.v_proj(x), self.v_conv1d.weight, "v_conv", info, cache)
        q, k = l2_norm(split_heads(q, self.num_heads)), l2_norm(split_heads(k, self.num_heads))
        return q, k, split_heads(v, self.num_v_heads)

    def beta(self, x: Tensor) -> Tensor:
        """b_t, float32 [B, T, HV]; doubled if negative eigenvalues are allowed."""
        strength = self.b_proj(x)
        with exact():
            return self.beta_scale * strength.float().sigmoid().transpose(0, 1)


class DeltaNet(DeltaRuleMixer):
    """S_t = S_(t-1) (I - b_t k_t k_t^T) + b_t v_t k_t^T,  o_t = S_t q_t / sqrt(K)   (S is stored transposed, K x V).

    The output is RMS-normalised per head, and gated by silu(W_g x) if the configuration says so.
    """

    def __init__(self, config: ModelConfig) -> None:
        delta, d_model = config.delta_net, config.hidden_size
        super().__init__(d_model, delta, delta.num_heads)
        if delta.output_gate:
            self.g_proj = ColumnLinear(d_model, delta.num_heads * delta.head_v_dim, bias=False)
            self.o_norm: RMSNorm = GatedRMSNorm(delta.head_v_dim, config.norm_eps)
        else:
            self.o_norm = RMSNorm(delta.head_v_dim, config.norm_eps)

    def forward(self, x: Tensor, info: SequenceInfo, cache: LayerCache | None = None) -> Tensor:
        """Mix x [T, B, D]."""
        q, k, v = self.queries_keys_values(x, info, cache)
        o = run_recurrence(delta_rule, q, k, v, self.beta(x), info=info, cache=cache)
        if isinstance(self.o_norm, GatedRMSNorm):
            o = self.o_norm(o, split_heads(self.g_proj(x), self.num_v_heads))
        else:
            o = self.o_norm(o)
        return self.o_proj(merge_heads(o))
