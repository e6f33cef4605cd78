"""The task of writing SQL for questions about a small generated database, of two levels. Imports no torch."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, NamedTuple

_NAMES = (
    *("ann", "ben", "cleo", "dan", "eva", "finn", "gina", "hugo", "iris", "jack", "kim", "leo", "mia", "noah"),
    *("olga", "paul", "quinn", "rosa", "sam", "tara", "uma", "vera", "will", "xena", "yara", "zoe"),
)
_CITIES = ("rome", "oslo", "lima", "cairo", "tokyo")
_TEAMS = ("sales", "legal", "design", "support", "research")
_AGES, _PAYS = range(21, 65), range(25, 95)


class Question(NamedTuple):
    """A question with queries that answer it, all with the same result, and with ones that do not."""

    text: str
    right: tuple[str, ...]
    wrong: tuple[str, ...]


class _Condition(NamedTuple):
    words: str
    right: tuple[str, ...]
    wrong: tuple[str, ...]


def script(draw: random.Random) -> str:
    """Statements that make a database: staff with name, team, city, age and pay, and the floor of each team."""
    # No two are as old or paid alike, so that there is one oldest.
    ages, pays = (draw.sample(values, len(_NAMES)) for values in (_AGES, _PAYS))
    staff = ", ".join(
        f"('{name}', '{draw.choice(_TEAMS)}', '{draw.choice(_CITIES)}', {age}, {pay})"
        for name, age, pay in zip(_NAMES, ages, pays, strict=True)
    )
    floors = ", ".join(f"('{team}', {floor})" for floor, team in enumerate(draw.sample(_TEAMS, len(_TEAMS)), 1))
    return (
        "create table staff (name text, team text, city text, age integer, pay integer); "
        f"insert into staff values {staff}; create table teams (team text, floor integer); "
        f"insert into teams values {floors}"
    )


def rows(draw: random.Random) -> Iterator[dict[str, Any]]:
    """Rows without end, all about one database. Of `level` easy are those with one condition on one table."""
    statements = script(draw)
    with closing(sqlite3.connect(":memory:")) as database:
        database.executescript(statements)
        while True:
            is_easy = draw.random() < 0.5
            question = draw.choice(EASY if is_easy else HARD)(draw)
            right = draw.choice(question.right)
            result = _result(database, right)
            # A result of nothing is that of many wrong queries.
            wrong = [query for query in question.wrong if _result(database, query) != result]
            if wrong and result not in ([], [(0,)], [(None,)]):
                yield {
                    "prompt": f"{question.text}?",
                    "answer": {"gold_sql": question.right[0], "script": statements},
                    "completion": f" {right}",
                    "wrong": f" {draw.choice(wrong)}",
                    "level": "easy" if is_easy else "hard",
                }


def _result(database: sqlite3.Connection, query: str) -> list[Any]:
    return sorted(database.execute(query).fetchall(), key=repr)


def _place(draw: random.Random) -> _Condition:
    column, values, word = draw.choice((("city", _CITIES, "in"), ("team", _TEAMS, "of")))
    value, other = draw.sample(values, 2)
    wrong_column = "team" if column == "city" else "city"
    return _Condition(
        f"{word} {value}",
        (f"{column} = '{value}'", f"'{value}' = {column}", f"{column} in ('{value}')"),
        (f"{column} = '{other}'", f"{wrong_column} = '{value}'", f"not {column} = '{value}'"),
    )


def _amount(draw: random.Random) -> _Condition:
    column, values, words = draw.choice(
        (("age", _AGES, ("older than", "younger than")), ("pay", _PAYS, ("paid over", "paid under")))
    )
    value, is_more = draw.choice(values), draw.random() < 0.5
    sign, other_sign, next_value = (">", "<", value + 1) if is_more else ("<", ">", value - 1)
    other_column = "pay" if column == "age" else "age"
    return _Condition(
        f"{words[0] if is_more else words[1]} {value}",
        (f"{column} {sign} {value}", f"{value} {other_sign} {column}", f"{column} {sign}= {next_value}"),
        (f"{column} {other_sign} {value}", f"{column} = {value}", f"{other_column} {sign} {value}"),
    )


def _condition(draw: random.Random) -> _Condition:
    return draw.choice((_place, _amount))(draw)


def _names(draw: random.Random) -> Question:
    found = _condition(draw)
    return _of_condition(f"who is {found.words}", "name", "count(*)", found)


def _count(draw: random.Random) -> Question:
    found = _condition(draw)
    question = _of_condition(f"how many are {found.words}", "count(*)", "name", found)
    return question._replace(
        right=(*question.right, *(right.replace("count(*)", "count(name)") for right in question.right))
    )


def _of_condition(text: str, asked: str, other: str, found: _Condition) -> Question:
    return Question(
        text,
        tuple(f"select {asked} from staff where {condition}" for condition in found.right),
        (
            *(f"select {asked} from staff where {condition}" for condition in found.wrong),
            *(f"select {other} from staff where {condition}" for condition in found.right),
            f"select {asked} from staff",
        ),
    )


def _lookup(draw: random.Random) -> Question:
    (name, stranger), (column, other) = draw.sample(_NAMES, 2), draw.sample(("age", "pay", "city", "team"), 2)
    return Question(
        f"what {column} has {name}",
        tuple(f"select {column} from staff where {test}" for test in (f"name = '{name}'", f"name in ('{name}')")),
        (
            f"select {other} from staff where name = '{name}'",
            f"select {column} from staff where name = '{stranger}'",
            f"select name from staff where {column} = '{name}'",
        ),
    )


def _both(draw: random.Random) -> Question:
    place, amount = _place(draw), _amount(draw)
    orders = [(first, second) for a in place.right for b in amount.right for first, second in ((a, b), (b, a))]
    return Question(
        f"who {place.words} is {amount.words}",
        tuple(f"select name from staff where {first} and {second}" for first, second in orders),
        (
            *(f"select name from staff where {first} or {second}" for first, second in orders),
            *(f"select name from staff where {place.right[0]} and {condition}" for condition in amount.wrong),
            *(f"select name from staff where {test}" for test in (*place.right, *amount.right)),
        ),
    )


def _extreme(draw: random.Random) -> Question:
    place = _place(draw)
    column, words = draw.choice((("age", ("oldest", "youngest")), ("pay", ("best paid", "worst paid"))))
    is_most = draw.random() < 0.5
    order, function, flipped = (" desc", "max", f"-{column}") if is_most else ("", "min", f"-{column} desc")
    orders = (f"order by {column}{order} limit 1", f"order by {flipped} limit 1")
    wrongs = (f"order by {column}{'' if is_most else ' desc'} limit 1", f"order by {column}{order}")
    return Question(
        f"who {place.words} is {words[0] if is_most else words[1]}",
        tuple(f"select name from staff where {test} {order}" for test in place.right for order in orders),
        (
            *(f"select {function}({column}) from staff where {test}" for test in place.right),
            *(f"select name from staff where {test}" for test in place.right),
            *(f"select name from staff {order}" for order in orders),
            *(f"select name from staff where {place.right[0]} {wrong}" for wrong in wrongs),
        ),
    )


def _floor(draw: random.Random) -> Question:
    name, stranger = draw.sample(_NAMES, 2)

    def queries(test: str) -> tuple[str, str, str]:
        return (
            f"select floor from teams where team = (select team from staff where {test})",
            f"select floor from teams join staff using (team) where {test}",
            f"select floor from staff natural join teams where {test}",
        )

    return Question(
        f"which floor has {name}",
        (*queries(f"name = '{name}'"), *queries(f"name in ('{name}')")),
        (
            *queries(f"name = '{stranger}'"),
            f"select team from staff where name = '{name}'",
            f"select floor from teams where team = '{name}'",
        ),
    )


def _floors(draw: random.Random) -> Question:
    amount = _amount(draw)
    return Question(
        f"how many teams have someone {amount.words}",
        (
            *(f"select count(distinct team) from staff where {test}" for test in amount.right),
            *(
                f"select count(*) from teams where team in (select team from staff where {test})"
                for test in amount.right
            ),
        ),
        (
            *(f"select count(*) from staff where {test}" for test in amount.right),
            *(f"select count(team) from staff where {test}" for test in amount.wrong),
        ),
    )


EASY: tuple[Callable[[random.Random], Question], ...] = (_names, _count, _lookup)
HARD: tuple[Callable[[random.Random], Question], ...] = (_both, _extreme, _floor, _floors)
