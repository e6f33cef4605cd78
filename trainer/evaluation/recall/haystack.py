"""Text that hides what is to be found: sentences drawn from a list of words, or a text of the user's."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Protocol

from trainer.evaluation.recall.draws import Draws


def _list(words: str) -> list[str]:
    return words.split()


_ADJECTIVES = _list(
    "old small green quiet heavy bright narrow early gentle hollow broken silver patient distant yellow wooden careful "
    "empty frozen golden humble little modern northern open proud rapid simple tall warm white young"
)
_NOUNS = _list(
    "river garden teacher window letter market bridge painter kitchen forest harbour farmer engine library mountain "
    "captain orchard lantern village doctor station island singer cellar valley baker tower wagon sailor meadow clock "
    "neighbour basket chapel miller horse road winter table church uncle fence barn shepherd lake school stone boat"
)
_VERBS = _list(
    "watches carries follows remembers paints repairs crosses describes leaves visits opens counts borrows draws hears "
    "keeps measures misses passes reaches sells shows finds washes"
)
_PLACES = _list("near behind above beside below before after beyond")


class Words(Protocol):
    """The words of one example's haystack: the same first ones, however many are asked for."""

    def __call__(self, count: int) -> list[str]:
        """The first `count` words, with their punctuation."""


class Haystack:
    """A source of text.

    Args:
        text: The text to take words from, round and round, from a drawn word on. None draws sentences.
    """

    def __init__(self, text: str | None = None) -> None:
        self._words = None if text is None else text.split()

    def words(self, draws: Draws) -> Words:
        """The words of an example."""
        own = self._words
        if own is not None:
            start = draws.below(len(own))
            return lambda count: [own[(start + place) % len(own)] for place in range(count)]
        drawn: list[str] = []
        source = _sentences(draws)

        def first(count: int) -> list[str]:
            drawn.extend(islice(source, max(count - len(drawn), 0)))
            return drawn[:count]

        return first


def _sentences(draws: Draws) -> Iterator[str]:
    while True:
        sentence = ["The", draws.one_of(_ADJECTIVES), draws.one_of(_NOUNS), draws.one_of(_VERBS), "the"]
        sentence += [draws.one_of(_NOUNS)]
        if draws.below(2):
            sentence += [draws.one_of(_PLACES), "the", draws.one_of(_ADJECTIVES), draws.one_of(_NOUNS)]
        yield from sentence[:-1]
        yield sentence[-1] + "."


def hide(words: Sequence[str], needles: Sequence[str], depths: Sequence[float]) -> str:
    """Put sentences into a text, each at the beginning of the sentence that is nearest to its depth.

    Args:
        words: The text.
        needles: The sentences, in the order in which those of equal places are to stand.
        depths: Of each, from 0, the beginning, to 1, the end.
    """
    starts = [0, *(place + 1 for place, word in enumerate(words) if word.endswith((".", "!", "?")))]
    whole: dict[int, list[str]] = {}
    for needle, depth in zip(needles, depths, strict=True):
        target = depth * len(words)
        whole.setdefault(min(starts, key=lambda start: abs(start - target)), []).append(needle)
    text: list[str] = []
    for place in range(len(words) + 1):
        text += whole.get(place, [])
        text += words[place : place + 1]
    return " ".join(text)
