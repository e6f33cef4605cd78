"""Figures of answers: which texts are one answer, maj@k, and the tables that are kept and shown."""

import json

import pytest

from trainer.evaluation.pass_at_k import majority_at_k
from trainer.posttraining.answer_figures import (
    answer_figures,
    as_markdown,
    powers_of_two,
    save_rows,
    shown_rows,
    vote_of,
)
from trainer.posttraining.rewards.registry import RewardConfig
from trainer.posttraining.rollouts import Group, Sample


def group(answers: list[tuple[str, float]]) -> Group:
    samples = tuple(Sample((1, 2), (-1.0, -1.0), True, text, reward, {"sum": reward}) for text, reward in answers)
    return Group(0, "rows.jsonl:0", (7, 8), samples)


def test_what_is_voted_on():
    own = RewardConfig("trainer.posttraining.tasks:check_sum")
    assert vote_of([own])(" a \n b ") == "a b" and vote_of([])(" ") is None
    # By value, with the reward's own ways to find it; the first reward that has any.
    numeric = vote_of([own, RewardConfig("tags"), RewardConfig("numeric"), RewardConfig("exact")])
    assert numeric("so it is 1,250.0") == numeric(r"\boxed{1250}") == "1250" and numeric("none") is None
    hashes = vote_of([RewardConfig("exact", options={"extract": "hashes"})])
    assert hashes("#### 4  apples\n5") == "4 apples" and hashes("4 apples") is None
    assert vote_of([RewardConfig("math_verify")])(r"thus \boxed{x+1} 3") == "x+1"


def test_figures_are_means_over_prompts():
    groups = [
        group([("3", 1.0), ("4", 0.0), ("4", 0.0), (" 3.0", 1.0), ("5", 0.0), ("3", 0.5)]),
        group([("1", 0.0), ("", 0.0), ("2", 0.0), ("2", 0.0), ("2", 0.0), ("1", 0.0)]),
    ]
    figures = answer_figures(groups, 1.0, vote_of([]))
    assert figures["reward"] == pytest.approx(2.5 / 12)
    assert figures["pass@1"] == pytest.approx(1 / 6) and figures["pass@6"] == 0.5
    # A text that is worth less has the same answer, which is right as such.
    assert figures["maj@1"] == pytest.approx(3 / 12) and figures["maj@6"] == 0.5
    assert figures["maj@4"] == pytest.approx(majority_at_k(["3", "4", "4", "3", "5", "3"], {"3"}, 4) / 2)
    assert list(figures) == ["reward", *(f"{name}@{k}" for name in ("pass", "maj") for k in (1, 2, 4, 6))]


@pytest.mark.parametrize(("most", "expected"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_powers_of_two(most, expected):
    assert powers_of_two(most) == expected


def test_tables(tmp_path):
    rows = shown_rows([group([("a|b <c>\n`d`", 0.25), ("e", 1.0)]), group([("f", 1.0)])], str, 1)
    assert rows[0]["prompt"] == "(7, 8)" and rows[0]["reward"] == 0.25 and len(rows) == 1
    save_rows(tmp_path / "samples/step_00000001.jsonl", rows)
    assert json.loads((tmp_path / "samples/step_00000001.jsonl").read_text()) == rows[0]
    *_, line = as_markdown(rows).split("\n")
    assert line == "| (7, 8) | a&#124;b &lt;c><br>&#96;d&#96; | 0.25 | sum 0.25 |"
