"""Which features of a run can be combined. This table refuses runs, fills docs/parallelism.md and selects tests.

python -m trainer.combinations docs/parallelism.md
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # That module imports this one.
    from trainer.config import PretrainConfig


@dataclass(frozen=True)
class Feature:
    """A feature that a configuration can request.

    Attributes:
        name: Its name for users.
        asked: Whether a configuration requests it.
        missing: Why it is not supported at all. Empty if it is.
    """

    name: str
    asked: Callable[[PretrainConfig], bool]
    missing: str = ""


# In the order of the rows in docs/parallelism.md.
FEATURES = (
    Feature("engine.name=megatron", lambda c: c.engine.name == "megatron"),
    Feature("engine.name=deepspeed", lambda c: c.engine.name == "deepspeed"),
    Feature("engine.zero_stage=0", lambda c: c.engine.zero_stage == 0),
    Feature("engine.zero_stage=1", lambda c: c.engine.zero_stage == 1),
    Feature("engine.zero_stage=2", lambda c: c.engine.zero_stage == 2),
    Feature("engine.zero_stage=3", lambda c: c.engine.zero_stage == 3),
    Feature("engine.offload=optimizer", lambda c: c.engine.offload == "optimizer"),
    Feature("engine.offload=parameters", lambda c: c.engine.offload == "parameters"),
    Feature("data parallel", lambda c: True),
    Feature("parallel.tensor>1", lambda c: c.parallel.tensor > 1),
    Feature("parallel.sequence", lambda c: c.parallel.sequence),
    Feature("parallel.pipeline>1", lambda c: c.parallel.pipeline > 1),
    Feature("parallel.virtual_pipeline>1", lambda c: c.parallel.virtual_pipeline > 1),
    Feature("parallel.context>1", lambda c: c.parallel.context > 1),
    Feature("parallel.expert>1", lambda c: c.parallel.expert > 1),
    Feature("experts with parallel.tensor>1", lambda c: c.model.moe.num_experts > 0 and c.parallel.tensor > 1),
    Feature("train.precision=fp32", lambda c: c.train.precision == "fp32"),
    Feature("train.precision=bf16", lambda c: c.train.precision == "bf16"),
)

# Pairs of supported features that cannot be combined, with the reason.
_MEGATRON_STAGE = "its distributed optimizer is ZeRO 1; use engine.zero_stage=1, or engine.name=deepspeed"
_MEGATRON_OFFLOAD = "it keeps everything on the device; use engine.offload=none, or engine.name=deepspeed"
_NOTHING_TO_OFFLOAD = "ZeRO offloads what it shards; use engine.zero_stage=1 or more, or engine.offload=none"
_PARAMETERS_NOT_SHARDED = "only ZeRO 3 shards parameters; use engine.zero_stage=3, or engine.offload=optimizer"
_NO_PIPELINE = "ZeRO is run without a pipeline schedule; use engine.name=megatron"
CONFLICTS: dict[tuple[str, str], str] = {
    ("engine.name=megatron", "engine.zero_stage=0"): _MEGATRON_STAGE,
    ("engine.name=megatron", "engine.zero_stage=2"): _MEGATRON_STAGE,
    ("engine.name=megatron", "engine.zero_stage=3"): _MEGATRON_STAGE,
    ("engine.name=megatron", "engine.offload=optimizer"): _MEGATRON_OFFLOAD,
    ("engine.name=megatron", "engine.offload=parameters"): _MEGATRON_OFFLOAD,
    ("engine.zero_stage=0", "engine.offload=optimizer"): _NOTHING_TO_OFFLOAD,
    ("engine.zero_stage=0", "engine.offload=parameters"): _PARAMETERS_NOT_SHARDED,
    ("engine.zero_stage=1", "engine.offload=parameters"): _PARAMETERS_NOT_SHARDED,
    ("engine.zero_stage=2", "engine.offload=parameters"): _PARAMETERS_NOT_SHARDED,
    ("engine.zero_stage=0", "train.precision=bf16"): (
        "DeepSpeed would add up gradients and updates in bfloat16; use engine.zero_stage=1, or train.precision=fp32"
    ),
    ("engine.name=deepspeed", "parallel.pipeline>1"): _NO_PIPELINE,
    ("engine.name=deepspeed", "parallel.virtual_pipeline>1"): _NO_PIPELINE,
    ("engine.name=deepspeed", "parallel.context>1"): (
        "its ranks each compute whole sequences; use engine.name=megatron, or parallel.sequence"
    ),
    ("engine.name=deepspeed", "experts with parallel.tensor>1"): (
        "each tensor-parallel rank would train the experts on its own tokens alone; use engine.name=megatron"
    ),
    ("engine.name=deepspeed", "parallel.expert>1"): (
        "experts have no data-parallel groups of their own there; use engine.name=megatron"
    ),
}


def refuse_unsupported(config: PretrainConfig) -> None:
    """Raise for the first requested feature that is unsupported, alone or in combination.

    Raises:
        ValueError: the message gives the reason and an alternative.
    """
    asked = [feature for feature in FEATURES if feature.asked(config)]
    for feature in asked:
        if feature.missing:
            raise ValueError(f"{feature.name} is not supported: {feature.missing}")
    # CONFLICTS holds each pair in one order only.
    for i, first in enumerate(asked):
        for second in asked[i + 1 :]:
            reason = CONFLICTS.get((first.name, second.name)) or CONFLICTS.get((second.name, first.name))
            if reason:
                raise ValueError(f"{first.name} with {second.name} is not supported: {reason}")


def as_markdown() -> str:
    """Format the table of docs/parallelism.md."""
    lines = ["| feature | supported | why not, and what to use |", "|---|---|---|"]
    for feature in FEATURES:
        lines.append(f"| `{feature.name}` | {'no' if feature.missing else 'yes'} | {feature.missing} |")
    for (first, second), reason in CONFLICTS.items():
        lines.append(f"| `{first}` with `{second}` | no | {reason} |")
    return "\n".join(lines) + "\n"


TABLE_BEGIN, TABLE_END = "<!-- table: begin -->\n", "<!-- table: end -->\n"


def rewrite(page: str) -> str:
    """Return a page with the table between its two markers updated."""
    before, _, rest = page.partition(TABLE_BEGIN)
    _, _, after = rest.partition(TABLE_END)
    assert rest and page.count(TABLE_BEGIN) == page.count(TABLE_END) == 1, "the page needs both markers, once each"
    return before + TABLE_BEGIN + as_markdown() + TABLE_END + after


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(rewrite(path.read_text()))
