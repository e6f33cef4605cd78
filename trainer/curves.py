"""Curves of finished runs, read from metrics.jsonl."""

import json
import math
from pathlib import Path
from typing import Any


def read_metrics(run: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Read the lines of training steps and the lines of validations. A non-finite loss (null) becomes NaN."""
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "loss" in line and line["loss"] is None:
            line["loss"] = math.nan
    return [line for line in lines if "grad_norm" in line], [line for line in lines if "split" in line]


def smooth(values: list[float], half_life: float = 20.0) -> list[float]:
    """Exponential moving average, unbiased from the first value; ignores NaN, the loss of a skipped step."""
    # Dividing by the sum of weights removes the bias towards 0 (Adam's bias correction, arXiv 1412.6980).
    decay = 0.5 ** (1 / half_life)
    total = weight = 0.0
    out = []
    for value in values:
        if not math.isnan(value):
            total, weight = decay * total + value, decay * weight + 1
        out.append(total / weight if weight else math.nan)
    return out
