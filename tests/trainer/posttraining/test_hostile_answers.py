"""A whole run whose rewards are attacked in every way: it goes on, nothing is written, and each attack is counted."""

import json
import sqlite3
from collections import Counter
from contextlib import closing

import pytest

from tests.launch.serving import write_model
from tests.trainer.conftest import metrics, status
from tests.trainer.posttraining.conftest import run

# The first answer to a row's prompt is taken for the attack that the row names.
REWARD = """
import os, signal, sys, time
from dataclasses import replace
from trainer.posttraining.rewards.registry import RewardConfig, build

HERE = os.path.dirname(__file__)
PROGRAMS = build(RewardConfig("python_tests", options={"seconds": 60.0}))
QUERIES = build(RewardConfig("sql", options={"root": HERE, "seconds": 1.0}))

def program(answer, text):
    return PROGRAMS(replace(answer, completion=text, ground_truth={"cases": [{"output": ""}]}))

def query(answer, text):
    return QUERIES(replace(answer, completion=text, ground_truth={"gold_sql": "SELECT 1", "db_id": "d.sqlite"}))

def recurse(answer):
    return recurse(answer)

ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"
ATTACKS = {
    "killed worker": lambda answer: os.kill(os.getpid(), signal.SIGKILL),
    "hang": lambda answer: time.sleep(1000),
    "endless recursion": recurse,
    "10 GB": lambda answer: len("a" * (10 << 30)),
    "10 GB in a program": lambda answer: program(answer, "x = 'a' * (10 << 30)"),
    "endless output": lambda answer: program(answer, "while True: print('a' * 1000)"),
    "fork bomb": lambda answer: program(answer, "import os\\nwhile True: os.fork()"),
    "file": lambda answer: program(answer, f"open('{HERE}/written', 'w')"),
    "DROP": lambda answer: query(answer, "DROP TABLE t"),
    "ATTACH": lambda answer: query(answer, f"ATTACH '{HERE}/new.sqlite' AS n"),
    "endless query": lambda answer: query(answer, ENDLESS),
}

def score(answer):
    try:
        os.mkdir(f"{HERE}/seen/{answer.ground_truth}")
    except FileExistsError:
        return 1.0
    return ATTACKS[answer.ground_truth](answer)
"""

ERRORS = {
    "killed worker": "crash",
    "hang": "timeout",
    "endless recursion": "exception",
    "10 GB": "memory",
    "10 GB in a program": "memory",
    "endless output": "limit",
    "fork bomb": "refused",
    "file": "refused",
    "DROP": "refused",
    "ATTACH": "refused",
    "endless query": "timeout",
}


@pytest.mark.slow
def test_training_goes_on_and_each_attack_is_counted(tmp_path):
    model = write_model(tmp_path, rows=448)
    place = tmp_path / "attacked"
    (place / "seen").mkdir(parents=True)
    (place / "hostile.py").write_text(REWARD)
    rows = [{"prompt": f"def function_{number}(", "answer": attack} for number, attack in enumerate(ERRORS)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with closing(sqlite3.connect(place / "d.sqlite")) as connection:
        connection.executescript("CREATE TABLE t (x); INSERT INTO t VALUES (1)")
    before = {path: path.read_bytes() for path in place.iterdir() if path.is_file()}
    options = (
        *(f"--rows.train=[{place}/rows.jsonl]", "--rows.validation=[]", "--train.steps=2"),
        *("--rl.samples=4", f"--rl.prompts={len(ERRORS)}", f"--train.global_batch_size={4 * len(ERRORS)}"),
        # Long enough for a program to be refused on a busy machine; only what hangs takes as long.
        f'--rewards=[{{"name": "{place}/hostile.py:score", "seconds": 30}}]',
    )
    run(model, place, tmp_path / "run", "rl", *options)

    assert status(tmp_path / "run")["state"] == "done"
    first, second = metrics(tmp_path / "run")
    counted = {
        name.removeprefix("reward/errors/"): count for name, count in first.items() if name.startswith("reward/errors/")
    }
    assert counted == Counter(ERRORS.values()) and not any(name.startswith("reward/errors/") for name in second)
    # It learns from what the others are worth.
    assert first["reward/mean"] == pytest.approx(3 / 4) and first["grad_norm"] > 0
    lines = (tmp_path / "run/rollouts/00000000.jsonl").read_text().splitlines()[1:]
    for group in map(json.loads, lines):
        attack = list(ERRORS)[int(group["row"].rpartition(":")[2])]
        found = sorted((sample["reward"], sample["error"] or "") for sample in group["samples"])
        assert found == [(0.0, ERRORS[attack]), *[(1.0, "")] * 3], attack
    assert {path: path.read_bytes() for path in place.iterdir() if path.is_file()} == before
