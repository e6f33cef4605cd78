"""Causal softmax attention, full or with a sliding window, over packed documents or a key-value cache.

    o_t = sum_s p_ts v_s,   p_t = softmax_s(scale · q_t · k_s),   s in (t − window, t] and in t's document

Every query may see the keys of further tokens besides, the sinks, whatever the window and the document.

Sources: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; grouped queries, Ainslie et al. 2023, arXiv:2305.13245; sliding
window, Beltagy et al. 2020, arXiv:2004.05150.

Backends, all differentiable; only the reference materialises [T, T] scores:
    flash      flash-attn, on CUDA in float16 and bfloat16 if it is installed
    sdpa       torch's scaled_dot_product_attention, one call for all documents of one length
    banded     blocks of queries against the keys that they can see: O(T · window) on every device, with sinks too
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

KeysValues = tuple[Tensor, Tensor]
"""Keys [1, S, Hkv, K] and values [1, S, Hkv, V] of S sinks."""


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    documents: Documents | None = None,
    scale: float | None = None,
    sinks: KeysValues | None = None,
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
    scores_BHTT = scores_BHTT.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        sink_keys, sink_values = (x.to(math_dtype).repeat_interleave(groups, dim=2) for x in sinks)
        scores_BHTS = torch.einsum("bthk,shk->bhts", q.to(math_dtype) * scale, sink_keys[0])
        scores_BHTT = torch.cat((scores_BHTS, scores_BHTT), -1)
        values = torch.cat((sink_values.expand(len(v), -1, -1, -1), values), 1)
    probabilities = scores_BHTT.softmax(-1)
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
    sinks: KeysValues | None = None,
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
        sinks: keys and values of tokens that every query sees; the same on all ranks. Not for sdpa and flash.
        group: ranks that hold consecutive, equal shards of the sequence; requires Tq = Tk. A window may span several
            shards. documents describe the whole row and are the same on every rank. Without a window ranks exchange
            heads; with a window, the keys and values that it reaches: see `kernels.attention_sharded`.
        backend: "auto" or one of the module's backends. flash and sdpa are available only for inputs they support.

    Returns:
        o: [B, Tq, H, V] in q's dtype.

    Raises:
        ValueError: shapes, dtypes, window or documents are inconsistent, or the backend does not support the inputs.
    """
    _check(q, k, v, window, documents, sinks)
    if group is not None:
        return _over_ranks(q, k, v, window, documents, scale, sinks, group, backend)
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
    choice = resolve("attention", backend, _available(q, k, v, window, sinks))
    if choice == "reference":
        return attention_reference(q, k, v, window=window, documents=documents, scale=scale, sinks=sinks)
    if choice == "flash":
        return _flash(q, k, v, window, documents, longest, scale)
    if choice == "sdpa":
        dense = functools.partial(_sdpa, scale=scale)
    else:
        dense = functools.partial(_banded, window=window, scale=scale, sinks=sinks)
    return dense(q, k, v) if documents is None else _by_document(dense, q, k, v, documents.lengths)


def _over_ranks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    documents: Documents | None,
    scale: float | None,
    sinks: KeysValues | None,
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
    choice = resolve("attention", backend, _available(q, k, v, window, sinks))
    one_rank = functools.partial(attention, scale=scale, backend=choice)
    return attention_sharded(one_rank, q, k, v, window, documents, sinks, group)


def _check(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, documents: Documents | None, sinks: KeysValues | None
) -> None:
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
    if sinks is not None:
        fit = all(x.dim() == 4 and len(x) == 1 and x.shape[2:] == y.shape[2:] for x, y in zip(sinks, (k, v)))
        if not fit or sinks[0].shape[1] != sinks[1].shape[1] or any(x.dtype != q.dtype for x in sinks):
            raise ValueError(
                f"attention: needs sinks [1, S, Hkv, K] and [1, S, Hkv, V] in q's dtype, not "
                f"{', '.join(str(tuple(x.shape)) for x in sinks)}: {shapes}"
            )


def _available(q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: KeysValues | None = None) -> list[str]:
    """The backends that support these inputs, preferred first."""
    if sinks is not None:
        return ["banded", "reference"]
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


def _banded(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, sinks: KeysValues | None = None
) -> Tensor:
    """Blocks of queries against the keys that any of their queries sees."""
    return _Banded.apply(q, k, v, k.shape[1] if window is None else window, scale, *(sinks or (None, None)))


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
    """One tile of scores: rows of X, queries C, keys S after the sinks, and the masks to add at the keys' two ends."""

    rows: slice
    queries: slice
    keys: slice
    sinks: int
    future_CC: Tensor
    expired_CS: Tensor

    def seen(self, x_XTK: Tensor, sinks_XSK: Tensor | None) -> Tensor:
        """The sinks' and the keys' rows of keys or values, or of their gradients."""
        seen = x_XTK[self.rows, self.keys]
        return seen if sinks_XSK is None else torch.cat((sinks_XSK[self.rows], seen), 1)

    def add(self, part_XKS: Tensor, total_XKT: Tensor, sinks_XKS: Tensor | None) -> None:
        """Add a gradient of what `seen` returned, transposed, to those of the keys and of the sinks."""
        if sinks_XKS is not None:
            sinks_XKS[self.rows] += part_XKS[..., : self.sinks]
        total_XKT[self.rows, :, self.keys] += part_XKS[..., self.sinks :]

    def probabilities(self, q_XCK: Tensor, seen_XSK: Tensor, scale: float) -> Tensor:
        """Softmax of the scores [X, G · C, S], in q's dtype; scores have the keys' dtype.

        Rounding the scores themselves to bfloat16 would save 15 to 40 % of the time, at up to four times sdpa's error.
        """
        scores = batched_matmul(q_XCK.to(seen_XSK.dtype) * scale, seen_XSK.mT)
        scores_XGCS = scores.unflatten(1, (-1, len(self.future_CC)))
        scores_XGCS[..., -len(self.future_CC) :] += self.future_CC
        if self.expired_CS.shape[1]:
            scores_XGCS[..., self.sinks : self.sinks + self.expired_CS.shape[1]] += self.expired_CS
        return torch.softmax(scores, dim=-1).to(q_XCK.dtype)


def _tiles(q_XGTK: Tensor, wide_k_XTK: Tensor, window: int, sinks: int) -> Iterator[_Tile]:
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
        row_scores = groups * count * (sinks + last - first)
        step = max(1, _TILE_SCORES * torch.get_num_threads() // row_scores) if q_XGTK.is_cpu else rows
        for row in range(0, rows, step):
            yield _Tile(slice(row, row + step), slice(start, end), slice(first, last), sinks, future_CC, expired_CS)


class _Banded(torch.autograd.Function):
    """The `banded` backend: saves its inputs; backward recomputes each tile's probabilities."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: int,
        scale: float,
        sink_k: Tensor | None,
        sink_v: Tensor | None,
    ) -> Tensor:
        save(ctx, activations=(q, k, v), statistics=(sink_k, sink_v))
        ctx.window, ctx.scale = window, scale
        q_XGTK, _, v_XTV, wide_k_XTK = _tile_operands(q, k, v)
        sinks_k, sinks_v = _sink_operand(sink_k, wide_k_XTK), _sink_operand(sink_v, v_XTV)
        o_XGTV = q.new_empty(*q_XGTK.shape[:3], v.shape[3])
        for tile in _tiles(q_XGTK, wide_k_XTK, window, 0 if sink_k is None else sink_k.shape[1]):
            q_XCK = q_XGTK[tile.rows, :, tile.queries].flatten(1, 2)
            p_XCS = tile.probabilities(q_XCK, tile.seen(wide_k_XTK, sinks_k), scale)
            o_XCV = batched_matmul(p_XCS, tile.seen(v_XTV, sinks_v))
            o_XGTV[tile.rows, :, tile.queries] = o_XCV.unflatten(1, (q_XGTK.shape[1], -1))
        return _from_key_head(o_XGTV, q.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, Tensor | None, Tensor | None]:
        q, k, v, sink_k, sink_v = ctx.saved_tensors
        batch = q.shape[0]
        q_XGTK, k_XTK, v_XTV, wide_k_XTK = _tile_operands(q, k, v)
        grad_XGTV = _by_key_head(grad, k.shape[2])
        grad_q = torch.empty_like(q_XGTK)
        # A key's gradient is a sum over tiles, so it accumulates in the wide dtype. It is stored transposed, so that
        # the product's transposed factor, which gets copied, is the small queries rather than the scores.
        grad_k_XKT = torch.zeros_like(wide_k_XTK.mT, memory_format=torch.contiguous_format)
        grad_v_XVT = torch.zeros_like(v_XTV.mT, dtype=wide_k_XTK.dtype, memory_format=torch.contiguous_format)
        wide_sinks_k, sinks_k = _sink_operand(sink_k, wide_k_XTK), _sink_operand(sink_k, k_XTK)
        sinks_v = _sink_operand(sink_v, v_XTV)
        grad_sinks_k, grad_sinks_v = _zeros_of(sinks_k, wide_k_XTK.dtype), _zeros_of(sinks_v, wide_k_XTK.dtype)
        for tile in _tiles(q_XGTK, wide_k_XTK, ctx.window, 0 if sink_k is None else sink_k.shape[1]):
            q_XCK, grad_XCV = (x[tile.rows, :, tile.queries].flatten(1, 2) for x in (q_XGTK, grad_XGTV))
            p_XCS = tile.probabilities(q_XCK, tile.seen(wide_k_XTK, wide_sinks_k), ctx.scale)
            tile.add(batched_matmul(grad_XCV.mT, p_XCS), grad_v_XVT, grad_sinks_v)
            grad_p_XCS = batched_matmul(grad_XCV, tile.seen(v_XTV, sinks_v).mT)
            grad_scores_XCS = torch.ops.aten._softmax_backward_data(grad_p_XCS, p_XCS, -1, p_XCS.dtype)
            grad_q_XCK = batched_matmul(grad_scores_XCS, tile.seen(k_XTK, sinks_k))
            grad_q[tile.rows, :, tile.queries] = grad_q_XCK.unflatten(1, (q_XGTK.shape[1], -1))
            tile.add(batched_matmul(q_XCK.mT, grad_scores_XCS), grad_k_XKT, grad_sinks_k)
        return (
            _from_key_head(grad_q.mul_(ctx.scale), batch),
            _from_key_head(grad_k_XKT.mul_(ctx.scale).mT[:, None].to(k.dtype), batch),
            _from_key_head(grad_v_XVT.mT[:, None].to(v.dtype), batch),
            None,
            None,
            _sink_gradient(grad_sinks_k, batch, ctx.scale, k.dtype),
            _sink_gradient(grad_sinks_v, batch, 1.0, v.dtype),
        )


def _sink_operand(sinks: Tensor | None, like_XTK: Tensor) -> Tensor | None:
    """Keys or values of sinks [1, S, Hkv, K] as [X, S, K] with X = B · Hkv, in the dtype of those of the tokens."""
    if sinks is None:
        return None
    batch = like_XTK.shape[0] // sinks.shape[2]
    return sinks.to(like_XTK.dtype).transpose(1, 2).expand(batch, -1, -1, -1).flatten(0, 1)


def _zeros_of(sinks_XSK: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Zeros [X, K, S] for the gradient of sinks."""
    if sinks_XSK is None:
        return None
    return torch.zeros_like(sinks_XSK.mT, dtype=dtype, memory_format=torch.contiguous_format)


def _sink_gradient(grad_XKS: Tensor | None, batch: int, scale: float, dtype: torch.dtype) -> Tensor | None:
    """The gradient [1, S, Hkv, K], summed over the batch."""
    if grad_XKS is None:
        return None
    return grad_XKS.unflatten(0, (batch, -1)).sum(0, keepdim=True).mul_(scale).permute(0, 3, 1, 2).to(dtype)


def _tile_operands(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reshape to q [X, G, T, K], k [X, T, K], v [X, T, V] with X = B · Hkv, and k in at least float32."""
    q_XGTK, k_XGTK, v_XGTV = (_by_key_head(x, k.shape[2]) for x in (q, k, v))
    k_XTK = k_XGTK[:, 0]
    return q_XGTK, k_XTK, v_XGTV[:, 0], k_XTK.to(torch.promote_types(k.dtype, torch.float32))
