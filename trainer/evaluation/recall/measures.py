"""Measures of recall: whether a model gives the answers, and how it ranks them.

exact     share of answers that greedy decoding gives, token for token, after the context and the right answers before.
          Greedy decoding gives an answer if and only if each of its tokens is the most likely one after the right
          tokens before it, so one pass over the text tells without decoding anything.
tokens    share of the answers' tokens that are the most likely one after the right tokens before them
nats      negative log-likelihood of the answers' tokens, nats a token
first     share of answers that are more likely than all wrong candidates of the same kind: what a model remembers even
          if it does not follow the instruction. Guessing gives one over the number of candidates.
rank      mean place of the right answer among the candidates, from 1
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from trainer.evaluation.recall.examples import Answer, Example
from trainer.evaluation.recall.intervals import effective_count, wilson
from trainer.evaluation.scoring import Query, Score, Scorer


@dataclass(frozen=True)
class Outcome:
    """What a model makes of one answer.

    Attributes:
        example: Number of the example.
        depth: See Answer.
        right: Number of its tokens that are the most likely ones.
        tokens: Number of its tokens.
        log_prob: Log-probability of the whole answer, nats.
        rank: Its place among the candidates, from 1.
        candidates: Their number, the right one included.
    """

    example: int
    depth: float
    right: int
    tokens: int
    log_prob: float
    rank: int
    candidates: int

    @property
    def exact(self) -> bool:
        """Whether greedy decoding gives the answer."""
        return self.right == self.tokens


def measure(scorer: Scorer, examples: Sequence[Example], description: str) -> list[Outcome]:
    """Have a model answer the examples, with a progress bar that says `description`."""
    queries = [Query(example.tokens, example.answers[0].start) for example in examples]
    # Candidates of one token cost nothing: the context has been read for the right one.
    cheap = [_one_token_each(example) for example in examples]
    for example, is_cheap in zip(examples, cheap):
        if is_cheap:
            for answer in example.answers:
                queries += [Query((*example.tokens[: answer.start], *other), answer.start) for other in answer.others]
    scores = scorer.score(queries, description)
    singles = iter(scores[len(examples) :])
    outcomes = []
    for number, (example, score, is_cheap) in enumerate(zip(examples, scores, cheap)):
        if is_cheap:
            others = [[next(singles).total for _ in answer.others] for answer in example.answers]
        else:
            others = scorer.compare(example.tokens, [(answer.start, answer.others) for answer in example.answers])
        first = example.answers[0].start
        outcomes += [_outcome(number, answer, score, first, own) for answer, own in zip(example.answers, others)]
    return outcomes


def _one_token_each(example: Example) -> bool:
    return all(len(other) == 1 for answer in example.answers for other in answer.others)


def _outcome(number: int, answer: Answer, score: Score, first: int, others: Sequence[float]) -> Outcome:
    """The outcome of an answer, given the example's scores from token `first` on, and those of wrong candidates."""
    part = slice(answer.start - first, answer.stop - first)
    own = score.log_probs[part].sum(dtype=np.float64)
    return Outcome(
        number,
        answer.depth,
        int(score.greedy[part].sum()),
        answer.stop - answer.start,
        float(own),
        # A model that tells nothing apart ranks the right answer last.
        1 + sum(other >= float(own) for other in others),
        1 + len(others),
    )


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The measures over all answers, with intervals of 95 % for the shares."""
    tokens = sum(outcome.tokens for outcome in outcomes)
    return {
        "examples": len({outcome.example for outcome in outcomes}),
        "answers": len(outcomes),
        **_share("exact", outcomes, [outcome.exact for outcome in outcomes]),
        "tokens": sum(outcome.right for outcome in outcomes) / tokens,
        "nats": -sum(outcome.log_prob for outcome in outcomes) / tokens,
        **_share("first", outcomes, [outcome.rank == 1 for outcome in outcomes]),
        "rank": float(np.mean([outcome.rank for outcome in outcomes])),
        "candidates": float(np.mean([outcome.candidates for outcome in outcomes])),
    }


def _share(name: str, outcomes: Sequence[Outcome], hits: Sequence[bool]) -> dict[str, Any]:
    """The share of hits with its interval. Answers of one example may depend on each other."""
    pairs = groupby(zip(outcomes, hits), key=lambda pair: pair[0].example)
    groups = [[hit for _, hit in group] for _, group in pairs]
    share = sum(hits) / len(hits)
    return {name: share, f"{name}_interval": list(wilson(share, effective_count(groups)))}
