"""Curves of reinforcement learning: the reward over the steps, and pass@k before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.curves import read_metrics, smooth
from trainer.figures import pyplot, save

REWARD = "reward/mean"
_PREFIX = "pass@"


def is_of_rewards(run: str | Path) -> bool:
    """Whether a run has learned from rewards."""
    steps, _ = read_metrics(run)
    return any(REWARD in line for line in steps)


def pass_at(line: dict[str, Any]) -> dict[int, float]:
    """pass@k of a validation by k; empty for a validation without."""
    return {int(name.removeprefix(_PREFIX)): value for name, value in line.items() if name.startswith(_PREFIX)}


def draw(runs: Sequence[str | Path], path: Path) -> None:
    """Draw runs: rewards of training and of validations, and pass@k of their first and last validations.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for run in runs:
        steps, evaluations = read_metrics(run)
        drawn = [(line["step"], line[REWARD]) for line in steps if REWARD in line]
        numbers, rewards = zip(*drawn, strict=True)
        (faint,) = left.plot(numbers, rewards, linewidth=0.5, alpha=0.3)
        color, name = faint.get_color(), Path(run).name
        left.plot(numbers, smooth(list(rewards), 5.0), color=color, label=f"{name}: training")
        measured = [line for line in evaluations if pass_at(line)]
        if not measured:
            continue
        points = [(line["step"], line["reward"]) for line in measured]
        left.plot(*zip(*points, strict=True), color=color, marker="o", markersize=3, linestyle="--", label="validation")
        for line, style in ((measured[0], "--"), (measured[-1], "-")):
            curve = sorted(pass_at(line).items())
            right.plot(
                *zip(*curve, strict=True),
                color=color,
                linestyle=style,
                marker="o",
                label=f"{name}: step {line['step']}",
            )
    left.set_xlabel("step")
    left.set_ylabel("mean reward")
    right.set_xscale("log", base=2)
    right.set_xlabel("k, answers to a prompt")
    right.set_ylabel("pass@k of held-out prompts")
    for axes in (left, right):
        axes.grid(alpha=0.2)
        axes.legend(frameon=False)
    save(figure, path, dpi=130)
