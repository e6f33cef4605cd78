"""Search the layouts of a configuration on a cluster for the fastest that fit."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

from trainer.config import ParallelConfig, PretrainConfig
from trainer.phases import expand
from trainer.planning.config import PlanConfig
from trainer.planning.plan import Plan, Planner
from trainer.stored.on_disk import Weights
from trainer.stored.teacher import open_teacher, require_layout, taught_phases
from trainer.trainable import to_plan

# Powers of two, like the sizes of machines and clusters.
_SIZES = tuple(2**power for power in range(13))
_RECOMPUTE: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
_SECONDS_BETWEEN_REPORTS = 3.0
_ZERO: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)


def layouts(config: PlanConfig) -> Iterator[PretrainConfig]:
    """Yield every layout in powers of two that passes validate_layout, for the configuration's model, engine and batch.

    Sequence parallelism is on wherever tensor parallelism is. Under DeepSpeed the ZeRO stage is varied too.
    """
    train = config.train
    taught = [phase.config for phase in taught_phases(config)]
    teachers = [(open_teacher(phase.train.objective.teacher or ""), phase) for phase in taught]
    stages = _ZERO if config.engine.name == "deepspeed" else (config.engine.zero_stage,)
    for parallel in _cuts(config):
        for micro_batch, recompute, stage in itertools.product(_SIZES[:6], _RECOMPUTE, stages):
            run = replace(
                config,
                parallel=parallel,
                train=replace(train, micro_batch_size=micro_batch, recompute=recompute, recompute_modules=None),
                engine=replace(config.engine, zero_stage=stage),
            )
            if _valid(run, config.cluster.ranks, teachers):
                yield run


def _cuts(config: PlanConfig) -> Iterator[ParallelConfig]:
    """Yield the parallel sizes, in powers of two, that the cluster's ranks and the model's layers and experts allow."""
    ranks = config.cluster.ranks
    sizes = [size for size in _SIZES if ranks % size == 0]
    # Tensor-parallel ranks share a machine: they communicate in every layer, too much for the network between machines.
    within = [size for size in sizes if size <= config.cluster.devices]
    stages = [size for size in sizes if size <= config.model.num_layers]
    shared = [size for size in sizes if size <= max(config.model.moe.num_experts, 1)]
    for tensor, pipeline, context, expert in itertools.product(within, stages, sizes, shared):
        if ranks % (tensor * pipeline * context) == 0:
            for virtual in (1, 2, 4) if pipeline > 1 else (1,):
                yield ParallelConfig(
                    tensor=tensor,
                    sequence=tensor > 1,
                    pipeline=pipeline,
                    virtual_pipeline=virtual,
                    expert=expert,
                    context=context,
                )


def _valid(config: PretrainConfig, ranks: int, teachers: Sequence[tuple[Weights, PretrainConfig]]) -> bool:
    try:
        config.validate_layout(ranks)
        for teacher, phase in teachers:
            require_layout(teacher, replace(phase, parallel=config.parallel))
    except ValueError:
        return False
    return True


def search(config: PlanConfig, planner: Planner, report: Callable[[str], None]) -> list[Plan]:
    """Plan all layouts and return those that fit, the fastest first; ties are ordered by memory.

    Of a run in phases, every phase must fit, and the times of all phases are summed, weighted by their steps. The
    returned plan is the first phase's. `report` receives a progress message every few seconds.
    """
    candidates, found, said = list(layouts(config)), [], time.monotonic()
    for number, layout in enumerate(candidates, 1):
        phases = expand(layout)
        plans = [planner.plan(phase) for phase in to_plan(layout)]
        seconds = sum(plan.seconds * (phase.last - phase.first) for plan, phase in zip(plans, phases, strict=True))
        if all(plan.fits for plan in plans):
            found.append((seconds, max(plan.memory() for plan in plans), plans[0]))
        if time.monotonic() - said > _SECONDS_BETWEEN_REPORTS:
            said = time.monotonic()
            report(f"planned {number} of {len(candidates)} layouts")
    return [plan for _, _, plan in sorted(found, key=lambda entry: entry[:2])]
