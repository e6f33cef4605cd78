"""One choice of an answer as its tokens arrive: text without stop strings, and the tokens that the text is made of."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from models.generation import Event, Finish, StopStrings, TextStream


@dataclass(frozen=True)
class Token:
    """A token of a choice.

    Attributes:
        event: How it was drawn.
        offset: Where its text begins, in characters of the choice's text.
    """

    event: Event
    offset: int


@dataclass
class Piece:
    """What is new of a choice.

    Attributes:
        text: Its text.
        tokens: The tokens whose text is complete. Those of a stop string, and the token that ends a sample, have none.
        finish: Why the choice ends; None if it goes on.
    """

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: Finish | None = None

    def add(self, other: "Piece") -> None:
        """Append what came after."""
        self.text += other.text
        self.tokens += other.tokens
        self.finish = other.finish or self.finish


class Choice:
    """Turns the events of one sample into pieces.

    Args:
        decode: Maps tokens to text; incomplete characters become U+FFFD.
        prompt: Preceding tokens.
        stops: Strings that end the choice.

    Attributes:
        drawn: Number of tokens drawn, with those of a stop string and the one that ends the sample.
        finish: Why it has ended; None if it goes on.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int], stops: Sequence[str]) -> None:
        self.drawn = 0
        self.finish: Finish | None = None
        self._stream, self._stops = TextStream(decode, prompt), StopStrings(stops)
        # Characters that have arrived, and of these the ones that were returned.
        self._arrived, self._returned = 0, 0
        self._pending: deque[Token] = deque()

    def feed(self, event: Event) -> Piece:
        """Take the next event. After the end, the result is empty."""
        if self.finish is not None:
            return Piece()
        self.drawn += 1
        if event.finish == "stop":
            return self._end("stop", "")
        self._pending.append(Token(event, self._arrived))
        text = self._stream.feed(event.token)
        self._arrived += len(text)
        shown = self._show(text)
        if self._stops.stopped is not None:
            return self._end("stop", shown)
        if event.finish is not None:
            return self._end(event.finish, shown)
        return Piece(shown, self._complete())

    def _show(self, text: str) -> str:
        shown = self._stops.feed(text)
        self._returned += len(shown)
        return shown

    def _end(self, finish: Finish, shown: str) -> Piece:
        if self._stops.stopped is None:
            # Bytes that never became a character, and what could have begun a stop string.
            shown += self._show(self._stream.finish())
        if self._stops.stopped is None:
            rest = self._stops.finish()
            self._returned += len(rest)
            shown += rest
        else:
            finish = "stop"
        tokens = self._complete()
        if self._stops.stopped is None:
            tokens += self._pending
        self._pending.clear()
        self.finish = finish
        return Piece(shown, tokens, finish)

    def _complete(self) -> list[Token]:
        """Take the tokens whose text has begun to be returned."""
        found = []
        while self._pending and self._pending[0].offset < self._returned:
            found.append(self._pending.popleft())
        return found
