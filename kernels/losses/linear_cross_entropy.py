"""Cross entropy of a linear head, computed block by block of tokens: the full logits never exist.

    z_t = W h_t,   nll_t = logsumexp(z_t) − z_t[y_t],   loss = sum_t w_t nll_t

The loss is a plain sum, so d loss / d z_t = w_t (softmax(z_t) − onehot(y_t)) follows from the block's logits alone. The
forward computes both gradients block by block, and the backward only scales them (as in Liger-Kernel's
fused_linear_cross_entropy, Hsu et al. 2024, arXiv:2410.10989, section 3.2).

Each rank of a group holds consecutive rows W_p of W (the parallel output embedding of Shoeybi et al. 2019,
arXiv:1909.08053, section 3). The whole softmax takes two numbers per token and rank, in one all-gather per block:

    l_tp = logsumexp(W_p h_t),   a_tp = z_t[y_t] where W_p has row y_t, else −inf
    nll_t = logsumexp_p(l_tp) − max_p(a_tp),   d loss / d (W_p h_t) = w_t (exp(W_p h_t − logsumexp_p(l_tp)) − onehot_p)
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kernels.autograd import once_differentiable, save
from kernels.backend import resolve
from kernels.losses import _blocks
from kernels.losses._blocks import IGNORE_LABEL, Half
from kernels.matmul import matmul
from kernels.triton import implementations

# Called with (logits_CV, target_C, scale_C, nll_C, wants_gradient). Writes the losses to nll, and overwrites the logits
# with their gradients.
_ToGradient = Callable[[Tensor, Tensor, Tensor, Tensor, bool], None]


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy` through F.cross_entropy on the whole logits; float64 stays float64."""
    logits_NV = _blocks.whole_logits(hidden, weight, group)
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
    """Compute the weighted sum of the tokens' negative log-likelihoods under softmax(hidden · weightᵀ).

    Args:
        hidden: [N, D], floating.
        weight: [V, D] in hidden's dtype; the (possibly tied) output embedding.
        labels: int64 [N] in [0, V), or -100 for an ignored token; with `group`, V counts all ranks' rows.
        token_weights: float32 [N] without a gradient, or None for ones; a token with weight 0 is ignored.
        group: the ranks over which the vocabulary is sharded, or None. weight is then this rank's shard: rank r holds
            rows r · V to (r + 1) · V. The other inputs are the same on every rank.
        backend: auto, reference, torch or triton; torch and triton differ in the softmax only.

    Returns:
        (loss_sum, nll): a float32 scalar, differentiable in hidden and weight, and the unweighted losses, float32 [N]
        without a gradient, 0 for ignored tokens. Both are float64 for float64 inputs. The sum is not divided by the
        token count. With `group` they refer to the whole vocabulary and are the same on every rank.

    Raises:
        ValueError: shapes or dtypes do not fit, a label is outside the vocabulary, the token weights require a
            gradient, or the backend cannot serve these inputs. On a GPU labels are not checked, which would
            synchronise; a label outside the vocabulary makes its nll, the loss and every gradient NaN.

    With `group`, the gradient of weight is complete for this rank's rows. The gradient of hidden is PARTIAL: it covers
    this rank's rows only, and the caller sums it over the ranks, as on entering any tensor-parallel region. Every rank
    backpropagates from the whole loss, not from a share of it.

    Logits are computed by a matmul in hidden's dtype and converted to float32. The largest temporary holds the logits
    of one block of tokens. The gradient of weight is summed in float32.
    """
    vocabulary = _blocks.vocabulary_rows(weight, group)
    _blocks.check_head("linear_cross_entropy", hidden, weight, labels, "label", vocabulary)
    _blocks.check_token_weights("linear_cross_entropy", token_weights, len(hidden))
    available = implementations(("torch", "reference"), hidden, weight, labels, token_weights)
    choice = resolve("linear_cross_entropy", backend, available)
    if choice == "reference":
        return linear_cross_entropy_reference(hidden, weight, labels, token_weights, group)
    # Grad mode is passed as an argument: inside a Function it is always off, and needs_input_grad ignores it.
    return _LinearCrossEntropy.apply(hidden, weight, labels, token_weights, torch.is_grad_enabled(), choice, group)


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss, and if gradients are enabled, both gradients for a grad_output of 1."""

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
        target_N, scale_N = _blocks.find_targets(labels, weight, _blocks.vocabulary_rows(weight, group), group)
        unknown_N = scale_N.isnan()
        if token_weights is not None:
            scale_N = scale_N * token_weights
        nll_N = torch.empty_like(scale_N)
        needs_hidden, needs_weight = (wants_gradients and needs for needs in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Without tokens no block writes it.
        new_weight = torch.empty_like if len(hidden) else torch.zeros_like
        grad_weight = new_weight(weight, dtype=nll_N.dtype) if needs_weight else None
        to_gradient = _choose_softmax(backend, group)
        tokens = _blocks.block_tokens(weight)
        blocks = zip(*(x.split(tokens) for x in (hidden, target_N, scale_N, nll_N)))
        for start, (hidden_CD, target_C, scale_C, nll_C) in zip(range(0, len(hidden), tokens), blocks):
            logits = matmul(hidden_CD, weight.T)
            to_gradient(logits, target_C, scale_C, nll_C, needs_hidden or needs_weight)
            if grad_hidden is not None:
                grad_hidden[start : start + tokens] = matmul(logits, weight)
            if grad_weight is not None:
                _blocks.add_weight_gradient(grad_weight, logits, hidden_CD, first=start == 0)
        # Zero the ignored losses before the sum, because 0 times an infinite loss would make it NaN.
        nll_N.masked_fill_(scale_N == 0, 0.0).masked_fill_(unknown_N, torch.nan)
        loss = torch.dot(nll_N, scale_N)
        save(ctx, statistics=(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)))
        ctx.mark_non_differentiable(nll_N)
        return loss, nll_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *_blocks.scaled(ctx.saved_tensors, grad_loss), *[None] * 5


def _choose_softmax(backend: str, group: dist.ProcessGroup | None) -> _ToGradient:
    """Return the backend's softmax of a block, over the ranks of `group` if it is not None."""
    if group is not None:
        return _over_ranks(*_blocks.choose_halves(backend), group)
    if backend == "triton":
        from kernels.triton import losses  # lazily: not every machine has Triton

        return losses.to_gradient
    return _to_gradient


def _over_ranks(statistics: Half, part_to_gradient: Half, group: dist.ProcessGroup) -> _ToGradient:
    """Return the softmax of a block with a sharded vocabulary: both halves, with one all-gather between them."""

    def to_gradient(logits_CV: Tensor, target_C: Tensor, scale_C: Tensor, nll_C: Tensor, wants_gradient: bool) -> None:
        local_2C = nll_C.new_empty(2, len(nll_C))
        statistics(logits_CV, target_C, scale_C, local_2C)
        all_P2C = _blocks.gather(local_2C, group)
        log_total_C = all_P2C[:, 0].logsumexp(0)
        torch.sub(log_total_C, all_P2C[:, 1].amax(0), out=nll_C)
        if wants_gradient:
            part_to_gradient(logits_CV, target_C, scale_C, log_total_C)

    return to_gradient


def _to_gradient(logits_CV: Tensor, target_C: Tensor, scale_C: Tensor, nll_C: Tensor, wants_gradient: bool) -> None:
    """Write the tokens' losses to nll, and if `wants_gradient`, overwrite the logits with their gradients."""
    rows = _blocks.softmax_rows(logits_CV)
    for logits, target, scale, nll in zip(*(x.split(rows) for x in (logits_CV, target_C[:, None], scale_C, nll_C))):
        wide = logits.to(nll.dtype)
        probabilities = torch.softmax(wide, dim=-1)
        # logsumexp = max(z) − log max(p): two cheap passes. log_softmax and exp would compute the exponentials twice.
        largest = wide.amax(-1).sub_(probabilities.amax(-1).log_())
        torch.sub(largest, wide.gather(1, target)[:, 0], out=nll)
        if wants_gradient:
            gradient = torch.mul(probabilities, scale[:, None], out=wide)
            gradient.scatter_add_(1, target, -scale[:, None])
            if gradient.dtype != logits.dtype:
                logits.copy_(gradient)
