"""What both engines do alike: small messages between all ranks of a run, and the end of a training step."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from models.config import ModelConfig
from models.decoder import Decoder
from models.moe import statistics
from trainer.engines.base import StepResult
from trainer.engines.timing import PhaseTimer
from trainer.objectives.base import Objective


class Collectives:
    """Numbers, flags and objects between the ranks of a run. Every rank makes each call.

    Args:
        device: Where the tensors of a collective have to lie.
        counts: Whether this rank is the first of those that share the work of a data-parallel rank.
    """

    def __init__(self, device: torch.device, counts: bool) -> None:
        self._device, self._counts = device, counts

    def sum_over_ranks(self, values: Sequence[float], group: dist.ProcessGroup | None = None) -> list[float]:
        """Sum over a group, by default all ranks, in float64."""
        if dist.get_world_size(group) == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(total, group=group)
        sums: list[float] = total.tolist()
        return sums

    def sum_over_data(self, values: Sequence[float]) -> list[float]:
        """Sum over the data-parallel ranks, in float64, of values that the ranks which share one's work have alike.

        A value that is not finite on any rank makes the sum so.
        """
        # Times 0 and not left out: NaN and infinity then come through from every rank.
        return self.sum_over_ranks([value * float(self._counts) for value in values])

    def any_rank(self, flags: Sequence[bool]) -> list[bool]:
        """Of each flag whether any rank has it set."""
        return [count > 0 for count in self.sum_over_ranks([float(flag) for flag in flags])]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable object, on every rank."""
        found = [value] * dist.get_world_size()
        if len(found) > 1:
            dist.all_gather_object(found, value)
        return found

    def broadcast(self, value: Any) -> Any:
        """Rank 0's picklable object, on every rank."""
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
    """What a training step has summed over micro-batches and ranks.

    Attributes:
        loss: The objective's sum.
        count: What it counted.
        metrics: The sums of the objective's metrics, by name.
        routers: Those of models.moe.statistics.collect.
    """

    loss: float
    count: float
    metrics: dict[str, float]
    routers: list[float]

    @classmethod
    def of(cls, objective: Objective, loss: float, count: float, rest: Sequence[float]) -> "StepSums":
        """From the sums of the objective's metrics, one after the other, and then of what routers count."""
        named = len(objective.metrics)
        return cls(loss, count, dict(zip(objective.metrics, rest[:named], strict=True)), list(rest[named:]))

    @property
    def is_finite(self) -> bool:
        """Whether the loss is one to learn from; where not, nothing may be updated."""
        return math.isfinite(self.loss)

    def finish(
        self, grad_norm: float, decoders: Iterable[Decoder], config: ModelConfig, timer: PhaseTimer
    ) -> StepResult:
        """End the step: bring routers up to date, unless it was skipped, and divide by the count.

        Args:
            grad_norm: Of the whole gradient; where it or the loss is not finite, the engine has updated nothing.
            decoders: This rank's stages.
            config: The model.
            timer: Of the step's phases; the device is waited for, so that the step ends when its last kernel does.
        """
        skipped = not (self.is_finite and math.isfinite(grad_norm))
        if not skipped:
            statistics.finish_step(decoders, config, self.routers)
        divisor = max(self.count, 1.0)
        metrics = {name: total / divisor for name, total in self.metrics.items()}
        metrics |= statistics.metrics(config, self.routers)
        return StepResult(self.loss / divisor, grad_norm, int(self.count), skipped, metrics, timer.take())
