"""Needles in a haystack: numbers hidden in text, to be found by their keys (RULER, arXiv 2404.06654, section 3).

needle          one number
needle_keys     four keys with a number each; one key is asked for
needle_values   one key with four numbers; all are asked for
needle_queries  four keys with a number each; all are asked for

The numbers are asked for in the order in which they stand in the text, where RULER accepts any order.
"""

from collections.abc import Sequence

from trainer.evaluation.recall.draws import Draws
from trainer.evaluation.recall.examples import Blank, Example
from trainer.evaluation.recall.haystack import hide
from trainer.evaluation.recall.setting import Setting

# As many as in RULER.
_SEVERAL = 4
_DIGITS = 7


def needle(setting: Setting, draws: Draws, number: int, length: int) -> Example:
    """One number."""
    return _example("needle", setting, draws, number, length, keys=1)


def needle_keys(setting: Setting, draws: Draws, number: int, length: int) -> Example:
    """One number among those of other keys."""
    return _example("needle_keys", setting, draws, number, length, keys=_SEVERAL)


def needle_values(setting: Setting, draws: Draws, number: int, length: int) -> Example:
    """All numbers of one key."""
    return _example("needle_values", setting, draws, number, length, keys=1, values=_SEVERAL)


def needle_queries(setting: Setting, draws: Draws, number: int, length: int) -> Example:
    """The numbers of several keys."""
    return _example("needle_queries", setting, draws, number, length, keys=_SEVERAL, asked=_SEVERAL)


def _example(
    task: str, setting: Setting, draws: Draws, number: int, length: int, keys: int, values: int = 1, asked: int = 1
) -> Example:
    """An example with `values` numbers for each of `keys` keys, of which the first `asked` are asked for."""
    names = draws.words(keys)
    # The first of a text are its own, the others only serve as wrong answers.
    numbers = draws.numbers(keys * values + max(setting.candidates - 1, 0), _DIGITS)
    hidden = [(name, numbers[place * values + each]) for place, name in enumerate(names) for each in range(values)]
    depths = [setting.depth_of(number), *(draws.number() for _ in hidden[1:])]
    order = sorted(range(len(hidden)), key=depths.__getitem__)
    answers = [place for place in order if hidden[place][0] in names[:asked]]
    own = [value for _, value in hidden]
    blanks = []
    for place in answers:
        right = hidden[place][1]
        # Those that stand in the text first: a model that only knows what a number looks like cannot tell them apart.
        wrong = [*setting.others(draws, own, right), *numbers[len(own) :]]
        blanks.append(Blank(right, wrong[: setting.candidates - 1], depths[place]))
    words = setting.haystack.words(draws)
    sentences = [f"One of the special magic numbers for {name} is: {value}." for name, value in hidden]
    asked_names = list(dict.fromkeys(hidden[place][0] for place in answers))
    before, after = _frame(asked_names, len(blanks))

    def build(count: int) -> Sequence[str | Blank]:
        text = hide(words(count), [sentences[place] for place in order], [depths[place] for place in order])
        return [before + text + after, *blanks]

    return setting.text(task).fit(task, length, build)


def _frame(names: Sequence[str], answers: int) -> tuple[str, str]:
    """What stands before and after the text, in RULER's words, but for the colon at the end.

    The needles have one too. Without it a model may continue with the colon, and greedy decoding misses the answer.
    """
    asked = names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"
    if answers == 1:
        before = "A special magic number is hidden within the following text. Make sure to memorize it. "
        before += "I will quiz you about the number afterwards.\n"
        question = f"What is the special magic number for {asked} mentioned in the provided text?"
        return before, f"\n{question} The special magic number for {asked} mentioned in the provided text is:"
    before = "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
    before += "I will quiz you about the numbers afterwards.\n"
    question = f"What are all the special magic numbers for {asked} mentioned in the provided text, in their order?"
    return before, f"\n{question} The special magic numbers for {asked} mentioned in the provided text are:"
