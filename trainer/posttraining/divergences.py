"""Divergences of the policy from a reference, token by token, from the two log-probabilities of the sampled token.

With l = log π_θ(y) − log π_ref(y), u = e^l, f(1) = 0 and f'(1) = 0:

    where y is sampled    name      f                                          its expectation       df / d log π_θ
    from π_ref, stored    forward   u − 1 − l                                  KL(π_ref || π_θ)      u − 1
    from π_ref, stored    js        (u l − (u+1) log((u+1)/2)) / 2             JS(π_ref, π_θ)        u log(2u/(u+1)) / 2
    from π_ref, stored    alpha     (u^(1−a) − (1−a) u − a) / (a (a−1))        D_a(π_ref, π_θ)       (u − u^(1−a)) / a
    from π_θ              reverse   1/u − 1 + l                                KL(π_θ || π_ref)      1 − 1/u

These are the generators of DPH-RL (arXiv:2509.07430) as its code applies them: to each token's conditional ratio, never
to the ratio of whole sequences. D_a tends to KL(π_ref || π_θ) for a → 1 and to KL(π_θ || π_ref) for a → 0. Every
gradient is 0 at u = 1, so rehearsal does not reinforce its samples as fine-tuning does. For forgotten tokens (u → 0)
that of forward tends to −1, and those of js and of alpha with a < 1 to 0.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trainer.errors import ConfigError

Kind = Literal["forward", "js", "alpha", "reverse", "none"]
KlEstimator = Literal["k1", "k2", "k3", "k3+"]

# exp(20) = 5e8 is far above any ratio that carries information, and finite in float32, as is its square.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """A generator f, and what keeps it finite.

    Attributes:
        kind: See the module's table. none is 0.
        alpha: a of alpha, above 0 and below 1. The default is that of the paper's code.
        doubled: Whether js is twice the Jensen-Shannon divergence, as in the paper's code. A coefficient that was
            chosen for one of the two has half or double the effect with the other.
        max_log_ratio: Upper bound of l (of −l for reverse). Beyond it f is constant and has no gradient.
        min_log_ratio: Lower bound of l (of −l for reverse), or None. The paper's code uses −20 for forward; f is finite
            without it, and with it tokens that the policy has forgotten have no gradient.
        max_value: Bound of |f|, or None. The paper's code uses 10 for forward. The bound costs the gradient of exactly
            the tokens that need it: those with l < −11 are no longer pulled back, those with l > 2.6 not pulled down.
    """

    kind: Kind = "forward"
    alpha: float = 0.2
    doubled: bool = False
    max_log_ratio: float = MAX_LOG_RATIO
    min_log_ratio: float | None = None
    max_value: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("forward", "js", "alpha", "reverse", "none"):
            raise ConfigError(f"divergence: kind must be forward, js, alpha, reverse or none, not {self.kind!r}")
        if not 0 < self.alpha < 1:
            raise ConfigError(f"divergence: alpha must be above 0 and below 1, not {self.alpha}")
        if not self.max_log_ratio > 0:
            raise ConfigError(f"divergence: max_log_ratio must be above 0, not {self.max_log_ratio}")
        if self.min_log_ratio is not None and not self.min_log_ratio < 0:
            raise ConfigError(f"divergence: min_log_ratio must be below 0 or null, not {self.min_log_ratio}")
        if self.max_value is not None and not self.max_value > 0:
            raise ConfigError(f"divergence: max_value must be above 0 or null, not {self.max_value}")

    def __call__(self, log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
        """Compute f of every token.

        Args:
            log_probs: log π_θ of the sampled tokens, nats, any shape. Differentiable.
            reference_log_probs: log π_ref of the same tokens. No gradient reaches it.

        Returns:
            f, nats, of the same shape. Not negative, but for rounding.
        """
        log_ratio = log_probs - reference_log_probs.detach()
        if self.kind == "reverse":
            log_ratio = -log_ratio
        value = self._generator(log_ratio.clamp(self.min_log_ratio, self.max_log_ratio))
        return value if self.max_value is None else value.clamp(-self.max_value, self.max_value)

    def _generator(self, log_ratio: Tensor) -> Tensor:
        # expm1 keeps the digits that u − 1 loses near u = 1, where training starts.
        match self.kind:
            case "forward" | "reverse":
                return log_ratio.expm1() - log_ratio
            case "js":
                ratio = log_ratio.exp()
                twice = ratio * log_ratio - (ratio + 1) * (torch.nn.functional.softplus(log_ratio) - math.log(2))
                return twice if self.doubled else twice / 2
            case "alpha":
                a = self.alpha
                return (((1 - a) * log_ratio).expm1() - (1 - a) * log_ratio.expm1()) / (a * (a - 1))
            case "none":
                return 0.0 * log_ratio


def rehearsal_loss(
    divergence: Divergence, log_probs: Tensor, reference_log_probs: Tensor, weights: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute sum_t w_t f(u_t): the term that keeps a policy near its reference on stored samples of the reference.

    Args:
        divergence: f.
        log_probs: log π_θ of the tokens, nats, [N]. Differentiable.
        reference_log_probs: log π_ref of the tokens, [N], stored when they were sampled. They must come from the
            kernels that training uses; otherwise u is not 1 before the first step, which `max_change` shows.
        weights: w, [N]: see trainer.posttraining.objectives.token_weights. Tokens of weight 0 do not count, whatever
            their other values are.

    Returns:
        The sum, a differentiable scalar, and detached metrics. `tokens` and the sums over tokens of `u` and `f` add up
        over micro-batches and ranks; of `max_u`, the largest u, and `max_change`, the largest |u − 1|, the maximum
        counts. u is shown up to e^20.
    """
    counts = weights != 0
    log_probs = torch.where(counts, log_probs, 0.0)
    reference_log_probs = torch.where(counts, reference_log_probs, 0.0)
    values = divergence(log_probs, reference_log_probs)
    loss = (weights * values).sum()
    with torch.no_grad():
        ratio = (log_probs - reference_log_probs).clamp(max=MAX_LOG_RATIO).exp()
        # Tokens that do not count have u = 1 here. The zero in front gives an empty micro-batch a maximum.
        changes = (ratio - 1).abs()
        seen = torch.where(counts, ratio, 0.0)
        metrics = {
            "tokens": counts.sum(),
            "u": seen.sum(),
            "f": values.sum(),
            "max_u": torch.cat([seen.new_zeros(1), seen]).max(),
            "max_change": torch.cat([changes.new_zeros(1), changes]).max(),
        }
    return loss, metrics


def kl_estimate(log_probs: Tensor, reference_log_probs: Tensor, estimator: KlEstimator = "k3") -> Tensor:
    """Estimate KL(π_θ || π_ref) at every token from one sample of π_θ (Schulman 2020, "Approximating KL divergence").

    With l = log π_θ − log π_ref:

        k1    l                unbiased value, of any sign. The mean of its gradient is 0: as a loss it does nothing.
        k2    l² / 2           biased value, not negative. Its gradient is an unbiased estimate of that of the KL.
        k3    e^−l − 1 + l     unbiased value, not negative. The mean of its gradient is that of KL(π_ref || π_θ), the
                               other direction.
        k3+   the value of k3 with the gradient of k2: both unbiased. verl names it so.

    "Gradient" is that of the estimate at a given sample, which a loss sees. It holds for samples of π_θ itself; see
    trainer.posttraining.objectives.KlTerm for older ones. In a reward no gradient is taken, and k1 and k3 are unbiased.
    The gradient is at one token given those before it; none of them accounts for the effect of a token on later ones.

    Args:
        log_probs: log π_θ of the sampled tokens, nats, any shape. Differentiable.
        reference_log_probs: log π_ref of the same tokens. No gradient reaches it.
        estimator: One of the four. For k3, −l is bounded by 20.

    Returns:
        The estimates, nats, of the same shape.
    """
    log_ratio = log_probs - reference_log_probs.detach()
    match estimator:
        case "k1":
            return log_ratio
        case "k2":
            return log_ratio.square() / 2
        case "k3":
            return k3(log_ratio)
        case "k3+":
            with_gradient = log_ratio.square() / 2
            return k3(log_ratio.detach()) + with_gradient - with_gradient.detach()
    raise ConfigError(f"kl: the estimator must be k1, k2, k3 or k3+, not {estimator!r}")


def k3(log_ratio: Tensor) -> Tensor:
    """Compute e^−l − 1 + l for l = log p − log q of samples of p, an estimate of KL(p || q). −l is bounded by 20."""
    # expm1 keeps the digits that e^−l − 1 loses in float32 while the two are close.
    inverse = (-log_ratio).clamp(max=MAX_LOG_RATIO)
    return inverse.expm1() - inverse
