"""What the tasks of recall share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from trainer.errors import ConfigError
from trainer.evaluation.recall.draws import Draws
from trainer.evaluation.recall.examples import Example, Writer
from trainer.evaluation.recall.haystack import Haystack

T = TypeVar("T")

_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Setting:
    """What examples are made of.

    Attributes:
        ids: The token ids that stand for text.
        writer: Encodes text; None without a tokenizer.
        haystack: Where text comes from.
        candidates: How many answers of a kind to compare, the right one included.
        depth: Where to hide a needle, from 0 to 1. None spreads the examples evenly over all depths.
    """

    ids: Sequence[int]
    writer: Writer | None
    haystack: Haystack
    candidates: int = 4
    depth: float | None = None

    def text(self, task: str) -> Writer:
        """The writer.

        Raises:
            ConfigError: there is no tokenizer.
        """
        if self.writer is None:
            raise ConfigError(f"recall: {task} is text, and the checkpoint has no tokenizer; name one with --tokenizer")
        return self.writer

    def depth_of(self, number: int) -> float:
        """The depth of an example's first needle. Multiples of the golden ratio fill [0, 1) evenly at any count."""
        return (0.5 + number * _GOLDEN) % 1 if self.depth is None else self.depth

    def others(self, draws: Draws, values: Sequence[T], right: T) -> list[T]:
        """Draw the wrong candidates among the values: fewer where there are not enough."""
        wrong = [value for value in values if value != right]
        return draws.some_of(wrong, min(self.candidates - 1, len(wrong)))


# (setting, draws, number of the example, length in tokens) to the example.
Task = Callable[[Setting, Draws, int, int], Example]
