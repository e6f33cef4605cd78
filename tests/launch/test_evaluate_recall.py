"""Tasks of recall of a checkpoint, as a command."""

import json
import re

import pytest

from trainer.evaluation.recall.tasks import TASKS


def recall(launch, trained, tmp_path, *arguments):
    options = ("--checkpoint", str(trained), "--examples", "2", "--json", str(tmp_path / "out.json"), *arguments)
    code, out, errors, _ = launch("evaluate", *options, forked=True)
    assert code == 0, errors
    return json.loads((tmp_path / "out.json").read_text())["recall"], out


def test_every_task_of_a_trained_checkpoint(launch, trained, tmp_path):
    rows, out = recall(launch, trained, tmp_path, f"--recall=[{', '.join(TASKS)}]", "--lengths=[800, 1000]")
    assert [(row["task"], row["length"]) for row in rows] == [
        (task, length) for task in TASKS for length in (800, 1000)
    ]
    for row in rows:
        assert row["examples"] == 2 and row["answers"] == len(row["outcomes"])
        assert row["length"] - 24 < row["mean_length"] <= row["length"]
        low, high = row["exact_interval"]
        assert 0 <= low <= row["exact"] <= high <= 1 and row["exact"] <= row["tokens"]
        assert row["exact"] == sum(each["right"] == each["tokens"] for each in row["outcomes"]) / row["answers"]
        assert row["first"] == sum(each["rank"] == 1 for each in row["outcomes"]) / row["answers"]
        assert 1 <= row["rank"] <= row["candidates"] == 4
    lines = out.splitlines()
    assert lines[0] == "answers that greedy decoding gives, with 95 % intervals"
    assert sum(line.startswith(("│ needle ", "│ mqar ")) for line in lines) == 2 * 3
    assert "guessing: 0.25" in out


def test_the_same_examples_come_again(launch, trained, tmp_path):
    common = ("--recall=[mqar]", "--lengths=[100]")
    first, again, other = (
        recall(launch, trained, tmp_path, *common, *more)[0][0]["nats"]
        for more in (("--batch_size", "50"), ("--batch_size", "1"), ("--seed", "2"))
    )
    assert again == pytest.approx(first, rel=1e-5) and other != pytest.approx(first, rel=1e-5)


def test_every_task_has_a_row_and_every_length_a_column(launch, trained, tmp_path):
    rows, out = recall(launch, trained, tmp_path, "--recall=[mqar, needle]", "--lengths=[400, 500]", "--candidates=1")
    assert [(row["task"], row["length"]) for row in rows] == [
        (task, length) for task in ("mqar", "needle") for length in (400, 500)
    ]
    head, *body = [re.findall(r"\w+", line) for line in out.splitlines() if "┃" in line or "│" in line][:3]
    assert head == ["task", "400", "tokens", "500", "tokens"] and [line[0] for line in body] == ["mqar", "needle"]


def test_a_haystack_a_depth_and_no_candidates(launch, trained, tmp_path):
    (tmp_path / "text.txt").write_text("It was late. Nobody spoke. ")
    options = ("--haystack", "text.txt", "--depth", "0.25", "--candidates", "1")
    rows, out = recall(launch, trained, tmp_path, "--recall=[needle]", "--lengths=[500]", *options)
    assert {each["depth"] for each in rows[0]["outcomes"]} == {0.25}
    assert rows[0]["rank"] == rows[0]["candidates"] == 1 and "guessing" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recall=[needles]",), "recall: there is no task 'needles'; did you mean 'needle'?"),
        (("--recall=[everything]",), "recall: there is no task 'everything'; choose from needle, needle_keys"),
        (("--recall=[needle]", "--lengths=[]"), "lengths is []: give numbers of tokens"),
        (("--recall=[needle]", "--examples=0"), "examples is 0: it must be at least 1"),
        (("--recall=[needle]", "--depth=1.5"), "depth is 1.5: it must be from 0"),
        (("--recall=[needle]", "--haystack=none.txt"), "haystack: none.txt is not a file; name a text file"),
        (("--recall=[needle]", "--haystack=empty.txt"), "haystack: empty.txt holds no words; name another text"),
        (
            ("--recall=[needle]", "--by_position=true"),
            "by_position is of an evaluation of data, and this is one of recall; leave it out",
        ),
        (("--depth=0.5",), "depth is of an evaluation of recall, and this is one of data; leave it out"),
    ],
)
def test_bad_input_is_one_line_before_torch(launch, trained, tmp_path, arguments, message):
    (tmp_path / "empty.txt").write_text(" \n")
    code, _, errors, imported = launch("evaluate", "--checkpoint", str(trained), *arguments)
    assert code == 2
    assert len(errors.strip().splitlines()) == 1
    assert message in errors
    assert imported == []


def test_a_length_that_is_too_short_is_refused_before_anything_is_computed(launch, trained):
    options = ("--checkpoint", str(trained), "--recall=[mqar, needle]", "--lengths=[512, 32]")
    code, out, errors, _ = launch("evaluate", *options, forked=True)
    assert (code, out) == (2, "")
    assert "lengths: 32 tokens are too few for needle, which needs" in errors
