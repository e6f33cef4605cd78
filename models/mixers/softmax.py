"""Softmax attention: full and sliding-window."""

from typing import ClassVar

import torch
from torch import Tensor

from kernels.attention import attention
from kernels.autograd import label
from kernels.backend import is_generating
from kernels.quantization.int8 import decode_int8, encode_int8
from kernels.rotary import apply_rotary
from models.config import ModelConfig
from models.layers import residual_norm
from models.mixers.base import LayerCache, Mixer, SequenceInfo, merge_heads, split_heads
from models.parallel import ColumnLinear, RowLinear
from models.sinks import attend_among_sinks
from models.spiking import Int8, Neuron, attach


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
        gated = attn.output_gate
        self.g_proj = ColumnLinear(config.hidden_size, attn.num_heads * head_dim, bias=False) if gated else None
        self.q_norm = residual_norm(config, head_dim) if attn.qk_norm else None
        self.k_norm = residual_norm(config, head_dim) if attn.qk_norm else None
        self.int8 = Int8(config.spiking) if config.spiking.int8_keys_values else None
        spiking = config.spiking
        self.query_spikes = attach(self, "queries", Neuron(spiking, head_dim)) if spiking.queries else None

    def forward(self, x: Tensor, info: SequenceInfo, cache: LayerCache | None = None) -> Tensor:
        """Attend over x [T, B, D]."""
        q = split_heads(self.q_proj(x), self.num_heads)
        k = split_heads(self.k_proj(x), self.num_kv_heads)
        v = split_heads(self.v_proj(x), self.num_kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            # QK norm precedes the rotation, as in Qwen3.
            q, k = self.q_norm(q), self.k_norm(k)
        if info.cos is not None and info.sin is not None:
            q, k = _rotated(q, k, info.cos, info.sin)
        if self.query_spikes is not None:
            # After the rotation, as in the published code of SpikingBrain.
            q = self.query_spikes(q)
        sinks = None if info.sinks is None else info.sinks.by_mixer.get(self)
        if cache is not None and cache.store is not None:
            return self.project(cache.store.attend(q, self.entries(k, v), sinks), x)
        if cache is not None:
            k, v = keys_and_values(self._remember(cache, self.entries(k, v)), q.dtype)
        elif self.int8 is not None:
            k, v = self.int8(k), self.int8(v)
        label(q=q, k=k, v=v)
        if info.are_sinks:
            assert info.sinks is not None, "the pass over the sinks has a place for their keys"
            info.sinks.by_mixer[self] = k, v
            o = attend_among_sinks(q, k, v)
        else:
            o = attention(q, k, v, window=self.window, documents=info.documents, sinks=sinks, group=info.group)
        return self.project(o, x)

    def project(self, o: Tensor, x: Tensor) -> Tensor:
        """The mixer's output [T, B, D] from its heads o [B, T, H, V] and its input x [T, B, D]."""
        merged = merge_heads(o)
        if self.g_proj is not None:
            merged = merged * torch.sigmoid(self.g_proj(x))
        return self.o_proj(merged)

    def entries(self, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        """What a cache keeps of keys and values [B, T, H, K]: themselves, or int8 codes with scales [B, T, H, 1]."""
        if self.int8 is None or not self.int8.is_on:
            return {"k": k, "v": v}
        (k_codes, k_scale), (v_codes, v_scale) = encode_int8(k), encode_int8(v)
        return {"k": k_codes, "k_scale": k_scale, "v": v_codes, "v_scale": v_scale}

    def _remember(self, cache: LayerCache, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """The entries of all tokens so far [B, S, H, ...], of which the cache keeps those that will be seen."""
        before = cache.tensors
        extended = {name: torch.cat((before[name], x), 1) if name in before else x for name, x in entries.items()}
        length = extended["k"].shape[1]
        # A sliding window needs only its last window - 1 keys besides the new one.
        first = 0 if self.window is None else max(length - self.window + 1, 0)
        cache.tensors |= {name: x[:, first:] for name, x in extended.items()}
        return extended


def _rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The rotated queries and keys [B, T, H, K]; in one call if that is cheaper."""
    if q.shape[1] > 1 or not is_generating():
        return _rotate(q, cos, sin), _rotate(k, cos, sin)
    q, k = _rotate(torch.cat((q, k), 2), cos, sin).split((q.shape[2], k.shape[2]), 2)
    return q, k


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first channels of heads x [B, T, H, K], as many as the tables are for."""
    channels = 2 * cos.shape[-1]
    if channels == x.shape[-1]:
        return apply_rotary(x, cos, sin)
    return torch.cat((apply_rotary(x[..., :channels], cos, sin), x[..., channels:]), dim=-1)


def keys_and_values(entries: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The keys and values that a cache keeps as `entries`, any shape [..., K]; `dtype` is that of decoded ones."""
    if "k_scale" not in entries:
        return entries["k"], entries["v"]
    keys = decode_int8(entries["k"], entries["k_scale"], dtype)
    return keys, decode_int8(entries["v"], entries["v_scale"], dtype)


class SlidingWindowAttention(FullAttention):
    """Softmax attention over the last `window` tokens, including the query's own; cost O(T * window)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.window = config.attention.window
