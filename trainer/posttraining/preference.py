"""Losses of preference: of two answers to a prompt, the chosen one becomes more likely than the rejected one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trainer.errors import ConfigError
from trainer.posttraining.segments import segment_sums


@dataclass(frozen=True, kw_only=True)
class Preference:
    """What is minimised for a pair, with h = (l_chosen − l_rejected) and l = log π_θ(answer) − log π_ref(answer).

    Attributes:
        kind: sigmoid: −(1−ε) log σ(β h) − ε log σ(−β h) (DPO, arXiv:2305.18290, equation 7; ε in section 3 of its
            authors' note on conservative DPO). ipo: (h − 1/(2β))² (arXiv:2310.12036, equation 17).
        beta: β, above 0.
        label_smoothing: ε, the probability that a label is wrong: 0 to 0.5, sigmoid only.
        length_normalized: Whether l is the mean over the answer's tokens instead of the sum, for example for ipo as in
            TRL.

    Raises:
        ConfigError: a value is out of its range.
    """

    kind: Literal["sigmoid", "ipo"] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    length_normalized: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("sigmoid", "ipo"):
            raise ConfigError(f"preference: kind must be sigmoid or ipo, not {self.kind!r}")
        if not self.beta > 0:
            raise ConfigError(f"preference: beta must be above 0, not {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"preference: label_smoothing must be 0 to below 0.5, not {self.label_smoothing}")
        if self.label_smoothing and self.kind != "sigmoid":
            raise ConfigError("preference: label_smoothing works with kind sigmoid; set it to 0 for ipo")


def preference_loss(
    preference: Preference,
    log_probs: Tensor,
    reference_log_probs: Tensor,
    sequence: Tensor,
    pairs: Tensor,
    weights: Tensor,
    *,
    sequences: int,
    all_sum: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the weighted sum of the pairs' losses.

    Args:
        preference: The loss of a pair.
        log_probs: log π_θ of the answers' tokens, nats, floating [N]. Differentiable.
        reference_log_probs: log π_ref of the tokens, [N]. No gradient reaches it.
        sequence: Number of each token's answer in the micro-batch, int64 [N] in [0, sequences); tokens of negative
            numbers do not count, whatever their log-probabilities are.
        pairs: Numbers of the chosen and the rejected answer of each pair, int64 [P, 2].
        weights: [P], for the mean 1 / the number of pairs of the global batch.
        sequences: Number of answers.
        all_sum: Sums a tensor over the ranks that hold parts of the same answers (context parallelism), or None. Each
            rank then gets the whole loss, with the gradient of its own tokens.

    Returns:
        The sum, a differentiable scalar, and detached sums over the pairs: their number `pairs`, `accuracy` (h > 0),
        β h as `margin`, and the rewards β l of chosen and rejected answers. They add up over micro-batches and ranks.
    """
    counts = sequence >= 0
    log_ratio = torch.where(counts, log_probs - reference_log_probs.detach(), 0.0)
    sequence = sequence.clamp(min=0)
    rewards = _whole(segment_sums(log_ratio, sequence, sequences), all_sum)
    if preference.length_normalized:
        lengths = _whole(segment_sums(counts.to(log_ratio), sequence, sequences), all_sum)
        rewards = rewards / lengths.clamp(min=1)
    chosen, rejected = rewards[pairs].unbind(1)
    difference = chosen - rejected
    if preference.kind == "ipo":
        losses = (difference - 1 / (2 * preference.beta)).square()
    else:
        scaled, smoothing = preference.beta * difference, preference.label_smoothing
        losses = -(1 - smoothing) * logsigmoid(scaled) - smoothing * logsigmoid(-scaled)
    metrics = {
        "pairs": torch.ones_like(difference),
        "accuracy": (difference > 0).to(difference),
        "margin": preference.beta * difference,
        "chosen_reward": preference.beta * chosen,
        "rejected_reward": preference.beta * rejected,
    }
    return (weights * losses).sum(), {name: values.detach().sum() for name, values in metrics.items()}


def _whole(part: Tensor, all_sum: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Return the sum over ranks, with the gradient of this rank's part."""
    if all_sum is None:
        return part
    return part + (all_sum(part.detach()) - part.detach())
