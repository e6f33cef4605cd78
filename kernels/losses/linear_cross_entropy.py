"""Cross entropy of a linear head without the logits of more than one block of tokens.

    z_t = W h_t,   nll_t = logsumexp(z_t) − z_t[y_t],   loss = sum_t w_t nll_t

The loss is a plain sum, so d loss / d z_t = w_t (softmax(z_t) − onehot(y_t)) is known as soon as the block's logits
are: the forward computes both gradients block by block and the backward only scales them (as in Liger-Kernel's
fused_linear_cross_entropy, Hsu et al. 2024, arXiv:2410.10989, section 3.2).

Over a group of ranks, each of which holds consecutive rows W_p of W (the parallel output embedding of Shoeybi et al.
2019, arXiv:1909.08053, section 3), two numbers a token and rank make the whole softmax, in one all-gather a block:

    l_tp = logsumexp(W_p h_t),   a_tp = z_t[y_t] where W_p has row y_t, else −inf
    nll_t = logsumexp_p(l_tp) − max_p(a_tp),   d loss / d (W_p h_t) = w_t (exp(W_p h_t − logsumexp_p(l_tp)) − onehot_p)
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kernels.autograd import once_differentiable
from kernels.backend import resolve
from kernels.indices import check_range
from kernels.matmul import matmul
from kernels.triton import implementations

IGNORE_LABEL = -100

# A block of tokens costs one pass over the gradient of weight, [V, D] in float32, so it holds at least 512 tokens, and
# up to 1024 while its logits take no more than 64 MiB. The softmax goes through it by rows that stay in the cache.
_LOGITS_BYTES = 64 << 20
_MIN_TOKENS = 512
_MAX_TOKENS = 1024
_SOFTMAX_ELEMENTS = 1 << 17
# Rows of the gradient of weight whose product exists at once, beside their sum: an eighth of a vocabulary of 256k.
_PRODUCT_ROWS = 1 << 15

# (logits_CV, target_C, scale_C, nll_C, wants_gradient): writes the losses and, over the logits, their gradients.
_ToGradient = Callable[[Tensor, Tensor, Tensor, Tensor, bool], None]
# (logits_CV, target_C, scale_C, statistics_2C) and (logits_CV, target_C, scale_C, log_total_C): its two halves for a
# part of the vocabulary, in which a target below 0 or from V on is another rank's.
_Half = Callable[[Tensor, Tensor, Tensor, Tensor], None]


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy` through F.cross_entropy on the whole logits; float64 stays float64."""
    logits_NV = F.linear(hidden, weight)
    if group is not None:
        # The other ranks' logits are constants here: what is left is this rank's share of every gradient.
        parts = [torch.empty_like(logits_NV) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, logits_NV.detach(), group=group)
        parts[dist.get_rank(group)] = logits_NV
        logits_NV = torch.cat(parts, dim=1)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    nll_N = F.cross_entropy(logits_NV, labels, ignore_index=IGNORE_LABEL, reduction="none")
    if token_weights is None:
        return nll_N.sum(), nll_N.detach()
    return (nll_N * token_weights).sum(), nll_N.detach().masked_fill(token_weights == 0, 0.0)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the tokens' negative log-likelihoods under softmax(hidden · weightᵀ).

    Args:
        hidden: [N, D], floating.
        weight: [V, D] in hidden's dtype; the (perhaps tied) output embedding.
        labels: int64 [N] in [0, V), or -100 for a token that counts nothing; with `group` V is that of all ranks.
        token_weights: float32 [N] or None for ones, without a gradient; a token whose weight is 0 counts nothing.
        group: the ranks over which the vocabulary is cut, or None. weight is then this rank's part, [V, D] on each:
            rank r holds rows r · V to (r + 1) · V of the whole. All else is the same on every rank.
        backend: auto, reference, torch or triton, of which the last two differ in the softmax alone.

    Returns:
        (loss_sum, nll): a float32 scalar, differentiable in hidden and weight, and the unweighted losses, float32 [N]
        without a gradient, 0 where a token counts nothing. Both are float64 for float64 inputs. The sum is not divided
        by the token count. With `group` they are those of the whole vocabulary, the same on every rank.

    Raises:
        ValueError: shapes or dtypes do not fit each other, a label is outside the vocabulary, the token weights want a
            gradient, or the backend cannot serve these inputs. On a GPU, where looking at labels would wait for it, one
            that is outside makes the loss, its token's and every gradient NaN.

    With `group`, the gradient of weight is that of this rank's rows and whole, while the gradient of hidden is this
    rank's PARTIAL one, through its own rows: the caller adds up the ranks', as where any tensor-parallel region is
    entered. Every rank backpropagates from the whole loss, not from a share of it.

    Logits come from a matmul in hidden's dtype and are float32 after it. The largest temporary holds the logits of one
    block of tokens; the gradient of weight is summed in float32.
    """
    vocabulary = len(weight) * (1 if group is None else dist.get_world_size(group))
    _check(hidden, weight, labels, token_weights, vocabulary)
    available = implementations(("torch", "reference"), hidden, weight, labels, token_weights)
    choice = resolve("linear_cross_entropy", backend, available)
    if choice == "reference":
        return linear_cross_entropy_reference(hidden, weight, labels, token_weights, group)
    # Inside a Function grad mode is always off and needs_input_grad ignores it, so the answer is taken along.
    return _LinearCrossEntropy.apply(hidden, weight, labels, token_weights, torch.is_grad_enabled(), choice, group)


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor | None, vocabulary: int) -> None:
    if not hidden.is_floating_point():
        raise ValueError(f"linear_cross_entropy: hidden must be floating, not {hidden.dtype}")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or hidden.dtype != weight.dtype:
        raise ValueError(
            f"linear_cross_entropy: hidden [N, D] and weight [V, D] must share D and dtype, not "
            f"{tuple(hidden.shape)} {hidden.dtype} and {tuple(weight.shape)} {weight.dtype}"
        )
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"linear_cross_entropy: labels must be int64 [{len(hidden)}], not {labels.dtype} {tuple(labels.shape)}"
        )
    if token_weights is not None and token_weights.shape != labels.shape:
        raise ValueError(f"linear_cross_entropy: token_weights {tuple(token_weights.shape)} must be [{len(hidden)}]")
    if token_weights is not None and token_weights.requires_grad and torch.is_grad_enabled():
        raise ValueError("linear_cross_entropy: token_weights would get no gradient: detach them first")
    check_range("linear_cross_entropy", "label", labels, vocabulary, besides=IGNORE_LABEL)


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss and, where asked for, both gradients for a grad_output of 1."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        token_weights: Tensor | None,
        wants_gradients: bool,
        backend: str,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        vocabulary = len(weight) * (1 if group is None else dist.get_world_size(group))
        exists_N = (labels >= 0) & (labels < vocabulary)
        # Labels that nobody could look at: their tokens read the row of another, and count as NaN.
        unknown_N = ~exists_N & (labels != IGNORE_LABEL)
        scale_N = exists_N.to(wide).masked_fill_(unknown_N, torch.nan)
        if token_weights is not None:
            scale_N = scale_N * token_weights
        target_N = labels.masked_fill(~exists_N, 0)
        if group is not None:
            target_N -= dist.get_rank(group) * len(weight)
        nll_N = torch.empty_like(scale_N)
        needs_hidden, needs_weight = (wants_gradients and needs for needs in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Without a token there is no block to write it.
        new_weight = torch.empty_like if len(hidden) else torch.zeros_like
        grad_weight = new_weight(weight, dtype=wide) if needs_weight else None
        to_gradient = _choose_softmax(backend, group)
        tokens = _block_tokens(weight)
        blocks = zip(*(x.split(tokens) for x in (hidden, target_N, scale_N, nll_N)))
        for start, (hidden_CD, target_C, scale_C, nll_C) in zip(range(0, len(hidden), tokens), blocks):
            logits = matmul(hidden_CD, weight.T)
            to_gradient(logits, target_C, scale_C, nll_C, needs_hidden or needs_weight)
            if grad_hidden is not None:
                grad_hidden[start : start + tokens] = matmul(logits, weight)
            if grad_weight is not None:
                # Half-precision products are added up in float32.
                add = Tensor.copy_ if start == 0 else Tensor.add_
                for logits_CR, grad_RD in zip(logits.split(_PRODUCT_ROWS, dim=1), grad_weight.split(_PRODUCT_ROWS)):
                    add(grad_RD, matmul(logits_CR.T, hidden_CD))
        # First the zeros, then the sum: an infinite loss that counts nothing would make it nan.
        nll_N.masked_fill_(scale_N == 0, 0.0).masked_fill_(unknown_N, torch.nan)
        loss = torch.dot(nll_N, scale_N)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(nll_N)
        return loss, nll_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # Reading the factor would make a GPU wait; on the CPU it saves a pass over both gradients.
        if grad_loss.is_cpu and grad_loss.item() == 1.0:
            return grad_hidden, grad_weight, None, None, None, None, None
        return (
            None if grad_hidden is None else grad_hidden * grad_loss,
            None if grad_weight is None else grad_weight * grad_loss,
            None,
            None,
            None,
            None,
            None,
        )


def _block_tokens(weight: Tensor) -> int:
    return min(max(_LOGITS_BYTES // (weight.element_size() * len(weight)), _MIN_TOKENS), _MAX_TOKENS)


def _choose_softmax(backend: str, group: dist.ProcessGroup | None) -> _ToGradient:
    """The backend's softmax of a block, over the ranks of `group` if there is one."""
    to_gradient, statistics, part_to_gradient = _to_gradient, _statistics, _part_to_gradient
    if backend == "triton":
        from kernels.triton import losses  # here, for machines without triton

        to_gradient, statistics, part_to_gradient = losses.to_gradient, losses.statistics, losses.part_to_gradient
    return to_gradient if group is None else _over_ranks(statistics, part_to_gradient, group)


def _over_ranks(statistics: _Half, part_to_gradient: _Half, group: dist.ProcessGroup) -> _ToGradient:
    """The softmax of a block whose vocabulary is cut over ranks: both halves, and one all-gather between them."""

    def to_gradient(logits_CV: Tensor, target_C: Tensor, scale_C: Tensor, nll_C: Tensor, wants_gradient: bool) -> None:
        local_2C = nll_C.new_empty(2, len(nll_C))
        statistics(logits_CV, target_C, scale_C, local_2C)
        # Gathered rather than reduced: every rank adds in the same order, so that the losses agree to the last bit.
        all_P2C = nll_C.new_empty(dist.get_world_size(group), *local_2C.shape)
        dist.all_gather(list(all_P2C), local_2C, group=group)
        log_total_C = all_P2C[:, 0].logsumexp(0)
        torch.sub(log_total_C, all_P2C[:, 1].amax(0), out=nll_C)
        if wants_gradient:
            part_to_gradient(logits_CV, target_C, scale_C, log_total_C)

    return to_gradient


def _softmax_rows(logits_CV: Tensor) -> int:
    return max(1, _SOFTMAX_ELEMENTS // logits_CV.shape[1]) if logits_CV.is_cpu else len(logits_CV)


def _statistics(logits_CV: Tensor, target_C: Tensor, scale_C: Tensor, statistics_2C: Tensor) -> None:
    """Write the tokens' logsumexp over this part of the vocabulary, and their target's logit (−inf if not in it)."""
    del scale_C  # which the Triton kernel reads, to pass over tokens that count nothing
    rows, last = _softmax_rows(logits_CV), logits_CV.shape[1] - 1
    for logits, target, log_total, at_target in zip(*(x.split(rows) for x in (logits_CV, target_C, *statistics_2C))):
        wide = logits.to(statistics_2C.dtype)
        torch.logsumexp(wide, -1, out=log_total)
        inside = target.clamp(0, last)
        at_target.copy_(wide.gather(1, inside[:, None])[:, 0].masked_fill_(inside != target, -torch.inf))


def _part_to_gradient(logits_CV: Tensor, target_C: Tensor, scale_C: Tensor, log_total_C: Tensor) -> None:
    """Write the gradients of the tokens' losses over this part of their logits, given the whole logsumexp."""
    rows, last = _softmax_rows(logits_CV), logits_CV.shape[1] - 1
    blocks = zip(*(x.split(rows) for x in (logits_CV, target_C, scale_C, log_total_C)))
    for logits, target, scale, log_total in blocks:
        # Over the logits themselves, or over their wider copy.
        gradient = logits.to(log_total.dtype).sub_(log_total[:, None]).exp_().mul_(scale[:, None])
        inside = target.clamp(0, last)
        gradient.scatter_add_(1, inside[:, None], -scale.masked_fill(inside != target, 0.0)[:, None])
        if gradient.dtype != logits.dtype:
            logits.copy_(gradient)


def _to_gradient(logits_CV: Tensor, target_C: Tensor, scale_C: Tensor, nll_C: Tensor, wants_gradient: bool) -> None:
    """Write the tokens' losses to nll and, if asked, their gradients over the logits."""
    rows = _softmax_rows(logits_CV)
    for logits, target, scale, nll in zip(*(x.split(rows) for x in (logits_CV, target_C[:, None], scale_C, nll_C))):
        wide = logits.to(nll.dtype)
        probabilities = torch.softmax(wide, dim=-1)
        # logsumexp = max(z) − log max(p): two cheap passes where log_softmax and exp would take the exponentials twice.
        largest = wide.amax(-1).sub_(probabilities.amax(-1).log_())
        torch.sub(largest, wide.gather(1, target)[:, 0], out=nll)
        if wants_gradient:
            gradient = torch.mul(probabilities, scale[:, None], out=wide)
            gradient.scatter_add_(1, target, -scale[:, None])
            if gradient.dtype != logits.dtype:
                logits.copy_(gradient)
