"""Multi-query associative recall (Arora et al. 2023, "Zoology", arXiv 2312.04927, section 3 and appendix E).

A sequence begins with pairs of a key and its value. Later each key comes again, at a distance that follows a power law,
and its value is what has to come next:

    k1 v1 k2 v2 k3 v3 …  r r k2 v2 r r r r k1 v1 r r …

`mqar` is made of token ids, keys, values and the rest r at random, so that it exists for any vocabulary. It tests the
mechanism by itself: untrained on it, a language model that copies after a repeated token does well. `mqar_text` has
lines of words, with a text between pairs and queries.
"""

from collections.abc import Sequence

from trainer.errors import ConfigError
from trainer.evaluation.recall.draws import Draws
from trainer.evaluation.recall.examples import Answer, Blank, Example
from trainer.evaluation.recall.setting import Setting

# Exponent of the distances: the slots of queries are drawn with probabilities ~ slot^(0.01 - 1), as in Zoology's code.
_POWER = 0.01
# A pair for so many tokens, and at most so many pairs: Zoology has 4 pairs in 64 tokens, and 64 pairs at most.
_TOKENS_PER_PAIR, _MOST_PAIRS = 16, 64
# Lines of text have several tokens a word.
_TOKENS_PER_LINE, _MOST_LINES = 64, 32


def mqar(setting: Setting, draws: Draws, number: int, length: int) -> Example:
    """Pairs and queries of token ids."""
    pairs = min(length // _TOKENS_PER_PAIR, _MOST_PAIRS, len(setting.ids) // 4)
    if pairs < 1:
        raise ConfigError(
            f"lengths: mqar needs {_TOKENS_PER_PAIR} tokens and 4 ids at least, not {length} and {len(setting.ids)}"
        )
    drawn = draws.some_of(setting.ids, 2 * pairs)
    keys, values = drawn[:pairs], drawn[pairs:]
    # The rest must not ask for anything.
    known = set(keys)
    rest = [token for token in setting.ids if token not in known]
    slots = [(draws.one_of(rest), draws.one_of(rest)) for _ in range((length - 2 * pairs) // 2)]
    tokens = [token for pair in zip(keys, values) for token in pair]
    places = _slots_of_queries(draws, len(slots), pairs)
    for pair, place in enumerate(places):
        slots[place] = (keys[pair], values[pair])
    answers = []
    for pair, place in sorted(enumerate(places), key=lambda item: item[1]):
        start = 2 * pairs + 2 * place + 1
        others = tuple((other,) for other in setting.others(draws, values, values[pair]))
        answers.append(Answer(start, start + 1, others, 2 * pair / length))
    return Example((*tokens, *(token for slot in slots for token in slot)), tuple(answers))


def _slots_of_queries(draws: Draws, slots: int, count: int) -> list[int]:
    """Draw different slots, slot i (from 1) with a probability ~ i^(power - 1) among those that are left.

    The largest u^(1/w) of weights w are such a draw (Efraimidis and Spirakis 2006, "Weighted random sampling with a
    reservoir").
    """
    keys = [draws.number() ** (slot ** (1 - _POWER)) for slot in range(1, slots + 1)]
    return sorted(range(slots), key=keys.__getitem__, reverse=True)[:count]


def mqar_text(setting: Setting, draws: Draws, number: int, length: int) -> Example:
    """Lines of a key and its value, a text, and the keys again in another order."""
    lines = max(2, min(length // _TOKENS_PER_LINE, _MOST_LINES))
    drawn = draws.words(2 * lines)
    keys, values = drawn[:lines], drawn[lines:]
    pairs = "".join(f"{key}: {value}\n" for key, value in zip(keys, values))
    words, queries = setting.haystack.words(draws), []
    for place in draws.shuffled(range(lines)):
        others = setting.others(draws, values, values[place])
        # The queries end the text, so that a depth is that of the pair among the pairs.
        queries.append((f"\n{keys[place]}:", Blank(values[place], others, place / lines)))

    def build(count: int) -> Sequence[str | Blank]:
        return [pairs + "\n" + " ".join(words(count)) + "\n", *(part for query in queries for part in query)]

    return setting.text("mqar_text").fit("mqar_text", length, build)
