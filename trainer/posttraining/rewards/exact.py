"""Exact text: 1 if the answer in the completion is the ground truth, or one of a list of them."""

import string
import unicodedata
from collections.abc import Sequence

from trainer.posttraining.rewards.base import Answer, Reward
from trainer.posttraining.rewards.extraction import Extraction, truths


def exact(
    extract: str | Sequence[str] = ("boxed", "answer", "hashes", "last_line"),
    ignore_case: bool = False,
    ignore_space: bool = True,
    ignore_punctuation: bool = False,
) -> Reward:
    """Compares texts.

    Args:
        extract: Ways to find the answer in the completion, the first that finds one counts: see EXTRACTIONS.
        ignore_case: Take upper and lower case for the same.
        ignore_space: Take any run of white space for one space, and none at the ends.
        ignore_punctuation: Leave out ASCII punctuation.

    Raises:
        ConfigError: a way is not known.
    """
    find = Extraction(extract)

    def normal(text: str) -> str:
        text = unicodedata.normalize("NFC", text)
        if ignore_punctuation:
            text = text.translate(str.maketrans("", "", string.punctuation))
        if ignore_case:
            text = text.casefold()
        return " ".join(text.split()) if ignore_space else text

    def score(answer: Answer) -> float:
        found = find(answer.completion)
        if found is None:
            return 0.0
        return float(normal(found) in {normal(str(truth)) for truth in truths(answer.ground_truth)})

    return score
