"""Values of PPO: what a value head learns, and advantages by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.posttraining.advantages import gae, whiten
from trainer.posttraining.data.sequences import TokenSequence


@dataclass(frozen=True, kw_only=True)
class ValueTerm:
    """The value head's term of the loss.

    Attributes:
        coefficient: Its coefficient.
        clip: How far a value may move from that of the rollout before its loss no longer falls.
    """

    coefficient: float
    clip: float


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute sum_t w_t max((V − R)², (V' − R)²) / 2, where V' is V within `clip` of the rollout's values.

    That is the clipped loss of PPO's published code (openai/baselines, ppo2). The paper has (V − R)² alone, which an
    infinite `clip` gives.

    Args:
        values: V, floating [N]. Differentiable.
        old_values: V of the policy that sampled, [N].
        returns: R, [N].
        weights: w, [N]. Tokens of weight 0 do not count, whatever their other values are.
        clip: Above 0.

    Returns:
        The sum, a differentiable scalar, and detached sums over the tokens that count: their number, the loss without
        weights, and how many have the clipped loss.
    """
    counts = weights != 0
    values, old_values, returns = (torch.where(counts, x, 0.0) for x in (values, old_values, returns))
    plain = (values - returns).square()
    clipped = (old_values + (values - old_values).clamp(-clip, clip) - returns).square()
    losses = torch.maximum(plain, clipped) / 2
    sums = {"tokens": counts, "loss": losses.detach(), "clipped": clipped > plain}
    return (weights * losses).sum(), {name: value.to(losses).sum() for name, value in sums.items()}


@dataclass(frozen=True)
class Estimates:
    """Advantages and returns of a rollout's sequences, float32 [L] each, 0 at tokens that are not learned.

    Attributes:
        advantages: Whitened over the rollout's tokens.
        returns: What the value head learns.
        explained: Share of the returns' variance that the values explain; 0 for returns that are all alike.
    """

    advantages: list[np.ndarray]
    returns: list[np.ndarray]
    explained: float


def estimate(
    sequences: Sequence[TokenSequence],
    values: Sequence[np.ndarray],
    rewards: Tensor,
    *,
    gamma: float,
    lam: float,
    penalties: Sequence[np.ndarray] | None = None,
) -> Estimates:
    """Compute generalised advantage estimates of the answers in a rollout, each an episode of its own.

    The reward stands at an answer's last token, and nothing follows it, whether the model has ended the answer or the
    limit of its length. Advantages are whitened over all tokens, as in every published implementation for language
    models; the paper does not say.

    Args:
        sequences: The rollout.
        values: The value before each token, [L] each.
        rewards: Of each sequence, [S].
        gamma: Discount.
        lam: λ of trainer.posttraining.advantages.gae.
        penalties: What is taken off the reward of each token, [L] each; None for nothing.
    """
    masks = [np.concatenate([[False], sequence.loss_mask[1:] != 0]) for sequence in sequences]
    lengths = torch.tensor([int(mask.sum()) for mask in masks])

    def flat(arrays: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate([array[mask] for array, mask in zip(arrays, masks, strict=True)]))

    own = flat(values).double()
    given = torch.zeros_like(own) if penalties is None else -flat(penalties).double()
    ends, counts = lengths.cumsum(0) - 1, lengths > 0
    given = given.index_add(0, ends[counts], rewards.double()[counts])
    advantages, returns = gae(given, own, lengths, gamma, lam)
    spread = float(returns.var(correction=0)) if len(returns) else 0.0
    explained = 1 - float((returns - own).var(correction=0)) / spread if spread > 0 else 0.0

    def spread_out(found: Tensor) -> list[np.ndarray]:
        arrays, parts = [], np.split(found.float().numpy(), lengths.cumsum(0)[:-1].numpy())
        for mask, part in zip(masks, parts, strict=True):
            arrays.append(np.zeros(len(mask), np.float32))
            arrays[-1][mask] = part
        return arrays

    return Estimates(spread_out(whiten(advantages)), spread_out(returns), explained)
