"""Gated linear attention and the delta rules in Triton: chunked forward and backward with one set of kernels.

    S  <- Diag(decay_t) S_{t-1},   S_t = S + k_t beta_t r_t^T,   o_t = scale S_t^T q_t
    r_t = v_t, beta_t = 1 (GLA and its special cases)   or   r_t = v_t - S^T k_t (the delta rules)

A chunk is C tokens of one sequence. All kernels except the scan over states are parallel over chunks and heads, and
only `prepare_kernel` and its backward handle decays:

    P_i   the decay from the chunk's start to token i        R_j   from after token j to the chunk's end
    q_decayed = P scale q      k_written = R k beta      k_decayed = P k      total = the whole chunk's decay
    scores A_ij = sum_c scale q_ic decay_c(j -> i) k_jc beta_j   for j <= i
    inverse     = (I + stril(sum_c k_ic decay_c(j -> i) k_jc beta_j))^-1           (delta rule alone; else beta = 1)

No exponent is a difference of cumulative sums, which would overflow and, after a strong decay, lose the digits of a
weak one. Spans are summed from their own tokens. In the levels of a binary tree over the chunk, every pair j < i meets
at one split s, where decay(j -> i) = decay(s -> i) decay(j -> s) with both factors at most 1. At each level a token has
a single factor, to or from its block's split. A level therefore costs one exponential per element, whose logarithm is a
0/1 matrix times the log decays.

The rest is matrix products, for each chunk with S the state at its start:

    r = inverse (v - k_decayed S), or v     o = q_decayed S + scores r     S <- total S + k_written^T r

and backward, with dS the gradient of the state at the chunk's end:

    dr = scores^T do + k_written dS         dv = inverse^T dr, or dr
    dS <- total dS + q_decayed^T do - k_decayed^T dv
    dscores = do r^T     d(stril) = -dv r^T     dq_decayed = do S^T     dk_decayed = -dv S^T     dk_written = r dS^T
"""

# Triton interprets a kernel's annotations, and only constexpr annotations are meaningful to it.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy cannot type a growing tuple of tiles either.
# mypy: disable-error-code="no-untyped-def, import-untyped, assignment, var-annotated, index, misc"

import triton
import triton.language as tl

from kernels.triton.launch import dot
from kernels.triton.sequences import chunk_tokens, load_rows, state_block, store_rows

NO_DECAY, PER_HEAD, PER_CHANNEL = 0, 1, 2
_PER_HEAD, _PER_CHANNEL = tl.constexpr(PER_HEAD), tl.constexpr(PER_CHANNEL)

# exp of this is 0 in float32. It is finite, because a 0/1 matrix times -inf would give NaN.
_STRONGEST = tl.constexpr(-200.0)


@triton.jit
def _bounded(log_decay):
    """Clamp log decays from below to `_STRONGEST`; keeps NaN, which tl.maximum would replace by the bound."""
    return tl.where(log_decay < _STRONGEST, _STRONGEST, log_decay)


@triton.jit
def _spans(rows, columns, half):
    """Whether the decay of token `columns` lies between token `rows` and the split of its block of `2 * half`.

    Everything here and in `_pairs` depends on `half`: otherwise a loop over levels would keep whole matrices in
    registers.
    """
    split = rows // (2 * half) * (2 * half) + half
    row, column = rows - split, columns - split
    # Right of the split: 0 <= column <= row; left of the split: row < column < 0.
    return (column >= 0) == (column <= row)


@triton.jit
def _pairs(rows, columns, half):
    """Whether `rows` lies in the right half of a block and `columns` in its left half."""
    split = rows // (2 * half) * (2 * half) + half
    column = columns - split
    return (rows >= split) & (column < 0) & (column >= -half)


@triton.jit
def _load_pairs(x, tokens, valid, head, heads, pairs, CHUNK: tl.constexpr):
    """Load the rows `[C, C]` of `[T, heads, C]` where `pairs` holds, zero elsewhere."""
    address = x + (tokens[:, None] * heads + head) * CHUNK + tl.arange(0, CHUNK)[None, :]
    return tl.load(address, mask=valid[:, None] & pairs, other=0.0)


@triton.jit
def _sums(chosen, x):
    """The 0/1 matrix `chosen` `[C, C]` times `x` `[C, BLOCK]` to 16 bits, enough for gradients.

    0 and 1 are exact in bfloat16, so two bfloat16 products suffice. A float32 product would take more work and
    registers on NVIDIA's tensor cores.
    """
    chosen = chosen.to(tl.float32).to(tl.bfloat16)
    high = x.to(tl.bfloat16)
    low = (x - high.to(tl.float32)).to(tl.bfloat16)
    return dot(chosen, high, "ieee") + dot(chosen, low, "ieee")


@triton.jit
def _exact_sums(chosen, x):
    """Like `_sums`, to float32's 24 bits, for logarithms: exp turns their absolute error into a relative one."""
    high = x.to(tl.bfloat16).to(tl.float32)
    return dot(chosen.to(tl.float32).to(tl.bfloat16), high.to(tl.bfloat16), "ieee") + _sums(chosen, x - high)


@triton.jit
def prepare_kernel(
    q,
    k,
    log_decay,
    beta,
    chunks,
    q_decayed,
    k_decayed,
    k_written,
    total,
    scores,
    inverse,
    scale,
    heads,
    q_heads,
    k_heads,
    decay_heads,
    beta_heads,
    levels,
    KEY: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DECAY: tl.constexpr,
    DELTA: tl.constexpr,
    SCORES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the module docstring's list for one chunk of one head; without SCORES all but the last two."""
    chunk, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    tokens, valid = chunk_tokens(chunks, chunk, CHUNK)
    rows, columns = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    operand = q.dtype.element_ty
    q_head, k_head = head * q_heads // heads, head * k_heads // heads
    decay_head = head * decay_heads // heads
    if DELTA:
        beta_C = tl.load(beta + tokens * beta_heads + head * beta_heads // heads, mask=valid, other=0.0).to(tl.float32)
    if DECAY == _PER_HEAD:
        decay_C = tl.load(log_decay + tokens * decay_heads + decay_head, mask=valid, other=0.0).to(tl.float32)
        decay_C = _bounded(decay_C)
        # Masked sums instead of differences of cumulative sums, see the module's docstring.
        until_C = tl.exp(tl.sum(tl.where(columns <= rows, decay_C[None, :], 0.0), axis=1))
        after_C = tl.exp(tl.sum(tl.where(columns > rows, decay_C[None, :], 0.0), axis=1))
        whole = tl.exp(tl.sum(decay_C, axis=0))
    queries_CC = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    keys_CC = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    for first in range(0, KEY, BLOCK_K):
        q_CK = load_rows(q, tokens, valid, q_head, q_heads, KEY, first, BLOCK_K).to(tl.float32) * scale
        k_CK = load_rows(k, tokens, valid, k_head, k_heads, KEY, first, BLOCK_K).to(tl.float32)
        key_CK = k_CK
        if DELTA:
            key_CK = k_CK * beta_C[:, None]
        q_out, k_out, written = q_CK, k_CK, key_CK
        whole_K = tl.full([BLOCK_K], 1.0, dtype=tl.float32)
        if DECAY == _PER_HEAD:
            q_out, k_out, written = q_CK * until_C[:, None], k_CK * until_C[:, None], key_CK * after_C[:, None]
            whole_K = whole_K * whole
        if DECAY == _PER_CHANNEL:
            decay_CK = load_rows(log_decay, tokens, valid, decay_head, decay_heads, KEY, first, BLOCK_K).to(tl.float32)
            decay_CK = _bounded(decay_CK)
            until_CK = tl.exp(_exact_sums(columns <= rows, decay_CK))
            after_CK = tl.exp(_exact_sums(columns > rows, decay_CK))
            q_out, k_out, written = q_CK * until_CK, k_CK * until_CK, key_CK * after_CK
            whole_K = tl.exp(tl.sum(decay_CK, axis=0))
        store_rows(q_decayed, q_out, tokens, valid, head, heads, KEY, first, BLOCK_K)
        store_rows(k_written, written, tokens, valid, head, heads, KEY, first, BLOCK_K)
        if DELTA:
            store_rows(k_decayed, k_out, tokens, valid, head, heads, KEY, first, BLOCK_K)
        column = first + tl.arange(0, BLOCK_K)
        # int64, because offsets may exceed 2^31.
        tl.store(total + tl.program_id(0).to(tl.int64) * KEY + column, whole_K, mask=column < KEY)
        if SCORES:
            if DECAY == _PER_CHANNEL:
                queries_CC += tl.where(rows == columns, tl.sum(q_CK * key_CK, axis=1)[:, None], 0.0)
                half = 1
                for _ in range(levels):
                    factor_CK = tl.exp(_exact_sums(_spans(rows, columns, half), decay_CK))
                    pairs = _pairs(rows, columns, half)
                    left_KC = tl.trans((key_CK * factor_CK).to(operand))
                    queries_CC += tl.where(pairs, dot((q_CK * factor_CK).to(operand), left_KC, PRECISION), 0.0)
                    if DELTA:
                        keys_CC += tl.where(pairs, dot((k_CK * factor_CK).to(operand), left_KC, PRECISION), 0.0)
                    half = half * 2
            else:
                key_KC = tl.trans(key_CK.to(operand))
                queries_CC += dot(q_CK.to(operand), key_KC, PRECISION)
                if DELTA:
                    keys_CC += dot(k_CK.to(operand), key_KC, PRECISION)
    if SCORES:
        if DECAY == _PER_HEAD:
            gamma_CC = (rows == columns).to(tl.float32)
            half = 1
            for _ in range(levels):
                span_C = tl.sum(tl.where(_spans(rows, columns, half), decay_C[None, :], 0.0), axis=1)
                gamma_CC += tl.where(_pairs(rows, columns, half), tl.exp(span_C[:, None] + span_C[None, :]), 0.0)
                half = half * 2
            queries_CC *= gamma_CC
            keys_CC *= gamma_CC
        queries_CC = tl.where(columns <= rows, queries_CC, 0.0)
        store_rows(scores, queries_CC, tokens, valid, head, heads, CHUNK, 0, CHUNK)
        if DELTA:
            # Merge block halves: [[T1, 0], [L, T2]]^-1 = [[T1, 0], [-T2 L T1, T2]], where T1 and T2 are already
            # inverted.
            inverse_CC = (rows == columns).to(tl.float32)
            half = 1
            for _ in range(levels):
                lower_CC = tl.where(_pairs(rows, columns, half), keys_CC, 0.0)
                inverse_CC -= dot(inverse_CC, dot(lower_CC, inverse_CC, PRECISION), PRECISION)
                half = half * 2
            store_rows(inverse, inverse_CC, tokens, valid, head, heads, CHUNK, 0, CHUNK)


@triton.jit
def prepare_backward_per_head_kernel(
    q,
    k,
    log_decay,
    beta,
    chunks,
    d_q_decayed,
    d_k_decayed,
    d_k_written,
    d_total,
    d_scores,
    d_strict,
    d_q,
    d_k,
    d_log_decay,
    d_beta,
    scale,
    heads,
    q_heads,
    k_heads,
    decay_heads,
    beta_heads,
    levels,
    KEY: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DECAY: tl.constexpr,
    DELTA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Backward of `prepare_kernel` with one decay per head or none: gradients of q, k, beta and log_decay."""
    chunk, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    tokens, valid = chunk_tokens(chunks, chunk, CHUNK)
    rows, columns = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    operand = q.dtype.element_ty
    q_head, k_head = head * q_heads // heads, head * k_heads // heads
    if DELTA:
        beta_C = tl.load(beta + tokens * beta_heads + head * beta_heads // heads, mask=valid, other=0.0).to(tl.float32)
        d_beta_C = tl.zeros([CHUNK], dtype=tl.float32)
        d_keys_CC = load_rows(d_strict, tokens, valid, head, heads, CHUNK, 0, CHUNK)
        d_keys_CC = tl.where(columns < rows, d_keys_CC, 0.0)
    d_queries_CC = load_rows(d_scores, tokens, valid, head, heads, CHUNK, 0, CHUNK)
    d_queries_CC = tl.where(columns <= rows, d_queries_CC, 0.0)
    if DECAY == _PER_HEAD:
        decay_head = head * decay_heads // heads
        decay_C = tl.load(log_decay + tokens * decay_heads + decay_head, mask=valid, other=0.0).to(tl.float32)
        decay_C = _bounded(decay_C)
        until_C = tl.exp(tl.sum(tl.where(columns <= rows, decay_C[None, :], 0.0), axis=1))
        after_C = tl.exp(tl.sum(tl.where(columns > rows, decay_C[None, :], 0.0), axis=1))
        # First the scores without Gamma times their gradients; times Gamma this is the gradient of log Gamma.
        queries_CC = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
        keys_CC = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
        for first in range(0, KEY, BLOCK_K):
            q_CK = load_rows(q, tokens, valid, q_head, q_heads, KEY, first, BLOCK_K).to(tl.float32) * scale
            k_CK = load_rows(k, tokens, valid, k_head, k_heads, KEY, first, BLOCK_K).to(tl.float32)
            key_CK = k_CK
            if DELTA:
                key_CK = k_CK * beta_C[:, None]
                keys_CC += dot(k_CK.to(operand), tl.trans(key_CK.to(operand)), PRECISION)
            queries_CC += dot(q_CK.to(operand), tl.trans(key_CK.to(operand)), PRECISION)
        product_CC = queries_CC * d_queries_CC
        if DELTA:
            product_CC += keys_CC * d_keys_CC
        # Gamma again, and on the way the gradients of the log decays, level by level.
        gamma_CC = (rows == columns).to(tl.float32)
        d_decay_C = tl.zeros([CHUNK], dtype=tl.float32)
        half = 1
        for _ in range(levels):
            spans = _spans(rows, columns, half)
            span_C = tl.sum(tl.where(spans, decay_C[None, :], 0.0), axis=1)
            level_CC = tl.where(_pairs(rows, columns, half), tl.exp(span_C[:, None] + span_C[None, :]), 0.0)
            gamma_CC += level_CC
            level_CC *= product_CC
            d_span_CC = level_CC + tl.trans(level_CC)
            d_span_C = tl.sum(d_span_CC, axis=1)
            d_decay_C += tl.sum(tl.where(spans, d_span_C[:, None], 0.0), axis=0)
            half = half * 2
        d_queries_CC *= gamma_CC
        if DELTA:
            d_keys_CC *= gamma_CC
        d_until_C = tl.zeros([CHUNK], dtype=tl.float32)
        d_after_C = tl.zeros([CHUNK], dtype=tl.float32)
        d_whole = 0.0
    for first in range(0, KEY, BLOCK_K):
        q_CK = load_rows(q, tokens, valid, q_head, q_heads, KEY, first, BLOCK_K).to(tl.float32) * scale
        k_CK = load_rows(k, tokens, valid, k_head, k_heads, KEY, first, BLOCK_K).to(tl.float32)
        key_CK = k_CK
        if DELTA:
            key_CK = k_CK * beta_C[:, None]
        d_q_CK = load_rows(d_q_decayed, tokens, valid, head, heads, KEY, first, BLOCK_K)
        d_key_CK = load_rows(d_k_written, tokens, valid, head, heads, KEY, first, BLOCK_K)
        d_k_CK = tl.zeros([CHUNK, BLOCK_K], dtype=tl.float32)
        if DELTA:
            d_k_CK = load_rows(d_k_decayed, tokens, valid, head, heads, KEY, first, BLOCK_K)
        if DECAY == _PER_HEAD:
            d_q_CK *= until_C[:, None]
            d_k_CK *= until_C[:, None]
            d_key_CK *= after_C[:, None]
            d_until_C += tl.sum(d_q_CK * q_CK + d_k_CK * k_CK, axis=1)
            d_after_C += tl.sum(d_key_CK * key_CK, axis=1)
            column = first + tl.arange(0, BLOCK_K)
            address = d_total + tl.program_id(0).to(tl.int64) * KEY + column
            d_whole += tl.sum(tl.load(address, mask=column < KEY, other=0.0), axis=0)
        d_q_CK += dot(d_queries_CC.to(operand), key_CK.to(operand), PRECISION)
        d_key_CK += dot(tl.trans(d_queries_CC.to(operand)), q_CK.to(operand), PRECISION)
        if DELTA:
            d_k_CK += dot(d_keys_CC.to(operand), key_CK.to(operand), PRECISION)
            d_key_CK += dot(tl.trans(d_keys_CC.to(operand)), k_CK.to(operand), PRECISION)
            d_beta_C += tl.sum(d_key_CK * k_CK, axis=1)
            d_k_CK += d_key_CK * beta_C[:, None]
        else:
            d_k_CK += d_key_CK
        store_rows(d_q, d_q_CK * scale, tokens, valid, head, heads, KEY, first, BLOCK_K)
        store_rows(d_k, d_k_CK, tokens, valid, head, heads, KEY, first, BLOCK_K)
    if DELTA:
        tl.store(d_beta + tokens * heads + head, d_beta_C, mask=valid)
    if DECAY == _PER_HEAD:
        # A token's decay is part of P at this and later tokens, and of R at earlier ones.
        d_decay_C += tl.sum(tl.where(columns <= rows, d_until_C[:, None], 0.0), axis=0)
        d_decay_C += tl.sum(tl.where(columns > rows, d_after_C[:, None], 0.0), axis=0) + d_whole
        tl.store(d_log_decay + tokens * heads + head, d_decay_C, mask=valid)


@triton.jit
def prepare_backward_per_channel_kernel(
    q,
    k,
    log_decay,
    beta,
    chunks,
    d_q_decayed,
    d_k_decayed,
    d_k_written,
    d_total,
    d_scores,
    d_strict,
    d_q,
    d_k,
    d_log_decay,
    d_beta,
    scale,
    heads,
    q_heads,
    k_heads,
    decay_heads,
    beta_heads,
    levels,
    KEY: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DECAY: tl.constexpr,
    DELTA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """As `prepare_backward_per_head_kernel`, one decay per channel: a block of channels and its share of d_beta."""
    chunk, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    tokens, valid = chunk_tokens(chunks, chunk, CHUNK)
    rows, columns = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    operand = q.dtype.element_ty
    q_head, k_head = head * q_heads // heads, head * k_heads // heads
    decay_head = head * decay_heads // heads
    if DELTA:
        beta_C = tl.load(beta + tokens * beta_heads + head * beta_heads // heads, mask=valid, other=0.0).to(tl.float32)
    first = tl.program_id(1) * BLOCK_K
    q_CK = load_rows(q, tokens, valid, q_head, q_heads, KEY, first, BLOCK_K).to(tl.float32) * scale
    k_CK = load_rows(k, tokens, valid, k_head, k_heads, KEY, first, BLOCK_K).to(tl.float32)
    key_CK = k_CK
    if DELTA:
        key_CK = k_CK * beta_C[:, None]
    decay_CK = load_rows(log_decay, tokens, valid, decay_head, decay_heads, KEY, first, BLOCK_K).to(tl.float32)
    decay_CK = _bounded(decay_CK)

    until_CK = tl.exp(_exact_sums(columns <= rows, decay_CK))
    d_q_CK = load_rows(d_q_decayed, tokens, valid, head, heads, KEY, first, BLOCK_K) * until_CK
    d_until_CK = d_q_CK * q_CK
    d_k_CK = tl.zeros([CHUNK, BLOCK_K], dtype=tl.float32)
    if DELTA:
        d_k_CK = load_rows(d_k_decayed, tokens, valid, head, heads, KEY, first, BLOCK_K) * until_CK
        d_until_CK += d_k_CK * k_CK
    after_CK = tl.exp(_exact_sums(columns > rows, decay_CK))
    d_key_CK = load_rows(d_k_written, tokens, valid, head, heads, KEY, first, BLOCK_K) * after_CK
    column = first + tl.arange(0, BLOCK_K)
    address = d_total + tl.program_id(0).to(tl.int64) * KEY + column
    d_decay_CK = tl.load(address, mask=column < KEY, other=0.0)[None, :]
    # A token's decay affects reads from this token on, and writes before it.
    d_decay_CK += _sums(columns >= rows, d_until_CK)
    d_decay_CK += _sums(columns < rows, d_key_CK * key_CK)

    half = 1
    for _ in range(levels):
        spans_CC = _spans(rows, columns, half)
        factor_CK = tl.exp(_exact_sums(spans_CC, decay_CK))
        pairs = _pairs(rows, columns, half)
        d_queries_CC = _load_pairs(d_scores, tokens, valid, head, heads, pairs, CHUNK).to(operand)
        # This order avoids register spills on sm_90.
        d_key_level = dot(tl.trans(d_queries_CC), (q_CK * factor_CK).to(operand), PRECISION)
        left_CK = (key_CK * factor_CK).to(operand)
        d_q_level = dot(d_queries_CC, left_CK, PRECISION) * factor_CK
        d_q_CK += d_q_level
        d_span_CK = d_q_level * q_CK
        if DELTA:
            d_keys_CC = _load_pairs(d_strict, tokens, valid, head, heads, pairs, CHUNK).to(operand)
            d_k_level = dot(d_keys_CC, left_CK, PRECISION) * factor_CK
            d_key_level += dot(tl.trans(d_keys_CC), (k_CK * factor_CK).to(operand), PRECISION)
            d_k_CK += d_k_level
            d_span_CK += d_k_level * k_CK
        d_key_level *= factor_CK
        d_key_CK += d_key_level
        d_span_CK += d_key_level * key_CK
        d_decay_CK += _sums(_spans(columns, rows, half), d_span_CK)
        half = half * 2

    row_C = tl.arange(0, CHUNK)
    diagonal_C = tl.load(d_scores + (tokens * heads + head) * CHUNK + row_C, mask=valid, other=0.0)
    d_q_CK += diagonal_C[:, None] * key_CK
    d_key_CK += diagonal_C[:, None] * q_CK
    if DELTA:
        address = d_beta + (tokens * heads + head) * tl.num_programs(1) + tl.program_id(1)
        tl.store(address, tl.sum(d_key_CK * k_CK, axis=1), mask=valid)
        d_k_CK += d_key_CK * beta_C[:, None]
    else:
        d_k_CK += d_key_CK
    store_rows(d_q, d_q_CK * scale, tokens, valid, head, heads, KEY, first, BLOCK_K)
    store_rows(d_k, d_k_CK, tokens, valid, head, heads, KEY, first, BLOCK_K)
    store_rows(d_log_decay, d_decay_CK, tokens, valid, head, heads, KEY, first, BLOCK_K)


@triton.jit
def scan_kernel(
    v,
    k_decayed,
    k_written,
    total,
    inverse,
    initial,
    chunks,
    first_chunk,
    states,
    residual,
    final,
    heads,
    v_heads,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    DELTA: tl.constexpr,
    INITIAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """S <- total S + k_written^T r over one sequence's chunks; stores S before each chunk, and r."""
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    first_value = tl.program_id(1) * BLOCK_V
    whole = tl.program_id(0).to(tl.int64) * KEY * VALUE
    # The state is held as tiles along its key dimension: one product over all of it would need too many registers.
    state = ()
    for piece in tl.static_range(PIECES):
        offsets, inside = state_block(piece * BLOCK_K, first_value, KEY, VALUE, BLOCK_K, BLOCK_V)
        if INITIAL:
            state += (tl.load(initial + whole + offsets, mask=inside, other=0.0).to(tl.float32),)
        else:
            state += (tl.zeros([BLOCK_K, BLOCK_V], dtype=tl.float32),)
    for chunk in range(tl.load(first_chunk + sequence), tl.load(first_chunk + sequence + 1)):
        tokens, valid = chunk_tokens(chunks, chunk, CHUNK)
        row = (chunk * heads + head).to(tl.int64)
        r_CV = load_rows(v, tokens, valid, head * v_heads // heads, v_heads, VALUE, first_value, BLOCK_V)
        error_CV = r_CV.to(tl.float32)
        for piece in tl.static_range(PIECES):
            narrow_KV = state[piece].to(states.dtype.element_ty)
            offsets, inside = state_block(piece * BLOCK_K, first_value, KEY, VALUE, BLOCK_K, BLOCK_V)
            tl.store(states + row * KEY * VALUE + offsets, narrow_KV, mask=inside)
            if DELTA:
                k_CK = load_rows(k_decayed, tokens, valid, head, heads, KEY, piece * BLOCK_K, BLOCK_K)
                error_CV -= dot(k_CK, narrow_KV, PRECISION)
        if DELTA:
            # The state at the chunk's start is known now, so the error v - k_decayed S gives the residual r.
            inverse_CC = load_rows(inverse, tokens, valid, head, heads, CHUNK, 0, CHUNK)
            r_CV = dot(inverse_CC, error_CV.to(v.dtype.element_ty), PRECISION).to(v.dtype.element_ty)
            store_rows(residual, r_CV, tokens, valid, head, heads, VALUE, first_value, BLOCK_V)
        after = ()
        for piece in tl.static_range(PIECES):
            column = piece * BLOCK_K + tl.arange(0, BLOCK_K)
            decay_K = tl.load(total + row * KEY + column, mask=column < KEY, other=0.0)
            written_CK = load_rows(k_written, tokens, valid, head, heads, KEY, piece * BLOCK_K, BLOCK_K)
            after += (state[piece] * decay_K[:, None] + dot(tl.trans(written_CK), r_CV, PRECISION),)
        state = after
    for piece in tl.static_range(PIECES):
        offsets, inside = state_block(piece * BLOCK_K, first_value, KEY, VALUE, BLOCK_K, BLOCK_V)
        tl.store(final + whole + offsets, state[piece], mask=inside)


@triton.jit
def outputs_kernel(
    q_decayed,
    scores,
    residual,
    states,
    chunks,
    o,
    heads,
    residual_heads,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute o = q_decayed S + scores r, for one chunk of one head."""
    chunk, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    first_value = tl.program_id(1) * BLOCK_V
    tokens, valid = chunk_tokens(chunks, chunk, CHUNK)
    scores_CC = load_rows(scores, tokens, valid, head, heads, CHUNK, 0, CHUNK)
    residual_head = head * residual_heads // heads
    r_CV = load_rows(residual, tokens, valid, residual_head, residual_heads, VALUE, first_value, BLOCK_V)
    o_CV = dot(scores_CC, r_CV, PRECISION)
    for first_key in range(0, KEY, BLOCK_K):
        q_CK = load_rows(q_decayed, tokens, valid, head, heads, KEY, first_key, BLOCK_K)
        offsets, inside = state_block(first_key, first_value, KEY, VALUE, BLOCK_K, BLOCK_V)
        address = states + tl.program_id(0).to(tl.int64) * KEY * VALUE + offsets
        o_CV += dot(q_CK, tl.load(address, mask=inside, other=0.0), PRECISION)
    store_rows(o, o_CV, tokens, valid, head, heads, VALUE, first_value, BLOCK_V)


@triton.jit
def scan_backward_kernel(
    d_o,
    q_decayed,
    k_decayed,
    k_written,
    total,
    scores,
    inverse,
    d_final,
    chunks,
    first_chunk,
    d_states,
    d_v,
    d_initial,
    heads,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    DELTA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Backward of the scan: stores the gradient of the state after each chunk, and computes d_v and d_initial."""
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    first_value = tl.program_id(1) * BLOCK_V
    whole = tl.program_id(0).to(tl.int64) * KEY * VALUE
    operand = d_o.dtype.element_ty
    d_state = ()
    for piece in tl.static_range(PIECES):
        offsets, inside = state_block(piece * BLOCK_K, first_value, KEY, VALUE, BLOCK_K, BLOCK_V)
        d_state += (tl.load(d_final + whole + offsets, mask=inside, other=0.0),)
    first, end = tl.load(first_chunk + sequence), tl.load(first_chunk + sequence + 1)
    # Chunks in reverse: the gradient of the state flows from the last to the first.
    for index in range(end - first):
        chunk = end - 1 - index
        tokens, valid = chunk_tokens(chunks, chunk, CHUNK)
        row = (chunk * heads + head).to(tl.int64)
        d_o_CV = load_rows(d_o, tokens, valid, head, heads, VALUE, first_value, BLOCK_V)
        scores_CC = load_rows(scores, tokens, valid, head, heads, CHUNK, 0, CHUNK)
        d_r_CV = dot(tl.trans(scores_CC), d_o_CV, PRECISION)
        for piece in tl.static_range(PIECES):
            narrow_KV = d_state[piece].to(operand)
            offsets, inside = state_block(piece * BLOCK_K, first_value, KEY, VALUE, BLOCK_K, BLOCK_V)
            tl.store(d_states + row * KEY * VALUE + offsets, narrow_KV, mask=inside)
            written_CK = load_rows(k_written, tokens, valid, head, heads, KEY, piece * BLOCK_K, BLOCK_K)
            d_r_CV += dot(written_CK, narrow_KV, PRECISION)
        if DELTA:
            inverse_CC = load_rows(inverse, tokens, valid, head, heads, CHUNK, 0, CHUNK)
            d_r_CV = dot(tl.trans(inverse_CC), d_r_CV.to(operand), PRECISION)
        store_rows(d_v, d_r_CV, tokens, valid, head, heads, VALUE, first_value, BLOCK_V)
        before = ()
        for piece in tl.static_range(PIECES):
            column = piece * BLOCK_K + tl.arange(0, BLOCK_K)
            decay_K = tl.load(total + row * KEY + column, mask=column < KEY, other=0.0)
            q_CK = load_rows(q_decayed, tokens, valid, head, heads, KEY, piece * BLOCK_K, BLOCK_K)
            d_piece_KV = d_state[piece] * decay_K[:, None] + dot(tl.trans(q_CK), d_o_CV, PRECISION)
            if DELTA:
                k_CK = load_rows(k_decayed, tokens, valid, head, heads, KEY, piece * BLOCK_K, BLOCK_K)
                d_piece_KV -= dot(tl.trans(k_CK), d_r_CV.to(operand), PRECISION)
            before += (d_piece_KV,)
        d_state = before
    for piece in tl.static_range(PIECES):
        offsets, inside = state_block(piece * BLOCK_K, first_value, KEY, VALUE, BLOCK_K, BLOCK_V)
        tl.store(d_initial + whole + offsets, d_state[piece], mask=inside)


@triton.jit
def scores_backward_kernel(
    d_o,
    d_v,
    residual,
    chunks,
    d_scores,
    d_strict,
    heads,
    residual_heads,
    VALUE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    DELTA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the scores, d_o r^T, and of the matrix before inversion, -d_v r^T; neither is masked."""
    chunk, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    tokens, valid = chunk_tokens(chunks, chunk, CHUNK)
    residual_head = head * residual_heads // heads
    d_scores_CC = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    d_strict_CC = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    for first in range(0, VALUE, BLOCK_V):
        r_CV = load_rows(residual, tokens, valid, residual_head, residual_heads, VALUE, first, BLOCK_V)
        d_o_CV = load_rows(d_o, tokens, valid, head, heads, VALUE, first, BLOCK_V)
        d_scores_CC += dot(d_o_CV, tl.trans(r_CV), PRECISION)
        if DELTA:
            d_v_CV = load_rows(d_v, tokens, valid, head, heads, VALUE, first, BLOCK_V)
            d_strict_CC -= dot(d_v_CV, tl.trans(r_CV), PRECISION)
    # The readers mask: `prepare_backward_*` use only the entries on and below the diagonal.
    store_rows(d_scores, d_scores_CC, tokens, valid, head, heads, CHUNK, 0, CHUNK)
    if DELTA:
        store_rows(d_strict, d_strict_CC, tokens, valid, head, heads, CHUNK, 0, CHUNK)


@triton.jit
def reads_backward_kernel(
    d_o,
    d_v,
    residual,
    states,
    d_states,
    total,
    chunks,
    d_q_decayed,
    d_k_decayed,
    d_k_written,
    d_total,
    heads,
    residual_heads,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    DELTA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the reads from and writes to the state, and of the logarithm of the state's own decay."""
    chunk, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    first_key = tl.program_id(1) * BLOCK_K
    tokens, valid = chunk_tokens(chunks, chunk, CHUNK)
    residual_head = head * residual_heads // heads
    row = tl.program_id(0).to(tl.int64)
    d_q_CK = tl.zeros([CHUNK, BLOCK_K], dtype=tl.float32)
    d_k_CK = tl.zeros([CHUNK, BLOCK_K], dtype=tl.float32)
    d_written_CK = tl.zeros([CHUNK, BLOCK_K], dtype=tl.float32)
    d_total_K = tl.zeros([BLOCK_K], dtype=tl.float32)
    for first in range(0, VALUE, BLOCK_V):
        offsets, inside = state_block(first_key, first, KEY, VALUE, BLOCK_K, BLOCK_V)
        state_KV = tl.load(states + row * KEY * VALUE + offsets, mask=inside, other=0.0)
        d_state_KV = tl.load(d_states + row * KEY * VALUE + offsets, mask=inside, other=0.0)
        d_total_K += tl.sum(state_KV.to(tl.float32) * d_state_KV.to(tl.float32), axis=1)
        d_o_CV = load_rows(d_o, tokens, valid, head, heads, VALUE, first, BLOCK_V)
        d_q_CK += dot(d_o_CV, tl.trans(state_KV), PRECISION)
        r_CV = load_rows(residual, tokens, valid, residual_head, residual_heads, VALUE, first, BLOCK_V)
        d_written_CK += dot(r_CV, tl.trans(d_state_KV), PRECISION)
        if DELTA:
            d_v_CV = load_rows(d_v, tokens, valid, head, heads, VALUE, first, BLOCK_V)
            d_k_CK -= dot(d_v_CV, tl.trans(state_KV), PRECISION)
    store_rows(d_q_decayed, d_q_CK, tokens, valid, head, heads, KEY, first_key, BLOCK_K)
    store_rows(d_k_written, d_written_CK, tokens, valid, head, heads, KEY, first_key, BLOCK_K)
    if DELTA:
        store_rows(d_k_decayed, d_k_CK, tokens, valid, head, heads, KEY, first_key, BLOCK_K)
    column = first_key + tl.arange(0, BLOCK_K)
    decay_K = tl.load(total + row * KEY + column, mask=column < KEY, other=0.0)
    tl.store(d_total + row * KEY + column, d_total_K * decay_K, mask=column < KEY)
