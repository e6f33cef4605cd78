"""Curves of finished runs, from their metrics.jsonl."""

import json
import math
from pathlib import Path
from typing import Any


def read_metrics(run: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of training steps, and those of validations. A loss that was not finite (null) is NaN."""
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "loss" in line and line["loss"] is None:
            line["loss"] = math.nan
    return [line for line in lines if "grad_norm" in line], [line for line in lines if "split" in line]


def smooth(values: list[float], half_life: float = 20.0) -> list[float]:
    """Exponential moving average, unbiased from the first value on; NaN, the loss of a skipped step, does not count."""
    decay = 0.5 ** (1 / half_life)
    total = weight = 0.0
    out = []
    for value in values:
        if not math.isnan(value):
            total, weight = decay * total + value, decay * weight + 1
        out.append(total / weight if weight else math.nan)
    return out
