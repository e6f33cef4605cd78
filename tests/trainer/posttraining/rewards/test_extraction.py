"""Finding answers in completions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import ConfigError
from trainer.posttraining.rewards import extraction
from trainer.posttraining.rewards.extraction import EXTRACTIONS, Extraction


@pytest.mark.parametrize(
    ("way", "text", "expected"),
    [
        ("boxed", r"first \boxed{1}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("boxed", r"\boxed {a \{ b}", r"a \{ b"),
        ("boxed", r"\fbox{7} and \boxed{8", "7"),
        ("boxed", "no box", None),
        ("answer", "<answer>1</answer> <answer> 2\n</answer>", "2"),
        ("answer", "<answer>1", None),
        ("answer", "</answer><answer>", None),
        ("hashes", "12 + 3\n#### 15\n", "15"),
        ("hashes", "#### ", None),
        ("last_line", "one\ntwo \n\n", "two"),
        ("last_line", " \n", None),
        ("last_number", "3 apples and -1,234.5 pears.", "-1,234.5"),
        ("last_number", "from 5-3", "3"),
        ("last_number", "x = 3/4", "3/4"),
        ("last_number", "about 40 %!", "40 %"),
        ("last_number", "in 1,2 or 12,34", "34"),
        ("last_number", "none", None),
        ("whole", " a b ", "a b"),
    ],
)
def test_what_is_found(way, text, expected):
    assert EXTRACTIONS[way](text) == expected


def test_the_first_way_that_finds_something_counts():
    assert Extraction(["boxed", "hashes", "last_line"])("a\n#### b\nc") == "b"
    assert Extraction("boxed")("a") is None


def test_unknown_ways_are_refused():
    with pytest.raises(ConfigError, match="no 'boxes'"):
        Extraction(["boxes"])
    with pytest.raises(ConfigError, match="empty"):
        Extraction([])


def test_code_blocks():
    text = "```python\na\n```\ntext\n```sql\nb\n```\n"
    assert extraction.code_block(text, "python") == "a\n"
    assert extraction.code_block(text, "rust") == "b\n"
    assert extraction.code_block("no code") is None
    assert extraction.after_thoughts("<think>x</think>y") == "y"


@given(st.text(alphabet="\\boxed{}fx $#<>/answer\n1,.%"), st.sampled_from(sorted(EXTRACTIONS)))
def test_any_text_can_be_searched(text, way):
    found = EXTRACTIONS[way](text)
    assert found is None or found in text


@given(st.text(alphabet="ab{}"))
def test_a_box_with_any_balanced_text_gives_it_back(inside):
    depth = lowest = 0
    for character in inside:
        depth += (character == "{") - (character == "}")
        lowest = min(lowest, depth)
    if depth == lowest == 0:
        assert extraction.boxed(f"x \\boxed{{{inside}}} y") == inside
