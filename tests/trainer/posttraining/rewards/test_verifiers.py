"""Texts, numbers, patterns and formats."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import ConfigError
from trainer.posttraining.rewards.base import Answer, Score, ScoringError, as_score
from trainer.posttraining.rewards.exact import exact
from trainer.posttraining.rewards.numeric import numeric, parse_number
from trainer.posttraining.rewards.pattern import pattern
from trainer.posttraining.rewards.tags import tags
from trainer.posttraining.rewards.weighted import weighted_sum


def answer(completion, truth=None, **others):
    return Answer("prompt", completion, ground_truth=truth, **others)


@pytest.mark.parametrize(
    ("options", "completion", "truth", "expected"),
    [
        ({}, r"so \boxed{New  York}", "New York", 1),
        ({}, r"so \boxed{new york}", "New York", 0),
        ({"ignore_case": True}, r"so \boxed{new york}", "New York", 1),
        ({"ignore_space": False}, r"\boxed{a  b}", "a b", 0),
        ({"ignore_punctuation": True}, r"\boxed{a, b.}", "a b", 1),
        ({}, "thoughts\nParis", ["Lyon", "Paris"], 1),
        ({"extract": "boxed"}, "Paris", "Paris", 0),
        ({}, "7", 7, 1),
        ({}, "", "", 0),
        ({}, "cafe\u0301", "caf\u00e9", 1),
    ],
)
def test_exact(options, completion, truth, expected):
    assert exact(**options)(answer(completion, truth)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,234.5", Fraction(2469, 2)),
        ("−3", -3),
        ("+4.", 4),
        (".5", Fraction(1, 2)),
        ("2.5e-3", Fraction(1, 400)),
        ("7/8", Fraction(7, 8)),
        ("-1 3/4", Fraction(-7, 4)),
        (r"-\frac{7}{8}", Fraction(-7, 8)),
        (r"$\dfrac{1}{3}$", Fraction(1, 3)),
        ("$1{,}000", 1000),
        ("40 %", Fraction(2, 5)),
        (r"40\%", Fraction(2, 5)),
        ("1,23", None),
        ("1/0", None),
        ("", None),
        (".", None),
        ("e5", None),
        ("abc", None),
        ("1e999", None),
        ("1e999999999", None),
        ("9" * 201, None),
        ("--1", None),
        ("\u0663", None),
    ],
)
def test_numbers_are_read_exactly(text, expected):
    assert parse_number(text) == expected


@given(st.fractions(), st.booleans())
def test_any_fraction_is_read_back(number, as_latex):
    sign = "-" if number < 0 else ""
    number = abs(number)
    text = rf"\frac{{{number.numerator}}}{{{number.denominator}}}" if as_latex else str(number)
    assert parse_number(sign + text) == (-number if sign else number)


@given(st.integers(-(10**12), 10**12))
def test_separators_of_thousands_change_nothing(number):
    assert parse_number(f"{number:,}") == number


@pytest.mark.parametrize(
    ("options", "completion", "truth", "expected"),
    [
        ({}, "The answer is 1,000 apples.", "1000", 1),
        ({}, r"\boxed{x = 7}", 7, 1),
        ({}, "#### 72", "48 + 24 = 72\n#### 72", 1),
        ({}, "3.14", 3.14159, 0),
        ({"tolerance": 0.01}, "3.14", 3.14159, 1),
        ({"relative": 0.001}, "3.14", 3.14159, 1),
        ({}, "50%", 0.5, 1),
        ({"percent": "ignore"}, "50%", 50, 1),
        ({}, "none", 1, 0),
        ({}, "2", [1, 2], 1),
    ],
)
def test_numeric(options, completion, truth, expected):
    assert numeric(**options)(answer(completion, truth)) == expected


def test_a_ground_truth_that_is_no_number_is_named():
    with pytest.raises(ScoringError, match="no number") as caught:
        numeric()(answer("1", "one"))
    assert caught.value.kind == "truth"


@pytest.mark.parametrize(
    ("options", "completion", "truth", "expected"),
    [
        ({"pattern": r"\bcat\b"}, "a cat.", None, 1),
        ({"pattern": "CAT"}, "a cat.", None, 0),
        ({"pattern": "CAT", "ignore_case": True}, "a cat.", None, 1),
        ({"pattern": "a.b", "mode": "whole"}, "a\nb", None, 1),
        ({"pattern": "a.b", "mode": "whole", "dot_matches_newline": False}, "a\nb", None, 0),
        ({"pattern": "a", "mode": "whole"}, "ab", None, 0),
        ({}, "abc", "b", 1),
    ],
)
def test_pattern(options, completion, truth, expected):
    assert pattern(**options)(answer(completion, truth)) == expected


@pytest.mark.parametrize("truth", ["(", None])
def test_a_ground_truth_that_is_no_pattern_is_named(truth):
    with pytest.raises(ScoringError) as caught:
        pattern()(answer("a", truth))
    assert caught.value.kind == "truth"


@pytest.mark.parametrize(
    ("options", "completion", "expected"),
    [
        ({}, "<think>a</think>\n<answer>b</answer>", 1),
        ({}, "<think>a</think> so <answer>b</answer>", 0),
        ({}, "x<think>a</think><answer>b</answer>", 0),
        ({}, "<think>a</think><answer>b</answer>.", 0),
        ({}, "<answer>b</answer><think>a</think>", 0),
        ({}, "<think>a</think><answer>b</answer><answer>c</answer>", 0),
        ({}, "<think><think>a</think><answer>b</answer>", 0),
        ({}, "<think> </think><answer>b</answer>", 0),
        ({"allow_empty": True}, "<think> </think><answer>b</answer>", 1),
        ({}, "a</think><answer>b</answer>", 0),
        ({"opened": True}, "a</think><answer>b</answer>", 1),
        ({"opened": True}, "<think>a</think><answer>b</answer>", 1),
        ({"names": ["think", "answer"], "closed": False}, "<think>a</think>b", 1),
        ({"names": ["think", "answer"], "closed": False}, "<think>a</think>", 0),
        ({"names": ["think", "answer"], "closed": False}, "b", 0),
        ({"names": ["a"]}, "<a>x</a>", 1),
        ({}, "", 0),
    ],
)
def test_tags(options, completion, expected):
    assert tags(**options)(answer(completion)) == expected


def test_a_format_that_was_cut_off_is_none():
    whole = answer("<think>a</think><answer>b</answer>", finished=False)
    assert tags()(whole) == 0 and tags(unfinished=True)(whole) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: numeric(tolerance=-1),
        lambda: numeric(percent="x"),
        lambda: exact(extract="x"),
        lambda: pattern("("),
        lambda: pattern("a", mode="x"),
        lambda: tags(names="think"),
        lambda: tags(names=["a", "a"]),
        lambda: tags(names=["a b"]),
    ],
)
def test_wrong_options_are_refused(make):
    with pytest.raises(ConfigError):
        make()


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (1, Score(1.0)),
        (True, Score(1.0)),
        ({"score": 0.5, "acc": True, "pred": "x"}, Score(0.5, {"acc": 1.0})),
        ({"score": 0, "error": "timeout"}, Score(0.0, {}, "timeout")),
        ({"score": 0, "error": "mine"}, Score(0.0)),
        ({"acc": 1}, Score(0.0, {"acc": 1.0}, "value")),
        (float("nan"), Score(error="value")),
        (10**400, Score(error="value")),
        ("1", Score(error="value")),
        (None, Score(error="value")),
        ([1.0], Score(error="value")),
    ],
)
def test_what_rewards_may_return(result, expected):
    assert as_score(result) == expected


def test_weighted_sum():
    scores = {"a": Score(1.0, {"x": 3.0}), "b": Score(0.5, error="timeout"), "c": Score(2.0, error="crash")}
    total = weighted_sum(scores, {"a": 1.0, "b": 2.0, "c": -0.5})
    assert total == Score(1.0, {"a": 1.0, "a/x": 3.0, "b": 0.5, "c": 2.0}, "timeout")
