"""Random choices that are the same in every version of Python and on every machine."""

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

_CONSONANTS, _VOWELS = "bdfghklmnprstvz", "aeiou"


class Draws:
    """Random choices of one example.

    Args:
        key: What they depend on: equal keys give equal choices.
    """

    def __init__(self, *key: str | float) -> None:
        # Of this module, only random() after a seed of a string is guaranteed never to change.
        self._random = random.Random("/".join(map(str, key))).random

    def number(self) -> float:
        """Draw a number from [0, 1)."""
        return self._random()

    def below(self, end: int) -> int:
        """Draw an integer from [0, end)."""
        return int(self._random() * end)

    def one_of(self, values: Sequence[T]) -> T:
        """Draw one of the values."""
        return values[self.below(len(values))]

    def some_of(self, values: Sequence[T], count: int) -> list[T]:
        """Draw `count` different ones of the values, in a random order (the first steps of Fisher and Yates)."""
        moved: dict[int, int] = {}
        drawn = []
        for place in range(count):
            other = place + self.below(len(values) - place)
            drawn.append(values[moved.get(other, other)])
            moved[other] = moved.get(place, place)
        return drawn

    def shuffled(self, values: Sequence[T]) -> list[T]:
        """The values in a random order."""
        return self.some_of(values, len(values))

    def words(self, count: int) -> list[str]:
        """Draw `count` different words of three syllables, such as bakomi. There are 421,875 of them."""
        found: dict[str, None] = {}
        while len(found) < count:
            found["".join(self.one_of(_CONSONANTS) + self.one_of(_VOWELS) for _ in range(3))] = None
        return list(found)

    def numbers(self, count: int, digits: int) -> list[str]:
        """Draw `count` different numbers of so many digits."""
        found: dict[str, None] = {}
        first = 10 ** (digits - 1)
        while len(found) < count:
            found[str(first + self.below(9 * first))] = None
        return list(found)
