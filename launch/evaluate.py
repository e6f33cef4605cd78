"""Evaluate a checkpoint: bits per byte of data, tasks of recall, tasks of the lm-eval harness, or answers to prompts.

spiketrain evaluate --checkpoint runs/laptop --data data/stdlib-bpe4096 --split test
spiketrain evaluate --checkpoint runs/laptop --data README.md --by_position true
spiketrain evaluate --checkpoint runs/laptop --spiking true --raster spikes.png
spiketrain evaluate --checkpoint runs/laptop --recall '[needle, mqar]' --lengths '[512, 1024]'
spiketrain evaluate --checkpoint runs/laptop --tasks 'one,two' --task_dir tasks
spiketrain evaluate --checkpoint runs/grpo --rows.validation '[data/sums/validation.jsonl]' \
    --rewards '[{name: "trainer.posttraining.tasks:check_sum"}]' --pass_at_k '{samples: 64, max_new_tokens: 12}'
"""

import json
import math
from pathlib import Path
from typing import Any

from trainer.cli import entry
from trainer.evaluation.answers import evaluate_answers
from trainer.evaluation.config import EvaluateConfig
from trainer.evaluation.data import evaluate_data
from trainer.evaluation.harness_run import evaluate_tasks
from trainer.evaluation.recall.run import evaluate_recall


def finite(values: Any) -> Any:
    """Values as JSON has them: without NaN and infinities, which become null."""
    if isinstance(values, dict):
        return {name: finite(value) for name, value in values.items()}
    if isinstance(values, list):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def main(config: EvaluateConfig) -> None:
    """Evaluate, print the figures, and write them to a file if one is named."""
    if config.recall:
        result = evaluate_recall(config)
    elif config.rows.validation:
        result = evaluate_answers(config)
    else:
        result = (evaluate_tasks if config.tasks else evaluate_data)(config)
    if config.json:
        Path(config.json).write_text(json.dumps(finite(result), indent=1) + "\n")


if __name__ == "__main__":
    entry(main, EvaluateConfig, "Evaluate a checkpoint: bits per byte of data, or tasks.")
