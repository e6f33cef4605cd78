"""Validations of post-training: the loss on held-out answers, and the model's own answers to held-out prompts."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trainer.callbacks.base import Callback
from trainer.errors import ConfigError
from trainer.objectives.language_model import LanguageModel
from trainer.posttraining.answer_figures import Vote, answer_figures, as_markdown, save_rows, shown_rows
from trainer.posttraining.curves import draw
from trainer.posttraining.data.packing import Packing, pack
from trainer.posttraining.data.sequences import TokenSequence
from trainer.posttraining.initial import numbered
from trainer.posttraining.rollouts import Policy, Sampler

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
        trainer.tables = {}

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

    The draws are the same at every validation. run.dir/samples has some answers of each.

    Args:
        prompts: The rows with the tokens of their prompts.
        sampler: Answers prompts.
        policy: How the answers of training are drawn.
        config: How many prompts and answers.
        vote: What of an answer maj@k counts.
    """

    def __init__(
        self,
        prompts: Sequence[tuple[Row, list[int]]],
        sampler: Sampler,
        policy: Policy,
        config: PassAtKConfig,
        vote: Vote,
    ) -> None:
        self._prompts = numbered(prompts[: config.prompts] if config.prompts else prompts)
        self._sampler, self._vote, self.every = sampler, vote, config.every
        self._right, self._show = config.right, config.show
        # Other draws than those of training.
        self._policy = replace(
            policy, samples=config.samples, temperature=config.temperature, seed=policy.seed + 1_000_003
        )

    def validate(self, trainer: Trainer) -> dict[str, float]:
        """See `PassAtK`."""
        groups = self._sampler.answer(self._prompts, self._policy)
        if self._show and self._sampler.rank == 0:
            rows = shown_rows(groups, self._sampler.decode, self._show)
            save_rows(trainer.run_dir / "samples" / f"step_{trainer.progress.step:08d}.jsonl", rows)
            trainer.tables = {"answers": as_markdown(rows)}
        return answer_figures(groups, self._right, self._vote)

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
