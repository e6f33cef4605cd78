"""Queries, judged by their results on SQLite, as Spider (arXiv 1809.08887) and BIRD (arXiv 2305.03111) do.

Nothing that a query says can change anything: the database is opened read-only, and SQLite asks an authorizer about
every step of a statement, which allows reading, functions and recursion, and nothing else. Time, memory, rows and bytes
are limited.
"""

import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from trainer.errors import ConfigError
from trainer.posttraining.rewards.base import Answer, Reward, ScoringError
from trainer.posttraining.rewards.extraction import after_thoughts, code_block, tagged

Compare = Literal["auto", "set", "bag", "ordered", "spider", "bird"]
Row = tuple[Any, ...]

_COMPARISONS = ("auto", "set", "bag", "ordered", "spider", "bird")
_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
_REFUSED_FUNCTIONS = {"load_extension", "fts3_tokenizer", "readfile", "writefile", "edit"}
# Steps of SQLite's machine between looks at the clock: some tens of microseconds.
_STEPS = 5000
# Orders of columns that are tried at most.
_MOST_ORDERS = 1000
_MOST_SQL_CHARACTERS = 1 << 16


def sql(
    root: str | None = None,
    compare: Compare = "auto",
    any_column_order: bool = False,
    seconds: float = 5.0,
    rows: int = 100_000,
    result_bytes: int = 16 << 20,
    memory_bytes: int = 256 << 20,
) -> Reward:
    """1 if the completion's query has the same result as the right one.

    The ground truth is an object with the right query as `gold_sql` (or `sql`), and its database: `db_id`, a path under
    the root (as in concert_singer/concert_singer.sqlite, or the part before the slash), or `script`, statements that
    make one in memory. `cmp_method` overrides `compare`.

    Args:
        root: Directory of the databases; null if all have scripts.
        compare: set, as BIRD (bird): order and repeated rows do not matter; bag: repeated rows do; ordered: order does,
            too; auto, as Spider (spider): ordered if the right query ends with an ORDER BY, else bag.
        any_column_order: Take results whose columns are in another order, as Spider's test suites do.
        seconds: Limit of each query.
        rows: Limit of a result.
        result_bytes: Limit of a result's values.
        memory_bytes: Limit of SQLite's memory.

    Raises:
        ConfigError: an option is not valid.
    """
    if compare not in _COMPARISONS:
        raise ConfigError(f"compare is {compare!r}: choose from {', '.join(_COMPARISONS)}")
    if root is not None and not Path(root).is_dir():
        raise ConfigError(f"root: {root} is not a directory; give the one that has the databases")
    for name, value in (("seconds", seconds), ("rows", rows), ("result_bytes", result_bytes)):
        if value <= 0:
            raise ConfigError(f"{name} is {value}: it must be more than 0")
    limits = (seconds, rows, result_bytes)

    def score(answer: Answer) -> float:
        truth = answer.ground_truth
        gold = truth.get("gold_sql") or truth.get("sql") if isinstance(truth, dict) else None
        if not isinstance(truth, dict) or not isinstance(gold, str):
            raise ScoringError("truth", "the ground truth must be an object with gold_sql, and db_id or script")
        method = truth.get("cmp_method") or compare
        if method not in _COMPARISONS:
            raise ScoringError("truth", f"cmp_method is {method!r}, and not one of {', '.join(_COMPARISONS)}")
        query = _query(answer.completion)
        with _opened(root, truth, seconds, memory_bytes) as connection:
            try:
                expected = _result(connection, gold, *limits)
            except (sqlite3.Error, sqlite3.Warning, ScoringError) as error:
                raise ScoringError("truth", f"the right query fails: {error}") from error
            try:
                found = _result(connection, query, *limits)
            # Two statements, or a text with a null character.
            except (sqlite3.Warning, sqlite3.ProgrammingError, ValueError):
                return 0.0
            except sqlite3.Error as error:
                raise_if_forbidden(error)
                return 0.0
        order = _ordered(method, gold)
        return float(same_results(expected, found, order, any_column_order))

    return score


def raise_if_forbidden(error: sqlite3.Error) -> None:
    """Tell a query that is wrong from one that did what none may do.

    Raises:
        ScoringError: it was not authorized, or wanted too much memory.
    """
    if error.sqlite_errorcode in (sqlite3.SQLITE_AUTH, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
        raise ScoringError("refused", str(error)) from error
    if error.sqlite_errorcode in (sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_TOOBIG):
        raise ScoringError("memory", str(error)) from error


def _query(completion: str) -> str:
    """The last block of SQL, else the <answer>, else all of it after </think>."""
    text = after_thoughts(completion)
    block = code_block(text, "sql", "sqlite")
    return (block if block is not None else tagged(text) or text).strip()


@contextmanager
def _opened(root: str | None, truth: dict[str, Any], seconds: float, memory: int) -> Iterator[sqlite3.Connection]:
    """A connection to the database of a ground truth that can only read."""
    script = truth.get("script")
    address = ":memory:" if isinstance(script, str) else _address(root, truth.get("db_id"))
    # isolation_level None: no BEGIN of Python's.
    with closing(sqlite3.connect(address, uri=True, isolation_level=None)) as connection:
        for pragma in ("temp_store = memory", "trusted_schema = off", f"hard_heap_limit = {memory}"):
            connection.execute(f"PRAGMA {pragma}")
        if isinstance(script, str):
            with _timed(connection, seconds):
                try:
                    connection.executescript(script)
                except (sqlite3.Error, ScoringError) as error:
                    raise ScoringError("truth", f"the script of the database fails: {error}") from error
        connection.execute("PRAGMA query_only = on")
        connection.text_factory = lambda content: content.decode("utf-8", "replace")
        connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        connection.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, _MOST_SQL_CHARACTERS)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 1 << 24)
        connection.set_authorizer(_authorize)
        yield connection


def _authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    if action not in _ALLOWED or (action == sqlite3.SQLITE_FUNCTION and str(second).lower() in _REFUSED_FUNCTIONS):
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK


def _address(root: str | None, name: Any) -> str:
    """The URI of a database under the root, which neither dots nor links may lead out of."""
    if root is None or not isinstance(name, str) or not name:
        raise ScoringError("truth", "the ground truth must have a script, or db_id, and the reward a root for it")
    top = Path(root).resolve()
    path = (top / name).resolve()
    if path.is_dir():
        path = (path / f"{path.name}.sqlite").resolve()
    if not path.is_relative_to(top) or not path.is_file():
        raise ScoringError("truth", f"there is no database {name!r} under the root")
    # immutable: neither locks nor journals are made beside it.
    return f"file:{quote(str(path))}?mode=ro&immutable=1"


@contextmanager
def _timed(connection: sqlite3.Connection, seconds: float) -> Iterator[None]:
    """Interrupt what runs on a connection after so many seconds.

    Raises:
        ScoringError: it was interrupted.
    """
    end = time.monotonic() + seconds
    connection.set_progress_handler(lambda: int(time.monotonic() > end), _STEPS)
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_INTERRUPT:
            raise ScoringError("timeout", f"the query took more than {seconds:g} s") from error
        raise
    finally:
        connection.set_progress_handler(None, 0)


def _result(connection: sqlite3.Connection, query: str, seconds: float, rows: int, result_bytes: int) -> list[Row]:
    """The rows of a query.

    Raises:
        ScoringError: it passes a limit.
        sqlite3.Error: it is wrong or forbidden.
    """
    found: list[Row] = []
    size = 0
    with _timed(connection, seconds), closing(connection.cursor()) as cursor:
        for row in cursor.execute(query):
            size += sum(len(value) if isinstance(value, str | bytes) else 8 for value in row)
            if len(found) == rows or size > result_bytes:
                raise ScoringError("limit", f"the result has more than {rows} rows or {result_bytes} bytes")
            found.append(row)
    return found


def _ordered(method: str, gold: str) -> Literal["set", "bag", "ordered"]:
    if method in ("auto", "spider"):
        # An ORDER BY in a subquery or a window orders nothing of the result.
        outside, depth = [], 0
        for character in gold.lower():
            depth += (character == "(") - (character == ")")
            outside.append(character if depth == 0 else " ")
        return "ordered" if "order by" in " ".join("".join(outside).split()) else "bag"
    return "set" if method in ("set", "bird") else "ordered" if method == "ordered" else "bag"


def same_results(
    expected: Sequence[Row],
    found: Sequence[Row],
    order: Literal["set", "bag", "ordered"],
    any_column_order: bool = False,
) -> bool:
    """Whether two results are the same; 1 and 1.0 are.

    Args:
        expected: Rows of the right query.
        found: Rows of the other.
        order: Whether their order, and how often each appears, matter.
        any_column_order: Take columns in another order; at most a thousand orders are tried.
    """
    view: Callable[[Sequence[Row]], Any] = {"set": set, "bag": Counter, "ordered": list}[order]
    if not expected or not found:
        return len(expected) == len(found)
    width = len(expected[0])
    if len(found[0]) != width or (order != "set" and len(found) != len(expected)):
        return False
    right = view(expected)
    if view(found) == right:
        return True
    if not any_column_order:
        return False
    # For each column of the right result those with the same values.
    pick = set if order == "set" else Counter
    theirs = [pick(row[place] for row in found) for place in range(width)]
    fitting = [
        [place for place in range(width) if theirs[place] == pick(row[column] for row in expected)]
        for column in range(width)
    ]
    if prod(map(len, fitting)) > _MOST_ORDERS:
        return False
    orders = (places for places in product(*fitting) if len(set(places)) == width)
    return any(view([tuple(row[place] for place in places) for row in found]) == right for places in orders)
