"""Reports of plans: text for people, values for programs."""

from dataclasses import asdict
from typing import Any

from trainer.config import PretrainConfig
from trainer.phases import expand
from trainer.planning.plan import Plan, Stage

GB = 1e9


def layout(config: PretrainConfig) -> str:
    """Write a layout as command-line options."""
    parallel, train = config.parallel, config.train
    values: dict[str, Any] = {
        name: getattr(parallel, name) for name in ("tensor", "pipeline", "virtual_pipeline", "context", "expert")
    }
    words = [f"{name}={value}" for name, value in values.items() if value > 1]
    words += ["sequence=true"] if parallel.sequence else []
    words += [f"micro_batch_size={train.micro_batch_size}", f"recompute={train.recompute}"]
    words += [f"zero_stage={config.engine.zero_stage}"] if config.engine.name == "deepspeed" else []
    return " ".join(words)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Write a Markdown table with aligned columns."""
    lines = [header, ["---"] * len(header), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def _gb(size: float) -> str:
    return f"{size / GB:.3g}" if abs(size) < 100 * GB else f"{size / GB:.0f}"


def describe_phases(config: PretrainConfig, plans: list[Plan]) -> str:
    """Write the report of a run, given the plan of each phase."""
    if len(plans) == 1:
        return describe(plans[0])
    parts = [f"{phase}\n{describe(plan)}" for phase, plan in zip(expand(config), plans, strict=True)]
    return "\n\n".join(parts)


def describe(plan: Plan) -> str:
    """Write the report of a plan."""
    cluster, train = plan.cluster, plan.config.train
    stages = plan.stages
    numbers = [str(i) for i in range(len(stages))]
    memory = {
        "parameters": [stage.states.parameters for stage in stages],
        "gradients": [stage.states.gradients for stage in stages],
        "optimizer": [stage.states.optimizer for stage in stages],
        "message buffers": [stage.states.buffers for stage in stages],
        "teacher": [stage.states.teacher for stage in stages],
        "less: in host memory": [-stage.states.host for stage in stages],
    }
    rows = [[name, *map(_gb, sizes)] for name, sizes in memory.items() if any(sizes)]
    rows += [
        [f"activations, {name}", *(_gb(_activations(stage, name)) for stage in stages)]
        for name in stages[0].activations
    ]
    rows.append([f"together, {plan.recompute}", *(_gb(stage.memory(plan.recompute)) for stage in stages)])
    kinds = [kind for kind in stages[0].sent if any(stage.sent[kind] for stage in stages)]
    sent = [[kind, *(_gb(stage.sent[kind]) for stage in stages)] for kind in kinds]
    return "\n".join(
        [
            f"{cluster.name}: {cluster.nodes} x {cluster.devices} devices of {cluster.memory:g} GB",
            f"layout: {layout(plan.config)}, data parallel {plan.data_parallel}; "
            f"{plan.micro_batches} micro-batches of {train.micro_batch_size} x {train.seq_len} tokens a step",
            "",
            table(["GB of a rank, by pipeline stage", *numbers], rows),
            "",
            table(["GB sent in a step", *numbers], sent) if sent else "nothing is sent",
            "",
            *_compressed(plan),
            f"step: {plan.seconds:.3g} s, {plan.tokens_per_second:.0f} tokens/s a device, "
            f"{100 * plan.utilization:.1f} % of peak, bubble {100 * plan.bubble:.1f} % "
            f"(assuming {100 * cluster.efficiency:.0f} % of peak while computing, and nothing sent meanwhile)",
            verdict(plan),
        ]
    )


def _compressed(plan: Plan) -> list[str]:
    """What train.compression saves of each layer; nothing without it."""
    if not plan.by_layer:
        return []
    rows = [
        [str(layer), f"{plain / 1e6:.3g}", f"{kept / 1e6:.3g}", f"{100 * (1 - kept / plain):.1f}"]
        for layer, (plain, kept) in enumerate(plan.by_layer)
    ]
    return [table(["layer", "MB of a micro-batch", "compressed", "saved, %"], rows), ""]


def _activations(stage: Stage, choice: str) -> float:
    return stage.activations[choice] + stage.again[choice]


def verdict(plan: Plan) -> str:
    """Write whether the plan fits. If not, write which memory is short, by how much, and the settings that help."""
    cluster = plan.cluster
    needed, budget = plan.memory(), cluster.budget
    if plan.fits:
        return f"fits: {_gb(needed)} of {_gb(budget)} GB ({100 * cluster.usable:.0f} % of {cluster.memory:g} GB)"
    if needed <= budget:
        return (
            f"does not fit: offloading takes {_gb(plan.host_memory)} GB of a host with {cluster.host_memory:g} GB; "
            "use more data-parallel ranks, or engine.offload=none"
        )
    short = f"does not fit: device memory is short by {_gb(needed - budget)} GB ({_gb(needed)} of {_gb(budget)} GB)"
    return f"{short}; {'; '.join(_remedies(plan))}"


def _remedies(plan: Plan) -> list[str]:
    """The settings that make the plan fit, or else those that shrink its larger part."""
    enough = [name for name in plan.stages[0].activations if plan.memory(name) <= plan.cluster.budget]
    if enough:
        name, _, modules = enough[0].partition(" ")
        return [f"use train.recompute={name}" + (f" with train.recompute_modules={modules}" if modules else "")]
    fullest = max(plan.stages, key=lambda stage: stage.memory(plan.recompute))
    if fullest.states.on_device > plan.cluster.budget:
        return ["parameters, gradients and optimizer alone do not fit; raise parallel.pipeline or parallel.tensor"]
    hints = ["use train.recompute=full"] if plan.recompute != "full" else []
    hints += ["lower train.micro_batch_size"] if plan.config.train.micro_batch_size > 1 else []
    return [*hints, "raise parallel.context or parallel.tensor", "--search lists what fits"]


def as_values(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON values; sizes in bytes, times in seconds."""
    return {
        "layout": layout(plan.config),
        "parallel": asdict(plan.config.parallel),
        "data_parallel": plan.data_parallel,
        "micro_batches": plan.micro_batches,
        "recompute": plan.recompute,
        "stages": [
            {
                "layers": [[layers.start, layers.stop] for layers in stage.layers],
                "states": asdict(stage.states),
                "activations": {name: _activations(stage, name) for name in stage.activations},
                "sent": stage.sent,
            }
            for stage in plan.stages
        ],
        "by_layer": plan.by_layer,
        "memory": plan.memory(),
        "budget": plan.cluster.budget,
        "fits": plan.fits,
        "bubble": plan.bubble,
        "step_seconds": plan.seconds,
        "model_flops_utilization": plan.utilization,
        "tokens_per_second_per_device": plan.tokens_per_second,
    }


def compare(plans: list[Plan], config: PretrainConfig) -> str:
    """Write a table of the given plans, one per line."""
    if not plans:
        return (
            f"no layout of engine.name={config.engine.name} fits; use more or larger devices, a smaller "
            "train.seq_len, or a global batch that divides over fewer ranks"
        )
    rows = [
        [
            layout(plan.config),
            str(plan.data_parallel),
            _gb(plan.memory()),
            f"{plan.seconds:.3g}",
            f"{100 * plan.utilization:.1f}",
            f"{100 * plan.bubble:.1f}",
        ]
        for plan in plans
    ]
    return table(["layout", "data parallel", "GB", "s a step", "% of peak", "bubble, %"], rows)
