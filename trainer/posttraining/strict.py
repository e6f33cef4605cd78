"""Strict mode: the sampler's log-probabilities are those of the training step, to the last bit.

The generation engine proposes an answer. Then training's own forward, over the micro-batch that the answer will be
learned from, gives each of its tokens a distribution, from which the token's random number draws again. Where a draw
differs from the proposal, it takes its place, and the micro-batch is computed again. In the end every token is a draw
from training's distribution, and the log-probabilities are those of a forward with the same tokens, shapes, kernels and
ranks as the training step's. So no kernel has to be invariant to the batch or to later tokens.

This is speculative decoding (arXiv 2211.17192) that shares random numbers between proposal and target, in place of
rejecting proposals. Rounding seldom changes a draw, so an answer costs about one forward beside its generation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from models.generation import Completion, Request
from models.generation.sampling import draw, uniform
from trainer.data.batch import Batch
from trainer.objectives.base import NO_MODELS, Outputs
from trainer.posttraining.data.packing import SEQUENCE, Packing, pack
from trainer.posttraining.data.sequences import TokenSequence
from trainer.posttraining.divergences import k3
from trainer.posttraining.policy import policy_log_probs

if TYPE_CHECKING:
    from trainer.engines.base import Engine

# Rows of logits that are in memory at once.
_ROWS = 256


class _Draws:
    """An objective that minimises nothing: it draws an answer's tokens again and keeps their log-probabilities."""

    metrics: tuple[str, ...] = ()
    models = NO_MODELS

    def __init__(self, request: Request, sample: int, first: int, vocab_size: int) -> None:
        self._request, self._sample, self._first, self._vocab_size = request, sample, first, vocab_size
        self.tokens: list[int] = []
        self.log_probs: tuple[float, ...] = ()

    def count(self, batch: Batch) -> int:
        return int(batch.loss_mask.count_nonzero())

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        counts, sampling = batch.loss_mask != 0, self._request.sampling
        log_probs, _ = policy_log_probs(outputs, batch, sampling.temperature)
        self.log_probs = tuple(log_probs[counts].tolist())
        for places in counts.flatten().nonzero()[:, 0][self._first :].split(_ROWS):
            chosen = torch.zeros_like(counts).flatten().index_fill(0, places, True).view_as(counts)
            start = self._first + len(self.tokens)
            numbers = [uniform(sampling.seed, self._sample, start + place) for place in range(len(places))]
            rows = len(numbers)
            drawn = draw(outputs.logits(chosen), [sampling] * rows, numbers, [None] * rows, self._vocab_size)
            self.tokens += [one.token for one in drawn]
        return log_probs.new_zeros(()), ()


class Redraw:
    """Draws proposed answers again from the distributions of training.

    Ranks that share a model call it together, and get the same.

    Args:
        engine: What trains the model.
        packing: What micro-batches of training look like: each holds one answer.
        vocab_size: Ids from this one on are padding of the vocabulary and are never drawn.
    """

    def __init__(self, engine: Engine, packing: Packing, vocab_size: int) -> None:
        assert packing.alone, "a position's values depend on what else a micro-batch holds"
        self._engine, self._packing, self._vocab_size = engine, packing, vocab_size

    def answers(
        self, requests: Sequence[Request], proposed: Sequence[Sequence[Completion]]
    ) -> tuple[list[list[Completion]], int]:
        """Draw the tokens of answers by training's forward.

        Args:
            requests: What was asked for, without penalties and truncation.
            proposed: The generation engine's answers to each.

        Returns:
            The answers, both of whose log-probabilities are the policy's, and how often a draw was another than the
            proposal.
        """
        found = [
            [self._answer(request, number, one) for number, one in enumerate(group)]
            for request, group in zip(requests, proposed, strict=True)
        ]
        return [[one for one, _ in group] for group in found], sum(count for group in found for _, count in group)

    def _answer(self, request: Request, sample: int, proposed: Completion) -> tuple[Completion, int]:
        changed = 0
        sampling, tokens, sure = request.sampling, list(proposed.tokens), 0
        while True:
            draws = self._forward(request, sample, tokens, sure)
            pairs = zip(tokens[sure:], draws.tokens, strict=True)
            agreed = next((place for place, (own, other) in enumerate(pairs) if own != other), None)
            if agreed is not None:
                sure += agreed
                tokens[sure] = draws.tokens[agreed]
                changed += 1
                if tokens[sure] in sampling.stop_tokens:
                    del tokens[sure + 1 :]
                sure += 1
            elif tokens[-1] in sampling.stop_tokens or len(tokens) == sampling.max_new_tokens:
                break
            else:
                sure = len(tokens)
                # Any token serves as the next proposal.
                tokens.append(tokens[-1])
        ends = tokens[-1] in sampling.stop_tokens
        answer = replace(
            proposed,
            tokens=tuple(tokens),
            log_probs=draws.log_probs,
            tempered_log_probs=draws.log_probs,
            finish="stop" if ends else "length",
        )
        return answer, changed

    def _forward(self, request: Request, sample: int, tokens: Sequence[int], first: int) -> _Draws:
        draws = _Draws(request, sample, first, self._vocab_size)
        sequence = TokenSequence.of([(request.prompt, False), (tokens, True)])
        self._engine.evaluate(pack([sequence], self._packing, seed=0, step=0), draws)
        return draws


@dataclass(frozen=True)
class Mismatch:
    """How the sampler's log-probabilities differ from a training step's.

    Attributes:
        tokens: Number of tokens at which they differ.
        difference: Largest difference, nats.
        k3: Largest k3 estimate of the divergence at a token, nats.
        sequence: Number of the first such sequence in the step.
        position: Position of its first such token in the sequence, from 0.
    """

    tokens: int = 0
    difference: float = 0.0
    k3: float = 0.0
    sequence: int = -1
    position: int = -1

    def __str__(self) -> str:
        return (
            f"{self.tokens} of the sampler's log-probabilities are not training's to the bit, first at token "
            f"{self.position} of sequence {self.sequence}; at most {self.difference:.3g} nats (k3 {self.k3:.3g})"
        )


class Check:
    """Compares the sampler's log-probabilities with those of a training step, bit by bit.

    Attributes:
        is_on: Whether the step is the first after sampling. Later ones have other weights.
    """

    def __init__(self) -> None:
        self.is_on = False
        self._found: list[Mismatch] = []

    def compare(self, log_probs: Tensor, sampler: Tensor, counts: Tensor, batch: Batch) -> Tensor:
        """Compare a micro-batch. All tensors are flat, [N].

        Args:
            log_probs: Of the training step.
            sampler: Of the sampler.
            counts: Which tokens to compare.
            batch: The micro-batch.

        Returns:
            0, or NaN if they differ: engines update nothing on a loss that is not finite.
        """
        log_probs = log_probs.detach()
        if not self.is_on or torch.equal(log_probs[counts], sampler[counts]):
            return log_probs.new_zeros(())
        places = (counts & (log_probs != sampler)).nonzero()[:, 0]
        differences = (sampler - log_probs)[places]
        first = int(places[0])
        self._found.append(
            Mismatch(
                len(places),
                _most(differences.abs()),
                _most(k3(differences)),
                int(batch.extra[SEQUENCE].flatten()[first]),
                # A position predicts the next token.
                int(batch.positions.flatten()[first]) + 1,
            )
        )
        return log_probs.new_full((), math.nan)

    def collect(self, engine: Engine) -> Mismatch:
        """What all micro-batches of the step have shown. Every rank calls this, and gets the same."""
        found, self._found = self._found, []
        # Ranks that share a data-parallel rank's micro-batches have found the same.
        by_rank = dict(engine.collectives.gather((engine.data_parallel_rank, found)))
        every = [one for part in by_rank.values() for one in part]
        if not every:
            return Mismatch()
        first = min(every, key=lambda one: one.sequence)
        return replace(
            first,
            tokens=sum(one.tokens for one in every),
            difference=max(one.difference for one in every),
            k3=max(one.k3 for one in every),
        )


def _most(values: Tensor) -> float:
    """The largest value; NaN if one is."""
    return float(np.max(values.float().cpu().numpy()))
