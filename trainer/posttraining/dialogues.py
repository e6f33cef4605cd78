"""Answers of several turns: an environment replies to a turn of the model, which then goes on (environments.py).

A dialogue is one sequence of tokens: the prompt, the model's turns with the tokens that end them, and the replies
between, which the model reads and does not learn. Its draws depend on the run's seed, the prompt's number, the answer's
number and the turn's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING

from models.generation import Completion, Request
from trainer.posttraining.environments import TURNS, EnvironmentConfig
from trainer.posttraining.rewards.base import Answer, Score
from trainer.posttraining.rollouts import Gathers, Policy, Prompt, Sample

if TYPE_CHECKING:
    from trainer.data.tokenizer import Tokenizer
    from trainer.posttraining.data.encode import Encoder
    from trainer.posttraining.rewards.workers import RewardPool

Generate = Callable[[Sequence[Request]], list[list[Completion]]]


@dataclass
class _Dialogue:
    """One answer as it grows.

    Attributes:
        prompt: Its prompt.
        number: Its number in its group.
        answer: What is there so far.
        turns: The model's turns as text.
        said: All text, in order.
        is_open: Whether the model has ended its turn, and the environment is to reply.
    """

    prompt: Prompt
    number: int
    answer: Sample
    turns: list[str]
    said: list[str] = field(default_factory=list)
    is_open: bool = True

    @property
    def key(self) -> tuple[int, int]:
        """Its place among all dialogues of a rollout, the same on every rank."""
        return self.prompt.number, self.number


class Dialogues:
    """Continues first turns to whole answers.

    Args:
        config: The environment.
        encoder: Turns replies into tokens.
        tokenizer: The tokenizer.
        pool: Computes replies; None on ranks that score nothing.
        collectives: Of the engine that trains the model.
    """

    def __init__(
        self,
        config: EnvironmentConfig,
        encoder: Encoder,
        tokenizer: Tokenizer,
        pool: RewardPool | None,
        collectives: Gathers,
    ) -> None:
        self._config, self._encoder, self._tokenizer = config, encoder, tokenizer
        self._pool, self._collectives = pool, collectives

    def finish(
        self, prompts: Sequence[Prompt], first: Sequence[Sequence[Sample]], policy: Policy, generate: Generate
    ) -> list[list[Sample]]:
        """Go on until the environment ends every dialogue, or its turns or tokens are used up. Every rank calls this.

        Args:
            prompts: This rank's prompts.
            first: The first turns of the answers to each.
            policy: How answers are drawn.
            generate: Completes requests.
        """
        dialogues = [
            _Dialogue(prompt, number, sample, [sample.text], [sample.text], sample.finished)
            for prompt, samples in zip(prompts, first, strict=True)
            for number, sample in enumerate(samples)
        ]
        for turn in count(1):
            replies = self._replies([one for one in dialogues if one.is_open])
            requests = []
            for one in [one for one in dialogues if one.is_open]:
                request = self._read(one, replies[one.key], policy, turn)
                requests += [] if request is None else [(one, request)]
            if not any(self._collectives.gather(bool(requests))):
                break
            completions = generate([request for _, request in requests]) if requests else []
            for (one, _), (completion,) in zip(requests, completions, strict=True):
                self._add_turn(one, completion, policy)
        answers = iter(replace(one.answer, text="".join(one.said)) for one in dialogues)
        return [[next(answers) for _ in samples] for samples in first]

    def _replies(self, dialogues: Sequence[_Dialogue]) -> dict[tuple[int, int], Score]:
        """The replies to dialogues, on every rank that has them."""
        own: dict[tuple[int, int], Score] = {}
        if self._pool is not None and dialogues:
            scores = self._pool.score([self._question(one) for one in dialogues])
            own = {one.key: score for one, score in zip(dialogues, scores, strict=True)}
        return {key: score for part in self._collectives.gather(own) for key, score in part.items()}

    def _question(self, one: _Dialogue) -> Answer:
        row = one.prompt.row
        text = self._tokenizer.decode(list(one.prompt.tokens))
        return Answer(text, "", row.data_source, row.ground_truth, {**row.extra, TURNS: one.turns})

    def _read(self, one: _Dialogue, score: Score, policy: Policy, turn: int) -> Request | None:
        """Take a reply, and return the request for the next turn; None if the dialogue is over."""
        answer = one.answer
        reward = answer.reward + score.value
        one.answer = replace(answer, reward=reward, parts={"environment": reward}, error=score.error)
        one.is_open = False
        if score.error is not None or score.parts["done"]:
            return None
        if turn == self._config.turns:
            one.answer = replace(one.answer, finished=False)
            return None
        tokens = self._encoder.reply(one.prompt.row, score.text, self._config.role)[: self._config.max_reply_tokens]
        left = policy.max_new_tokens - len(answer.tokens) - len(tokens)
        if left < 1:
            one.answer = replace(one.answer, finished=False)
            return None
        one.said.append(score.text)
        first = len(answer.tokens)
        one.answer = replace(
            one.answer,
            tokens=(*answer.tokens, *tokens),
            log_probs=(*answer.log_probs, *[0.0] * len(tokens)),
            replies=(*answer.replies, (first, first + len(tokens))),
        )
        request = policy.request(replace(one.prompt, tokens=(*one.prompt.tokens, *one.answer.tokens)))
        key = hashlib.sha256(f"{policy.seed}/{one.prompt.number}/{one.number}/{turn}".encode()).digest()
        seed = int.from_bytes(key[:7], "little")
        return replace(request, sampling=replace(request.sampling, seed=seed, max_new_tokens=left), samples=1)

    def _add_turn(self, one: _Dialogue, completion: Completion, policy: Policy) -> None:
        turn = policy.sample(completion, self._tokenizer)
        one.turns.append(turn.text)
        one.said.append(turn.text)
        one.is_open = turn.finished
        one.answer = replace(
            one.answer,
            tokens=one.answer.tokens + turn.tokens,
            log_probs=one.answer.log_probs + turn.log_probs,
            finished=turn.finished,
        )
