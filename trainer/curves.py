"""Curves of finished runs, from their metrics.jsonl."""

import json
from pathlib import Path
from typing import Any


def read_metrics(run: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of training steps, and those of validations."""
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "grad_norm" in line], [line for line in lines if "split" in line]


def smooth(values: list[float], half_life: float = 20.0) -> list[float]:
    """Exponential moving average, unbiased from the first value on."""
    decay = 0.5 ** (1 / half_life)
    total = weight = 0.0
    out = []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        out.append(total / weight)
    return out
