"""What an example of a task of recall is, and how text becomes one of a given length in tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Answer:
    """Tokens that follow from what stands before them.

    Attributes:
        start: Number of the first token in the example.
        stop: Number of the token after the last.
        others: Token ids of wrong answers of the same kind, to compare the right one to.
        depth: Place of what they follow from, from 0, the beginning of the context, to 1.
    """

    start: int
    stop: int
    others: tuple[tuple[int, ...], ...]
    depth: float


@dataclass(frozen=True)
class Example:
    """A context with its answers.

    Attributes:
        tokens: Token ids of all of it.
        answers: The answers, in their order. An answer follows from the context and not from answers before it.
    """

    tokens: tuple[int, ...]
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Blank:
    """An answer as text.

    Attributes:
        text: The answer, without a space before it.
        others: Wrong answers of the same kind.
        depth: See Answer.
    """

    text: str
    others: Sequence[str]
    depth: float


class Writer:
    """Turns text into examples.

    The parts of a text are encoded one by one, so that a prompt has the tokens that it would have by itself.

    Args:
        tokenizer: The model's.
    """

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._tokenizer = tokenizer

    @cached_property
    def _lead(self) -> str:
        """What an answer needs before it to follow a space: nothing if the tokenizer writes spaces by itself."""
        encode, decode = self._tokenizer.encode, self._tokenizer.decode
        return " " if decode([*encode("a"), *encode(" b")]) == "a b" else ""

    def encode(self, parts: Sequence[str | Blank]) -> Example:
        """Encode a text. What stands before an answer must not end with a space: the answer brings it."""
        tokens: list[int] = []
        answers: list[Answer] = []
        for part in parts:
            if isinstance(part, str):
                tokens += self._tokenizer.encode(part)
                continue
            ids, *others = (tuple(self._tokenizer.encode(self._lead + text)) for text in (part.text, *part.others))
            answers.append(Answer(len(tokens), len(tokens) + len(ids), tuple(others), part.depth))
            tokens += ids
        return Example(tuple(tokens), tuple(answers))

    def fit(self, task: str, length: int, build: Callable[[int], Sequence[str | Blank]]) -> Example:
        """Encode the longest text that has at most `length` tokens.

        Args:
            task: Name of the task, for messages.
            length: Number of tokens, with the answers.
            build: Gives the text with so many units of what fills it. More units must never make fewer tokens.

        Raises:
            ConfigError: even without any filling the text has more tokens.
        """
        low, high = 0, None
        best = self.encode(build(0))
        base = len(best.tokens)
        if base > length:
            raise ConfigError(f"lengths: {length} tokens are too few for {task}, which needs {base}; give more")
        tokens_per_unit = 2.0
        while high is None or high - low > 1:
            guess = low + max(1, int((length - len(best.tokens)) / tokens_per_unit))
            guess = guess if high is None else min(guess, high - 1)
            example = self.encode(build(guess))
            tokens_per_unit = max((len(example.tokens) - base) / guess, 0.1)
            if len(example.tokens) <= length:
                low, best = guess, example
            else:
                high = guess
        return best
