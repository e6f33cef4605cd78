"""Rehearsal of what the initial model has mastered (DPH-RL, arXiv:2509.07430).

Before the first step the initial model answers every prompt several times. Prompts of which enough answers are right
are mastered, and no longer sampled. One more answer to each is drawn, so that the stored ones are not those by which
the prompt was chosen; if it is right, it is stored with its log-probabilities under the initial model, by the kernels
of training. No reference model is needed after that.

run.dir/rehearsal has the stored answers (answers.safetensors) and which prompts were mastered (mastered.json).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.callbacks.base import Callback
from trainer.posttraining.data.packing import Packing
from trainer.posttraining.data.sampler import EndlessOrder
from trainer.posttraining.data.sequences import TokenSequence, load_sequences, save_sequences
from trainer.posttraining.initial import answers, count_right, numbered, read_known, write_known
from trainer.posttraining.policy import REFERENCE
from trainer.posttraining.rollouts import Policy, Prompt, Sampler
from trainer.posttraining.scoring import Scorer

if TYPE_CHECKING:
    from trainer.loop import Trainer
    from trainer.posttraining.config import RehearsalConfig
    from trainer.posttraining.data.row import Row

# Added to the run's seed: other draws than those of training, and than those that decide.
_SECOND_SEED = 3_000_017


@dataclass(frozen=True)
class Stored:
    """What the initial model has mastered.

    Attributes:
        mastered: Numbers of the mastered prompts among all, in order.
        answered: Those of them whose stored answer is right, in order.
        sequences: Their stored answers, with the log-probabilities as REFERENCE.
    """

    mastered: tuple[int, ...]
    answered: tuple[int, ...]
    sequences: tuple[TokenSequence, ...]

    def take(self, step: int, count: int, seed: int) -> list[TokenSequence]:
        """The stored answers of a step: each once per epoch, shuffled."""
        if not self.sequences:
            return []
        return EndlessOrder([self.sequences], [1.0], seed).take(step * count, count)


def load(folder: Path, settings: dict[str, Any]) -> Stored | None:
    """Read what `collect` has written; None if there is nothing.

    Raises:
        ConfigError: the files are damaged, or of other settings or another model.
    """
    known = read_known(folder / "mastered.json", settings)
    if known is None:
        return None
    sequences = load_sequences(folder / "answers.safetensors") if known["answered"] else []
    return Stored(tuple(known["mastered"]), tuple(known["answered"]), tuple(sequences))


def collect(
    folder: Path,
    settings: dict[str, Any],
    rows: Sequence[tuple[Row, list[int]]],
    config: RehearsalConfig,
    right: float,
    sampler: Sampler,
    scorer: Scorer,
    policy: Policy,
    packing: Packing,
) -> Stored:
    """Answer all prompts with the initial model, which the engine holds. Every rank calls this.

    Args:
        folder: Where the result is written.
        settings: What it depends on, which `load` compares.
        rows: All rows with the tokens of their prompts.
        config: How many answers decide.
        right: Reward of a right answer.
        sampler: Answers prompts.
        scorer: Scores the stored answers.
        policy: How answers of training are drawn.
        packing: What micro-batches of scoring must look like.
    """
    prompts, needed = numbered(rows), config.threshold or config.samples
    counts = count_right(prompts, sampler, policy, config.samples, right, "rehearsal")
    mastered = [prompt for prompt, count in zip(prompts, counts, strict=True) if count >= needed]
    second = replace(policy, samples=1, seed=policy.seed + _SECOND_SEED)
    answered, sequences = [], []
    for prompt, group in zip(mastered, answers(mastered, sampler, second), strict=True):
        if group.rewards[0] >= right:
            answered.append(prompt.number)
            sequences.append(TokenSequence.of([(prompt.tokens, False), (group.samples[0].tokens, True)]))
    log_probs = scorer.score(sequences, packing, step=0)[0] if sequences else []
    stored = Stored(
        tuple(prompt.number for prompt in mastered),
        tuple(answered),
        tuple(replace(sequence, extra={REFERENCE: own}) for sequence, own in zip(sequences, log_probs, strict=True)),
    )
    if scorer.engine.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if stored.sequences:
            save_sequences(folder / "answers.safetensors", stored.sequences)
        # Written last: without it the others do not count.
        write_known(folder / "mastered.json", settings, mastered=stored.mastered, answered=stored.answered)
    return stored


class KeepRate(Callback):
    """Reports the share of mastered prompts that the model still solves, in one answer each.

    Args:
        stored: What the initial model has mastered.
        rows: All rows with the tokens of their prompts.
        sampler: Answers prompts.
        policy: How answers of training are drawn.
        right: Reward of a right answer.
        every: Steps between reports; 0 reports after the last step only.
        most: Number of prompts, the first of the mastered ones; 0 takes all.
    """

    phase = "validate"

    def __init__(
        self,
        stored: Stored,
        rows: Sequence[tuple[Row, list[int]]],
        sampler: Sampler,
        policy: Policy,
        right: float,
        every: int,
        most: int,
    ) -> None:
        chosen = stored.mastered[:most] if most else stored.mastered
        self._prompts = [Prompt(number, rows[number][0], tuple(rows[number][1])) for number in chosen]
        self._sampler, self._right, self._every = sampler, right, every
        self._policy = replace(policy, samples=1, seed=policy.seed + _SECOND_SEED + 1)

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Report if a report is due."""
        due = trainer.finished or (self._every and trainer.progress.step % self._every == 0)
        if not due or not self._prompts:
            return
        trainer.enter(self.phase)
        groups = self._sampler.answer(self._prompts, self._policy)
        kept = float(np.mean([group.rewards[0] >= self._right for group in groups]))
        trainer.report_figures("mastered", {"keep_rate": kept}, 0.0)
