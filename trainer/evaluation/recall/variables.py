"""Variable tracking: names that stand for the same value (RULER, arXiv 2404.06654, section 3).

    VAR QXBTA = 48213  …  VAR MPLZK = VAR QXBTA  …  VAR TRWGH = VAR MPLZK

The statements are hidden in text. All variables of the value are asked for, in the order in which they were assigned.
RULER hides one chain by default; here there is a second one, whose variables have another value.
"""

from collections.abc import Sequence

from trainer.evaluation.recall.draws import Draws
from trainer.evaluation.recall.examples import Blank, Example
from trainer.evaluation.recall.haystack import hide
from trainer.evaluation.recall.setting import Setting

# RULER's: the first assignment and four hops, five letters, five digits.
_VARIABLES, _LETTERS, _DIGITS = 5, 5, 5
_CHAINS = 2
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def variables(setting: Setting, draws: Draws, number: int, length: int) -> Example:
    """Two chains of assignments."""
    names, values = _names(draws, _CHAINS * _VARIABLES), draws.numbers(_CHAINS, _DIGITS)
    chains = [names[_VARIABLES * chain : _VARIABLES * (chain + 1)] for chain in range(_CHAINS)]
    statements: list[tuple[float, str]] = []
    for chain, value in zip(chains, values):
        depths = sorted(draws.number() for _ in chain)
        assigned = [value, *(f"VAR {name}" for name in chain[:-1])]
        statements += [(depth, f"VAR {name} = {what}.") for depth, name, what in zip(depths, chain, assigned)]
    asked, value = statements[:_VARIABLES], values[0]
    statements.sort()
    wrong = [name for chain in chains[1:] for name in chain]
    blanks = [Blank(name, setting.others(draws, wrong, name), depth) for name, (depth, _) in zip(chains[0], asked)]
    words = setting.haystack.words(draws)
    before = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    after = f"\nQuestion: Find all variables that are assigned the value {value} in the text above, in their order. "
    after += "Answer: According to the chain(s) of variable assignment in the text above, "
    after += f"{_VARIABLES} variables are assigned the value {value}, they are:"

    def build(count: int) -> Sequence[str | Blank]:
        text = hide(words(count), [text for _, text in statements], [depth for depth, _ in statements])
        return [before + text + after, *blanks]

    return setting.text("variables").fit("variables", length, build)


def _names(draws: Draws, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(draws.one_of(_ALPHABET) for _ in range(_LETTERS))] = None
    return list(found)
