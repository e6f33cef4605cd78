"""Advantages: how much better an answer is than expected.

S sequences of a global batch, each of a group (the answers to one question, numbered from 0), have one reward each.
N tokens lie one sequence after the other. The functions need the whole global batch: part of it has another mean.
"""

from typing import Literal

import torch
from torch import Tensor

from trainer.errors import ConfigError
from trainer.posttraining.divergences import KlEstimator, kl_estimate
from trainer.posttraining.segments import segment_sums

GroupBaseline = Literal["group_std", "group", "leave_one_out"]


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    how: GroupBaseline = "group_std",
    *,
    statistics: Tensor | None = None,
    eps: float = 1e-6,
    unbiased: bool = True,
) -> Tensor:
    """Compare every reward R with those of its group.

        group_std       (R − mean) / (std + eps)     GRPO (arXiv:2402.03300)
        group           R − mean                     Dr. GRPO (arXiv:2503.20783)
        leave_one_out   R − mean of the others       RLOO (arXiv:2402.14740)

    For LUFFY and SRFT pass the union of answers and demonstrations, each demonstration with its reward and the group of
    its question.

    Args:
        rewards: R, floating [S].
        groups: int64 [S].
        how: See above.
        statistics: Which sequences mean and std are computed from, bool [S]; None for all. HPT's `grpo_split` leaves
            demonstrations out.
        eps: Added to std.
        unbiased: Whether std divides by n − 1, as in TRL and verl. The paper does not say.

    Returns:
        [S]. Exactly 0 where a reward equals all those of its group's statistics, whatever the rounding of the mean, and
        in groups with nothing to compare with. If only the statistics are constant, std is not divided by.
    """
    if how not in ("group_std", "group", "leave_one_out"):
        raise ConfigError(f"advantage: {how!r} is unknown; choose group_std, group or leave_one_out")
    counts = torch.ones_like(groups, dtype=torch.bool) if statistics is None else statistics
    size = int(groups.max()) + 1 if len(groups) else 0
    lowest, highest = (x[groups] for x in _extremes(rewards, groups, size, counts))
    own = counts.to(rewards)
    number = segment_sums(own, groups, size)[groups]
    total = segment_sums(own * rewards, groups, size)[groups]
    if how == "leave_one_out":
        others = number - own
        baseline = (total - own * rewards) / others.clamp(min=1)
        baseline = torch.where(others > 0, baseline, rewards)
    else:
        baseline = torch.where(number > 0, total / number.clamp(min=1), rewards)
    constant = lowest == highest
    advantages = rewards - torch.where(constant, lowest, baseline)
    if how != "group_std":
        return advantages
    squares = segment_sums(own * advantages.square(), groups, size)[groups]
    std = (squares / (number - int(unbiased)).clamp(min=1)).sqrt()
    return torch.where(lowest < highest, advantages / (std + eps), advantages)


def carries_signal(rewards: Tensor, groups: Tensor, count: int | None = None) -> Tensor:
    """Say which groups' rewards differ, so that some advantage is not 0.

    A group without a signal may still serve another term of the loss, such as a demonstration or a rehearsal.

    Args:
        rewards: Floating [S].
        groups: int64 [S].
        count: Number of groups; None for the largest number that occurs.

    Returns:
        bool [groups].
    """
    size = count if count is not None else int(groups.max()) + 1 if len(groups) else 0
    lowest, highest = _extremes(rewards, groups, size, torch.ones_like(groups, dtype=torch.bool))
    return lowest < highest


def _extremes(rewards: Tensor, groups: Tensor, size: int, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lowest and highest reward of each group, among those that count; inf and −inf if none does."""
    infinite = rewards.new_full((size,), torch.inf)
    lowest = infinite.scatter_reduce(0, groups, torch.where(counts, rewards, torch.inf), "amin")
    highest = (-infinite).scatter_reduce(0, groups, torch.where(counts, rewards, -torch.inf), "amax")
    return lowest, highest


def reinforce_advantages(rewards: Tensor, baseline: Literal["none", "batch_mean"] = "none") -> Tensor:
    """Return the rewards [S] (Williams 1992), or their difference from the batch's mean."""
    if baseline == "none":
        return rewards
    return torch.where((rewards == rewards[:1]).all(), 0.0, rewards - rewards.mean())


def reinforce_plus_plus_advantages(
    rewards: Tensor, groups: Tensor | None = None, lengths: Tensor | None = None, eps: float = 1e-8
) -> Tensor:
    """Normalise rewards over the global batch (REINFORCE++, arXiv:2501.03262).

    With a penalty per token, normalise the tokens instead: `whiten(discounted_returns(rewards_with_kl(…), …))`.

    Args:
        rewards: [S].
        groups: int64 [S] to subtract each group's mean first (REINFORCE++-baseline), or None.
        lengths: Number of tokens of each sequence, [S], to count a sequence once per token, as the paper's mean over
            all tokens does. None to count each once.
        eps: Added to the standard deviation.

    Returns:
        [S].
    """
    values = rewards if groups is None else group_advantages(rewards, groups, "group")
    return whiten(values, lengths, eps)


def whiten(values: Tensor, weights: Tensor | None = None, eps: float = 1e-8) -> Tensor:
    """Return (x − mean) / (std + eps), 0 if all x are equal.

    Args:
        values: x, floating [N].
        weights: How much each counts for mean and std, [N]; None for equally. std divides by the sum of the weights.
        eps: Added to std.
    """
    weights = torch.ones_like(values) if weights is None else weights.to(values)
    counted = values[weights != 0]
    if len(counted) == 0 or bool((counted == counted[0]).all()):
        return torch.zeros_like(values)
    total = weights.sum()
    deviations = values - (weights * values).sum() / total
    return deviations / (((weights * deviations.square()).sum() / total).sqrt() + eps)


def srft_on_policy(rewards: Tensor, entropies: Tensor) -> Tensor:
    """Return SRFT's advantages of its own samples, for the row `reinforce` (arXiv:2506.19767).

    0.1 e^H for samples with a reward above 0, and −1 for the others. The paper means the policy's entropy H, whose
    average it leaves open: give it per token or per sequence.

    Args:
        rewards: Any shape.
        entropies: H, nats, of the same shape. No gradient reaches it.
    """
    return torch.where(rewards > 0, 0.1 * entropies.detach().exp(), -1.0)


def srft_demonstrations(entropies: Tensor) -> Tensor:
    """Return SRFT's weights of demonstrations, 0.5 e^−H, as advantages for the row `sft`. See `srft_on_policy`."""
    return 0.5 * (-entropies.detach()).exp()


def rewards_with_kl(
    rewards: Tensor,
    lengths: Tensor,
    log_probs: Tensor,
    reference_log_probs: Tensor,
    coefficient: float,
    estimator: KlEstimator = "k1",
) -> Tensor:
    """Compute rewards per token: −β KL_t at every token, plus the sequence's reward at its last.

    Args:
        rewards: [S].
        lengths: Number of tokens of each sequence, int64 [S]. The reward of a sequence without tokens is lost.
        log_probs: log π_old of the tokens, nats, floating [N].
        reference_log_probs: log π_ref of the tokens, [N].
        coefficient: β.
        estimator: See trainer.posttraining.divergences.kl_estimate. k1 is PPO's for language models (arXiv:2203.02155).

    Returns:
        [N], detached.
    """
    penalties = coefficient * kl_estimate(log_probs.detach(), reference_log_probs, estimator)
    last, counts = lengths.cumsum(0) - 1, lengths > 0
    return (-penalties).index_add(0, last[counts], rewards[counts].to(penalties))


def gae(
    rewards: Tensor,
    values: Tensor,
    lengths: Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
    last_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute generalised advantage estimates (Schulman et al. 2015, arXiv:1506.02438, equations 11 and 16).

        δ_t = r_t + γ V_{t+1} − V_t,    A_t = δ_t + γ λ A_{t+1}

    Args:
        rewards: r, floating [N]. With a reward per sequence, 0 but at each sequence's last token: `rewards_with_kl`.
        values: V, the value before each token, [N].
        lengths: Number of tokens of each sequence, int64 [S].
        gamma: γ.
        lam: λ.
        last_values: V after the last token of each sequence, [S]; None for 0, as after an end.

    Returns:
        (A, A + V), both [N] and detached: the advantages, and what a value head learns.
    """
    rewards, values = rewards.detach(), values.detach()
    sequences, steps = len(lengths), int(lengths.max()) if len(lengths) else 0
    row = torch.arange(sequences, device=lengths.device).repeat_interleave(lengths)
    column = torch.arange(len(row), device=lengths.device) - (lengths.cumsum(0) - lengths)[row]
    # One column more, for the values after the end.
    values_ST = values.new_zeros(sequences, steps + 1)
    values_ST[row, column] = values
    if last_values is not None:
        values_ST[torch.arange(sequences, device=lengths.device), lengths] = last_values.detach().to(values)
    deltas = rewards + gamma * values_ST[row, column + 1] - values
    advantages_ST = values.new_zeros(sequences, steps + 1)
    advantages_ST[row, column] = deltas
    for step in reversed(range(steps)):
        # Past a sequence's end both terms are 0.
        advantages_ST[:, step] += gamma * lam * advantages_ST[:, step + 1]
    advantages = advantages_ST[row, column]
    return advantages, advantages + values


def discounted_returns(rewards: Tensor, lengths: Tensor, gamma: float = 1.0) -> Tensor:
    """Sum γ^(s−t) r_s over the tokens s ≥ t of the same sequence. Arguments as for `gae`; returns [N]."""
    return gae(rewards, torch.zeros_like(rewards), lengths, gamma, lam=1.0)[0]
