"""Learning rate as a pure function of the step. No state is stored, so a resume cannot get it wrong."""

import math

from trainer.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of a step.

    Linear warm-up to config.lr over warmup_steps, followed by one of two schedules. `cosine`: cosine decay (SGDR, arXiv
    1608.03983) to lr * min_lr_ratio at the last step. Otherwise: warm-up, stable, linear decay to the same value (arXiv
    2404.06395).

    Args:
        config: The schedule.
        step: Number of steps already taken, 0 for the first.
        steps: Number of steps in the whole run.
    """
    # step + 1: a learning rate of 0 would waste the first step.
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    low = config.lr * config.min_lr_ratio
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(steps - 1 - config.warmup_steps, 1)
        return low + (config.lr - low) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    decay_steps = round(steps * config.decay_fraction)
    left = max(steps - 1 - step, 0)
    return config.lr if left >= decay_steps else low + (config.lr - low) * left / decay_steps
