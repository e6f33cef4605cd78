"""Softmax attention: full and sliding-window."""

from typing import ClassVar

import torch
from torch import Tensor

from kernels.attention import attention
from kernels.rotary import apply_rotary
from models.config import ModelConfig
from models.layers import RMSNorm
from models.mixers.base import LayerCache, Mixer, SequenceInfo, merge_heads, split_heads
from models.parallel import ColumnLinear, RowLinear


class FullAttention(Mixer):
    """o_t = sum over s <= t of softmax(q_t . k_s / sqrt(K)) v_s, grouped-query, rotary (arXiv 2104.09864)."""

    head_counts: ClassVar = ("num_heads", "num_kv_heads")
    window: int | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        attn, head_dim = config.attention, config.attention_head_dim
        self.num_heads, self.num_kv_heads = attn.num_heads, attn.num_kv_heads
        self.rotary = config.rotary("full_attention")
        self.q_proj = ColumnLinear(config.hidden_size, attn.num_heads * head_dim, bias=attn.qkv_bias)
        self.k_proj = ColumnLinear(config.hidden_size, attn.num_kv_heads * head_dim, bias=attn.qkv_bias)
        self.v_proj = ColumnLinear(config.hidden_size, attn.num_kv_heads * head_dim, bias=attn.qkv_bias)
        self.o_proj = RowLinear(attn.num_heads * head_dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(head_dim, config.norm_eps) if attn.qk_norm else None
        self.k_norm = RMSNorm(head_dim, config.norm_eps) if attn.qk_norm else None

    def forward(self, x: Tensor, info: SequenceInfo, cache: LayerCache | None = None) -> Tensor:
        """Attend over x [T, B, D]."""
        q = split_heads(self.q_proj(x), self.num_heads)
        k = split_heads(self.k_proj(x), self.num_kv_heads)
        v = split_heads(self.v_proj(x), self.num_kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            # QK norm precedes the rotation, as in Qwen3.
            q, k = self.q_norm(q), self.k_norm(k)
        if info.cos is not None and info.sin is not None:
            q, k = apply_rotary(q, info.cos, info.sin), apply_rotary(k, info.cos, info.sin)
        if cache is not None:
            k, v = self._extend(cache, k, v)
        o = attention(q, k, v, window=self.window, documents=info.documents, group=info.group)
        return self.o_proj(merge_heads(o))

    def _extend(self, cache: LayerCache, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if "k" in cache.tensors:
            k, v = torch.cat((cache.tensors["k"], k), 1), torch.cat((cache.tensors["v"], v), 1)
        # A sliding window needs only its last window - 1 keys besides the new one.
        kept = k.shape[1] if self.window is None else self.window - 1
        first = max(k.shape[1] - kept, 0)
        cache.tensors |= {"k": k[:, first:], "v": v[:, first:]}
        return k, v


class SlidingWindowAttention(FullAttention):
    """Softmax attention over the last `window` tokens, including the query's own; cost O(T * window)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.window = config.attention.window
