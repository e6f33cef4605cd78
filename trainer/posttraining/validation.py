"""Validations of post-training: the loss on held-out answers, and the model's own answers to held-out prompts."""

from __future__ import annotations

import logging
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.callbacks.base import Callback
from trainer.errors import ConfigError
from trainer.evaluation.pass_at_k import pass_at_k
from trainer.objectives.language_model import LanguageModel
from trainer.posttraining.curves import draw
from trainer.posttraining.data.packing import Packing, pack
from trainer.posttraining.data.sequences import TokenSequence
from trainer.posttraining.rollouts import Policy, Prompt, Sampler

if TYPE_CHECKING:
    from trainer.loop import Trainer
    from trainer.posttraining.config import PassAtKConfig, PosttrainConfig
    from trainer.posttraining.data.row import Row

_LOGGER = logging.getLogger("spiketrain")


class Validation(Callback, ABC):
    """Validates before the first step, every so many steps, and after the last one."""

    phase = "validate"
    every = 0

    def on_start(self, trainer: Trainer) -> None:
        """Validate what the run begins with."""
        if trainer.progress.step == 0:
            self._report(trainer)

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Validate if a validation is due."""
        if trainer.finished or (self.every and trainer.progress.step % self.every == 0):
            self._report(trainer)

    def _report(self, trainer: Trainer) -> None:
        trainer.enter(self.phase)
        start = time.perf_counter()
        figures = self.validate(trainer)
        trainer.report_figures("validation", figures, time.perf_counter() - start)

    @abstractmethod
    def validate(self, trainer: Trainer) -> dict[str, float]:
        """Return the figures, the same on every rank."""


class SupervisedLoss(Validation):
    """Nats per learned token of held-out sequences.

    Args:
        sequences: The sequences.
        packing: What micro-batches must look like; `tokens` is not used.
        config: The run's configuration.
    """

    def __init__(self, sequences: Sequence[TokenSequence], packing: Packing, config: PosttrainConfig) -> None:
        self._sequences, self.every = sequences, config.evaluation.every
        self._packing = replace(packing, tokens=config.train.seq_len * config.train.micro_batch_size)

    def validate(self, trainer: Trainer) -> dict[str, float]:
        """See `SupervisedLoss`."""
        engine = trainer.engine
        batches = pack(
            self._sequences,
            self._packing,
            seed=0,
            step=0,
            rank=engine.data_parallel_rank,
            world=engine.data_parallel_size,
        )
        objective = LanguageModel()
        own = [engine.evaluate(batches, objective)[0], float(sum(map(objective.count, batches)))]
        loss, tokens = engine.collectives.sum_over_data(own)
        return {"loss": loss / max(tokens, 1.0)}


class PassAtK(Validation):
    """The model's answers to held-out prompts: their mean reward, and the share of prompts solved in k answers.

    The draws are the same at every validation.

    Args:
        prompts: The rows with the tokens of their prompts.
        sampler: Answers prompts.
        policy: How the answers of training are drawn.
        config: How many prompts and answers.
    """

    def __init__(
        self, prompts: Sequence[tuple[Row, list[int]]], sampler: Sampler, policy: Policy, config: PassAtKConfig
    ) -> None:
        chosen = prompts[: config.prompts] if config.prompts else prompts
        self._prompts = [Prompt(number, row, tuple(tokens)) for number, (row, tokens) in enumerate(chosen)]
        self._sampler, self.every, self._right = sampler, config.every, config.right
        # Other draws than those of training.
        self._policy = replace(
            policy, samples=config.samples, temperature=config.temperature, seed=policy.seed + 1_000_003
        )

    def validate(self, trainer: Trainer) -> dict[str, float]:
        """See `PassAtK`."""
        groups = self._sampler.answer(self._prompts, self._policy)
        solved = np.array([sum(reward >= self._right for reward in group.rewards) for group in groups])
        count = self._policy.samples
        rewards = [reward for group in groups for reward in group.rewards]
        figures = {"reward": statistics.fmean(rewards)}
        for k in powers_of_two(count):
            figures[f"pass@{k}"] = float(np.mean(pass_at_k(np.full(len(solved), count), solved, k)))
        return figures

    def on_end(self, trainer: Trainer) -> None:
        """Draw the rewards and pass@k of the whole run, if matplotlib is installed."""
        if trainer.engine.rank != 0 or not trainer.finished:
            return
        path = trainer.run_dir / "pass_at_k.png"
        try:
            draw([trainer.run_dir], path)
        except ConfigError as error:
            _LOGGER.info("no plot: %s", error)
        else:
            _LOGGER.info("drew %s", path)


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4, … up to `most`, and `most`."""
    return sorted(
        {most, *(1 << power for power in range(most.bit_length()))} - {0} - set(range(most + 1, 2 * most + 1))
    )
