"""What the server does with one request for text, without HTTP: limits, prompts → tokens, tokens → pieces."""

import asyncio
import hmac
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from models.generation import Request
from trainer.data.chat import Message
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ConfigError
from trainer.serving import protocol
from trainer.serving.answers import Answer, Chat, Completions, TokenTexts
from trainer.serving.choices import Choice, Piece
from trainer.serving.config import ServeConfig
from trainer.serving.errors import ApiError, bad_field, shortened
from trainer.serving.scheduler import Generation, Scheduler

# The text of a token depends on the few before it.
_TOKENS_OF_CONTEXT = 16
# Characters above which text is worked on in a thread of its own, so that others need not wait for it.
_LARGE = 1 << 14

T = TypeVar("T")


@dataclass(frozen=True)
class Served:
    """The model.

    Attributes:
        name: Its name in requests.
        tokenizer: Its tokenizer.
        stop_tokens: Tokens that end a choice.
        render: Turns messages into the tokens of a prompt. Raises ConfigError if it cannot.
    """

    name: str
    tokenizer: Tokenizer
    stop_tokens: tuple[int, ...]
    render: Callable[[Sequence[Message]], list[int]]


class Service:
    """Answers requests for text.

    Args:
        served: The model.
        scheduler: Its scheduler.
        config: Limits and key.

    Attributes:
        served: The model.
        scheduler: Its scheduler.
        config: Limits and key.
        is_draining: Set it to refuse further requests.
    """

    def __init__(self, served: Served, scheduler: Scheduler, config: ServeConfig) -> None:
        self.served, self.scheduler, self.config = served, scheduler, config
        self.is_draining = False
        self._texts = TokenTexts(served.tokenizer)
        self._limits = protocol.Limits(config.max_prompt_tokens, config.max_new_tokens, config.slots + config.queue)

    @property
    def state(self) -> str:
        """Whether requests are accepted: ready, or why not."""
        return "failed" if self.scheduler.failure else "draining" if self.is_draining else "ready"

    def require_key(self, authorization: str) -> None:
        """Check the header Authorization.

        Raises:
            ApiError: 401.
        """
        if self.config.api_key is None:
            return
        given = authorization.removeprefix("Bearer ").strip()
        # Takes as long wherever the keys differ, so that its time tells nothing.
        if not hmac.compare_digest(given.encode(), self.config.api_key.encode()):
            message = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

    def require_model(self, name: str) -> None:
        """Check the name of a model.

        Raises:
            ApiError: 404.
        """
        if name != self.served.name:
            message = f"the model {shortened(name)!r} is not served here, but {self.served.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def complete(self, content: bytes) -> "Task":
        """Begin to answer the body of a request to /v1/completions.

        Raises:
            ApiError: the request is refused.
        """
        asked = protocol.read_completions(await _apart(len(content), protocol.parse_json, content), self._limits)
        self.require_model(asked.model)
        prompts = [await self._tokens(prompt) for prompt in asked.prompts]
        return self._begin(Completions, asked, prompts)

    async def chat(self, content: bytes) -> "Task":
        """Begin to answer the body of a request to /v1/chat/completions.

        Raises:
            ApiError: the request is refused.
        """
        asked = protocol.read_chat(await _apart(len(content), protocol.parse_json, content), self._limits)
        self.require_model(asked.model)
        try:
            prompt = await _apart(len(content), self.served.render, asked.messages)
        except ConfigError as error:
            raise bad_field("messages", str(error)) from error
        self._require_length(len(prompt), "messages")
        return self._begin(Chat, asked, [prompt])

    async def _tokens(self, prompt: protocol.Prompt) -> list[int]:
        tokenizer = self.served.tokenizer
        if isinstance(prompt, str):
            # In training, every document follows the end of another.
            tokens = await _apart(len(prompt), tokenizer.encode, prompt) or [tokenizer.eod_id]
        else:
            tokens = list(prompt)
            if min(tokens) < 0 or max(tokens) >= tokenizer.vocab_size:
                raise bad_field("prompt", f"token ids must be from 0 to {tokenizer.vocab_size - 1}")
        self._require_length(len(tokens), "prompt")
        return tokens

    def _require_length(self, length: int, param: str) -> None:
        if length > self._limits.prompt_tokens:
            message = f"{param}: {length} tokens are more than this server's {self._limits.prompt_tokens}; shorten it"
            raise ApiError(400, message, param=param, code="context_length_exceeded")

    def _begin(self, kind: type[Answer], asked: protocol.Asked, prompts: Sequence[list[int]]) -> "Task":
        tokenizer = self.served.tokenizer
        answer = kind(asked.model, self._texts, sum(map(len, prompts)), asked.log_probs)
        choices = [
            Choice(tokenizer.decode, prompt[-_TOKENS_OF_CONTEXT:], asked.stops)
            for prompt in prompts
            for _ in range(asked.samples)
        ]
        sampling = replace(asked.sampling, stop_tokens=self.served.stop_tokens)
        requests = [Request(tuple(prompt), sampling, asked.samples) for prompt in prompts]
        # Last, because from here on slots have to be given back.
        return Task(asked, self.scheduler.submit(requests), answer, choices)


async def _apart(size: int, function: Callable[..., T], *arguments: Any) -> T:
    """Call a function, in a thread if the text that it works on is large."""
    return function(*arguments) if size < _LARGE else await asyncio.to_thread(function, *arguments)


class Task:
    """An answer in the making.

    Args:
        asked: The request.
        generation: Its tokens.
        answer: Its JSON.
        choices: Its choices.

    Attributes:
        asked: The request.
        generation: Its tokens. Leave its context to give back the slots.
        answer: Its JSON.
    """

    def __init__(
        self, asked: protocol.Asked, generation: Generation, answer: Answer, choices: Sequence[Choice]
    ) -> None:
        self.asked, self.generation, self.answer, self._choices = asked, generation, answer, choices

    @property
    def drawn(self) -> int:
        """Tokens drawn so far, over all choices."""
        return sum(choice.drawn for choice in self._choices)

    async def pieces(self) -> AsyncIterator[dict[int, Piece]]:
        """What has arrived since the last time, by choice, until all choices have ended.

        Raises:
            ApiError: the generation has failed.
        """
        while any(choice.finish is None for choice in self._choices):
            found: dict[int, Piece] = {}
            for place, event in await self.generation.read():
                index = place * self.asked.samples + event.sample
                choice = self._choices[index]
                was_open = choice.finish is None
                found.setdefault(index, Piece()).add(choice.feed(event))
                if was_open and choice.finish is not None and event.finish is None:
                    # A stop string, of which the engine knows nothing.
                    self.generation.end(place, event.sample)
            yield found

    async def whole(self) -> dict[str, Any]:
        """The answer, once it is complete.

        Raises:
            ApiError: the generation has failed.
        """
        whole = [Piece() for _ in self._choices]
        async for found in self.pieces():
            for index, piece in found.items():
                whole[index].add(piece)
        return self.answer.whole(whole, self.drawn)

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The events of a stream, as they come.

        Raises:
            ApiError: the generation has failed.
        """
        first = self.answer.first_chunks(len(self._choices))
        async for found in self.pieces():
            for chunk in first:
                yield chunk
            first = []
            for index, piece in found.items():
                if piece.text or piece.tokens or piece.finish:
                    yield self.answer.chunk(index, piece)
        if self.asked.include_usage:
            yield self.answer.usage_chunk(self.drawn)
