"""Common words: those that appear most often in a list (RULER's CWE, arXiv 2404.06654, section 3).

Five words appear ten times as often as all others (six times as often in short lists). They are asked for in the order
in which they first appear, where RULER asks for ten in any order.
"""

from collections.abc import Sequence

from trainer.evaluation.recall.draws import Draws
from trainer.evaluation.recall.examples import Blank, Example
from trainer.evaluation.recall.setting import Setting

_COMMON = 5
# How often a common word appears, and another one: in lists below 4,096 tokens, and from there on, as in RULER.
_SHORT, _LONG, _LONG_FROM = (6, 1), (30, 3), 4096


def common_words(setting: Setting, draws: Draws, number: int, length: int) -> Example:
    """A numbered list of words."""
    often, seldom = _LONG if length >= _LONG_FROM else _SHORT
    wrong = setting.candidates - 1
    # An entry has two tokens at least: a number and a word.
    words = draws.words(_COMMON + wrong + length // 2)
    common, others = words[:_COMMON], words[_COMMON:]
    # Each entry has a place in [0, 1), so that more words leave the order of the first ones as it is.
    entries = [(draws.number(), word) for word in common for _ in range(often)]
    filling = [(draws.number(), word) for word in others for _ in range(seldom)]
    first = {word: min(place for place, each in entries if each == word) for word in common}
    blanks = [Blank(word, others[:wrong], first[word]) for word in sorted(common, key=first.__getitem__)]
    before = "Below is a numbered list of words. In these words, some appear more often than others. "
    before += "Memorize the ones that appear most often.\n"
    after = f"\nQuestion: What are the {_COMMON} most common words in the above list, in the order in which they first "
    after += f"appear? Answer: The top {_COMMON} words that appear most often in the list are:"

    def build(count: int) -> Sequence[str | Blank]:
        listed = sorted(entries + filling[: (wrong + count) * seldom])
        text = " ".join(f"{place}. {word}" for place, (_, word) in enumerate(listed, 1))
        return [before + text + after, *blanks]

    return setting.text("common_words").fit("common_words", length, build)
