"""KL divergence between a teacher's and a student's next-token distributions, computed block by block of tokens.

    p_t = softmax(W_T h_Tt / temperature),   q_t = softmax(W_S h_St / temperature)
    forward: KL(p_t || q_t) = sum_v p_tv (log p_tv − log q_tv),   reverse: KL(q_t || p_t)
    loss = sum_t w_t KL_t

Distillation usually minimises the forward divergence (Hinton et al. 2015, arXiv:1503.02531, section 2; per word: Kim
and Rush 2016, arXiv:1606.07947, section 3.1). The reverse divergence lets the student pick among the teacher's modes
(Gu et al. 2023, arXiv:2306.08543, section 2). The teacher gets no gradient. The student's scaled logits z_t get

    forward: d KL_t / d z_t = q_t − p_t,   reverse: d KL_t / d z_t = q_t (log q_t − log p_t − KL_t)

The loss is a plain sum, so the forward computes both gradients block by block, as in linear_cross_entropy, and the
teacher's logits only once.

Each rank of a group holds consecutive rows of both heads. The whole divergence takes three numbers per token and rank,
in one all-gather per block: the logsumexps of the rank's two parts, and the divergence D_tp between the softmaxes of
these parts. With A_tp and B_tp the probability of part p under the two distributions, the chain rule of relative
entropy (Cover and Thomas, "Elements of information theory", theorem 2.5.3) gives

    KL(a_t || b_t) = sum_p A_tp (D_tp + log A_tp − log B_tp)
"""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.autograd import once_differentiable, save
from kernels.backend import resolve
from kernels.losses import _blocks
from kernels.matmul import matmul
from kernels.triton import implementations

Direction = Literal["forward", "reverse"]

# Called with (logits_CV, teacher_CV, scale_C, kl_C, wants_gradient). Writes the divergences to kl, and overwrites the
# student's logits with their gradients.
_ToGradient = Callable[[Tensor, Tensor, Tensor, Tensor, bool], None]


def distillation_kl_reference(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_weights: Tensor | None = None,
    direction: Direction = "forward",
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """`distillation_kl` by log_softmax of both models' full logits; float64 stays float64."""
    ignored_N = torch.zeros_like(hidden[:, 0], dtype=torch.bool) if token_weights is None else token_weights == 0
    log_q_NV, log_p_NV = (
        (_blocks.whole_logits(x.masked_fill(ignored_N[:, None], 0.0), head, group) / temperature).log_softmax(-1)
        for x, head in ((hidden, weight), (teacher_hidden.detach(), teacher_weight.detach()))
    )
    log_a_NV, log_b_NV = (log_q_NV, log_p_NV) if direction == "reverse" else (log_p_NV, log_q_NV)
    kl_N = (log_a_NV.exp() * (log_a_NV - log_b_NV)).sum(-1).masked_fill(ignored_N, 0.0)
    return (kl_N if token_weights is None else kl_N * token_weights).sum(), kl_N.detach()


def distillation_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_weights: Tensor | None = None,
    *,
    direction: Direction = "forward",
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute the weighted sum over tokens of the KL divergence between a teacher's and a student's distributions.

    Args:
        hidden: the student's hidden states, [N, D_S], floating.
        weight: the student's output embedding, [V, D_S] in hidden's dtype.
        teacher_hidden: the teacher's hidden states, [N, D_T], floating, of any width and dtype.
        teacher_weight: the teacher's output embedding, [V, D_T] in teacher_hidden's dtype. Row v is the same token in
            both embeddings.
        token_weights: float32 [N] without a gradient, or None for ones; a token with weight 0 is ignored.
        direction: forward, KL(teacher || student), or reverse, KL(student || teacher).
        temperature: divides both models' logits, in float32; above 0. The gradient scales as 1 / temperature². To keep
            its size, multiply the loss by temperature² (Hinton et al. 2015, section 2); this function does not.
        group: the ranks over which the vocabulary is sharded, or None. Both weights are then this rank's shards: rank r
            holds rows r · V to (r + 1) · V. The other inputs are the same on every rank.
        backend: auto, reference, torch or triton; torch and triton differ in the softmaxes only.

    Returns:
        (loss_sum, kl): a float32 scalar, differentiable in hidden and weight, and the unweighted divergences in nats,
        float32 [N] without a gradient, 0 for ignored tokens. Both are float64 for float64 inputs. With `group` they
        refer to the whole vocabulary and are the same on every rank.

    Raises:
        ValueError: shapes or dtypes do not fit, the heads have different numbers of rows, the temperature is not above
            0, the direction is unknown, the token weights require a gradient, or the backend cannot serve these inputs.
        RuntimeError: a second derivative is computed with a backend other than reference.

    With `group`, the gradient of weight is complete for this rank's rows. The gradient of hidden is PARTIAL: it covers
    this rank's rows only, and the caller sums it over the ranks, as on entering any tensor-parallel region. Every rank
    backpropagates from the whole loss, not from a share of it.

    Logits are computed by matmuls in the inputs' dtypes and converted to float32. The largest temporaries hold both
    models' logits of one block of tokens. The gradient of weight is summed in float32. An ignored token does not affect
    the gradients, even if its hidden states are not finite.
    """
    _check(hidden, weight, teacher_hidden, teacher_weight, token_weights, direction, temperature)
    inputs = hidden, weight, teacher_hidden, teacher_weight, token_weights
    choice = resolve("distillation_kl", backend, implementations(("torch", "reference"), *inputs))
    if choice == "reference":
        return distillation_kl_reference(*inputs, direction, temperature, group)
    # Grad mode is passed as an argument: inside a Function it is always off, and needs_input_grad ignores it.
    wants_gradients = torch.is_grad_enabled()
    return _DistillationKL.apply(*inputs, direction == "reverse", 1 / temperature, wants_gradients, choice, group)


def _check(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_weights: Tensor | None,
    direction: str,
    temperature: float,
) -> None:
    op = "distillation_kl"
    _blocks.check_projection(op, hidden, weight, "token")
    _blocks.check_projection(f"{op}, teacher", teacher_hidden, teacher_weight, "token")
    if len(hidden) != len(teacher_hidden) or len(weight) != len(teacher_weight):
        raise ValueError(
            f"{op}: student and teacher must have equally many hidden states and equally many rows, not "
            f"{len(hidden)} and {len(teacher_hidden)} states, {len(weight)} and {len(teacher_weight)} rows"
        )
    _blocks.check_token_weights(op, token_weights, len(hidden))
    if direction not in get_args(Direction):
        raise ValueError(f"{op}: direction must be forward or reverse, not {direction!r}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"{op}: temperature must be above 0 and finite, not {temperature}")


class _DistillationKL(torch.autograd.Function):
    """The loss, and if gradients are enabled, both of the student's gradients for a grad_output of 1."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        token_weights: Tensor | None,
        reverse: bool,
        inverse_temperature: float,
        wants_gradients: bool,
        backend: str,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(torch.promote_types(hidden.dtype, teacher_hidden.dtype), torch.float32)
        scale_N = hidden.new_ones(len(hidden), dtype=wide) if token_weights is None else token_weights.to(wide)
        kl_N = torch.empty_like(scale_N)
        needs_hidden, needs_weight = (wants_gradients and needs for needs in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Without tokens no block writes it.
        new_weight = torch.empty_like if len(hidden) else torch.zeros_like
        grad_weight = new_weight(weight, dtype=wide) if needs_weight else None
        wants_any = needs_hidden or needs_weight
        to_gradient = _over_ranks(*_choose_halves(backend), inverse_temperature, reverse, group)
        tokens = _blocks.block_tokens(weight)
        blocks = zip(*(x.split(tokens) for x in (hidden, teacher_hidden, scale_N, kl_N)))
        for start, (hidden_CD, teacher_CD, scale_C, kl_C) in zip(range(0, len(hidden), tokens), blocks):
            # Zero the ignored tokens: their scale 0 times a non-finite number would be NaN.
            ignored_C1 = (scale_C == 0)[:, None]
            hidden_CD, teacher_CD = (x.masked_fill(ignored_C1, 0.0) for x in (hidden_CD, teacher_CD))
            logits = matmul(hidden_CD, weight.T)
            to_gradient(logits, matmul(teacher_CD, teacher_weight.T), scale_C, kl_C, wants_any)
            if grad_hidden is not None:
                grad_hidden[start : start + tokens] = matmul(logits, weight)
            if grad_weight is not None:
                _blocks.add_weight_gradient(grad_weight, logits, hidden_CD, first=start == 0)
            # Free the logits before the next block allocates its own and its teacher's.
            del logits
        kl_N.masked_fill_(scale_N == 0, 0.0)
        save(ctx, statistics=(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)))
        ctx.mark_non_differentiable(kl_N)
        return torch.dot(kl_N, scale_N), kl_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *_blocks.scaled(ctx.saved_tensors, grad_loss), *[None] * 8


def _choose_halves(backend: str) -> tuple[_blocks.Half, _blocks.Half]:
    """Return a backend's `_divergence` and `_to_gradient`."""
    if backend == "triton":
        from kernels.triton import losses  # lazily: not every machine has Triton

        return losses.divergence, losses.divergence_to_gradient
    return _divergence, _to_gradient


def _over_ranks(
    divergence: _blocks.Half,
    to_gradient: _blocks.Half,
    inverse_temperature: float,
    reverse: bool,
    group: dist.ProcessGroup | None,
) -> _ToGradient:
    """Return the function for a block's logits: both halves, with one all-gather between them if there is a group."""

    def both(logits_CV: Tensor, teacher_CV: Tensor, scale_C: Tensor, kl_C: Tensor, wants_gradient: bool) -> None:
        told_3C = kl_C.new_empty(3, len(kl_C))
        divergence(logits_CV, teacher_CV, scale_C, told_3C, inverse_temperature, reverse)
        totals_2C = _combine(_blocks.gather(told_3C, group), kl_C, reverse)
        if wants_gradient:
            factor_C = scale_C * inverse_temperature
            to_gradient(logits_CV, teacher_CV, factor_C, totals_2C, kl_C, inverse_temperature, reverse)

    return both


def _divergence(
    logits_CV: Tensor, teacher_CV: Tensor, scale_C: Tensor, told_3C: Tensor, inverse_temperature: float, reverse: bool
) -> None:
    """Write the statistics of this rank's part of the vocabulary, which the ranks then exchange.

    Args:
        logits_CV, teacher_CV: floating; not modified.
        scale_C: 0 for an ignored token, whose statistics may be anything.
        told_3C: float32 or wider, the output. Per token, of the logits times inverse_temperature: the student's
            logsumexp, the teacher's, and the divergence between their softmaxes.
        inverse_temperature: above 0.
        reverse: KL(student || teacher) if true, else KL(teacher || student).
    """
    del scale_C  # read by the Triton kernel only, to skip ignored tokens
    rows = _blocks.softmax_rows(logits_CV)
    for *logits, told in zip(logits_CV.split(rows), teacher_CV.split(rows), told_3C.split(rows, dim=1)):
        logs = []
        for log_total, part in zip(told, logits):
            scaled = _scaled(part, told.dtype, inverse_temperature)
            logs.append(scaled.log_softmax(-1))
            # log_softmax does not return logsumexp = max(z) − max(log p).
            torch.sub(scaled.amax(-1), logs[-1].amax(-1), out=log_total)
        log_a, log_b = logs if reverse else logs[::-1]
        torch.sum(log_a.exp() * (log_a - log_b), -1, out=told[2])


def _combine(all_P3C: Tensor, kl_C: Tensor, reverse: bool) -> Tensor:
    """Combine all ranks' statistics: write the divergence to kl_C, return both logsumexps over all parts, [2, C]."""
    totals_2C = all_P3C[:, :2].logsumexp(0)
    log_shares = (all_P3C[:, :2] - totals_2C).unbind(1)
    log_a_PC, log_b_PC = log_shares if reverse else log_shares[::-1]
    torch.sum(log_a_PC.exp() * (all_P3C[:, 2] + log_a_PC - log_b_PC), 0, out=kl_C)
    return totals_2C


def _to_gradient(
    logits_CV: Tensor,
    teacher_CV: Tensor,
    factor_C: Tensor,
    totals_2C: Tensor,
    kl_C: Tensor,
    inverse_temperature: float,
    reverse: bool,
) -> None:
    """Overwrite the student's logits with factor (q − p), or factor q (log q − log p − KL) if reverse.

    Args:
        logits_CV: the student's, overwritten.
        teacher_CV, inverse_temperature, reverse: as in `_divergence`.
        factor_C: a factor per token.
        totals_2C: the logsumexps of student and teacher over all parts.
        kl_C: the divergence of each token, over all parts.
    """
    rows = _blocks.softmax_rows(logits_CV)
    blocks = zip(*(x.split(rows) for x in (logits_CV, teacher_CV, kl_C, factor_C)), totals_2C.split(rows, dim=1))
    for logits, teacher, kl, factor, totals in blocks:
        log_q, log_p = (
            _scaled(x, totals.dtype, inverse_temperature) - total[:, None]
            for x, total in zip((logits, teacher), totals)
        )
        q = log_q.exp()
        gradient = q.mul_(log_q.sub_(log_p).sub_(kl[:, None])) if reverse else q.sub_(log_p.exp_())
        logits.copy_(gradient.mul_(factor[:, None]))


def _scaled(logits: Tensor, dtype: torch.dtype, inverse_temperature: float) -> Tensor:
    """Divide logits by the temperature. Both halves must round identically, because errors of large logits show."""
    wide = logits.to(dtype)
    return wide if inverse_temperature == 1 else wide * inverse_temperature
