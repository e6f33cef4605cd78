"""Copy tokens to rows sorted by expert, and sum each token's rows. A token may have any number of experts.

    rows_n = x_t(n)     for every pair (token t, expert e) of the map, in order of e, then of t
    x_t    = sum over the rows n of token t of w_n · rows_n

Each is the transpose of the other, so each is the other's backward:

    permute:    dx = unpermute(drows)            dprobs[t, e] = drow_probs_n
    unpermute:  drows_n = w_n · dx_t(n)          dw_n = ⟨rows_n, dx_t(n)⟩

No tensor has tokens × experts × capacity elements: beyond the rows there are a few integers per row. The number of rows
is the map's sum, and the host must know it. With a fixed number of experts per token the caller knows it. Otherwise
`permute` synchronises with the device once.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.autograd import once_differentiable, save
from kernels.backend import resolve
from kernels.indices import check_range, on_host, rows_by_token
from kernels.triton import implementations

_BACKENDS = ("torch", "reference")


def permute_reference(
    x_TD: Tensor, routing_map_TE: Tensor, probs_TE: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """`permute` as a loop over experts, in plain operations."""
    tokens = [column.nonzero()[:, 0] for column in routing_map_TE.unbind(1)]
    row_tokens_N = torch.cat(tokens)
    row_probs_N = None
    if probs_TE is not None:
        row_probs_N = torch.cat([probs[token] for probs, token in zip(probs_TE.unbind(1), tokens)])
    return x_TD[row_tokens_N], row_probs_N, row_tokens_N, routing_map_TE.sum(0)


def unpermute_reference(
    rows_ND: Tensor, row_tokens_N: Tensor, num_tokens: int, row_probs_N: Tensor | None = None
) -> Tensor:
    """`unpermute` in plain operations."""
    wide = rows_ND.to(torch.promote_types(rows_ND.dtype, torch.float32))
    if row_probs_N is not None:
        wide = wide * row_probs_N[:, None]
    return wide.new_zeros(num_tokens, rows_ND.shape[1]).index_add(0, row_tokens_N, wide).to(rows_ND.dtype)


def permute(
    x_TD: Tensor,
    routing_map_TE: Tensor,
    probs_TE: Tensor | None = None,
    *,
    num_rows: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Copy every token to one row per expert that takes it.

    Args:
        x_TD: tokens, floating.
        routing_map_TE: bool, whether an expert takes a token. A token may have no expert, an expert no token.
        probs_TE: the tokens' weights at the experts, read where the map is true.
        num_rows: the map's sum, if known; None counts it.
        backend: auto, reference, torch or triton.

    Returns:
        rows_ND in x's dtype, sorted by expert, then by token; the rows' weights `[N]`, None without probs_TE; the rows'
        tokens `[N]`, int64; the number of rows per expert `[E]`, int64, on the device of x. N is the map's sum.

    Raises:
        ValueError: the shapes do not fit, the map is not bool, its sum is not `num_rows` (not checked on a GPU, where
            it would synchronise), or the backend cannot serve these inputs.
    """
    if not x_TD.is_floating_point() or x_TD.ndim != 2:
        raise ValueError(f"permute: x must be floating [tokens, D], not {x_TD.dtype} {tuple(x_TD.shape)}")
    if routing_map_TE.dtype != torch.bool or routing_map_TE.ndim != 2 or len(routing_map_TE) != len(x_TD):
        raise ValueError(
            f"permute: the map {tuple(routing_map_TE.shape)} {routing_map_TE.dtype} must be bool "
            f"[tokens, experts] for x {tuple(x_TD.shape)}"
        )
    if probs_TE is not None and probs_TE.shape != routing_map_TE.shape:
        raise ValueError(
            f"permute: probs {tuple(probs_TE.shape)} must have the map's shape {tuple(routing_map_TE.shape)}"
        )
    choice = resolve("permute", backend, implementations(_BACKENDS, x_TD, probs_TE))
    if choice == "reference":
        return permute_reference(x_TD, routing_map_TE, probs_TE)
    experts, tokens = _rows(routing_map_TE, num_rows)
    row_probs_N = None
    if probs_TE is not None:
        row_probs_N = _TakeOnce.apply(probs_TE, tokens * probs_TE.shape[1] + experts)
    if choice == "triton":
        from kernels.triton import permutation  # lazily: not every machine has Triton

        rows_ND = permutation.permute(x_TD, tokens)
    else:
        rows_ND = _Permute.apply(x_TD, tokens)
    return rows_ND, row_probs_N, tokens, routing_map_TE.sum(0)


def _rows(routing_map_TE: Tensor, num_rows: int | None) -> tuple[Tensor, Tensor]:
    """Return the expert and the token of each row, int64 `[N]`."""
    if num_rows is not None and not on_host(routing_map_TE):
        experts, tokens = torch.nonzero_static(routing_map_TE.T, size=num_rows).unbind(1)
        return experts, tokens
    experts, tokens = routing_map_TE.T.nonzero(as_tuple=True)
    if num_rows not in (None, len(tokens)):
        raise ValueError(f"permute: num_rows {num_rows} must be the sum of the map, which is {len(tokens)}")
    return experts, tokens


def unpermute(
    rows_ND: Tensor,
    row_tokens_N: Tensor,
    num_tokens: int,
    row_probs_N: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Sum the rows of each token.

    Args:
        rows_ND: floating, in any order.
        row_tokens_N: int64 in [0, num_tokens), the token of each row.
        num_tokens: T.
        row_probs_N: a weight per row, floating; None means 1.
        backend: auto, reference, torch or triton.

    Returns:
        `[T, D]` in the rows' dtype, summed in float32 (float64 for float64 rows); zeros for a token without rows. Rows
        are always summed in their order, so the result is deterministic.

    Raises:
        ValueError: the shapes do not fit, a row's token is out of range, or the backend cannot serve these inputs. On a
            GPU tokens are not checked, which would synchronise; a token out of range makes the output NaN.
    """
    if not rows_ND.is_floating_point() or rows_ND.ndim != 2:
        raise ValueError(f"unpermute: rows must be floating [N, D], not {rows_ND.dtype} {tuple(rows_ND.shape)}")
    if row_tokens_N.shape != rows_ND.shape[:1] or (row_probs_N is not None and row_probs_N.shape != row_tokens_N.shape):
        probs = "" if row_probs_N is None else f" and their probs {tuple(row_probs_N.shape)}"
        raise ValueError(
            f"unpermute: the rows' tokens {tuple(row_tokens_N.shape)}{probs} must be [{len(rows_ND)}], as many as rows"
        )
    check_range("unpermute", "row's token", row_tokens_N, num_tokens)
    choice = resolve("unpermute", backend, implementations(_BACKENDS, rows_ND, row_probs_N))
    if choice == "reference":
        return unpermute_reference(rows_ND, row_tokens_N, num_tokens, row_probs_N)
    if choice == "triton":
        from kernels.triton import permutation

        return permutation.unpermute(rows_ND, row_tokens_N, num_tokens, row_probs_N)
    return _Unpermute.apply(rows_ND, row_tokens_N, num_tokens, row_probs_N)


def _add_up(rows_ND: Tensor, row_tokens_N: Tensor, num_tokens: int, row_probs_N: Tensor | None) -> Tensor:
    """`unpermute` by embedding_bag, on a CPU 1.5 to 10 times as fast as index_add."""
    if not len(rows_ND):
        return rows_ND.new_zeros(num_tokens, rows_ND.shape[1])
    order_N, bounds = rows_by_token(row_tokens_N, num_tokens)
    # embedding_bag requires weights in the rows' dtype, and sums narrow rows in float32 itself.
    weights, narrow = None, rows_ND.dtype
    if row_probs_N is not None:
        rows_ND = rows_ND.to(torch.promote_types(rows_ND.dtype, row_probs_N.dtype))
        weights = row_probs_N.to(rows_ND.dtype)[order_N]
    bags = torch.embedding_bag(rows_ND, order_N, bounds, per_sample_weights=weights, include_last_offset=True)[0]
    if not on_host(row_tokens_N):
        # Rows of tokens out of range are missing from every sum, so the result must not look complete.
        bags = torch.where((bounds[0] == 0) & (bounds[-1] == len(order_N)), bags, torch.nan)
    return bags.to(narrow)


class _TakeOnce(torch.autograd.Function):
    """Take the elements of x at distinct flat indices, so that the gradient needs no sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places_N: Tensor) -> Tensor:
        save(ctx, indices=(places_N,))
        ctx.shape = x.shape
        return x.reshape(-1).index_select(0, places_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (places_N,) = ctx.saved_tensors
        out = grad.new_zeros(ctx.shape)
        out.view(-1)[places_N] = grad
        return out, None


class _Permute(torch.autograd.Function):
    """The rows of `permute`: saves their tokens."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, row_tokens_N: Tensor) -> Tensor:
        save(ctx, indices=(row_tokens_N,))
        ctx.num_tokens = len(x_TD)
        return x_TD.index_select(0, row_tokens_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (row_tokens_N,) = ctx.saved_tensors
        return _add_up(grad.contiguous(), row_tokens_N, ctx.num_tokens, None), None


class _Unpermute(torch.autograd.Function):
    """`unpermute`: saves the tokens, and if there are weights, the rows and the weights."""

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, row_tokens_N: Tensor, num_tokens: int, row_probs_N: Tensor | None) -> Tensor:
        rows = None if row_probs_N is None else rows_ND
        save(ctx, activations=(rows,), statistics=(row_probs_N,), indices=(row_tokens_N,))
        return _add_up(rows_ND.contiguous(), row_tokens_N, num_tokens, row_probs_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
        rows_ND, row_probs_N, row_tokens_N = ctx.saved_tensors
        grad_rows = grad.index_select(0, row_tokens_N)
        if row_probs_N is None:
            return grad_rows, None, None, None
        wide = torch.promote_types(grad.dtype, torch.float32)
        grad_probs = torch.linalg.vecdot(rows_ND.to(wide), grad_rows.to(wide)).to(row_probs_N.dtype)
        if grad_rows.dtype == row_probs_N.dtype:
            return grad_rows.mul_(row_probs_N[:, None]), None, None, grad_probs
        return (grad_rows * row_probs_N[:, None]).to(grad_rows.dtype), None, None, grad_probs
