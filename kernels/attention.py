"""Causal softmax attention, full or with a sliding window, over packed documents or a key-value cache.

    o_t = sum_s p_ts v_s,   p_t = softmax_s(scale · q_t · k_s),   s in (t − window, t] and in t's document

Sources: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; grouped queries, Ainslie et al. 2023, arXiv:2305.13245; sliding
window, Beltagy et al. 2020, arXiv:2004.05150.

Backends, all differentiable; only the reference materialises [T, T] scores:
    flash      flash-attn, on CUDA in float16 and bfloat16 if it is installed
    sdpa       torch's scaled_dot_product_attention, one call for all documents of one length
    banded     blocks of queries against the keys that they can see: O(T · window) on every device
    reference  the whole masked score matrix in plain operations
"""

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kernels.attention_sharded import attention_sharded
from kernels.autograd import derive, once_differentiable, save
from kernels.backend import resolve
from kernels.documents import Documents, sequences_in, takes_cu_seqlens
from kernels.matmul import batched_matmul
from kernels.shapes import has_values

# Queries per tile of the banded form by element size in bytes, and scores per CPU tile and thread, chosen so that
# softmax finds them in the cache. Measured on a Zen 5 with 1 MiB of L2 cache per core; half and double cost 0 to 10 %.
_TILE_QUERIES = {8: 64, 4: 256, 2: 256}
_TILE_SCORES = 1 << 18

_FLASH_MAX_HEAD_DIM = 256


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    documents: Documents | None = None,
    scale: float | None = None,
) -> Tensor:
    """`attention` by its definition: one score matrix [Tq, Tk] per head; computes in float32, float64 for float64."""
    math_dtype = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    groups = q.shape[2] // k.shape[2]
    keys, values = (x.to(math_dtype).repeat_interleave(groups, dim=2) for x in (k, v))
    scores_BHTT = torch.einsum("bthk,bshk->bhts", q.to(math_dtype) * scale, keys)
    key_time = torch.arange(k.shape[1], device=q.device)
    query_time = key_time[k.shape[1] - q.shape[1] :, None]
    visible = key_time <= query_time
    if window is not None:
        visible &= key_time > query_time - window
    if documents is not None:
        ends = documents.cu_seqlens(q.device)[1:].to(key_time.dtype)
        document = torch.bucketize(key_time, ends, right=True)
        visible &= document == document[:, None]
    probabilities = scores_BHTT.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshv->bthv", probabilities, values).to(q.dtype)


@takes_cu_seqlens
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    documents: Documents | None = None,
    scale: float | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal softmax attention.

    Args:
        q: [B, Tq, H, K]; the queries are the last Tq of the Tk positions, so Tq = 1 is a decoding step.
        k, v: [B, Tk, Hkv, K] and [B, Tk, Hkv, V] in q's dtype; query head h reads key head h · Hkv // H.
        window: number of keys that a query sees, including its own; None for all.
        documents: documents packed into one row, which do not see each other; requires B = 1 and Tq = Tk.
        scale: factor of the scores; K^(-1/2) by default.
        group: ranks that hold consecutive, equal shards of the sequence; requires Tq = Tk. A window may span several
            shards. documents describe the whole row and are the same on every rank. Without a window ranks exchange
            heads; with a window, the keys and values that it reaches: see `kernels.attention_sharded`.
        backend: "auto" or one of the module's backends. flash and sdpa are available only for inputs they support.

    Returns:
        o: [B, Tq, H, V] in q's dtype.

    Raises:
        ValueError: shapes, dtypes, window or documents are inconsistent, or the backend does not support the inputs.
    """
    _check(q, k, v, window, documents)
    if group is not None:
        return _over_ranks(q, k, v, window, documents, scale, group, backend)
    if documents is not None:
        sequences_in(q.shape[0], q.shape[1], documents)
    longest = k.shape[1] if documents is None else max(documents.lengths)
    if window is not None and documents is None:
        # A cache may hold more keys than any query can see.
        longest = min(longest, q.shape[1] + window - 1)
        k, v = k[:, -longest:], v[:, -longest:]
    # A window that covers every key is no window, for which faster backends are available.
    if window is not None and window >= longest:
        window = None
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    choice = resolve("attention", backend, _available(q, k, v, window))
    if choice == "reference":
        return attention_reference(q, k, v, window=window, documents=documents, scale=scale)
    if choice == "flash":
        return _flash(q, k, v, window, documents, longest, scale)
    if choice == "sdpa":
        dense = functools.partial(_sdpa, scale=scale)
    else:
        dense = functools.partial(_banded, window=window, scale=scale)
    return dense(q, k, v) if documents is None else _by_document(dense, q, k, v, documents.lengths)


def _over_ranks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    documents: Documents | None,
    scale: float | None,
    group: dist.ProcessGroup,
    backend: str,
) -> Tensor:
    """`attention` over context-parallel ranks; raises all errors before the first message."""
    time, row = q.shape[1], q.shape[1] * dist.get_world_size(group)
    if time != k.shape[1] or time == 0:
        raise ValueError(f"attention: over ranks Tq = Tk > 0, not {time} and {k.shape[1]}")
    if documents is not None:
        sequences_in(q.shape[0], row, documents)
    if window is not None and window >= row:
        window = None
    # Choose here, so that all ranks choose alike: the available backends depend on the keys before a rank's own tokens.
    choice = resolve("attention", backend, _available(q, k, v, window))
    one_rank = functools.partial(attention, scale=scale, backend=choice)
    return attention_sharded(one_rank, q, k, v, window, documents, group)


def _check(q: Tensor, k: Tensor, v: Tensor, window: int | None, documents: Documents | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4 or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        raise ValueError(f"attention: needs q [B, Tq, H, K], k [B, Tk, Hkv, K], v [B, Tk, Hkv, V], not {shapes}")
    if q.shape[3] != k.shape[3] or not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        dtypes = f"{q.dtype}, {k.dtype}, {v.dtype}"
        raise ValueError(f"attention: q and k must share K, and all three a floating dtype: {shapes}, {dtypes}")
    if not q.shape[0] * q.shape[1] * k.shape[2] * q.shape[3] * v.shape[3]:
        raise ValueError(f"attention: nothing to attend with: {shapes}")
    if q.shape[2] % k.shape[2] or not q.shape[2]:
        raise ValueError(f"attention: the number of key heads must divide that of query heads: {shapes}")
    if q.shape[1] > k.shape[1]:
        raise ValueError(f"attention: queries are the last of the keys' positions and cannot outnumber them: {shapes}")
    if window is not None and window < 1:
        raise ValueError(f"attention: window counts the keys a query sees, itself among them: at least 1, not {window}")
    if documents is not None and (q.shape[0] != 1 or q.shape[1] != k.shape[1]):
        raise ValueError(f"attention: packed documents (cu_seqlens) need B = 1 and Tq = Tk: {shapes}")


def _available(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> list[str]:
    """The backends that support these inputs, preferred first."""
    available = []
    half = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)
    # flash-attn requires values as wide as keys.
    if half and q.shape[3] == v.shape[3] <= _FLASH_MAX_HEAD_DIM and _flash_attn() is not None:
        available.append("flash")
    # torch aligns is_causal to the first key instead of the last: correct if there are as many queries as keys, and
    # irrelevant for a single query. In double precision a GPU has no fused kernel for it.
    if window is None and q.shape[1] in (1, k.shape[1]) and not (q.is_cuda and q.dtype == torch.float64):
        available.append("sdpa")
    # Forward and backward on CPU at 512 tokens: banded is 1.7 times as fast as sdpa in float32, 2.2 times in bfloat16.
    position = 0 if q.is_cpu and q.shape[1] > 1 else len(available)
    available.insert(position, "banded")
    return [*available, "reference"]


@functools.cache
def _flash_attn() -> ModuleType | None:
    """The flash_attn module; None if it is not installed or fails to load."""
    try:
        return importlib.import_module("flash_attn")
    except ImportError:
        return None


def _flash(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, documents: Documents | None, longest: int, scale: float
) -> Tensor:
    """flash-attn (Dao 2023, arXiv:2307.08691); its window counts the keys to the left of the query, without its own."""
    flash_attn = _flash_attn()
    assert flash_attn is not None
    window_size = (-1, -1) if window is None else (window - 1, 0)
    if documents is None:
        return flash_attn.flash_attn_func(q, k, v, softmax_scale=scale, causal=True, window_size=window_size)
    bounds = documents.cu_seqlens(q.device)
    return flash_attn.flash_attn_varlen_func(
        *(x[0] for x in (q, k, v)),
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scale,
        causal=True,
        window_size=window_size,
    )[None]


def _by_document(dense: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Attention within each document: one call of `dense` for all documents of the same length."""
    if len(set(lengths)) == 1:
        q_NTHK, k_NTHK, v_NTHV = (x.reshape(len(lengths), lengths[0], *x.shape[2:]) for x in (q, k, v))
        return dense(q_NTHK, k_NTHK, v_NTHV).reshape(*q.shape[:3], v.shape[3])
    by_length: dict[int, list[int]] = {}
    for document, length in enumerate(lengths):
        by_length.setdefault(length, []).append(document)
    # split and cat touch every element once in backward too; slicing would sum full-length gradients.
    q_documents, k_documents, v_documents = (x.split(lengths, dim=1) for x in (q, k, v))
    outputs: dict[int, Tensor] = {}
    for documents in by_length.values():
        batch = [torch.cat([x[i] for i in documents]) for x in (q_documents, k_documents, v_documents)]
        for of_length, x in zip(batch, (q, k, v)):
            derive(of_length, partial(_documents_of, lengths=lengths, documents=documents), (x,))
        for document, output in zip(documents, dense(*batch).unbind(0)):
            outputs[document] = output
    return torch.cat([outputs[document] for document in range(len(lengths))])[None]


def _documents_of(x: Tensor, lengths: Sequence[int], documents: Sequence[int]) -> Tensor:
    """Some documents of x [1, T, H, K], all of one length: [documents, length, H, K]."""
    parts = x.split(lengths, dim=1)
    return torch.cat([parts[i] for i in documents])


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Torch's fused attention for Tq = Tk or Tq = 1."""
    value_dim = v.shape[3]
    q, k, v = _fused_operands(q, k, v, q.is_cuda)
    o_BHTV = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=q.shape[1] > 1,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return o_BHTV.transpose(1, 2)[..., :value_dim]


def _fused_operands(q: Tensor, k: Tensor, v: Tensor, on_gpu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rewrite the attention into a form for which torch has a fused kernel; the unfused one materialises [T, T] scores.

    All head sizes become equal. GPU kernels require rows of a multiple of 16 bytes, and the float32 one as many key
    heads as query heads.
    """
    width = max(q.shape[3], v.shape[3])
    if on_gpu:
        width = -(-width // 8) * 8
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x if x.shape[3] == width else F.pad(x, (0, width - x.shape[3])) for x in (q, k, v))
    if on_gpu and q.dtype == torch.float32 and groups > 1:
        k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    return q, k, v


def _banded(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    """Blocks of queries against the keys that any of their queries sees."""
    return _Banded.apply(q, k, v, k.shape[1] if window is None else window, scale)


def _by_key_head(x: Tensor, key_heads: int) -> Tensor:
    """[B, T, H, K] to [B · Hkv, H / Hkv, T, K], contiguous: groups the query heads that share a key head."""
    batch, time, _, width = x.shape
    x = x.reshape(batch, time, key_heads, -1, width).permute(0, 2, 3, 1, 4)
    return x.reshape(batch * key_heads, -1, time, width)


def _from_key_head(x: Tensor, batch: int) -> Tensor:
    """Inverse of `_by_key_head`."""
    time, width = x.shape[2:]
    x = x.unflatten(0, (batch, -1)).permute(0, 3, 1, 2, 4)
    return x.reshape(batch, time, -1, width)


class _Tile(NamedTuple):
    """One tile of scores: rows of X, queries C, keys S, and the masks to add at its two ends."""

    rows: slice
    queries: slice
    keys: slice
    future_CC: Tensor
    expired_CS: Tensor

    def probabilities(self, q_XCK: Tensor, wide_k_XTK: Tensor, scale: float) -> Tensor:
        """Softmax of the scores [X, G · C, S], in q's dtype; scores have wide_k's dtype.

        Rounding the scores themselves to bfloat16 would save 15 to 40 % of the time, at up to four times sdpa's error.
        """
        scores = batched_matmul(q_XCK.to(wide_k_XTK.dtype) * scale, wide_k_XTK[self.rows, self.keys].mT)
        scores_XGCS = scores.unflatten(1, (-1, len(self.future_CC)))
        scores_XGCS[..., -len(self.future_CC) :] += self.future_CC
        if self.expired_CS.shape[1]:
            scores_XGCS[..., : self.expired_CS.shape[1]] += self.expired_CS
        return torch.softmax(scores, dim=-1).to(q_XCK.dtype)


def _tiles(q_XGTK: Tensor, wide_k_XTK: Tensor, window: int) -> Iterator[_Tile]:
    """Yield tiles that cover every visible score; the last query of a tile is at the position of its last key."""
    rows, groups, queries, _ = q_XGTK.shape
    # A block computes window + block keys per query, of which window are visible.
    block = min(_TILE_QUERIES[q_XGTK.dtype.itemsize], max(64, window // 2))
    for start in range(0, queries if has_values() else 0, block):
        end = min(start + block, queries)
        count, last = end - start, end + wide_k_XTK.shape[1] - queries
        first = max(0, last - count - window + 1)
        expired = max(0, last - first - window)
        hidden = wide_k_XTK.new_full((count, max(count, expired)), float("-inf"))
        future_CC = hidden[:, :count].triu(1)
        # For the last query, every key at this end is outside the window; each earlier query loses one key fewer.
        expired_CS = hidden[:, :expired].tril(expired - count)
        row_scores = groups * count * (last - first)
        step = max(1, _TILE_SCORES * torch.get_num_threads() // row_scores) if q_XGTK.is_cpu else rows
        for row in range(0, rows, step):
            yield _Tile(slice(row, row + step), slice(start, end), slice(first, last), future_CC, expired_CS)


class _Banded(torch.autograd.Function):
    """The `banded` backend: saves its inputs; backward recomputes each tile's probabilities."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
        save(ctx, activations=(q, k, v))
        ctx.window, ctx.scale = window, scale
        q_XGTK, _, v_XTV, wide_k_XTK = _tile_operands(q, k, v)
        o_XGTV = q.new_empty(*q_XGTK.shape[:3], v.shape[3])
        for tile in _tiles(q_XGTK, wide_k_XTK, window):
            q_XCK = q_XGTK[tile.rows, :, tile.queries].flatten(1, 2)
            p_XCS = tile.probabilities(q_XCK, wide_k_XTK, scale)
            o_XCV = batched_matmul(p_XCS, v_XTV[tile.rows, tile.keys])
            o_XGTV[tile.rows, :, tile.queries] = o_XCV.unflatten(1, (q_XGTK.shape[1], -1))
        return _from_key_head(o_XGTV, q.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v = ctx.saved_tensors
        batch = q.shape[0]
        q_XGTK, k_XTK, v_XTV, wide_k_XTK = _tile_operands(q, k, v)
        grad_XGTV = _by_key_head(grad, k.shape[2])
        grad_q = torch.empty_like(q_XGTK)
        # A key's gradient is a sum over tiles, so it accumulates in the wide dtype. It is stored transposed, so that
        # the product's transposed factor, which gets copied, is the small queries rather than the scores.
        grad_k_XKT = torch.zeros_like(wide_k_XTK.mT, memory_format=torch.contiguous_format)
        grad_v_XVT = torch.zeros_like(v_XTV.mT, dtype=wide_k_XTK.dtype, memory_format=torch.contiguous_format)
        for tile in _tiles(q_XGTK, wide_k_XTK, ctx.window):
            q_XCK, grad_XCV = (x[tile.rows, :, tile.queries].flatten(1, 2) for x in (q_XGTK, grad_XGTV))
            p_XCS = tile.probabilities(q_XCK, wide_k_XTK, ctx.scale)
            grad_v_XVT[tile.rows, :, tile.keys] += batched_matmul(grad_XCV.mT, p_XCS)
            grad_p_XCS = batched_matmul(grad_XCV, v_XTV[tile.rows, tile.keys].mT)
            grad_scores_XCS = torch.ops.aten._softmax_backward_data(grad_p_XCS, p_XCS, -1, p_XCS.dtype)
            grad_q_XCK = batched_matmul(grad_scores_XCS, k_XTK[tile.rows, tile.keys])
            grad_q[tile.rows, :, tile.queries] = grad_q_XCK.unflatten(1, (q_XGTK.shape[1], -1))
            grad_k_XKT[tile.rows, :, tile.keys] += batched_matmul(q_XCK.mT, grad_scores_XCS)
        return (
            _from_key_head(grad_q.mul_(ctx.scale), batch),
            _from_key_head(grad_k_XKT.mul_(ctx.scale).mT[:, None].to(k.dtype), batch),
            _from_key_head(grad_v_XVT.mT[:, None].to(v.dtype), batch),
            None,
            None,
        )


def _tile_operands(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reshape to q [X, G, T, K], k [X, T, K], v [X, T, V] with X = B · Hkv, and k in at least float32."""
    q_XGTK, k_XGTK, v_XGTV = (_by_key_head(x, k.shape[2]) for x in (q, k, v))
    k_XTK = k_XGTK[:, 0]
    return q_XGTK, k_XTK, v_XGTV[:, 0], k_XTK.to(torch.promote_types(k.dtype, torch.float32))
