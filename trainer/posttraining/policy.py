"""The losses of post-training as objectives of engines.

A micro-batch carries what its tokens contribute in tensors of Batch.extra, float32 [B, T]. Their weights normalise over
the global batch, and are multiplied by the number of tokens in its loss masks, by which engines divide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.losses.distillation import Direction
from kernels.losses.token_log_probs import IGNORE_LABEL
from trainer.data.batch import Batch
from trainer.engines.frozen import FrozenModel
from trainer.objectives.base import NO_MODELS, Outputs
from trainer.posttraining.data.packing import SEQUENCE
from trainer.posttraining.divergences import Divergence, rehearsal_loss
from trainer.posttraining.objectives import Correction, Estimator, KlTerm, metric_names, policy_loss
from trainer.posttraining.preference import Preference, preference_loss
from trainer.posttraining.values import ValueTerm, value_loss

if TYPE_CHECKING:
    from trainer.posttraining.strict import Check

# Weights of the terms: the policy gradient of the model's own answers, the same of demonstrations, fine-tuning on
# demonstrations, and rehearsal.
WEIGHTS, OFF_POLICY, SUPERVISED, REHEARSAL = "weights", "off_policy", "supervised", "rehearsal"
ADVANTAGES = "advantages"
_TEACHER = "teacher"
# Of a value head: its values in the rollout, and what it learns.
VALUES, RETURNS = "values", "returns"
# Log-probabilities under the sampler, the policy that sampled, and the initial policy.
SAMPLER, OLD, REFERENCE = "sampler_log_probs", "old_log_probs", "reference_log_probs"


@dataclass(frozen=True)
class Terms:
    """What a step minimises the sum of.

    Attributes:
        estimator: The row of the table for the model's own answers.
        temperature: Divides the logits, as in the sampler.
        entropy: Coefficient of the entropy bonus.
        kl: The divergence from the reference in the loss; None for none.
        corrections: Importance weights for the sampler's deviation.
        has_old: Whether the policy that sampled may differ from the one in training: after the first update of a
            rollout.
        off_policy: The row for demonstrations that are taken as answers; None without any.
        has_demonstrations: Whether demonstrations are fine-tuned on.
        rehearsal: The divergence on stored answers of the initial policy; None without any.
        value: The loss of a value head; None without one.
        distillation: The direction of the divergence from a teacher, which is then all that is minimised; None without.
    """

    estimator: Estimator
    temperature: float = 1.0
    entropy: float = 0.0
    kl: KlTerm | None = None
    corrections: tuple[Correction, ...] = ()
    has_old: bool = False
    off_policy: Estimator | None = None
    has_demonstrations: bool = False
    rehearsal: Divergence | None = None
    value: ValueTerm | None = None
    distillation: Direction | None = None

    @property
    def extras(self) -> tuple[str, ...]:
        """Names of the tensors that every micro-batch carries."""
        return (
            *(WEIGHTS, ADVANTAGES, SAMPLER),
            *((OLD,) if self.has_old else ()),
            *((REFERENCE,) if self.kl is not None or self.rehearsal is not None else ()),
            *((OFF_POLICY,) if self.off_policy is not None else ()),
            *((SUPERVISED,) if self.has_demonstrations else ()),
            *((REHEARSAL,) if self.rehearsal is not None else ()),
            *((VALUES, RETURNS) if self.value is not None else ()),
        )


class PolicyObjective:
    """The terms of a run of reinforcement learning on packed micro-batches.

    With a teacher it is sum_t w_t KL_t instead: the divergence of the whole next-token distributions, at the
    temperature, at every token of the model's own answers (on-policy distillation, Agarwal et al. 2023,
    arXiv:2306.13649, section 3). That is the mean over the next token of the policy gradient whose advantage is log
    p_teacher − log p, with no variance from that token; neither counts what a token does to later ones.

    Args:
        terms: The terms.
        sequences: An upper bound of the number of sequences in a step, which micro-batches number theirs by.
        check: Compares the sampler's log-probabilities with the step's; None without strict mode.
        teacher: The teacher of terms.distillation.
    """

    def __init__(
        self, terms: Terms, sequences: int, check: Check | None = None, teacher: FrozenModel | None = None
    ) -> None:
        self._terms, self._sequences, self._check = terms, sequences, check
        self.models: Mapping[str, FrozenModel] = NO_MODELS if teacher is None else {_TEACHER: teacher}
        self._names = metric_names(entropy=True, kl=terms.kl is not None, sampler=True)
        self.metrics: tuple[str, ...] = tuple(f"policy/{name}" for name in self._names)
        if terms.off_policy is not None:
            self.metrics += ("demonstrations/off_policy_loss",)
        if terms.has_demonstrations:
            self.metrics += ("demonstrations/loss",)
        if terms.rehearsal is not None:
            self.metrics += ("rehearsal/tokens", "rehearsal/u", "rehearsal/f")
        if terms.value is not None:
            self.metrics += ("value/tokens", "value/loss", "value/clipped")
        self.metrics += ("distillation/kl",) if teacher is not None else ()

    def count(self, batch: Batch) -> int:
        """Count the tokens in the loss mask."""
        return int(batch.loss_mask.count_nonzero())

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """See trainer.objectives.base.Objective."""
        if self._terms.distillation is not None:
            return self._distill(outputs, batch, self._terms.distillation)
        return self._forward(outputs, batch)

    def _distill(self, outputs: Outputs, batch: Batch, direction: Direction) -> tuple[Tensor, Sequence[Tensor]]:
        with torch.no_grad():
            # For its metrics.
            _, found = self._forward(outputs, batch)
        weights = torch.where(batch.loss_mask != 0, batch.extra[WEIGHTS], 0.0)
        loss = outputs.kl_sum(
            outputs.frozen[_TEACHER], weights, direction=direction, temperature=self._terms.temperature
        )
        return loss, [*found, loss.detach()]

    def _forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        terms = self._terms
        counts = batch.loss_mask != 0
        log_probs, entropies = policy_log_probs(outputs, batch, terms.temperature)
        log_probs = log_probs.flatten()
        extra = {name: torch.where(counts, batch.extra[name], 0.0).flatten() for name in terms.extras}
        # Padding belongs to no sequence, and has no weight.
        sequence = batch.extra[SEQUENCE].flatten().clamp(min=0)
        loss, sums = policy_loss(
            terms.estimator,
            log_probs,
            extra[OLD] if terms.has_old else None,
            extra[ADVANTAGES],
            sequence,
            extra[WEIGHTS],
            sequences=self._sequences,
            entropies=(entropies if terms.entropy else entropies.detach()).flatten(),
            entropy_coefficient=terms.entropy,
            reference_log_probs=extra[REFERENCE] if terms.kl is not None else None,
            kl=terms.kl,
            sampler_log_probs=extra[SAMPLER],
            corrections=terms.corrections,
            all_sum=_sum_over(outputs.groups.context),
        )
        found = [sums[name] for name in self._names]
        if terms.off_policy is not None:
            term, _ = policy_loss(
                terms.off_policy,
                log_probs,
                None,
                extra[ADVANTAGES],
                sequence,
                extra[OFF_POLICY],
                sequences=self._sequences,
            )
            loss, found = loss + term, [*found, term.detach()]
        if terms.has_demonstrations:
            term = -(extra[SUPERVISED] * log_probs).sum()
            loss, found = loss + term, [*found, term.detach()]
        if terms.rehearsal is not None:
            term, measures = rehearsal_loss(terms.rehearsal, log_probs, extra[REFERENCE], extra[REHEARSAL])
            loss, found = loss + term, [*found, *(measures[name] for name in ("tokens", "u", "f"))]
        if terms.value is not None:
            term, measures = value_loss(
                outputs.values().flatten(), extra[VALUES], extra[RETURNS], extra[WEIGHTS], terms.value.clip
            )
            loss = loss + terms.value.coefficient * term
            found = [*found, *(measures[name] for name in ("tokens", "loss", "clipped"))]
        if self._check is not None:
            loss = loss + self._check.compare(log_probs, extra[SAMPLER], extra[WEIGHTS] != 0, batch)
        return loss, found


def policy_log_probs(outputs: Outputs, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the tokens that a micro-batch learns, and the policy's entropies there, float32 [B, T]."""
    tokens = batch.labels.masked_fill(batch.loss_mask == 0, IGNORE_LABEL)
    log_probs, entropies = outputs.token_log_probs(tokens, temperature=temperature, entropy=True)
    assert entropies is not None
    return log_probs, entropies


def per_token(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a step, with those of policy, rehearsal and values as means over the tokens of their own.

    In place of the squares of weights there are effective sample sizes, (Σ w)² / Σ w², as shares of the tokens.
    """
    found = dict(metrics)
    for prefix in ("policy/", "rehearsal/", "value/"):
        # The engine has divided all of them, their number included, by the tokens of the whole step.
        tokens = found.pop(f"{prefix}tokens", 0.0) or 1.0
        found |= {name: value / tokens for name, value in found.items() if name.startswith(prefix)}
    for name in [name for name in found if name.endswith("_squared")]:
        weight, squared = name.removesuffix("_squared"), found.pop(name)
        found[f"{weight}_sample_size"] = found[weight] ** 2 / squared if squared else 0.0
    return found


def _sum_over(group: dist.ProcessGroup | None) -> Callable[[Tensor], Tensor] | None:
    if group is None:
        return None

    def all_sum(x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    return all_sum


class PreferenceObjective:
    """trainer.posttraining.preference.preference_loss of packed micro-batches, the mean over pairs.

    Sequence 2 i of a step is the chosen answer of pair i, and 2 i + 1 its rejected one; both are in one micro-batch.

    Args:
        preference: The loss of a pair.
        reference: The initial model.
    """

    metrics = tuple(f"preference/{name}" for name in ("accuracy", "margin", "chosen_reward", "rejected_reward"))

    def __init__(self, preference: Preference, reference: FrozenModel) -> None:
        self._preference = preference
        self.models: Mapping[str, FrozenModel] = {"reference": reference}

    def count(self, batch: Batch) -> int:
        """Count the pairs that begin in this rank's part: those whose chosen answer has its first token there."""
        numbers, positions = batch.extra[SEQUENCE], batch.positions
        return int(((numbers >= 0) & (numbers % 2 == 0) & (positions == 0)).sum())

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """See trainer.objectives.base.Objective."""
        counts = batch.loss_mask != 0
        tokens = batch.labels.masked_fill(~counts, IGNORE_LABEL)
        log_probs, _ = outputs.token_log_probs(tokens)
        reference, _ = outputs.frozen["reference"].token_log_probs(tokens)
        numbers = batch.extra[SEQUENCE]
        group = outputs.groups.context
        known = torch.unique(numbers[numbers >= 0])
        ranks = 1
        if group is not None:
            ranks = dist.get_world_size(group)
            parts: list[Tensor | None] = [None] * ranks
            dist.all_gather_object(parts, known.cpu(), group=group)
            known = torch.unique(torch.cat([part for part in parts if part is not None])).to(numbers)
        # Numbers in the micro-batch, from 0 and without gaps. Pairs stay pairs.
        own = torch.where(counts & (numbers >= 0), torch.searchsorted(known, numbers.clamp(min=0)), -1)
        pairs = torch.arange(len(known), device=numbers.device).view(-1, 2)
        loss, sums = preference_loss(
            self._preference,
            log_probs.flatten(),
            reference.flatten(),
            own.flatten(),
            pairs,
            log_probs.new_ones(len(pairs)),
            sequences=len(known),
            all_sum=_sum_over(group),
        )
        # Context-parallel ranks have all computed the whole pairs; the gradient of each is that of its own tokens.
        shared = loss - loss.detach() * (1 - 1 / ranks)
        return shared, [sums[name.removeprefix("preference/")] / ranks for name in self.metrics]
