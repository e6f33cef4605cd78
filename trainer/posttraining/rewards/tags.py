"""Format: 1 if the completion is sections between tags, each once, in order, and nothing else."""

import re
from collections.abc import Sequence

from trainer.errors import ConfigError
from trainer.posttraining.rewards.base import Answer, Reward


def tags(
    names: Sequence[str] = ("think", "answer"),
    opened: bool = False,
    closed: bool = True,
    allow_empty: bool = False,
    unfinished: bool = False,
) -> Reward:
    """Judges the format alone, whatever stands in it.

    Args:
        names: The tags in order.
        opened: The prompt ends with the first opening tag, so the completion may leave it out.
        closed: Whether the last section must be between tags; else it is the rest of the completion.
        allow_empty: Take sections without text.
        unfinished: Take completions that were cut off, too.

    Raises:
        ConfigError: the names are no names of tags, or the same.
    """
    if isinstance(names, str) or not names or len(set(names)) < len(names):
        raise ConfigError("names: give a list of different names of tags, such as [think, answer]")
    if not all(re.fullmatch(r"[\w-]+", name) for name in names):
        raise ConfigError("names: the name of a tag has letters, digits, - and _ only")
    between = list(names) if closed else list(names[:-1])
    expected = [tag for name in between for tag in (f"<{name}>", f"</{name}>")]
    marks = re.compile(rf"(</?(?:{'|'.join(map(re.escape, names))})>)")

    def score(answer: Answer) -> float:
        if not (answer.finished or unfinished):
            return 0.0
        text = answer.completion
        if opened and expected and not text.lstrip().startswith(expected[0]):
            text = expected[0] + text
        pieces = marks.split(text)
        # Texts alternate with tags: outside, tag, inside, tag, outside …
        outside, inside = pieces[0::4], pieces[2::4]
        rest = outside.pop() if not closed and outside else ""
        if pieces[1::2] != expected or any(map(str.strip, outside)):
            return 0.0
        sections = inside if closed else [*inside, rest]
        return float(allow_empty or all(map(str.strip, sections)))

    return score
