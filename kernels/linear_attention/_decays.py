"""Products of decays within a chunk, and scores under them: one decay per head, or one per key channel.

The decay between token j and a later token i of a chunk is the product of the decays of j + 1 … i. `decay_levels`
computes all of them from products of numbers <= 1. With one decay per head they form a matrix that multiplies the
scores. With one per channel they are inside the sum over channels, and each score is computed at the one level where
its two tokens meet.
"""

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from kernels.matmul import through_mkl
from kernels.shapes import block_limit

# Elements per tensor and block of chunks on the CPU, measured on a Zen 5 with 1 MiB of L2 cache per core.
_BLOCK_ELEMENTS = 1 << 18
# For batched products up to this size MKL is faster than oneDNN, up to five times at size 1.
_TINY = 16


def decay_levels(until: Tensor, after: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Turn single-step decays `[G, C, K]` into decays over a chunk by doubling; yields every level.

    Level m divides the chunk into blocks of 2m tokens, each split in the middle, and yields (m, rows, columns), both
    `[G, C/2m, m, K]`. `rows` is the decay from the split to a token of the right half (inclusive), `columns` from a
    token of the left half (exclusive) to the split. rows * columns is the decay between the two, and each pair of
    tokens of a chunk meets at exactly one level. All factors are <= 1, so no decay can overflow and, unlike exp of a
    difference of cumulative sums, no precision is lost after a strong decay.

    On entry `until` holds the decays and `after` ones. Both change in place, so a level must be used before the next
    one is requested. On exit `until` is the decay from the chunk's start to each token (inclusive), and `after` from
    each token (exclusive) to the chunk's end.
    """
    groups, chunk, dim = until.shape
    half = 1
    while half < chunk:
        until_blocks = until.view(groups, chunk // (2 * half), 2, half, dim)
        after_blocks = after.view(groups, chunk // (2 * half), 2, half, dim)
        yield half, until_blocks[:, :, 1], after_blocks[:, :, 0]
        after_blocks[:, :, 0] *= until_blocks[:, :, 1, -1:]
        until_blocks[:, :, 1] *= until_blocks[:, :, 0, -1:]
        half *= 2


def level_blocks(matrix: Tensor, half: int) -> Tensor:
    """Entries of `[…, C, C]` with row in a block's right half and column in its left half: a view `[…, C/2m, m, m]`."""
    blocks = matrix.shape[-1] // (2 * half)
    right_left = matrix.unflatten(-1, (blocks, 2, half)).unflatten(-4, (blocks, 2, half))[..., 1, :, :, 0, :]
    return right_left.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def sum_over_spans(d_until: Tensor, d_after: Tensor) -> Tensor:
    """Gradient of the log decays `[G, C, K]` from the gradients of log decays over spans within the chunk.

    `d_until` belongs to the decay from the chunk's start to each token (inclusive), which contains the token's own
    decay and all earlier ones; `d_after` to the decay from each token (exclusive) to the end. A token's sum must
    exclude its own `d_after` instead of adding and subtracting it: under strong decay it exceeds the result by orders
    of magnitude.
    """
    total = d_until.sum(1, keepdim=True)
    before = torch.sub(d_until, d_after).cumsum(1)
    return torch.cat((total, total - before[:, :-1]), dim=1)


def pairwise_decays(decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gamma `[G, C, C]` (zero above the diagonal), P and R `[G, C, 1]` of step decays `[G, C, 1]`; overwrites them."""
    gamma = torch.diag_embed(torch.ones_like(decay[..., 0]))
    after = torch.ones_like(decay)
    for half, rows, columns in decay_levels(decay, after):
        torch.mul(rows, columns.mT, out=level_blocks(gamma, half))
    return gamma, decay, after


def block_groups(x_GCK: Tensor) -> int:
    """Number of chunks whose temporaries fit into the CPU's cache together; all chunks on other devices."""
    return max(1, block_limit(_BLOCK_ELEMENTS) // x_GCK[0].numel()) if x_GCK.is_cpu else len(x_GCK)


def channel_scores(rows: Tensor, columns: Tensor, until: Tensor, after: Tensor, scores: Tensor) -> None:
    """Write sum_c x_ic columns_jc decay_c(j -> i) for j < i, for each x `[G, C, K]` in `rows` `[G, R, C, K]`.

    `scores` is `[G, R, C, C]`; its other entries are unchanged. Takes `until` and `after` as `decay_levels` does, and
    leaves them as P and R.
    """
    for half, row_decay, column_decay in decay_levels(until, after):
        left, right = _level_factors(rows, columns, half, row_decay, column_decay)
        blocks = level_blocks(scores, half).transpose(1, 2)
        blocks.copy_(_small_matmul(right, left.mT).view(blocks.shape))


def channel_scores_backward(
    rows: Tensor,
    columns: Tensor,
    until: Tensor,
    after: Tensor,
    d_scores: Tensor,
    d_rows: Tensor,
    d_columns: Tensor,
) -> None:
    """Write the gradients of `rows` and `columns` of `channel_scores`. Leaves `until` and `after` as P and R."""
    d_rows.zero_()
    d_columns.zero_()
    for half, row_decay, column_decay in decay_levels(until, after):
        left, right = _level_factors(rows, columns, half, row_decay, column_decay)
        d_blocks = level_blocks(d_scores, half).transpose(1, 2).reshape(len(left), -1, half)
        d_right = _small_matmul(d_blocks, left).view(*row_decay.shape[:2], -1, *row_decay.shape[2:])
        _halves(d_rows, half)[..., 1, :, :].addcmul_(row_decay[:, None], d_right.transpose(1, 2))
        d_left = _small_matmul(d_blocks.mT, right).view(column_decay.shape)
        _halves(d_columns, half)[..., 0, :, :].addcmul_(column_decay, d_left)


def _level_factors(
    rows: Tensor, columns: Tensor, half: int, row_decay: Tensor, column_decay: Tensor
) -> tuple[Tensor, Tensor]:
    """The two sides of a level's splits, decayed to the split: columns `[X, m, K]` and rows `[X, R * m, K]`."""
    groups, kinds, _, dim = rows.shape
    left = (_halves(columns, half)[..., 0, :, :] * column_decay).view(-1, half, dim)
    # A single product for all R kinds of rows.
    right = rows.new_empty(groups, row_decay.shape[1], kinds, half, dim)
    torch.mul(_halves(rows, half)[..., 1, :, :].transpose(1, 2), row_decay[:, :, None], out=right)
    return left, right.view(-1, kinds * half, dim)


def _halves(x: Tensor, half: int) -> Tensor:
    """View `[…, C, K]` as `[…, C/2m, 2, m, K]`."""
    return x.unflatten(-2, (-1, 2, half))


def _small_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Batched a `[X, M, N]` @ b `[X, N, K]`; N <= 2 avoids torch.bmm's CPU loop, which is up to ten times slower."""
    terms = a.shape[-1]
    if terms > 2:
        with through_mkl() if min(terms, a.shape[1], b.shape[2]) <= _TINY else nullcontext():
            return torch.bmm(a, b)
    first = a[:, :, :1] * b[:, :1]
    return first if terms == 1 else first.addcmul_(a[:, :, 1:], b[:, 1:])
