r"""Finds the answer in a completion: the last \boxed{}, a tag, "####" as in GSM8K, a block of code, the last line."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from trainer.errors import ConfigError

# A sign behind a digit or a letter is a minus between two numbers.
_NUMBER = re.compile(
    r"(?:(?<![\w).])[-+−])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?:\s?/\s?\d+)?(?:\s?%)?"
)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
# Boxes that are looked at, from the end: each may take a pass over the rest of the text.
_MOST_BOXES = 20


def boxed(text: str) -> str | None:
    r"""What the last \boxed{} or \fbox{} holds, with the braces inside of it; one that is not closed is passed over."""
    starts = [match.end() - 1 for match in _BOX.finditer(text)]
    contents = (_braced(text, start) for start in reversed(starts[-_MOST_BOXES:]))
    return next((content.strip() for content in contents if content is not None), None)


def _braced(text: str, start: int) -> str | None:
    """What stands between the brace at `start` and the one that closes it."""
    depth = 0
    for place in range(start, len(text)):
        if text[place] in "{}" and (place == 0 or text[place - 1] != "\\"):
            depth += 1 if text[place] == "{" else -1
            if depth == 0:
                return text[start + 1 : place]
    return None


def tagged(text: str, tag: str = "answer") -> str | None:
    """What the last <tag> holds."""
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, end) if end >= 0 else -1
    return text[start + len(tag) + 2 : end].strip() if start >= 0 else None


def after_hashes(text: str) -> str | None:
    """What follows the last #### on its line."""
    _, found, rest = text.rpartition("####")
    return rest.strip().split("\n", 1)[0].strip() if found and rest.strip() else None


def last_line(text: str) -> str | None:
    """The last line that is not blank."""
    return text.strip().rsplit("\n", 1)[-1].strip() or None


def last_number(text: str) -> str | None:
    """The last number, with its sign, thousands separators, fraction and percent."""
    found = _NUMBER.findall(text)
    return found[-1] if found else None


def whole(text: str) -> str | None:
    """All of it."""
    return text.strip() or None


def code_block(text: str, *languages: str) -> str | None:
    """The last block between ``` of one of these languages or of none, else the last one of any."""
    blocks = [(match[1].lower(), match[2]) for match in re.finditer(r"```([\w+-]*)[^\n]*\n(.*?)```", text, re.DOTALL)]
    fitting = [content for language, content in blocks if not language or language in languages]
    return (fitting or [content for _, content in blocks] or [None])[-1]


def after_thoughts(text: str) -> str:
    """What follows the last </think>, everything if there is none."""
    return text.rpartition("</think>")[2]


EXTRACTIONS: dict[str, Callable[[str], str | None]] = {
    "boxed": boxed,
    "answer": tagged,
    "hashes": after_hashes,
    "last_line": last_line,
    "last_number": last_number,
    "whole": whole,
}


class Extraction:
    """Ways to find an answer, tried in order.

    Args:
        ways: Names out of EXTRACTIONS.

    Raises:
        ConfigError: one is not known.
    """

    def __init__(self, ways: str | Sequence[str]) -> None:
        self.ways = [ways] if isinstance(ways, str) else list(ways)
        for way in self.ways:
            if way not in EXTRACTIONS:
                raise ConfigError(f"extract: there is no {way!r}; choose from {', '.join(EXTRACTIONS)}")
        if not self.ways:
            raise ConfigError(f"extract: it is empty; choose from {', '.join(EXTRACTIONS)}")

    def __call__(self, text: str) -> str | None:
        """The first that is found."""
        return next((found for way in self.ways if (found := EXTRACTIONS[way](text)) is not None), None)


def truths(ground_truth: Any) -> list[Any]:
    """The answers that count as right: the items of a list, or the ground truth itself."""
    return list(ground_truth) if isinstance(ground_truth, list | tuple) else [ground_truth]
