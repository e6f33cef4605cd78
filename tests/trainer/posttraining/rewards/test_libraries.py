"""Rewards of other packages, in the pool that they need."""

import pytest

from trainer.errors import ConfigError
from trainer.posttraining.rewards.base import Answer
from trainer.posttraining.rewards.math_verification import math_verify
from trainer.posttraining.rewards.registry import RewardConfig
from trainer.posttraining.rewards.workers import RewardPool


def test_mathematics():
    rows = [
        (r"so $x = \boxed{\frac{1}{2}}$", "0.5", 1, None),
        (r"<think>\boxed{3}</think> the answer is \boxed{2\sqrt{2}}", r"\sqrt{8}", 1, None),
        (r"<answer>(1, 2)</answer>", "(1,2)", 1, None),
        (r"\boxed{x^2 + 2x + 1}", "$(x+1)^2$", 1, None),
        (r"\boxed{3}", "4", 0, None),
        ("I do not know", "4", 0, None),
        (r"\boxed{4}", "", 0, "truth"),
    ]
    with RewardPool([RewardConfig("math_verify", seconds=60)], workers=1) as pool:
        scores = pool.score([Answer("", completion, "", truth) for completion, truth, _, _ in rows])
        assert [(score.value, score.error) for score in scores] == [(value, error) for _, _, value, error in rows]


@pytest.mark.slow
def test_mathematics_that_takes_for_ever():
    """The library is still computing when its worker is killed."""
    answers = [Answer("", rf"\boxed{{{number}}}", "", "4") for number in ("4", "9^" * 40 + "9", "4")]
    with RewardPool([RewardConfig("math_verify", seconds=5)], workers=1) as pool:
        scores = pool.score(answers)
    assert [(score.value, score.error) for score in scores] == [(1, None), (0, "timeout"), (1, None)]


def test_mathematics_needs_a_worker():
    with pytest.raises(ConfigError, match="RewardPool"):
        math_verify()(Answer("", "4", "", "4"))


def test_tasks_of_reasoning_gym():
    # Of leg_counting, seed 1: the import takes a second, which the worker spends already.
    row = {
        "question": "how many legs are there in total if you have 13 woodlouses, 8 leechs, 8 tigers, 11 humans?",
        "answer": "236",
        "metadata": {"source_dataset": "leg_counting", "total_legs": 236},
    }
    right, wrong = f"<answer>{row['answer']}</answer>", "<answer>-1</answer>"
    extra = {"metadata": row["metadata"]}
    answers = [
        Answer(row["question"], right, "", row["answer"], extra),
        Answer(row["question"], wrong, "", row["answer"], extra),
        Answer(row["question"], right, "", row),
        Answer(row["question"], right, "no_such_task", row["answer"]),
    ]
    with RewardPool([RewardConfig("reasoning_gym")], workers=1) as pool:
        scores = pool.score(answers)
    assert [score.value == 1 for score in scores] == [True, False, True, False]
    assert [score.error for score in scores] == [None, None, None, "truth"]
