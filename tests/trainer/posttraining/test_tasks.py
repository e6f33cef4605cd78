"""Generated rows: right answers are right, wrong ones wrong, and no prompt is held out and learned from."""

import json
import random
from itertools import islice

import pytest

from trainer.errors import ConfigError
from trainer.posttraining import countdown, queries, tasks
from trainer.posttraining.data.rows import read_rows
from trainer.posttraining.prepare_rows import PrepareRowsConfig, prepare
from trainer.posttraining.rewards.base import Answer
from trainer.posttraining.rewards.registry import RewardConfig, build


@pytest.mark.parametrize("name", tasks.TASKS)
def test_answers_are_judged(name):
    check = build(RewardConfig(tasks.TASKS[name].check))
    # Queries may have space around them, and other numbers in them the same result.
    ends = ("0", "\n") if tasks.TASKS[name].check != "sql" else (" from", " (")
    for row in islice(tasks.rows(name, 0), 50):
        scores = [
            check(Answer(row["prompt"], text, ground_truth=row["answer"]))
            for text in (row["completion"], row["wrong"], "", *(row["completion"] + end for end in ends))
        ]
        assert scores == [1.0, 0.0, 0.0, 0.0, 0.0], row


@pytest.mark.parametrize("name", ["countdown", "text_to_sql"])
def test_levels(name):
    found = list(islice(tasks.rows(name, 0), 400))
    easy, hard = ([row for row in found if row["level"] == level] for level in ("easy", "hard"))
    assert len(easy) + len(hard) == 400 and min(len(easy), len(hard)) > 100
    # Several right answers to a question, and the same rows again.
    answers: dict[str, set[str]] = {}
    for row in found:
        answers.setdefault(row["prompt"], set()).add(row["completion"])
    assert max(map(len, answers.values())) > 1
    assert found == list(islice(tasks.rows(name, 0), 400)) != list(islice(tasks.rows(name, 1), 400))


def test_all_answers_to_a_question_about_the_database_are_right():
    check = build(RewardConfig("sql"))
    statements = queries.script(random.Random(5))
    draw = random.Random(6)
    for kind in (*queries.EASY, *queries.HARD):
        for question in (kind(draw) for _ in range(10)):
            truth = {"gold_sql": question.right[0], "script": statements}
            for query in question.right:
                assert check(Answer("", query, ground_truth=truth)) == 1, (question.text, query)


def test_countdown_takes_each_number_once_and_products_first():
    def score(completion, target):
        return countdown.check(Answer(f"3 4 4 make {target}:", completion, ground_truth=str(target)))

    assert score(" 3 + 4 * 4", 19) == score(" 4 * 3 - 4", 8) == score(" 4 - 4 * 3", -8) == 1
    assert score(" 3 + 4 + 12", 19) == score(" 3 + 4 * 4", 28) == score(" 19", 19) == score(" 3 + 3 + 4", 10) == 0
    sums, everything = (countdown.expressions((3, 4, 4), operators) for operators in ("+-", "+-*"))
    assert set(sums) == {-5, -3, 3, 5, 11} and everything.keys() - sums.keys() == {-13, -8, 8, 13, 16, 19, 48}
    assert sorted(everything[8]) == [(3, "*", 4, "-", 4), (4, "*", 3, "-", 4)]


def test_zero_is_no_part_of_a_sum():
    check = build(RewardConfig(tasks.TASKS["sums"].check))
    assert check(Answer("12 =", " 0 + 12", ground_truth="12")) == 0
    assert (
        check(Answer("12 =", " 5 + 7", ground_truth="12")) == check(Answer("12 =", " 11 + 1", ground_truth="12")) == 1
    )


def test_files_of_a_task(tmp_path):
    config = PrepareRowsConfig("sums", str(tmp_path / "rows"), train=200, validation=8, seed=3)
    paths = prepare(config)
    rows = {path.stem: list(read_rows(path)) for path in paths}
    assert len(rows["sft"]) == len(rows["preferences"]) == 200 and len(rows["validation"]) == 8
    train, held_out = ({row.prompt for row in rows[name]} for name in ("train", "validation"))
    assert not train & held_out and len(train) == len(rows["train"]) == len(rows["demonstrations"])
    assert {row.prompt for row in rows["sft"]} == train
    assert all(row.demonstrations and row.ground_truth for row in rows["demonstrations"])
    assert all(row.chosen != row.rejected for row in rows["preferences"])
    before = {path: path.read_bytes() for path in paths}
    assert sorted(prepare(config)) == sorted(paths) and all(path.read_bytes() == before[path] for path in paths)
    with pytest.raises(ConfigError, match="has something else; remove it, or name another directory"):
        prepare(PrepareRowsConfig("products", str(tmp_path / "rows")))


def test_rows_of_reasoning_gym(tmp_path):
    paths = prepare(PrepareRowsConfig("reasoning_gym:basic_arithmetic", str(tmp_path / "rows"), train=5, validation=2))
    assert {path.stem for path in paths} == {"train", "validation", "sft", "sft-validation"}
    (first, *_) = read_rows(paths[0])
    score = build(RewardConfig("reasoning_gym"))
    for text, expected in ((first.ground_truth, 1.0), ("no number", 0.0)):
        answer = Answer(first.prompt, text, first.data_source, first.ground_truth, first.extra)
        assert (score(answer) == 1.0) == (expected == 1.0)


def test_settings_of_reasoning_gym(tmp_path):
    """Rows to fine-tune on have the prompts and answers of those to learn from by rewards."""
    own = {"min_terms": 2, "max_terms": 2, "max_digits": 1}
    paths = prepare(
        PrepareRowsConfig("reasoning_gym:chain_sum", str(tmp_path / "rows"), train=40, validation=2, options=own)
    )
    rows = {path.stem: list(read_rows(path)) for path in paths}
    answers = {row.prompt: row.ground_truth for row in rows["train"]}
    for row in rows["train"]:
        first, sign, second = row.prompt.split(": ")[1].removesuffix(" =").split()
        assert int(row.ground_truth) == int(first) + (1 if sign == "+" else -1) * int(second)
    assert len(rows["sft"]) == 40 and {row.prompt for row in rows["sft"]} == answers.keys()
    lines = (tmp_path / "rows/sft.jsonl").read_text().splitlines()
    assert all(answers[line["prompt"]] == line["completion"] for line in map(json.loads, lines))


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("sums", {"max_terms": 2}, "options: sums has none"),
        ("reasoning_gym:chain_sum", {"terms": 2}, "chain_sum does not take .*terms"),
        ("reasoning_gym:chain_sum", {"max_terms": 1}, "chain_sum does not take .*max_terms"),
    ],
)
def test_settings_that_a_task_has_not(tmp_path, task, options, message):
    with pytest.raises(ConfigError, match=message):
        prepare(PrepareRowsConfig(task, str(tmp_path / "rows"), options=options))


@pytest.mark.parametrize(
    ("task", "message"), [("sum", "there is no 'sum'"), ("reasoning_gym:none", "has no data set 'none'")]
)
def test_unknown_tasks(tmp_path, task, message):
    with pytest.raises(ConfigError, match=message):
        prepare(PrepareRowsConfig(task, str(tmp_path / "rows")))
