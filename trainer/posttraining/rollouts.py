"""Rollouts: answers of the model in training to prompts, with their rewards.

The generation engine samples from the training weights where they are. A prompt's state is computed once and cloned for
its group. An answer's draws depend on the run's seed, the prompt's number in the run and the answer's number in the
group, not on who computes them.

Ranks that share a model, over tensor- or expert-parallel groups, generate the same answers together. Each such replica
takes a share of the prompts; then every rank gets all answers.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch.distributed as dist

from models.generation import Completion, Engine, Request, Sampling
from trainer.durable import write_atomically
from trainer.errors import ConfigError
from trainer.posttraining.rewards.base import Answer, Score

if TYPE_CHECKING:
    from models.decoder import Decoder
    from trainer.data.tokenizer import Tokenizer
    from trainer.posttraining.data.row import Row
    from trainer.posttraining.dialogues import Dialogues
    from trainer.posttraining.rewards.workers import Batch, RewardPool
    from trainer.posttraining.strict import Redraw


@dataclass(frozen=True)
class Prompt:
    """A prompt that is to be answered.

    Attributes:
        number: Its number in the run, from 0; it seeds the samples.
        row: Its row.
        tokens: Its tokens.
    """

    number: int
    row: Row
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """One answer.

    Attributes:
        tokens: Its tokens, with the one that ends it.
        log_probs: Their log-probabilities as the sampler computed them, at the temperature of the samples, nats.
        finished: Whether the model ended it.
        text: The answer as text, without the token that ends it.
        reward: What it is worth.
        parts: Numbers that explain the reward.
        error: Why it could not be scored; None if it was.
        replies: Where in the tokens an environment's replies are: the first token of each, and the one behind it. Their
            log-probabilities are 0.
        experts: The experts that the sampler's routers chose, see models.generation.Completion; None if not recorded.
            Files of rollouts do not have them.
    """

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    finished: bool
    text: str = ""
    reward: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    replies: tuple[tuple[int, int], ...] = ()
    experts: np.ndarray | None = field(default=None, compare=False, repr=False)

    @property
    def pieces(self) -> list[tuple[tuple[int, ...], bool]]:
        """The tokens in pieces, each with whether the model wrote it."""
        found, place = [], 0
        for first, end in self.replies:
            found += [(self.tokens[place:first], True), (self.tokens[first:end], False)]
            place = end
        return [*found, (self.tokens[place:], True)]

    @property
    def written(self) -> int:
        """Number of tokens that the model wrote."""
        return len(self.tokens) - sum(end - first for first, end in self.replies)


@dataclass(frozen=True)
class Group:
    """The answers to one prompt.

    Attributes:
        number: The prompt's number in the run.
        row: Name of its row.
        prompt: Its tokens.
        samples: The answers.
    """

    number: int
    row: str
    prompt: tuple[int, ...]
    samples: tuple[Sample, ...]

    @property
    def rewards(self) -> list[float]:
        """The rewards of the answers."""
        return [sample.reward for sample in self.samples]

    @property
    def has_signal(self) -> bool:
        """Whether the rewards differ."""
        return min(self.rewards) < max(self.rewards)


@dataclass(frozen=True)
class Drawn:
    """Answers whose rewards are being computed.

    Attributes:
        groups: All groups, the same on every rank. They have their rewards if no rank scores them.
        batch: The scores of the groups that this rank scores; None if it scores none.
        own: Their places among all groups.
    """

    groups: tuple[Group, ...]
    batch: Batch | None = None
    own: range = range(0)


@dataclass(frozen=True)
class Policy:
    """How answers are drawn.

    Attributes:
        samples: Answers to each prompt.
        max_new_tokens: Longest answer.
        temperature: Divides the logits.
        seed: Of the run.
        stop_tokens: Tokens that end an answer.
    """

    samples: int
    max_new_tokens: int
    temperature: float
    seed: int
    stop_tokens: tuple[int, ...]

    def request(self, prompt: Prompt) -> Request:
        """The request for a prompt's answers."""
        key = hashlib.sha256(f"{self.seed}/{prompt.number}".encode()).digest()
        sampling = Sampling(
            self.max_new_tokens,
            temperature=self.temperature,
            seed=int.from_bytes(key[:7], "little"),
            stop_tokens=self.stop_tokens,
        )
        return Request(prompt.tokens, sampling, self.samples)

    def sample(self, completion: Completion, tokenizer: Tokenizer) -> Sample:
        """An answer as it was drawn, before it is scored."""
        log_probs = completion.log_probs if self.temperature == 1 else completion.tempered_log_probs
        text = tokenizer.decode(list(completion.content))
        experts = None if completion.experts is None else completion.experts.numpy()
        return Sample(completion.tokens, log_probs, completion.finish == "stop", text, experts=experts)


class Gathers(Protocol):
    """Collectives between all ranks; see trainer.engines.common.Collectives."""

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's object, on every rank."""


class Host(Protocol):
    """What holds the model on this rank: an engine, or a process by itself."""

    @property
    def model(self) -> Decoder:
        """The shard of the model on this rank."""

    @property
    def rank(self) -> int:
        """Number of this rank."""

    @property
    def collectives(self) -> Gathers:
        """Collectives between all ranks."""


class Sampler:
    """Answers prompts with the model in training, and scores the answers.

    Args:
        engine: What holds the model.
        tokenizer: The tokenizer.
        pool: Scores answers; None on ranks that score none, and for answers without rewards.
        slots: Answers that a rank continues at once.
        dialogues: Continues answers by turns of an environment; None for answers of one turn.
        redraw: Draws answers again from the distributions of training; None without strict mode.
        record_experts: Whether answers have the experts that routers chose.

    Attributes:
        rank: This rank.
        seconds: Time that generation, and waiting for rewards after it, have taken so far.
        tokens: Number of tokens drawn so far, over all ranks.
        redrawn: Number of them that strict mode has changed.
    """

    def __init__(
        self,
        engine: Host,
        tokenizer: Tokenizer,
        pool: RewardPool | None,
        slots: int,
        dialogues: Dialogues | None = None,
        redraw: Redraw | None = None,
        record_experts: bool = False,
    ) -> None:
        self._engine, self._tokenizer, self._pool, self._dialogues = engine, tokenizer, pool, dialogues
        self.rank, self._redraw = engine.rank, redraw
        self._replica, self._replicas, self._leads = replica_of(engine)
        self._generator = Engine(
            engine.model, slots=slots, vocab_size=tokenizer.vocab_size, record_experts=record_experts
        )
        self.seconds = {"generation": 0.0, "rewards": 0.0}
        self.tokens = self.redrawn = 0

    def answer(self, prompts: Sequence[Prompt], policy: Policy) -> list[Group]:
        """Answer prompts, equal on every rank; so are the groups, in the order of the prompts."""
        return self.finish(self.begin(prompts, policy))

    def begin(self, prompts: Sequence[Prompt], policy: Policy) -> Drawn:
        """Answer prompts, and begin to score the answers; else as `answer`."""
        own = prompts[self._replica :: self._replicas]
        start = time.perf_counter()
        # The weights have changed since the last time.
        self._generator.forget()
        requests = [policy.request(prompt) for prompt in own]
        completions = self._generator.generate(requests) if own else []
        redrawn = 0
        if self._redraw is not None:
            completions, redrawn = self._redraw.answers(requests, completions)
        drawn = [[policy.sample(one, self._tokenizer) for one in group] for group in completions]
        if self._dialogues is not None:
            drawn = self._dialogues.finish(own, drawn, policy, self._generator.generate)
        groups = [
            Group(prompt.number, prompt.row.id, prompt.tokens, tuple(samples))
            for prompt, samples in zip(own, drawn, strict=True)
        ]
        parts = self._engine.collectives.gather((groups, redrawn) if self._leads else ([], 0))
        gathered = [group for part, _ in parts for group in part]
        place = {prompt.number: index for index, prompt in enumerate(prompts)}
        gathered.sort(key=lambda group: place[group.number])
        self.seconds["generation"] += time.perf_counter() - start
        self.redrawn += sum(count for _, count in parts)
        self.tokens += sum(sample.written for group in gathered for sample in group.samples)
        return self.score(prompts, gathered)

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens as text."""
        return self._tokenizer.decode(list(tokens))

    def score(self, prompts: Sequence[Prompt], groups: Sequence[Group]) -> Drawn:
        """Begin to score answers to prompts, in the order of these."""
        own = range(self._replica, len(prompts), self._replicas)
        if self._pool is None or not self._leads:
            return Drawn(tuple(groups))
        answers = [self._answer(prompts[place], sample) for place in own for sample in groups[place].samples]
        return Drawn(tuple(groups), self._pool.submit(answers), own)

    def finish(self, drawn: Drawn) -> list[Group]:
        """Wait for the rewards of answers. Every rank calls this."""
        start = time.perf_counter()
        scores: list[Score] = [] if drawn.batch is None else drawn.batch.result()
        found, left = {}, iter(scores)
        if drawn.batch is not None:
            found = {place: [next(left) for _ in drawn.groups[place].samples] for place in drawn.own}
        every = {place: own for part in self._engine.collectives.gather(found) for place, own in part.items()}
        self.seconds["rewards"] += time.perf_counter() - start
        return [_scored(group, every.get(place)) for place, group in enumerate(drawn.groups)]

    def _answer(self, prompt: Prompt, sample: Sample) -> Answer:
        row, text = prompt.row, self.decode(prompt.tokens)
        return Answer(text, sample.text, row.data_source, row.ground_truth, row.extra, sample.finished)


def _scored(group: Group, scores: Sequence[Score] | None) -> Group:
    """The group with rewards beside those of its environment. An answer that the environment failed is worth 0."""
    if scores is None:
        return group
    samples = []
    for sample, score in zip(group.samples, scores, strict=True):
        if sample.error is not None:
            samples.append(replace(sample, reward=0.0))
            continue
        parts, reward = {**sample.parts, **score.parts}, sample.reward + score.value
        samples.append(replace(sample, reward=reward, parts=parts, error=score.error))
    return replace(group, samples=tuple(samples))


def mean_parts(samples: Sequence[Sample]) -> dict[str, float]:
    """The means of the numbers that explain the rewards, by name, each over the answers that have it."""
    parts: dict[str, list[float]] = {}
    for sample in samples:
        for name, value in sample.parts.items():
            parts.setdefault(name, []).append(value)
    return {name: statistics.fmean(values) for name, values in parts.items()}


def replica_of(engine: Host) -> tuple[int, int, bool]:
    """Which replica of the model this rank belongs to, how many there are, and whether this rank is its first.

    Every rank calls this.
    """
    groups = engine.model.groups
    own = {engine.rank}
    for group in (groups.tensor, groups.expert):
        own |= set() if group is None else set(dist.get_process_group_ranks(group))
    parts: list[set[int]] = []
    for linked in engine.collectives.gather(own):
        # Groups that have a rank in common are one replica.
        joined = set(linked).union(*(part for part in parts if part & linked))
        parts = [part for part in parts if not part & joined] + [joined]
    parts.sort(key=min)
    number = next(number for number, part in enumerate(parts) if engine.rank in part)
    return number, len(parts), engine.rank == min(parts[number])


_VERSION = 1


def save(path: Path, groups: Sequence[Group], **about: Any) -> None:
    """Write a rollout as lines of JSON: a line about it, then one for each group.

    Numbers are written in full, so that what is read back is the same to the bit.
    """
    lines = [{"version": _VERSION, **about}, *map(_line, groups)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _line(group: Group) -> dict[str, Any]:
    line = asdict(replace(group, samples=tuple(replace(sample, experts=None) for sample in group.samples)))
    for sample in line["samples"]:
        del sample["experts"]
    return line


def load(path: Path) -> tuple[list[Group], dict[str, Any]]:
    """Read what `save` has written: the groups, and what is known about the rollout.

    Raises:
        ConfigError: the file is missing, damaged, or of a later version.
    """
    try:
        about, *lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        if about["version"] > _VERSION:
            raise ConfigError(f"{path} is of a later version; read it with the program that wrote it")
        return [group_of(line) for line in lines], about
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is no rollout ({error}); restore it, or go on from a checkpoint at the beginning of a rollout"
        ) from error


def group_of(values: dict[str, Any]) -> Group:
    """A group from its plain values, as `dataclasses.asdict` gives them."""
    samples = tuple(
        Sample(
            **sample
            | {"tokens": tuple(sample["tokens"]), "log_probs": tuple(sample["log_probs"])}
            | {"replies": tuple((first, end) for first, end in sample.get("replies", ()))}
        )
        for sample in values["samples"]
    )
    return Group(values["number"], values["row"], tuple(values["prompt"]), samples)
