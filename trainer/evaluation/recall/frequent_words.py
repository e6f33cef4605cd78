"""Frequent words: the three most frequent words of a coded text (RULER's FWE, arXiv 2404.06654, section 3).

The word of rank r appears about N / (ζ(2) r²) times among N words. The first rank is '....', which is to be ignored.
The three words after it are asked for, the most frequent one first.
"""

import math
from collections.abc import Sequence

from trainer.evaluation.recall.draws import Draws
from trainer.evaluation.recall.examples import Blank, Example
from trainer.evaluation.recall.setting import Setting

_ASKED, _IGNORED = 3, "...."
# From so many words on the asked ones and the next one differ in their numbers: 15, 6, 3 and 2.
_FEWEST = 100


def frequent_words(setting: Setting, draws: Draws, number: int, length: int) -> Example:
    """A text of made-up words."""
    # Half of the words are '....', and the others have a token at least.
    most = _FEWEST + 4 * length
    words = draws.words(math.isqrt(most) + _ASKED + setting.candidates)
    order = [draws.number() for _ in range(most)]
    # Wrong answers are the words of the next ranks.
    wrong = words[_ASKED : _ASKED + setting.candidates - 1]
    blanks = [Blank(word, wrong, 0.0) for word in words[:_ASKED]]
    before = "Read the following coded text and track the frequency of each coded word. "
    before += "Find the three most frequently appeared coded words. "
    after = (
        f"\nQuestion: Please ignore the dots '{_IGNORED}'. What are the three most frequently appeared words in the "
    )
    after += (
        "above coded text? Answer: According to the coded text above, the three most frequently appeared words are:"
    )

    def build(count: int) -> Sequence[str | Blank]:
        listed = _text(words, _FEWEST + count)
        shuffled = [word for _, word in sorted(zip(order, listed))]
        return [before + " ".join(shuffled) + after, *blanks]

    return setting.text("frequent_words").fit("frequent_words", length, build)


def _text(words: Sequence[str], count: int) -> list[str]:
    """`count` words, those of one rank together; what rounding leaves is filled with '....'."""
    text: list[str] = []
    for rank, word in enumerate(words, 2):
        text += [word] * math.floor(count / (math.pi**2 / 6 * rank**2))
    return text + [_IGNORED] * (count - len(text))
