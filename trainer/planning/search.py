"""The layouts of a cluster that a configuration could take, and the fastest of them that fit."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from trainer.config import ParallelConfig, PretrainConfig
from trainer.planning.config import PlanConfig
from trainer.planning.plan import Plan, Planner

# Powers of two, as machines come.
_SIZES = tuple(2**power for power in range(13))
_RECOMPUTE: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
_ZERO: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)


def layouts(config: PlanConfig) -> Iterator[PretrainConfig]:
    """Every layout in powers of two that passes validate_layout, of the configuration's model, engine and batch.

    Sequence parallelism goes with tensor parallelism. Under DeepSpeed the stages of ZeRO take the place of layouts.
    """
    cluster, train = config.cluster, config.train
    stages = _ZERO if config.engine.name == "deepspeed" else (config.engine.zero_stage,)
    # Tensor-parallel ranks share a machine: what they send for every layer would not bear another network.
    within = [size for size in _SIZES if size <= cluster.devices]
    across = [size for size in _SIZES if size <= cluster.ranks]
    dimensions = itertools.product(within, across, (1, 2, 4), across, across)
    for tensor, pipeline, virtual, context, expert in dimensions:
        parallel = ParallelConfig(
            tensor=tensor,
            sequence=tensor > 1,
            pipeline=pipeline,
            virtual_pipeline=virtual,
            expert=expert,
            context=context,
        )
        for micro_batch, recompute, stage in itertools.product(_SIZES[:6], _RECOMPUTE, stages):
            run = replace(
                config,
                parallel=parallel,
                train=replace(train, micro_batch_size=micro_batch, recompute=recompute, recompute_modules=None),
                engine=replace(config.engine, zero_stage=stage),
            )
            if _valid(run, cluster.ranks):
                yield run


def _valid(config: PretrainConfig, ranks: int) -> bool:
    try:
        config.validate_layout(ranks)
    except ValueError:
        return False
    return True


def search(config: PlanConfig, planner: Planner) -> list[Plan]:
    """The plans of all layouts that fit, the fastest first; of equal ones the one that takes less memory."""
    plans = (planner.plan(layout) for layout in layouts(config))
    return sorted((plan for plan in plans if plan.fits), key=lambda plan: (plan.seconds, plan.memory()))
