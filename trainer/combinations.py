"""Which features of a run go together: one table that refuses a run, writes docs/parallelism.md and selects tests.

python -m trainer.combinations docs/parallelism.md
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainer.config import PretrainConfig


@dataclass(frozen=True)
class Feature:
    """Something a configuration can ask for.

    Attributes:
        name: As users write it.
        asked: Whether a configuration asks for it.
        missing: Why it cannot be had at all; empty where it can.
    """

    name: str
    asked: Callable[[PretrainConfig], bool]
    missing: str = ""


FEATURES = (
    Feature("engine.name=megatron", lambda c: c.engine.name == "megatron"),
    Feature(
        "engine.name=deepspeed",
        lambda c: c.engine.name == "deepspeed",
        "the DeepSpeed engine is not part of this version; use engine.name=megatron",
    ),
    Feature("engine.zero_stage=1", lambda c: c.engine.zero_stage == 1),
    Feature(
        "engine.zero_stage>1",
        lambda c: c.engine.zero_stage > 1,
        "the megatron engine shards the optimizer's state only; use engine.zero_stage=1",
    ),
    Feature(
        "engine.offload",
        lambda c: c.engine.offload != "none",
        "the megatron engine keeps everything on the device; use engine.offload=none",
    ),
    Feature("data parallel", lambda c: True),
    Feature(
        "parallel.tensor>1",
        lambda c: c.parallel.tensor > 1,
        "the layers are not sharded in this version; use parallel.tensor=1",
    ),
    Feature(
        "parallel.sequence",
        lambda c: c.parallel.sequence,
        "it needs tensor parallel, which this version does not have; use parallel.sequence=false",
    ),
    Feature(
        "parallel.pipeline>1",
        lambda c: c.parallel.pipeline > 1 or c.parallel.virtual_pipeline > 1,
        "the model is one stage in this version; use parallel.pipeline=1 and parallel.virtual_pipeline=1",
    ),
    Feature(
        "parallel.context>1",
        lambda c: c.parallel.context > 1,
        "sequences are not sharded in this version; use parallel.context=1",
    ),
    Feature(
        "parallel.expert>1",
        lambda c: c.parallel.expert > 1,
        "the model has no experts; use parallel.expert=1",
    ),
    Feature("train.precision=fp32", lambda c: c.train.precision == "fp32"),
    Feature("train.precision=bf16", lambda c: c.train.precision == "bf16"),
)

# Pairs that exist on their own but not together, with the reason.
CONFLICTS: dict[tuple[str, str], str] = {}


def refuse_unsupported(config: PretrainConfig) -> None:
    """Raise for the first thing asked for that cannot be had, alone or beside another.

    Raises:
        ValueError: with the reason and what to use in its place.
    """
    asked = [feature for feature in FEATURES if feature.asked(config)]
    for feature in asked:
        if feature.missing:
            raise ValueError(f"{feature.name} is not supported: {feature.missing}")
    for i, first in enumerate(asked):
        for second in asked[i + 1 :]:
            reason = CONFLICTS.get((first.name, second.name)) or CONFLICTS.get((second.name, first.name))
            if reason:
                raise ValueError(f"{first.name} with {second.name} is not supported: {reason}")


def as_markdown() -> str:
    """The table of docs/parallelism.md."""
    lines = ["| feature | supported | why not, and what to use |", "|---|---|---|"]
    for feature in FEATURES:
        lines.append(f"| `{feature.name}` | {'no' if feature.missing else 'yes'} | {feature.missing} |")
    for (first, second), reason in CONFLICTS.items():
        lines.append(f"| `{first}` with `{second}` | no | {reason} |")
    return "\n".join(lines) + "\n"


TABLE_BEGIN, TABLE_END = "<!-- table: begin -->\n", "<!-- table: end -->\n"


def rewrite(page: str) -> str:
    """The page with the table between its two markers brought up to date."""
    before, _, rest = page.partition(TABLE_BEGIN)
    _, _, after = rest.partition(TABLE_END)
    assert rest and page.count(TABLE_BEGIN) == page.count(TABLE_END) == 1, "the page needs both markers, once each"
    return before + TABLE_BEGIN + as_markdown() + TABLE_END + after


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(rewrite(path.read_text()))
