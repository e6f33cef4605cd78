"""Log-probabilities of given tokens under a linear head, and the head's entropy, computed block by block of tokens.

    z_t = W h_t / temperature,   log p_t = z_t[y_t] − L_t,   L_t = logsumexp(z_t),   H_t = −sum_v p_tv log p_tv

These are the basis of losses sum_t w_t log p_t: supervised fine-tuning, and policy gradients, with H as the entropy
bonus (Williams 1992, "Simple statistical gradient-following algorithms", sections 4 and 5; Mnih et al. 2016,
arXiv:1602.01783, section 4). The weights may depend on the log-probabilities, so the gradients cannot be computed in
the forward. The backward recomputes each block's logits:

    d log p_t / d z_t = onehot(y_t) − p_t,   d H_t / d z_t = −p_t (log p_t + H_t)

Each rank of a group holds consecutive rows of W. Both results take three numbers per token and rank, in one all-gather
of the forward: l_tp and H_tp, the logsumexp and entropy of the rank's part z_tp, and a_tp = z_t[y_t] if the rank has
row y_t, else −inf. The entropy is the mean of the parts' entropies plus the entropy of the choice among parts (Shannon
1948, "A mathematical theory of communication", section 6). All its terms have one sign:

    L_t = logsumexp_p(l_tp),   log p_t = max_p(a_tp) − L_t,   H_t = sum_p exp(l_tp − L_t) (H_tp + L_t − l_tp)
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.autograd import once_differentiable, save
from kernels.backend import resolve
from kernels.losses import _blocks
from kernels.losses._blocks import IGNORE_LABEL as IGNORE_LABEL
from kernels.matmul import matmul
from kernels.triton import implementations


def token_log_probs_reference(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    temperature: float = 1.0,
    entropy: bool = True,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`token_log_probs` by log_softmax of the full logits; float64 stays float64."""
    ignored_N = tokens == IGNORE_LABEL
    logits_NV = _blocks.whole_logits(hidden.masked_fill(ignored_N[:, None], 0.0), weight, group)[:, :vocab_size]
    log_p_NV = (logits_NV / temperature).log_softmax(-1)
    log_probs_N = log_p_NV.gather(1, tokens.masked_fill(ignored_N, 0)[:, None])[:, 0].masked_fill(ignored_N, 0.0)
    if not entropy:
        return log_probs_N, None
    return log_probs_N, -(log_p_NV.exp() * log_p_NV).sum(-1).masked_fill(ignored_N, 0.0)


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = True,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Compute the tokens' log-probabilities under softmax(hidden · weightᵀ / temperature), and its entropies, in nats.

    Args:
        hidden: [N, D], floating.
        weight: [V, D] in hidden's dtype; the (possibly tied) output embedding.
        tokens: int64 [N] in [0, vocab_size), or -100 for an ignored token.
        temperature: divides the logits, in float32; above 0. A temperature of 1 costs nothing.
        entropy: whether to compute the entropies.
        vocab_size: number of leading rows of the whole head that stand for tokens; None for all. The other rows are
            padding: their probability is 0, as in generation, and so is their gradient.
        group: the ranks over which the vocabulary is sharded, or None. weight is then this rank's shard: rank r holds
            rows r · V to (r + 1) · V. The other inputs are the same on every rank.
        backend: auto, reference, torch or triton; torch and triton differ in the softmax only.

    Returns:
        (log_probs, entropies), float32 [N], or float64 for float64 inputs. Both are differentiable in hidden and
        weight, and 0 for ignored tokens. entropies is None if not requested. With `group` they refer to the whole
        vocabulary and are the same on every rank.

    Raises:
        ValueError: shapes or dtypes do not fit, a token is outside the vocabulary, the temperature is not above 0,
            vocab_size is not 1 to the head's rows, or the backend cannot serve these inputs. On a GPU tokens are not
            checked, which would synchronise; a token outside the vocabulary makes its own results, its row of hidden's
            gradient, and the gradient of weight NaN.
        RuntimeError: a second derivative is computed with a backend other than reference.

    With `group`, the gradient of weight is complete for this rank's rows. The gradient of hidden is PARTIAL: it covers
    this rank's rows only, and the caller sums it over the ranks, as on entering any tensor-parallel region. Every rank
    must backpropagate the same gradients of the results. The forward has one all-gather for all tokens, the backward
    no communication.

    Logits are computed by a matmul in hidden's dtype and converted to float32. The largest temporary holds the logits
    of one block of tokens. The gradient of weight is summed in float32. Ignored tokens, and tokens whose gradient is 0,
    do not affect the backward, even if their hidden states are not finite.
    """
    rows = _blocks.vocabulary_rows(weight, group)
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"token_log_probs: temperature must be above 0 and finite, not {temperature}")
    if vocab_size is not None and not 0 < vocab_size <= rows:
        raise ValueError(f"token_log_probs: vocab_size must be 1 to {rows}, the rows of weight, not {vocab_size}")
    vocabulary = rows if vocab_size is None else vocab_size
    _blocks.check_head("token_log_probs", hidden, weight, tokens, "token", vocabulary)
    choice = resolve("token_log_probs", backend, implementations(("torch", "reference"), hidden, weight, tokens))
    if choice == "reference":
        return token_log_probs_reference(hidden, weight, tokens, temperature, entropy, vocabulary, group)
    return _TokenLogProbs.apply(hidden, weight, tokens, temperature, entropy, vocabulary, choice, group)


class _TokenLogProbs(torch.autograd.Function):
    """Both results, from the statistics of each block of tokens. The backward recomputes the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tensor,
        temperature: float,
        entropy: bool,
        vocabulary: int,
        backend: str,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor | None]:
        target_N, scale_N = _blocks.find_targets(tokens, weight, vocabulary, group)
        first_row = 0 if group is None else dist.get_rank(group) * len(weight)
        ctx.own_rows = min(max(vocabulary - first_row, 0), len(weight))
        weight_VD = weight[: ctx.own_rows]
        statistics, ctx.part_to_gradient = _blocks.choose_halves(backend)
        # The statistics of a rank that holds padding only: −inf, −inf and an entropy of 0.
        local_SN = scale_N.new_full((3 if entropy else 2, len(hidden)), -torch.inf)
        local_SN[2:] = 0.0
        size = _blocks.block_tokens(weight)
        blocks = zip(*(x.split(size) for x in (hidden, target_N, scale_N)), local_SN.split(size, dim=1))
        for hidden_CD, target_C, scale_C, local_SC in blocks if ctx.own_rows else ():
            statistics(matmul(hidden_CD, weight_VD.T), target_C, scale_C, local_SC, 1 / temperature)
        all_PSN = _blocks.gather(local_SN, group)
        log_total_N = all_PSN[:, 0].logsumexp(0)
        log_probs_N = _counted(all_PSN[:, 1].amax(0).sub_(log_total_N), scale_N)
        entropy_N = _counted(_whole_entropy(all_PSN, log_total_N), scale_N) if entropy else None
        ctx.temperature = temperature
        of_rows = scale_N, log_total_N, entropy_N
        save(ctx, activations=(hidden,), weights=(weight,), statistics=of_rows, indices=(target_N,))
        # An unused result then gets None instead of a gradient of zeros, which would cost work for the entropy.
        ctx.set_materialize_grads(False)
        return log_probs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, scale_N, log_total_N, entropy_N, target_N = ctx.saved_tensors
        if grad_log_probs is None:
            grad_log_probs = torch.zeros_like(scale_N)
        log_probs_scale_N = _counted(grad_log_probs / -ctx.temperature, scale_N)
        counts_N = log_probs_scale_N != 0
        entropies: list[Tensor] = []
        if grad_entropy is not None:
            entropy_scale_N = _counted(grad_entropy / ctx.temperature, scale_N)
            counts_N |= entropy_scale_N != 0
            entropies = [entropy_scale_N, entropy_N.masked_fill(~counts_N, 0.0)]
        # Replace the numbers of tokens without a gradient by finite ones, because 0 times NaN is NaN.
        log_total_N = log_total_N.masked_fill(~counts_N, 0.0)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        weight_VD = weight[: ctx.own_rows]
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=scale_N.dtype) if needs_weight else None
        size = _blocks.block_tokens(weight)
        rows = target_N, log_probs_scale_N, log_total_N, *entropies
        blocks = zip(range(0, len(hidden), size), *(x.split(size) for x in (hidden, counts_N, *rows)))
        for start, hidden_CD, counts_C, target_C, scale_C, log_total_C, *entropies_C in blocks if ctx.own_rows else ():
            hidden_CD = hidden_CD.masked_fill(~counts_C[:, None], 0.0)
            logits = matmul(hidden_CD, weight_VD.T)
            ctx.part_to_gradient(logits, target_C, scale_C, log_total_C, 1 / ctx.temperature, *entropies_C)
            if grad_hidden is not None:
                grad_hidden[start : start + size] = matmul(logits, weight_VD)
            if grad_weight is not None:
                _blocks.add_weight_gradient(grad_weight[: ctx.own_rows], logits, hidden_CD, first=start == 0)
        gradients = grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)
        return *gradients, None, None, None, None, None, None


def _counted(x_N: Tensor, scale_N: Tensor) -> Tensor:
    """Return x · scale, but 0 where the scale is 0, even if x is not finite."""
    return torch.where(scale_N == 0, 0.0, x_N * scale_N)


def _whole_entropy(all_PSN: Tensor, log_total_N: Tensor) -> Tensor:
    """Compute the entropy of the whole softmax from the parts' logsumexps and entropies."""
    log_share_PN = (all_PSN[:, 0] - log_total_N).clamp_min_(_blocks.LOG_ZERO)
    return (log_share_PN.exp() * (all_PSN[:, 2] - log_share_PN)).sum(0)
