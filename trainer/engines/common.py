"""Code that both engines share: small messages between all ranks of a run, and the end of a training step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from models.statistics import StepStatistics
from trainer.engines.base import StepResult
from trainer.engines.timing import PhaseTimer
from trainer.objectives.alignment import AnyObjective


class Collectives:
    """Exchanges numbers, flags and objects between the ranks of a run. Every rank must make each call.

    Args:
        device: Device of the tensors that the collectives exchange.
        counts: Whether this rank contributes to `sum_over_data`. Of the ranks that share one
            data-parallel rank's work, only the first does.
    """

    def __init__(self, device: torch.device, counts: bool) -> None:
        self._device, self._counts = device, counts

    def sum_over_ranks(self, values: Sequence[float], group: dist.ProcessGroup | None = None) -> list[float]:
        """Sum over a group (default: all ranks) in float64."""
        # A single rank skips the round trip through a tensor.
        if dist.get_world_size(group) == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(total, group=group)
        sums: list[float] = total.tolist()
        return sums

    def sum_over_data(self, values: Sequence[float]) -> list[float]:
        """Sum over data-parallel ranks in float64. Ranks that share one data-parallel rank's work pass equal values.

        A non-finite value on any rank makes the sum non-finite.
        """
        return self.sum_over_ranks(self.once_per_data_rank(values))

    def once_per_data_rank(self, values: Sequence[float]) -> list[float]:
        """What this rank contributes to a sum over all ranks of values that ranks which share work have alike."""
        # Multiply by 0 instead of passing 0: NaN and infinity then propagate from every rank.
        return [value * float(self._counts) for value in values]

    def any_rank(self, flags: Sequence[bool]) -> list[bool]:
        """Return for each flag whether any rank has set it."""
        return [count > 0 for count in self.sum_over_ranks([float(flag) for flag in flags])]

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's picklable object, on every rank."""
        found = [value] * dist.get_world_size()
        if len(found) > 1:
            dist.all_gather_object(found, value)
        return found

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's picklable object, on every rank."""
        holder = [value]
        if dist.get_world_size() > 1:
            dist.broadcast_object_list(holder, src=0)
        return holder[0]

    def barrier(self) -> None:
        """Wait for every rank."""
        if dist.get_world_size() > 1:
            dist.barrier()


@dataclass(frozen=True)
class StepSums:
    """The sums of a training step over micro-batches and ranks.

    Attributes:
        loss: The objective's sum.
        count: The objective's count; language models: tokens.
        metrics: The sums of the objective's metrics, by name.
        counted: What the model's modules counted (models.statistics).
    """

    loss: float
    count: float
    metrics: dict[str, float]
    counted: list[float]

    @classmethod
    def of(cls, objective: AnyObjective, loss: float, count: float, rest: Sequence[float]) -> "StepSums":
        """Build from `rest`, which holds the sums of the objective's metrics followed by what modules counted."""
        named = len(objective.metrics)
        return cls(loss, count, dict(zip(objective.metrics, rest[:named], strict=True)), list(rest[named:]))

    @property
    def is_finite(self) -> bool:
        """Whether the loss is finite. If it is not, the engine must not update anything."""
        return math.isfinite(self.loss)

    def finish(self, grad_norm: float, statistics: StepStatistics, timer: PhaseTimer) -> StepResult:
        """End the step: update the routers unless the step was skipped, and divide the sums by the count.

        Args:
            grad_norm: Norm of the global gradient. If it or the loss is not finite, the engine has updated nothing.
            statistics: What collected the counts of the model's modules.
            timer: The step's timer. Reading it synchronises the device, so the step ends with its last kernel.
        """
        skipped = not (self.is_finite and math.isfinite(grad_norm))
        if not skipped:
            statistics.finish(self.counted)
        # A batch may have no token in its loss mask.
        divisor = max(self.count, 1.0)
        metrics = {name: total / divisor for name, total in self.metrics.items()}
        metrics |= statistics.metrics(self.counted)
        return StepResult(self.loss / divisor, grad_norm, int(self.count), skipped, metrics, timer.take())
