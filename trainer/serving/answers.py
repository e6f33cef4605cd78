"""Answers of OpenAI's interface: the JSON of completions and chat completions, whole and as a stream of events.

Source: https://platform.openai.com/docs/api-reference/completions and .../chat.
"""

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from trainer.data.tokenizer import Tokenizer
from trainer.serving.choices import Piece, Token

DONE = b"data: [DONE]\n\n"


def event(values: dict[str, Any]) -> bytes:
    """One server-sent event."""
    # All ASCII: some clients take U+2028 and others for the end of a line.
    return b"data: " + json.dumps(values, separators=(",", ":")).encode() + b"\n\n"


class TokenTexts:
    """The texts of single tokens, each decoded once.

    Args:
        tokenizer: The model's.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known = {tokenizer.eod_id: tokenizer.eod}

    def __getitem__(self, token: int) -> str:
        """The text of a token within a text; U+FFFD for part of a character."""
        text = self._known.get(token)
        if text is None:
            # As the second of two: some tokenizers drop the space at the beginning of a text.
            first = self._tokenizer.decode([token])
            text = self._known[token] = self._tokenizer.decode([token, token])[len(first) :]
        return text


class Answer(ABC):
    """The JSON of one answer.

    Args:
        model: The model's name.
        texts: The texts of single tokens.
        prompt_tokens: Tokens of all prompts together.
        log_probs: Whether to report log-probabilities.
    """

    prefix: ClassVar[str]
    kind: ClassVar[str]
    kind_of_chunks: ClassVar[str]

    def __init__(self, model: str, texts: TokenTexts, prompt_tokens: int, log_probs: bool) -> None:
        self._texts, self._prompt_tokens, self._log_probs = texts, prompt_tokens, log_probs
        self._head = {"id": self.prefix + secrets.token_hex(12), "created": int(time.time()), "model": model}

    def whole(self, pieces: Sequence[Piece], drawn: int) -> dict[str, Any]:
        """The answer of a request that is not streamed. `drawn` is the number of tokens drawn over all choices."""
        choices = [self._choice(index, piece) for index, piece in enumerate(pieces)]
        return self._head | {"object": self.kind, "choices": choices, "usage": self._usage(drawn)}

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """The next event of a stream."""
        return self._chunk([self._delta(index, piece)])

    def first_chunks(self, choices: int) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return []

    def usage_chunk(self, drawn: int) -> dict[str, Any]:
        """The event that ends a stream with token counts."""
        return self._chunk([]) | {"usage": self._usage(drawn)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head | {"object": self.kind_of_chunks, "choices": choices}

    def _usage(self, drawn: int) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": drawn,
            "total_tokens": self._prompt_tokens + drawn,
        }

    @abstractmethod
    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """One of the choices of a whole answer."""

    @abstractmethod
    def _delta(self, index: int, piece: Piece) -> dict[str, Any]:
        """One of the choices of a chunk."""


class Completions(Answer):
    """The answer of /v1/completions."""

    prefix, kind, kind_of_chunks = "cmpl-", "text_completion", "text_completion"

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        log_probs = self._log_probs_of(piece.tokens) if self._log_probs else None
        return {"index": index, "text": piece.text, "logprobs": log_probs, "finish_reason": piece.finish}

    _delta = _choice

    def _log_probs_of(self, tokens: Sequence[Token]) -> dict[str, Any]:
        return {
            "tokens": [self._texts[token.event.token] for token in tokens],
            "token_logprobs": [token.event.log_prob for token in tokens],
            "top_logprobs": [self._alternatives(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _alternatives(self, token: Token) -> dict[str, float]:
        # The drawn token is among them, as in OpenAI's answers. Of tokens with the same text, the most likely counts.
        found: dict[str, float] = {}
        for other, log_prob in (*token.event.alternatives, (token.event.token, token.event.log_prob)):
            found.setdefault(self._texts[other], log_prob)
        return found


class Chat(Answer):
    """The answer of /v1/chat/completions."""

    prefix, kind, kind_of_chunks = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def first_chunks(self, choices: int) -> list[dict[str, Any]]:
        """See `Answer.first_chunks`: the role."""
        delta = {"role": "assistant", "content": ""}
        return [
            self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])
            for index in range(choices)
        ]

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"index": index, "message": message, **self._rest(piece)}

    def _delta(self, index: int, piece: Piece) -> dict[str, Any]:
        return {"index": index, "delta": {"content": piece.text} if piece.text else {}, **self._rest(piece)}

    def _rest(self, piece: Piece) -> dict[str, Any]:
        content = [self._token(token) for token in piece.tokens]
        log_probs = {"content": content, "refusal": None} if self._log_probs else None
        return {"logprobs": log_probs, "finish_reason": piece.finish}

    def _token(self, token: Token) -> dict[str, Any]:
        alternatives = [self._one(other, log_prob) for other, log_prob in token.event.alternatives]
        return self._one(token.event.token, token.event.log_prob) | {"top_logprobs": alternatives}

    def _one(self, token: int, log_prob: float) -> dict[str, Any]:
        text = self._texts[token]
        # The bytes of part of a character are not known here.
        return {"token": text, "logprob": log_prob, "bytes": None if "\ufffd" in text else list(text.encode())}
