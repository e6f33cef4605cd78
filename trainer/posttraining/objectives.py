"""Objectives of post-training as rows of one policy-gradient estimator.

The unified estimator of HPT (arXiv:2509.04419, section 2) has four parts. The gradient of the objective is

    sum_t  mask_t · 1 / π_ref,t · A_t · ∇π_θ,t

a stabilisation mask, the probability in a denominator, an advantage, and the gradient of the likelihood. Since
∇π = π ∇log π, every row is a weight times the gradient of the log-probability:

    weight_t = mask_t · sg(π_θ,t / π_ref,t),    ∇loss_t = −weight_t · A_t · ∇log π_θ,t

sg stops the gradient. `OBJECTIVES` names the rows. Their loss also has the published loss's value, so that logs can be
compared. Tensors are flat: N tokens of S sequences of a micro-batch, in any order.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trainer.errors import ConfigError
from trainer.posttraining.divergences import MAX_LOG_RATIO, KlEstimator, k3, kl_estimate
from trainer.posttraining.segments import segment_sums

Denominator = Literal["policy", "old", "sequence", "one"]
Mask = Literal["none", "clip", "weight"]
Advantage = Literal["one", "reward", "value", "leave_one_out", "group", "group_std", "whitened", "union_std"]
Normalization = Literal["token_mean", "group_token_mean", "sequence_mean", "sequence_sum"]


@dataclass(frozen=True)
class Estimator:
    """A row of the table.

    Attributes:
        denominator: π_ref. policy: π_θ itself, so the ratio r is 1. old: π_old of the policy that sampled. sequence:
            π_θ (π_old/π_θ)^(1/length), so r is the geometric mean of the sequence's ratios. one: 1, so r is π_θ.
        mask: none. clip: PPO's, which drops tokens with A > 0 and r > 1 + high, or A < 0 and r < 1 − low. weight: drops
            none, but clips r to [1 − low, 1 + high].
        advantage: What A is, for the caller to compute: see trainer.posttraining.advantages.
        normalization: What the weights are, for the caller to compute: see `token_weights`.
        clip_low: low, at least 0. From 1 on there is no lower bound.
        clip_high: high, at least 0.
        dual_clip: c > 1, or None. Also drops tokens with A < 0 and r > c (Ye et al. 2019, arXiv:1912.09729).
        shape: γ > 0, or None. Replaces π_θ by f(π_θ) = π_θ / (π_θ + γ), which weighs unlikely tokens more. The
            denominator is then one.

    Raises:
        ConfigError: a value is out of its range, or two do not go together.
    """

    denominator: Denominator
    mask: Mask
    advantage: Advantage
    normalization: Normalization
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    shape: float | None = None

    def __post_init__(self) -> None:
        if not (self.clip_low >= 0 and self.clip_high >= 0):
            raise ConfigError(f"clip_low and clip_high must be at least 0, not {self.clip_low} and {self.clip_high}")
        if self.dual_clip is not None and not (self.dual_clip > 1 and self.mask == "clip"):
            raise ConfigError(
                f"dual_clip must be above 1, not {self.dual_clip}, and mask must be clip, not {self.mask}"
            )
        if self.mask != "none" and self.denominator in ("policy", "one"):
            raise ConfigError(f"mask {self.mask} clips a ratio: choose the denominator old or sequence")
        if self.shape is not None and not (self.shape > 0 and self.denominator == "one"):
            raise ConfigError(f"shape must be above 0, not {self.shape}, and needs the denominator one")


# fmt: off
OBJECTIVES: dict[str, Estimator] = {
    # Where sources differ, the row is the paper's. Terms for the KL divergence are added by `policy_loss`.
    #                         denominator  mask      advantage        normalization     low     high    dual  shape
    "sft":          Estimator("policy",    "none",   "one",           "token_mean"),
    # Williams 1992. The sequence is the action: its log-probability is the sum over its tokens.
    "reinforce":    Estimator("policy",    "none",   "reward",        "sequence_sum"),
    # Ahmadian et al. 2024, arXiv:2402.14740.
    "rloo":         Estimator("policy",    "none",   "leave_one_out", "sequence_sum"),
    # Hu 2025, arXiv:2501.03262.
    "reinforce++":  Estimator("old",       "clip",   "whitened",      "token_mean",     0.2,    0.2),
    # Schulman et al. 2017, arXiv:1707.06347.
    "ppo":          Estimator("old",       "clip",   "value",         "token_mean",     0.2,    0.2),
    # Shao et al. 2024, arXiv:2402.03300. The paper adds 0.04 times a k3 estimate of the KL divergence.
    "grpo":         Estimator("old",       "clip",   "group_std",     "sequence_mean",  0.2,    0.2),
    # Liu et al. 2025, arXiv:2503.20783. The constant is the largest number of new tokens.
    "dr_grpo":      Estimator("old",       "clip",   "group",         "sequence_sum",   0.2,    0.2),
    # Yu et al. 2025, arXiv:2503.14476. The formula averages over each group's tokens and then over groups
    # (group_token_mean); the text and every implementation average over the batch's tokens.
    "dapo":         Estimator("old",       "clip",   "group_std",     "token_mean",     0.2,    0.28),
    # Zheng et al. 2025, arXiv:2507.18071.
    "gspo":         Estimator("sequence",  "clip",   "group_std",     "sequence_mean",  3e-4,   4e-4),
    # MiniMax 2025, arXiv:2506.13585: no lower bound; the upper one is not published. TRL's is 5; verl has both bounds.
    # The table of arXiv:2509.04419 gives this row a mask; the paper and both implementations drop no token.
    "cispo":        Estimator("old",       "weight", "group_std",     "token_mean",     1.0,    4.0),
    # Yan et al. 2025, arXiv:2504.14945: the demonstrations. Its on-policy part is grpo with advantages of the union.
    "luffy":        Estimator("one",       "none",   "union_std",     "token_mean",     shape=0.1),
    # Fu et al. 2025, arXiv:2506.19767: reinforcement learning on demonstrations, π_old = 1 and unclipped.
    "srft":         Estimator("one",       "none",   "union_std",     "token_mean"),
}
# fmt: on


@dataclass(frozen=True, kw_only=True)
class KlTerm:
    """A term β · KL(π_θ || π_ref) of the loss.

    Attributes:
        coefficient: β.
        estimator: See trainer.posttraining.divergences.kl_estimate.
        importance: Whether to multiply the estimate by the ratio π_θ / π_old, with its gradient. For samples of π_old
            the value and the gradient of k1 and of k3 are then unbiased (DeepSeek-V3.2, arXiv:2512.02556).
            k2 and k3+ have unbiased gradients without it, at π_θ = π_old only.
    """

    coefficient: float
    estimator: KlEstimator = "k3"
    importance: bool = False


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Importance weights for samplers whose probabilities differ from the trainer's by precision or kernels.

    w = π_old / π_sampler, both of the same parameters. Without a correction, a small difference can end training in
    collapse (verl#2953, TRL#4493).

    Attributes:
        level: token: w of each token. sequence: the product over the sequence. geometric: its geometric mean.
        how: truncate: min(w, cap). mask: w, and 0 outside of [floor, cap]. reject: 1, and 0 outside of [floor, cap].
        cap: Upper bound, at least 1.
        floor: Lower bound of mask and reject, 0 to 1.

    Raises:
        ConfigError: a bound is out of its range.
    """

    level: Literal["token", "sequence", "geometric"] = "sequence"
    how: Literal["truncate", "mask", "reject"] = "mask"
    cap: float = 3.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not self.cap >= 1:
            raise ConfigError(f"correction: cap must be at least 1, not {self.cap}")
        if not 0 <= self.floor <= 1:
            raise ConfigError(f"correction: floor must be 0 to 1, not {self.floor}")


def metric_names(*, entropy: bool = False, kl: bool = False, sampler: bool = False) -> tuple[str, ...]:
    """Names of the metrics of `policy_loss`, in its order, given which optional tensors it gets."""
    return (
        *("tokens", "clipped_low", "clipped_high", "clipped_dual", "ratio", "ratio_squared", "k1", "k3"),
        *(("entropy",) if entropy else ()),
        *(("kl",) if kl else ()),
        *(_SAMPLER_METRICS if sampler else ()),
    )


_SAMPLER_METRICS = (
    *("correction", "correction_squared", "dropped"),
    *("sampler_ratio", "sampler_ratio_squared", "sampler_k1", "sampler_k3", "sampler_difference"),
)


def policy_loss(
    estimator: Estimator,
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    sequence: Tensor,
    weights: Tensor,
    *,
    sequences: int,
    entropies: Tensor | None = None,
    entropy_coefficient: float = 0.0,
    reference_log_probs: Tensor | None = None,
    kl: KlTerm | None = None,
    sampler_log_probs: Tensor | None = None,
    corrections: Sequence[Correction] = (),
    all_sum: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute sum_t w_t (c_t · loss_t + β KL_t − η H_t) of a micro-batch.

    c is the product of the corrections. They apply to the policy's loss alone, as in TRL.

    Args:
        estimator: The row of the table, or another combination.
        log_probs: log π_θ of the tokens, nats, floating [N]. Differentiable.
        old_log_probs: log π_old of the policy that sampled, by the trainer's kernels, [N]. None for one update per
            rollout: π_old = π_θ.
        advantages: A, [N].
        sequence: Number of each token's sequence in the micro-batch, int64 [N] in [0, sequences).
        weights: w, [N]. They normalise over the global batch: see `token_weights`. Tokens of weight 0 do not count,
            whatever their other values are; `sequence` must be in range all the same.
        sequences: S. An upper bound serves.
        entropies: H of the policy at each token, nats, [N], differentiable. None without a bonus and metric.
        entropy_coefficient: η.
        reference_log_probs: log of the reference policy, [N]. Goes with `kl`.
        kl: β and the estimator of the KL divergence to the reference.
        sampler_log_probs: log-probabilities that the sampler reported, [N]. Needed by corrections, and alone enough for
            the metrics of the mismatch.
        corrections: Importance weights, multiplied. For example truncated token weights and rejected sequences.
        all_sum: Sums a tensor over the ranks that hold parts of the same sequences (context parallelism), or None. It
            is called where sequences have a ratio or a weight. `sequences` and the numbering are then equal on those
            ranks.

    Returns:
        The sum, a differentiable scalar, and `metric_names`: detached sums over the tokens that count, which add up
        over micro-batches and ranks. Ratios in them are at most e^20.

            tokens                 their number n
            clipped_low, …         those that the mask drops, or whose weight it clips
            ratio, ratio_squared   r and r²: ratio² / ratio_squared is the effective sample size
            k1, k3                 estimates of KL(π_old || π_θ)
            entropy, kl            H and the estimate of the KL divergence to the reference
            correction, …          c and c²
            dropped                those with c = 0
            sampler_ratio, …       π_old / π_sampler by token, and its square: the mean square − 1 is the χ² divergence
            sampler_k1, …_k3       estimates of KL(π_sampler || π_old)
            sampler_difference     |π_old − π_sampler|

    Raises:
        ValueError: `kl` without `reference_log_probs` or the reverse, or `corrections` without `sampler_log_probs`.
    """
    if (kl is None) != (reference_log_probs is None):
        raise ValueError("policy_loss: kl and reference_log_probs go together")
    if corrections and sampler_log_probs is None:
        raise ValueError("policy_loss: corrections need sampler_log_probs")
    tokens = _Tokens(weights != 0, sequence, sequences, all_sum)
    log_probs = tokens.counted(log_probs)
    advantages = tokens.counted(advantages)
    current = log_probs.detach()
    old = current if old_log_probs is None else tokens.counted(old_log_probs.detach())
    losses, sums = _policy_term(estimator, log_probs, current - old, advantages, tokens)
    correction = None
    if sampler_log_probs is not None:
        correction, sampler_sums = _correction(corrections, old, tokens.counted(sampler_log_probs.detach()), tokens)
        losses = losses * correction
    if entropies is not None:
        entropies = tokens.counted(entropies)
        losses = losses - entropy_coefficient * entropies
        sums["entropy"] = entropies.detach().sum()
    if kl is not None and reference_log_probs is not None:
        divergence = kl_estimate(log_probs, tokens.counted(reference_log_probs), kl.estimator)
        if kl.importance:
            divergence = divergence * (log_probs - old).clamp(max=MAX_LOG_RATIO).exp()
        losses = losses + kl.coefficient * divergence
        sums["kl"] = divergence.detach().sum()
    if correction is not None:
        sums |= sampler_sums
    return (weights * losses).sum(), sums


@dataclass(frozen=True)
class _Tokens:
    """Which tokens count, and their sequences."""

    counts: Tensor
    sequence: Tensor
    sequences: int
    all_sum: Callable[[Tensor], Tensor] | None

    def counted(self, values: Tensor) -> Tensor:
        """Replace the values of tokens that do not count by 0. A product would leave NaN what is NaN."""
        return torch.where(self.counts, values, 0.0)

    def sequence_sums(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over each token's sequence, and count its tokens: [N] each. No gradient is needed."""
        both = torch.stack([segment_sums(x, self.sequence, self.sequences) for x in (values, self.counts.to(values))])
        if self.all_sum is not None:
            both = self.all_sum(both)
        sums, counts = both[:, self.sequence].unbind()
        return sums, counts.clamp(min=1)


def _policy_term(
    estimator: Estimator, log_probs: Tensor, log_ratio: Tensor, advantages: Tensor, tokens: _Tokens
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the losses [N] without the optional terms, and the metrics of the ratio.

    Args:
        estimator: As for `policy_loss`.
        log_probs: log π_θ, 0 for tokens that do not count.
        log_ratio: log π_θ − log π_old, detached, 0 for tokens that do not count.
        advantages: A, 0 for tokens that do not count.
        tokens: Which tokens count.
    """
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    if estimator.denominator == "sequence":
        total, count = tokens.sequence_sums(log_ratio)
        ratio = (total / count).clamp(max=MAX_LOG_RATIO).exp()
    low, high = 1 - estimator.clip_low, 1 + estimator.clip_high
    limited, weight = ratio, torch.ones_like(ratio)
    if estimator.mask == "clip":
        # min(r, c) A is the published max(r A, c A), because A < 0.
        limited = torch.where(advantages > 0, ratio.clamp(max=high), ratio.clamp(low, estimator.dual_clip))
        limited = torch.where(advantages == 0, ratio, limited)
        weight = torch.where(limited == ratio, ratio, 0.0)
        # The published loss is −r A.
        value = limited * advantages
    elif estimator.mask == "weight":
        limited = weight = ratio.clamp(low, high)
        value = weight * advantages * log_probs.detach()
    elif estimator.denominator == "policy":
        value = advantages * log_probs.detach()
    elif estimator.denominator == "one":
        likelihood, weight = _likelihood(log_probs.detach(), estimator.shape)
        value = likelihood * advantages
    else:
        weight, value = ratio, ratio * advantages
    # The last factor is 0 and has the gradient of log π.
    losses = -(value + weight * advantages * (log_probs - log_probs.detach()))
    too_high = limited < ratio
    dual = too_high & (advantages < 0) if estimator.mask == "clip" else torch.zeros_like(too_high)
    counted = {
        "tokens": tokens.counts,
        "clipped_low": limited > ratio,
        "clipped_high": too_high & ~dual,
        "clipped_dual": dual,
        "ratio": tokens.counted(ratio),
        "ratio_squared": tokens.counted(ratio.square()),
        "k1": -log_ratio,
        "k3": k3(-log_ratio),
    }
    return losses, {name: tokens.counted(values.to(ratio)).sum() for name, values in counted.items()}


def _likelihood(log_probs: Tensor, shape: float | None) -> tuple[Tensor, Tensor]:
    """Return f(π) and its derivative by log π, π f'(π). f is the identity, or π / (π + shape)."""
    probs = log_probs.exp()
    if shape is None:
        return probs, probs
    return probs / (probs + shape), shape * probs / (probs + shape).square()


def _correction(
    corrections: Sequence[Correction], old: Tensor, sampler: Tensor, tokens: _Tokens
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the product of the corrections [N], and the metrics of the mismatch. See `policy_loss`."""
    log_ratio = old - sampler
    product = torch.ones_like(log_ratio)
    for correction in corrections:
        level_ratio = log_ratio
        if correction.level != "token":
            level_ratio, count = tokens.sequence_sums(log_ratio)
            if correction.level == "geometric":
                level_ratio = level_ratio / count
        weight = level_ratio.clamp(max=MAX_LOG_RATIO).exp()
        if correction.how == "truncate":
            product = product * weight.clamp(max=correction.cap)
        else:
            kept = (weight >= correction.floor) & (weight <= correction.cap)
            product = product * torch.where(kept, weight if correction.how == "mask" else 1.0, 0.0)
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    values = (
        *(product, product.square(), (product == 0).to(ratio)),
        *(ratio, ratio.square(), -log_ratio, k3(-log_ratio), (old.exp() - sampler.exp()).abs()),
    )
    return product, {name: tokens.counted(x).sum() for name, x in zip(_SAMPLER_METRICS, values, strict=True)}


def token_weights(
    lengths: Tensor,
    how: Normalization,
    *,
    sequences: float | None = None,
    constant: float = 1.0,
    groups: Tensor | None = None,
) -> Tensor:
    """Compute the weight of every token of each sequence, such that the weighted sum is the mean over a global batch.

        token_mean         1 / sum_i n_i                 DAPO; SFT. Every token counts alike.
        group_token_mean   1 / (G sum_{i in group} n_i)  the mean over groups of their token means.
        sequence_mean      1 / (S n_i)                   GRPO, GSPO. Every sequence counts alike.
        sequence_sum       1 / (S constant)              Dr. GRPO; with a constant of 1, REINFORCE and RLOO.

    The weights are those of the global batch. A part of it takes its sequences' entries, w[i], and the sums of all
    parts add up to that of the whole batch however it is split into micro-batches and ranks.

    Args:
        lengths: n, the number of tokens that count in each sequence of the global batch, integers [S'].
        how: See above.
        sequences: S. None for the number of sequences with n > 0, so that neither overlong sequences nor groups without
            a signal dilute the mean if their lengths are set to 0. G counts groups with tokens likewise.
        constant: Of sequence_sum, above 0.
        groups: Number of each sequence's group, int64 [S'], for group_token_mean.

    Returns:
        w, float64 [S']; 0 for sequences without tokens.

    Raises:
        ValueError: a length is negative, the constant or `sequences` is not above 0, or groups are missing.
    """
    if bool((lengths < 0).any()):
        raise ValueError("token_weights: lengths must not be negative")
    if not (constant > 0 and math.isfinite(constant)) or (sequences is not None and not sequences > 0):
        raise ValueError(f"token_weights: constant ({constant}) and sequences ({sequences}) must be above 0")
    counts = lengths > 0
    length = lengths.double().clamp(min=1)
    number = counts.double().sum() if sequences is None else length.new_tensor(sequences)
    match how:
        case "token_mean":
            weights = 1 / lengths.double().sum().expand(len(lengths))
        case "group_token_mean":
            if groups is None:
                raise ValueError("token_weights: group_token_mean needs groups")
            total = segment_sums(lengths.double(), groups, int(groups.max()) + 1 if len(groups) else 0)
            weights = 1 / ((total > 0).sum() * total[groups])
        case "sequence_mean":
            weights = 1 / (number * length)
        case "sequence_sum":
            weights = (1 / (number * constant)).expand(len(lengths))
        case _:
            raise ConfigError(f"normalization: {how!r} is unknown; choose one of {', '.join(_NORMALIZATIONS)}")
    return torch.where(counts, weights, 0.0)


_NORMALIZATIONS = ("token_mean", "group_token_mean", "sequence_mean", "sequence_sum")
