"""Queries on SQLite, and queries that should do nothing."""

import sqlite3
import time
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import ConfigError
from trainer.posttraining.rewards.base import Answer, ScoringError
from trainer.posttraining.rewards.sql import _authorize, same_results, sql

GOLD = "SELECT name, age FROM singer WHERE age > 20"
ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"
SCRIPT = "CREATE TABLE singer (name, age); INSERT INTO singer VALUES ('Ann', 30), ('Bob', 20), ('Cid', 40);"


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "databases" / "a #1?"
    folder.mkdir(parents=True)
    with closing(sqlite3.connect(folder / "a #1?.sqlite")) as connection:
        connection.executescript(SCRIPT)
    return tmp_path / "databases"


def judge(completion, reward=None, root=None, **truth):
    place = {"script": SCRIPT} if root is None else {"db_id": "a #1?"}
    return (reward or sql(root and str(root)))(Answer("", completion, ground_truth={"gold_sql": GOLD} | place | truth))


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("```sql\nSELECT name, age FROM singer WHERE age >= 21\n```", 1),
        ("<think>DROP</think>SELECT name, age + 0.0 FROM singer WHERE age > 20 ORDER BY age DESC;", 1),
        ("<answer>SELECT age, name FROM singer WHERE age > 20</answer>", 0),
        ("SELECT name, age FROM singer", 0),
        ("SELECT name, age FROM nobody", 0),
        ("no query", 0),
        ("", 0),
        ("SELECT 1; SELECT 2", 0),
        ("SELECT 'a\0b'", 0),
    ],
)
def test_results_are_compared(root, completion, expected):
    assert judge(completion) == expected
    assert judge(completion, root=root) == expected


@pytest.mark.parametrize("name", ["a #1?", "a #1?/a #1?.sqlite"])
def test_databases_by_name(root, name):
    assert judge(GOLD, root=root, db_id=name) == 1


@pytest.mark.parametrize(
    ("gold", "completion", "auto", "bird", "ordered"),
    [
        ("SELECT age FROM singer ORDER BY age", "SELECT age FROM singer ORDER BY age DESC", 0, 1, 0),
        ("SELECT max(age) FROM (SELECT age FROM singer ORDER BY age)", "SELECT 40", 1, 1, 1),
        ("SELECT 1 FROM singer", "SELECT 1", 0, 1, 0),
        ("SELECT age FROM singer", "SELECT age FROM singer ORDER BY age", 1, 1, 0),
    ],
)
def test_order_and_repetition(gold, completion, auto, bird, ordered):
    assert judge(completion, gold_sql=gold) == judge(completion, gold_sql=gold, cmp_method="spider") == auto
    assert judge(completion, gold_sql=gold, cmp_method="bird") == bird
    assert judge(completion, sql(compare="ordered"), gold_sql=gold) == ordered


@pytest.mark.parametrize(
    "query",
    [
        "DROP TABLE singer",
        "DELETE FROM singer",
        "INSERT INTO singer VALUES ('x', 1)",
        "CREATE TEMP TABLE t (x)",
        "ATTACH 'FOLDER/new.sqlite' AS n",
        "VACUUM INTO 'FOLDER/new.sqlite'",
        "PRAGMA query_only = off",
        "PRAGMA table_info(singer)",
        "BEGIN",
        "EXPLAIN DELETE FROM singer",
    ],
)
def test_everything_but_reading_is_refused(root, query):
    file = next(root.rglob("*.sqlite"))
    before = file.read_bytes()
    with pytest.raises(ScoringError) as caught:
        judge(query.replace("FOLDER", str(root)), root=root)
    assert caught.value.kind == "refused"
    assert file.read_bytes() == before and len(list(root.rglob("*"))) == 2


@pytest.mark.parametrize("function", ["load_extension", "LOAD_EXTENSION", "readfile"])
def test_functions_that_reach_outside_do_not_run(function):
    assert _authorize(sqlite3.SQLITE_FUNCTION, None, function, "main", None) == sqlite3.SQLITE_DENY
    assert _authorize(sqlite3.SQLITE_FUNCTION, None, "count", "main", None) == sqlite3.SQLITE_OK


@pytest.mark.parametrize(
    ("query", "kind"),
    [
        (ENDLESS, "timeout"),
        (ENDLESS.replace("count(*)", "x"), "limit"),
        ("SELECT zeroblob(5000) FROM singer, singer, singer", "limit"),
        ("SELECT zeroblob(1 << 30)", "memory"),
    ],
)
def test_limits(query, kind):
    begin = time.monotonic()
    with pytest.raises(ScoringError) as caught:
        judge(query, sql(seconds=0.2, rows=1000, result_bytes=100_000))
    assert caught.value.kind == kind
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize(
    "truth",
    [
        {"gold_sql": None},
        {"gold_sql": "SELECT nothing FROM singer"},
        {"cmp_method": "x"},
        {"script": "CREATE"},
        {"script": None},
        {"script": None, "db_id": "missing"},
        {"script": None, "db_id": "../outside.sqlite"},
    ],
)
def test_a_broken_ground_truth_is_named(root, truth):
    (root.parent / "outside.sqlite").write_bytes(next(root.rglob("*.sqlite")).read_bytes())
    with pytest.raises(ScoringError) as caught:
        judge(GOLD, sql(str(root)), **truth)
    assert caught.value.kind == "truth"


def test_links_do_not_lead_out_of_the_root(root):
    outside = root.parent / "outside.sqlite"
    outside.write_bytes(next(root.rglob("*.sqlite")).read_bytes())
    (root / "link.sqlite").symlink_to(outside)
    with pytest.raises(ScoringError, match="no database"):
        judge(GOLD, root=root, db_id="link.sqlite")


def test_wrong_options_are_refused(tmp_path):
    for options in ({"root": str(tmp_path / "none")}, {"compare": "x"}, {"seconds": 0}, {"rows": 0}):
        with pytest.raises(ConfigError):
            sql(**options)


rows = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.sampled_from(["a", "b"])), max_size=5)


@given(rows, st.permutations([0, 1, 2]), st.randoms())
def test_columns_in_any_order(expected, places, random):
    found = [tuple(row[place] for place in places) for row in expected]
    assert same_results(expected, found, "ordered", any_column_order=True)
    random.shuffle(found)
    assert same_results(expected, found, "bag", any_column_order=True)
    assert same_results(expected, found * 2, "set", any_column_order=True)
    assert same_results(expected, found * 2, "bag", any_column_order=True) == (not expected)


def test_columns_move_as_wholes():
    assert not same_results([(1, 2), (2, 1)], [(1, 1), (2, 2)], "bag", any_column_order=True)
    assert not same_results([(1, 2)], [(2, 1)], "bag")
