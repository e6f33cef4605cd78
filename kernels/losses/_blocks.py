"""What the losses of a linear head share: blocks of tokens, and the softmax of a vocabulary that is cut over ranks.

No more logits z_t = W h_t exist at once than those of one block of tokens. Of a group's ranks each holds consecutive
rows W_p of W (the parallel output embedding of Shoeybi et al. 2019, arXiv:1909.08053, section 3), and two or three
numbers a token and rank make the whole softmax, those of `statistics`; `part_to_gradient` is what follows on each rank.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kernels.indices import check_range, host_numbers
from kernels.matmul import matmul
from kernels.shapes import block_limit

IGNORE_LABEL = -100

# A block of tokens costs one pass over the gradient of weight, [V, D] in float32, so it holds at least 512 tokens, and
# up to 1024 while its logits take no more than 64 MiB. The softmax goes through it by rows that stay in the cache.
_LOGITS_BYTES = 64 << 20
_MIN_TOKENS = 512
_MAX_TOKENS = 1024
_SOFTMAX_ELEMENTS = 1 << 17
# Rows of the gradient of weight whose product exists at once, beside their sum: an eighth of a vocabulary of 256k.
_PRODUCT_ROWS = 1 << 15
# A logarithm in the place of log 0 = −inf, which times 0 would be NaN: its exponential is 0 in float64 as well.
LOG_ZERO = -1e4

# (logits_CV, target_C, scale_C, statistics_SC, ...) and (logits_CV, target_C, scale_C, log_total_C, ...): `statistics`
# and `part_to_gradient`, for a part of the vocabulary in which a target below 0 or from V on is another rank's.
Half = Callable[..., None]


def vocabulary_rows(weight: Tensor, group: dist.ProcessGroup | None) -> int:
    """Rows of the whole head."""
    return len(weight) * (1 if group is None else dist.get_world_size(group))


def check_projection(op: str, hidden: Tensor, weight: Tensor, name: str) -> None:
    """Raise ValueError unless hidden [N, D] and weight [V, D], with a row for each `name`, fit each other."""
    if not hidden.is_floating_point():
        raise ValueError(f"{op}: hidden must be floating, not {hidden.dtype}")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or hidden.dtype != weight.dtype:
        raise ValueError(
            f"{op}: hidden [N, D] and weight [V, D] must share D and dtype, not "
            f"{tuple(hidden.shape)} {hidden.dtype} and {tuple(weight.shape)} {weight.dtype}"
        )
    if not len(weight):
        raise ValueError(f"{op}: weight {tuple(weight.shape)} has no rows; a head has one for each {name}")


def check_head(op: str, hidden: Tensor, weight: Tensor, ids: Tensor, name: str, vocabulary: int) -> None:
    """Raise ValueError unless hidden [N, D], weight [V, D] and `ids`, each a `name`, int64 [N], fit each other."""
    check_projection(op, hidden, weight, name)
    if ids.shape != hidden.shape[:1] or ids.dtype != torch.int64:
        raise ValueError(f"{op}: {name}s must be int64 [{len(hidden)}], not {ids.dtype} {tuple(ids.shape)}")
    check_range(op, name, ids, vocabulary, besides=IGNORE_LABEL)


def check_token_weights(op: str, token_weights: Tensor | None, tokens: int) -> None:
    """Raise ValueError unless the token weights, if there are any, are [N] and want no gradient."""
    if token_weights is None:
        return
    if token_weights.shape != (tokens,):
        raise ValueError(f"{op}: token_weights {tuple(token_weights.shape)} must be [{tokens}]")
    if token_weights.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: token_weights would get no gradient: detach them first")


def find_targets(
    ids: Tensor, weight: Tensor, vocabulary: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Where the ids are among this rank's rows, int64 [N], and what each counts, in weight's dtype or float32: 0 or 1.

    Ids that nobody could look at, and that are outside the vocabulary, read the row of another and count NaN.
    """
    exists_N = (ids >= 0) & (ids < vocabulary)
    scale_N = exists_N.to(torch.promote_types(weight.dtype, torch.float32))
    scale_N.masked_fill_(~exists_N & (ids != IGNORE_LABEL), torch.nan)
    target_N = ids.masked_fill(~exists_N, 0)
    if group is not None:
        target_N -= dist.get_rank(group) * len(weight)
    return target_N, scale_N


def whole_logits(hidden: Tensor, weight: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All logits, float32 or wider, for the references."""
    logits_NV = F.linear(hidden, weight)
    if group is not None:
        # The other ranks' logits are constants here: what is left is this rank's share of every gradient.
        parts = [torch.empty_like(logits_NV) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, logits_NV.detach(), group=group)
        parts[dist.get_rank(group)] = logits_NV
        logits_NV = torch.cat(parts, dim=1)
    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))


def block_tokens(weight: Tensor) -> int:
    """Tokens of a block."""
    return min(max(_LOGITS_BYTES // (weight.element_size() * max(len(weight), 1)), _MIN_TOKENS), _MAX_TOKENS)


def softmax_rows(logits_CV: Tensor) -> int:
    """Tokens of a block whose softmax is taken at once."""
    return max(1, block_limit(_SOFTMAX_ELEMENTS) // logits_CV.shape[1]) if logits_CV.is_cpu else len(logits_CV)


def add_weight_gradient(grad_VD: Tensor, logits_CV: Tensor, hidden_CD: Tensor, *, first: bool) -> None:
    """Add a block's part of the gradient of weight to the sum, or begin it.

    grad_VD is wide, float32, or float64 for float64 inputs: products in half precision are added up in float32.
    """
    add = Tensor.copy_ if first else Tensor.add_
    for logits_CR, grad_RD in zip(logits_CV.split(_PRODUCT_ROWS, dim=1), grad_VD.split(_PRODUCT_ROWS)):
        add(grad_RD, matmul(logits_CR.T, hidden_CD))


def scaled(gradients: Sequence[Tensor | None], grad_loss: Tensor) -> Sequence[Tensor | None]:
    """Gradients for a grad_output of 1, times the one that came."""
    # Reading the factor would make a GPU wait; on the CPU it saves a pass over the gradients.
    if grad_loss.is_cpu and host_numbers(grad_loss) == 1.0:
        return gradients
    return [None if gradient is None else gradient * grad_loss for gradient in gradients]


def choose_halves(backend: str) -> tuple[Half, Half]:
    """`statistics` and `part_to_gradient` of a backend."""
    if backend == "triton":
        from kernels.triton import losses  # here, for machines without triton

        return losses.statistics, losses.part_to_gradient
    return statistics, part_to_gradient


def gather(local_SN: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All ranks' statistics [P, S, N] in one exchange."""
    if group is None:
        return local_SN[None]
    # Gathered rather than reduced: every rank adds in the same order, so that the losses agree to the last bit.
    all_PSN = local_SN.new_empty(dist.get_world_size(group), *local_SN.shape)
    dist.all_gather(list(all_PSN), local_SN, group=group)
    return all_PSN


def statistics(
    logits_CV: Tensor, target_C: Tensor, scale_C: Tensor, statistics_SC: Tensor, inverse_temperature: float = 1.0
) -> None:
    """Write what a rank must tell the others of its part of the vocabulary.

    Args:
        logits_CV: floating; they stay as they are.
        target_C: int64; below 0 or from V on where another part has it.
        scale_C: 0 where a token counts nothing, whose statistics may then be anything.
        statistics_SC: float32 or wider; of the logits times inverse_temperature it gets each token's logsumexp, its
            target's logit, −inf where another part has it, and, if there is a third row, the entropy of their softmax.
        inverse_temperature: above 0.
    """
    del scale_C  # which the Triton kernel reads, to pass over tokens that count nothing
    rows, last = softmax_rows(logits_CV), logits_CV.shape[1] - 1
    log_total_C, at_target_C, *entropy = statistics_SC
    largest_C, total_C, mean_C = (torch.empty_like(log_total_C) for _ in range(3))
    blocks = zip(*(x.split(rows) for x in (logits_CV, largest_C, total_C, mean_C)))
    for logits, largest, total, mean in blocks:
        # torch.logsumexp, step by step, for the entropy takes the same exponentials.
        wide = logits.to(total.dtype)
        if inverse_temperature != 1:
            wide = wide * inverse_temperature
        torch.amax(wide, -1, out=largest).nan_to_num_(torch.nan, 0.0, 0.0)
        below = wide - largest[:, None]
        p = below.exp() if entropy else below.exp_()
        torch.sum(p, -1, out=total)
        if entropy:
            torch.sum(p.mul_(below.clamp_min_(LOG_ZERO)), -1, out=mean)
    torch.log(total_C, out=log_total_C)
    if entropy:
        # H = log S − sum p (z − max) / S has terms of one sign, where logsumexp(z) − sum p z would cancel. Of logits
        # of −inf alone it is 0.
        entropy[0].copy_(log_total_C - mean_C / total_C).masked_fill_(total_C == 0, 0.0)
    log_total_C += largest_C
    inside_C = target_C.clamp(0, last)
    at_target_C.copy_(logits_CV.gather(1, inside_C[:, None])[:, 0]).mul_(inverse_temperature)
    at_target_C.masked_fill_(inside_C != target_C, -torch.inf)


def part_to_gradient(
    logits_CV: Tensor,
    target_C: Tensor,
    scale_C: Tensor,
    log_total_C: Tensor,
    inverse_temperature: float = 1.0,
    entropy_scale_C: Tensor | None = None,
    entropy_C: Tensor | None = None,
) -> None:
    """Write, over the logits z, scale (p − onehot) − entropy_scale p (log p + H), log p = inverse_temperature z − L.

    Args:
        logits_CV, target_C, inverse_temperature: as in `statistics`.
        scale_C, log_total_C: float32 or wider; L is the logsumexp of each token's logits over all parts.
        entropy_scale_C, entropy_C: in their dtype; H is the entropy of the softmax over all parts. Both or neither.
    """
    rows, last = softmax_rows(logits_CV), logits_CV.shape[1] - 1
    entropies = [] if entropy_scale_C is None or entropy_C is None else [entropy_scale_C, entropy_C]
    blocks = zip(*(x.split(rows) for x in (logits_CV, target_C, scale_C, log_total_C, *entropies)))
    for logits, target, scale, log_total, *entropy in blocks:
        # Over the logits themselves, or over their wider copy.
        wide = logits.to(log_total.dtype)
        if inverse_temperature != 1:
            wide.mul_(inverse_temperature)
        log_p = wide.sub_(log_total[:, None])
        if entropy:
            entropy_scale, whole_entropy = entropy
            log_p.clamp_min_(LOG_ZERO)
            p = log_p.exp()
            constant = scale - entropy_scale * whole_entropy
            gradient = torch.addcmul(constant[:, None], log_p, entropy_scale[:, None], value=-1, out=log_p).mul_(p)
        else:
            gradient = log_p.exp_().mul_(scale[:, None])
        inside = target.clamp(0, last)
        gradient.scatter_add_(1, inside[:, None], -scale.masked_fill(inside != target, 0.0)[:, None])
        if gradient.dtype != logits.dtype:
            logits.copy_(gradient)
