"""Shared by the losses of a linear head: blocks of tokens, and the softmax over a vocabulary sharded over ranks.

Only the logits z_t = W h_t of one block of tokens exist at a time. Each rank of a group holds consecutive rows W_p of W
(the parallel output embedding of Shoeybi et al. 2019, arXiv:1909.08053, section 3). The whole softmax follows from two
or three numbers per token and rank, computed by `statistics`. `part_to_gradient` then computes each rank's gradient.
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

# Each block of tokens costs one pass over the gradient of weight, [V, D] in float32. A block therefore has at least 512
# tokens, and up to 1024 as long as its logits take at most 64 MiB. The softmax processes it in cache-sized groups of
# rows.
_LOGITS_BYTES = 64 << 20
_MIN_TOKENS = 512
_MAX_TOKENS = 1024
_SOFTMAX_ELEMENTS = 1 << 17
# Rows of the gradient of weight computed at a time, to bound the temporary: an eighth of a vocabulary of 256k.
_PRODUCT_ROWS = 1 << 15
# Stands for log 0 = −inf, which would give NaN when multiplied by 0. Its exponential is 0 even in float64.
LOG_ZERO = -1e4

# Type of `statistics`, called with (logits_CV, target_C, scale_C, statistics_SC, ...), and of `part_to_gradient`,
# called with (logits_CV, target_C, scale_C, log_total_C, ...). A target outside [0, V) belongs to another rank.
Half = Callable[..., None]


def vocabulary_rows(weight: Tensor, group: dist.ProcessGroup | None) -> int:
    """Return the number of rows of the whole head."""
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
    """Raise ValueError unless the token weights are None, or [N] without a gradient."""
    if token_weights is None:
        return
    if token_weights.shape != (tokens,):
        raise ValueError(f"{op}: token_weights {tuple(token_weights.shape)} must be [{tokens}]")
    if token_weights.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: token_weights must not require a gradient; detach them")


def find_targets(
    ids: Tensor, weight: Tensor, vocabulary: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Locate the ids in this rank's rows.

    Returns:
        Each id's row relative to this rank's first, int64 [N], and its scale, [N] in weight's dtype but at least
        float32: 1, 0 for IGNORE_LABEL, NaN for an id outside the vocabulary (possible only on a GPU, where ids are not
        checked).
    """
    exists_N = (ids >= 0) & (ids < vocabulary)
    scale_N = exists_N.to(torch.promote_types(weight.dtype, torch.float32))
    scale_N.masked_fill_(~exists_N & (ids != IGNORE_LABEL), torch.nan)
    target_N = ids.masked_fill(~exists_N, 0)
    if group is not None:
        target_N -= dist.get_rank(group) * len(weight)
    return target_N, scale_N


def whole_logits(hidden: Tensor, weight: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Compute all logits, [N, V of all ranks] in float32 or wider, for the references."""
    logits_NV = F.linear(hidden, weight)
    if group is not None:
        # The other ranks' logits are constants, so each gradient is this rank's share.
        parts = [torch.empty_like(logits_NV) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, logits_NV.detach(), group=group)
        parts[dist.get_rank(group)] = logits_NV
        logits_NV = torch.cat(parts, dim=1)
    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))


def block_tokens(weight: Tensor) -> int:
    """Return the number of tokens per block."""
    return min(max(_LOGITS_BYTES // (weight.element_size() * max(len(weight), 1)), _MIN_TOKENS), _MAX_TOKENS)


def softmax_rows(logits_CV: Tensor) -> int:
    """Return the number of a block's tokens whose softmax is computed at once."""
    return max(1, block_limit(_SOFTMAX_ELEMENTS) // logits_CV.shape[1]) if logits_CV.is_cpu else len(logits_CV)


def add_weight_gradient(grad_VD: Tensor, logits_CV: Tensor, hidden_CD: Tensor, *, first: bool) -> None:
    """Add a block's gradient of weight to grad_VD, or write it if the block is the first.

    grad_VD is float32, or float64 for float64 inputs, so products in half precision are summed in float32.
    """
    add = Tensor.copy_ if first else Tensor.add_
    for logits_CR, grad_RD in zip(logits_CV.split(_PRODUCT_ROWS, dim=1), grad_VD.split(_PRODUCT_ROWS)):
        add(grad_RD, matmul(logits_CR.T, hidden_CD))


def scaled(gradients: Sequence[Tensor | None], grad_loss: Tensor) -> Sequence[Tensor | None]:
    """Multiply gradients, computed for a grad_output of 1, by the actual one."""
    # On the CPU a factor of 1 saves a pass over the gradients. On a GPU reading it would synchronise.
    if grad_loss.is_cpu and host_numbers(grad_loss) == 1.0:
        return gradients
    return [None if gradient is None else gradient * grad_loss for gradient in gradients]


def choose_halves(backend: str) -> tuple[Half, Half]:
    """Return a backend's `statistics` and `part_to_gradient`."""
    if backend == "triton":
        from kernels.triton import losses  # lazily: not every machine has Triton

        return losses.statistics, losses.part_to_gradient
    return statistics, part_to_gradient


def gather(local_SN: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All-gather the ranks' statistics to [P, S, N]."""
    if group is None:
        return local_SN[None]
    # Gathered instead of reduced: every rank sums in the same order, so the losses agree bitwise.
    all_PSN = local_SN.new_empty(dist.get_world_size(group), *local_SN.shape)
    dist.all_gather(list(all_PSN), local_SN, group=group)
    return all_PSN


def statistics(
    logits_CV: Tensor, target_C: Tensor, scale_C: Tensor, statistics_SC: Tensor, inverse_temperature: float = 1.0
) -> None:
    """Write the statistics of this rank's part of the vocabulary, which the ranks then exchange.

    Args:
        logits_CV: floating; not modified.
        target_C: int64; outside [0, V) if another rank has the row.
        scale_C: 0 for an ignored token, whose statistics may be anything.
        statistics_SC: float32 or wider, S = 2 or 3, the output. Per token, of the logits times inverse_temperature: the
            logsumexp, the target's logit (−inf if another rank has it), and with S = 3 the softmax's entropy.
        inverse_temperature: above 0.
    """
    del scale_C  # read by the Triton kernel only, to skip ignored tokens
    rows, last = softmax_rows(logits_CV), logits_CV.shape[1] - 1
    log_total_C, at_target_C, *entropy = statistics_SC
    largest_C, total_C, mean_C = (torch.empty_like(log_total_C) for _ in range(3))
    blocks = zip(*(x.split(rows) for x in (logits_CV, largest_C, total_C, mean_C)))
    for logits, largest, total, mean in blocks:
        # torch.logsumexp step by step, because the entropy uses the same exponentials.
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
        # The terms of H = log S − sum p (z − max) / S have one sign; logsumexp(z) − sum p z would cancel. If all logits
        # are −inf, H is 0.
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
    """Overwrite the logits z with scale (p − onehot) − entropy_scale p (log p + H), log p = inverse_temperature z − L.

    Args:
        logits_CV: floating; overwritten.
        target_C, inverse_temperature: as in `statistics`.
        scale_C, log_total_C: float32 or wider; log_total is L, each token's logsumexp over all ranks' logits.
        entropy_scale_C, entropy_C: in their dtype; entropy is H, of the softmax over all ranks. Both or neither.
    """
    rows, last = softmax_rows(logits_CV), logits_CV.shape[1] - 1
    entropies = [] if entropy_scale_C is None or entropy_C is None else [entropy_scale_C, entropy_C]
    blocks = zip(*(x.split(rows) for x in (logits_CV, target_C, scale_C, log_total_C, *entropies)))
    for logits, target, scale, log_total, *entropy in blocks:
        # Works in place on the logits, or on a copy in higher precision.
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
