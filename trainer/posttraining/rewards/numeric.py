"""Numbers: 1 if the answer is the ground truth's number, however it is written."""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

from trainer.errors import ConfigError
from trainer.posttraining.rewards.base import Answer, Reward, ScoringError
from trainer.posttraining.rewards.extraction import Extraction, truths

Percent = Literal["ratio", "ignore"]

# Longer numbers are none: Fraction("1e999999999") would fill the memory.
_MOST_CHARACTERS, _LARGEST_EXPONENT = 200, 400
_PLAIN = r"(?:\d{1,3}(?:,\d{3})+|\d[\d_]*)?(?:\.\d*)?(?:[eE][-+]?\d{1,3})?"
_NUMBER = re.compile(rf"(?P<sign>[-+]?)(?P<value>{_PLAIN})")
_FRACTION = re.compile(rf"(?:(?P<whole>\d+)\s+)?(?P<over>[-+]?{_PLAIN})\s*/\s*(?P<under>[-+]?{_PLAIN})")
_LATEX = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_NOISE = re.compile(r"\\[,;:! ]|\\left|\\right|\$|€|£|~|\{,\}(?=\d)")


def parse_number(text: str, percent: Percent = "ratio") -> Fraction | None:
    r"""A number as people write it, exactly: 1,234.5; −3; 2.5e-3; 7/8; 1 3/4; \frac{7}{8}; $12; 40 %.

    Args:
        text: The text, nothing but the number and its currency or percent sign.
        percent: Whether 40 % is 0.4 ("ratio") or 40 ("ignore").

    Returns:
        The number, None if it is none, or one of more than 200 characters or an exponent beyond 400.
    """
    if len(text) > _MOST_CHARACTERS:
        return None
    text = text.replace("−", "-").replace("\u00a0", " ").replace("{,}", ",")
    text = _LATEX.sub(r" (\1)/(\2)", _NOISE.sub("", text)).replace("\\%", "%").strip().rstrip(".").strip()
    is_percent = text.endswith("%")
    text = text.removesuffix("%").strip()
    sign = -1 if text.startswith("-") else 1
    text = text.lstrip("+-").strip() if text[:1] in "+-" and text[1:2] not in "+-" else text
    text = text.replace("(", "").replace(")", "")
    number = _quotient(text.strip())
    if number is None:
        return None
    return sign * (number / 100 if is_percent and percent == "ratio" else number)


def _quotient(text: str) -> Fraction | None:
    """A fraction, maybe with a whole number in front, or a decimal number."""
    match = _FRACTION.fullmatch(text)
    if match is None:
        return _decimal(text)
    over, under = _decimal(match["over"]), _decimal(match["under"])
    if over is None or not under:
        return None
    return over / under + (int(match["whole"]) if match["whole"] else 0)


def _decimal(text: str) -> Fraction | None:
    text = text.strip()
    match = _NUMBER.fullmatch(text)
    if match is None or not any(map(str.isdigit, re.split("[eE]", text)[0])) or not text.isascii():
        return None
    exponent = re.search(r"[eE]([-+]?\d+)$", text)
    if exponent is not None and abs(int(exponent[1])) > _LARGEST_EXPONENT:
        return None
    return Fraction(text.replace(",", "").replace("_", "").removesuffix("."))


def numeric(
    extract: str | Sequence[str] = ("boxed", "answer", "hashes", "last_number"),
    tolerance: float = 0.0,
    relative: float = 1e-6,
    percent: Percent = "ratio",
) -> Reward:
    """Compares numbers, exactly where both are exact.

    Args:
        extract: Ways to find the answer in the completion, see EXTRACTIONS. If what is found is no number by itself,
            as in `x = 7 apples`, its last number counts.
        tolerance: Largest difference that counts as none.
        relative: The same as a share of the ground truth.
        percent: Whether 40 % is 0.4 ("ratio") or 40 ("ignore"), on both sides.

    Raises:
        ConfigError: an option is not valid.
    """
    find, fallback = Extraction(extract), Extraction("last_number")
    if min(tolerance, relative) < 0:
        raise ConfigError("tolerance and relative must not be negative; give 0 for equal numbers")
    if percent not in ("ratio", "ignore"):
        raise ConfigError(f"percent is {percent!r}: give ratio or ignore")

    def number(text: str | None) -> Fraction | None:
        if text is None:
            return None
        found = parse_number(text, percent)
        return found if found is not None else parse_number(fallback(text) or "", percent)

    def score(answer: Answer) -> float:
        right = [_truth(truth, percent) for truth in truths(answer.ground_truth)]
        found = number(find(answer.completion))
        if found is None:
            return 0.0
        return float(any(abs(found - truth) <= max(tolerance, relative * abs(truth)) for truth in right))

    return score


def _truth(truth: Any, percent: Percent) -> Fraction:
    text = str(truth).rpartition("####")[2]  # GSM8K's answers are whole solutions
    number = parse_number(text, percent)
    if number is None:
        raise ScoringError("truth", f"the ground truth {str(truth)[:100]!r} is no number")
    return number
