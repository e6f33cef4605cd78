"""What a generation is asked for, and what it gives: sampling parameters, requests, events and completions."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one request are drawn.

    The logits pass, in this order: the repetition penalty, the temperature, top_k, top_p (of what top_k leaves, which
    again sums to 1), min_p. The token is drawn from what is left.

    Attributes:
        max_new_tokens: Tokens to draw at most, at least 1.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Keep this many of the most likely tokens; 0 keeps all.
        top_p: Keep the most likely tokens whose probabilities add up to this (nucleus sampling, arXiv 1904.09751).
        min_p: Keep the tokens that are at least this many times as likely as the most likely one (arXiv 2407.01082).
        repetition_penalty: Divides the positive logits of all tokens of the prompt and of the sample, and multiplies
            the negative ones (arXiv 1909.05858); 1 for none.
        seed: Seed of the draws. A draw depends on (seed, number of the sample, number of the token in it) only.
        stop_tokens: Tokens that end a sample.
        top_log_probs: How many of the most likely tokens to report with each drawn one.

    Raises:
        ValueError: a field is out of its range. The message begins with the field's name.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()
    top_log_probs: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}: it must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}: it must not be negative (0 is greedy)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: it must be in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}: it must be in [0, 1]")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}: it must be positive (1 is none)")
        for name in ("top_k", "top_log_probs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must not be negative")

    @property
    def truncates(self) -> bool:
        """Whether the draw leaves out tokens."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
        prompt: Token ids, at least one.
        sampling: How to draw.
        samples: Number of continuations, numbered from 0. They share the computation of the prompt.
    """

    prompt: tuple[int, ...]
    sampling: Sampling = Sampling()
    samples: int = 1

    def __post_init__(self) -> None:
        # A list is fine too.
        object.__setattr__(self, "prompt", tuple(self.prompt))


@dataclass(frozen=True)
class Event:
    """One drawn token of one sample.

    Attributes:
        request: The number that `Engine.submit` returned.
        sample: Number of the sample in the request.
        token: The token.
        log_prob: Its log-probability in nats under the model itself: before repetition penalty and temperature, over
            all rows of the head, as in training.
        tempered_log_prob: Its log-probability after repetition penalty and temperature, and before top_k, top_p and
            min_p, over the ids that can be drawn. 0 at temperature 0, where one token has all probability.
        alternatives: The `top_log_probs` most likely tokens with their log_prob, the most likely first.
        finish: Why the sample ends with this token, "stop" if it is a stop token and "length" if it is the
            max_new_tokens-th; None if the sample goes on.
        experts: The experts of every token that was computed for this one and for no earlier one, see
            Completion.experts; None if the engine records none.
    """

    request: int
    sample: int
    token: int
    log_prob: float
    tempered_log_prob: float
    alternatives: tuple[tuple[int, float], ...]
    finish: Finish | None
    experts: Tensor | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Completion:
    """One finished sample.

    Attributes:
        tokens: All drawn tokens, with the stop token if one ended the sample.
        log_probs: See Event.log_prob; one per token.
        tempered_log_probs: See Event.tempered_log_prob; one per token.
        alternatives: See Event.alternatives; one tuple per token.
        finish: See Event.finish.
        experts: The experts that routers chose for the prompt and the sample but its last token, on the CPU, int16
            [tokens, layers with experts, k] as models.moe.router.recorded_experts has it; None if none are recorded.
    """

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    tempered_log_probs: tuple[float, ...]
    alternatives: tuple[tuple[tuple[int, float], ...], ...]
    finish: Finish
    experts: Tensor | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, events: Sequence[Event]) -> "Completion":
        """Collect the events of one sample, of which the last has `finish`."""
        finish = events[-1].finish
        assert finish is not None, "the last event of a sample says why it ends"
        experts = [event.experts for event in events if event.experts is not None]
        return cls(
            tuple(event.token for event in events),
            tuple(event.log_prob for event in events),
            tuple(event.tempered_log_prob for event in events),
            tuple(event.alternatives for event in events),
            finish,
            torch.cat(experts).cpu() if experts else None,
        )

    @property
    def content(self) -> tuple[int, ...]:
        """The tokens without the stop token."""
        return self.tokens[:-1] if self.finish == "stop" else self.tokens
