"""HGRN (Qin et al. 2023, arXiv 2311.04823) and HGRN2 (Qin et al. 2024, arXiv 2404.07904): lower-bounded decays.

The decay of layer l (0 .. L-1) lies between a learned bound and 1, per channel (2311.04823, section 3):

    a_t = lb_l + (1 - lb_l) sigmoid(W_f x_t)        lb_l = sum over 1 <= i <= l of softmax(B)_i,  B in R^(L x D)

The bounds grow with the layer, so that higher layers remember for longer; layer 0 has none. B belongs to the model
rather than to a layer, because the softmax runs over all layers.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.autograd import exact
from kernels.linear_attention import hgrn, hgrn2
from models.config import ModelConfig
from models.layers import FullWidthGatedRMSNorm, FullWidthRMSNorm
from models.mixers.base import LayerCache, Mixer, SequenceInfo, merge_heads, run_recurrence, split_heads
from models.parallel import ColumnLinear, RowLinear
from models.parameters import local_part


def layer_bounds(weights_LD: Tensor) -> list[Tensor | None]:
    """lb_l of each layer, float32 [D], from B [L, D]; None for layer 0, whose bound is 0."""
    shares_LD = weights_LD.float().softmax(0)
    return [None, *shares_LD[1:].cumsum(0).unbind()]


def bounded_log_decay(f: Tensor, lower_bound_D: Tensor | None) -> Tensor:
    """The log decay log a_t from W_f x_t [..., D], in float32 and without cancellation near 0 or near the bound."""
    with exact():
        log_sigmoid = F.logsigmoid(f.float())
        if lower_bound_D is None:
            return log_sigmoid
        # log(lb + (1 - lb) sigmoid(f)) as a log-sum-exp.
        return torch.logaddexp(lower_bound_D.log(), torch.log1p(-lower_bound_D) + log_sigmoid)


class LowerBoundedMixer(Mixer):
    """A mixer whose decays have a lower bound, learned jointly for all layers."""

    def lower_bound(self, info: SequenceInfo) -> Tensor | None:
        """The bounds of this rank's channels."""
        return None if info.lower_bound is None else local_part(info.lower_bound, self.groups.tensor)


class HGRN(LowerBoundedMixer):
    """h_t = a_t * h_(t-1) + (1 - a_t) * silu(W_i x_t),  o_t = RMSNorm(h_t) * silu(W_g x_t), per channel.

    The norm spans the full width. (The paper's decays are complex; these are real, as HGRN2's.)
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d_model = config.hidden_size
        self.i_proj = ColumnLinear(d_model, d_model, bias=False)
        self.f_proj = ColumnLinear(d_model, d_model, bias=False)
        self.g_proj = ColumnLinear(d_model, d_model, bias=False)
        self.g_norm = FullWidthGatedRMSNorm(d_model, config.norm_eps)
        self.o_proj = RowLinear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, info: SequenceInfo, cache: LayerCache | None = None) -> Tensor:
        """Mix x [T, B, D]."""
        log_decay = bounded_log_decay(self.f_proj(x), self.lower_bound(info))
        # expm1 gives 1 - a without cancellation: the input matters most when the decay is close to 1.
        entering = F.silu(self.i_proj(x))
        with exact():
            entering = (entering * -torch.expm1(log_decay)).to(x.dtype)
        h = run_recurrence(hgrn, entering.transpose(0, 1), log_decay.transpose(0, 1), info=info, cache=cache)
        return self.o_proj(self.g_norm(h.transpose(0, 1), self.g_proj(x)))


class HGRN2(LowerBoundedMixer):
    """S_t = Diag(a_t) S_(t-1) + (1 - a_t) v_t^T,  o_t = S_t^T silu(W_q x_t) / sqrt(K)   (2404.07904).

    v_t = W_i x_t. The state of a head is K x K: HGRN's state, expanded by an outer product without further parameters.
    The output norm spans the full width, over all heads; there is no output gate.
    """

    head_counts: ClassVar = ("num_heads",)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d_model = config.hidden_size
        self.num_heads, _, _ = config.state_shape("hgrn2")
        self.q_proj = ColumnLinear(d_model, d_model, bias=False)
        self.f_proj = ColumnLinear(d_model, d_model, bias=False)
        self.i_proj = ColumnLinear(d_model, d_model, bias=False)
        self.g_norm = FullWidthRMSNorm(d_model, config.norm_eps)
        self.o_proj = RowLinear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, info: SequenceInfo, cache: LayerCache | None = None) -> Tensor:
        """Mix x [T, B, D]."""
        q = split_heads(F.silu(self.q_proj(x)), self.num_heads)
        v = split_heads(self.i_proj(x), self.num_heads)
        log_decay = split_heads(bounded_log_decay(self.f_proj(x), self.lower_bound(info)), self.num_heads)
        o = run_recurrence(hgrn2, q, v, log_decay, info=info, cache=cache)
        return self.o_proj(self.g_norm(merge_heads(o)))
