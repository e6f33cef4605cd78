"""Log-probabilities of given tokens under a linear head, and its entropy, without the logits of more than one block.

    z_t = W h_t / temperature,   log p_t = z_t[y_t] − L_t,   L_t = logsumexp(z_t),   H_t = −sum_v p_tv log p_tv

The base of losses sum_t w_t log p_t: supervised fine-tuning, and policy gradients, of whose bonus H is a part (Williams
1992, "Simple statistical gradient-following algorithms", sections 4 and 5; Mnih et al. 2016, arXiv:1602.01783, section
4). The weights may depend on the log-probabilities themselves, so the backward comes later than the forward and
computes each block's logits again:

    d log p_t / d z_t = onehot(y_t) − p_t,   d H_t / d z_t = −p_t (log p_t + H_t)

Over a group of ranks, each of which holds consecutive rows of W, three numbers a token and rank make both, in one
all-gather of the forward: l_tp and H_tp, logsumexp and entropy of this rank's part z_tp, and a_tp = z_t[y_t] where it
has row y_t, else −inf. The entropy is the mean of the parts' and that of the choice among parts (Shannon 1948, "A
mathematical theory of communication", section 6), all terms of one sign:

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
    """`token_log_probs` through log_softmax on the whole logits; float64 stays float64."""
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
    """The tokens' log-probabilities under softmax(hidden · weightᵀ / temperature), and its entropies, in nats.

    Args:
        hidden: [N, D], floating.
        weight: [V, D] in hidden's dtype; the (perhaps tied) output embedding.
        tokens: int64 [N] in [0, vocab_size), or -100 for one that counts nothing.
        temperature: divides the logits, in float32; above 0. 1 costs nothing.
        entropy: whether the entropies are wanted.
        vocab_size: rows of the whole head that stand for tokens, the first ones; None for all. The others, the
            embedding's padding, have probability 0, as in generation, and a gradient of 0.
        group: the ranks over which the vocabulary is cut, or None. weight is then this rank's part, [V, D] on each:
            rank r holds rows r · V to (r + 1) · V of the whole. All else is the same on every rank.
        backend: auto, reference, torch or triton, of which the last two differ in the softmax alone.

    Returns:
        (log_probs, entropies), float32 [N], or float64 for float64 inputs, both differentiable in hidden and weight
        and 0 where a token counts nothing; entropies is None unless wanted. With `group` they are those of the whole
        vocabulary, the same on every rank.

    Raises:
        ValueError: shapes or dtypes do not fit each other, a token is outside the vocabulary, the temperature is not
            above 0, vocab_size is not among the rows of the head, or the backend cannot serve these inputs. On a GPU,
            where looking at tokens would wait for it, one that is outside makes its own results NaN, its row of the
            gradient of hidden, and the gradient of weight.
        RuntimeError: a second derivative is asked for, of another backend than the reference.

    With `group`, the gradient of weight is that of this rank's rows and whole, while the gradient of hidden is this
    rank's PARTIAL one, through its own rows: the caller adds up the ranks', as where any tensor-parallel region is
    entered. Every rank backpropagates the same gradients of the results. The forward has one exchange, of all tokens,
    and the backward none.

    Logits come from a matmul in hidden's dtype and are float32 after it. The largest temporary holds the logits of one
    block of tokens; the gradient of weight is summed in float32. A token without a gradient, and one that counts
    nothing, has no part in the backward, whatever its hidden state holds.
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
    """Both results from the statistics of each block of tokens; the backward makes its logits again."""

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
        # What a rank tells of no rows at all: −inf, −inf and an entropy of 0.
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
        # A result that no loss reads has no gradient, rather than one of zeros: the entropy's costs work.
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
        # Finite numbers in the place of what has no part: 0 times a NaN would be one.
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
    """0 where a token counts nothing, whatever x is there; NaN where it counts NaN."""
    return torch.where(scale_N == 0, 0.0, x_N * scale_N)


def _whole_entropy(all_PSN: Tensor, log_total_N: Tensor) -> Tensor:
    """The entropy of the whole softmax from the parts' logsumexps and entropies."""
    log_share_PN = (all_PSN[:, 0] - log_total_N).clamp_min_(_blocks.LOG_ZERO)
    return (log_share_PN.exp() * (all_PSN[:, 2] - log_share_PN)).sum(0)
