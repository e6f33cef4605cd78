"""The pool of workers with rewards that hang, die, flood, and attack it."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.documented import ROOT
from tests.helpers import WAIT
from trainer.errors import ConfigError
from trainer.posttraining.rewards.base import Answer, Score
from trainer.posttraining.rewards.registry import RewardConfig
from trainer.posttraining.rewards.workers import RewardPool, _as_score, _parsed

HOSTILE = """
import os, sys, tempfile, time

def score(answer):
    what, result = answer.completion, 0.5
    if what == "loop":
        while True: pass
    if what == "sleep":
        time.sleep(1000)
    if what == "exit":
        os._exit(0)
    if what == "quit":
        sys.exit()
    if what == "kill":
        os.kill(os.getpid(), 9)
    if what == "raise":
        raise ValueError("no\\nsuch thing")
    if what == "memory":
        x = "a" * (20 << 30)
    if what == "print":
        print("a" * (1 << 20)); sys.stdin.read()
    if what == "text":
        return {"score": 0.5, "text": "a" * (200 << 20), **{str(i): i for i in range(1000)}}
    if what == "nan":
        return float("nan")
    if what == "children":
        # Bounded, and each of them ends by itself.
        children = []
        for _ in range(5):
            children.append(os.fork())
            if children[-1] == 0:
                time.sleep(3600)
                os._exit(0)
        open(answer.ground_truth, "w").write(" ".join([tempfile.mkdtemp(), str(os.getpid()), *map(str, children)]))
        time.sleep(1000)
    if what.startswith("pipe"):
        # The descriptor is worker.py's argument.
        line = {"pipe garbage": b"garbage\\n", "pipe flood": b"a" * (200 << 20), "pipe 2": b'{"id": 1}\\n{}\\n'}[what]
        while line:
            line = line[os.write(int(sys.argv[1]), line):]
    if what == "close":
        os.close(int(sys.argv[1])); time.sleep(1000)
    return result

def loading(answer):
    return 1.0
"""


def lives(pid):
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition):
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def hostile(tmp_path):
    (tmp_path / "hostile.py").write_text(HOSTILE)
    return f"{tmp_path}/hostile.py:score"


@pytest.fixture
def pool(hostile, request):
    """Two workers of the hostile reward; a test's parameter is its limit in seconds."""
    with RewardPool([RewardConfig(hostile, label="hostile", seconds=getattr(request, "param", WAIT))]) as pool:
        yield pool


# Enough for what is quick on any machine.
brief = pytest.mark.parametrize("pool", [2.0], indirect=True)


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        ("exit", "crash"),
        ("quit", "exception"),
        ("kill", "crash"),
        ("raise", "exception"),
        ("memory", "memory"),
        ("nan", "value"),
        ("pipe garbage", "crash"),
        ("pipe flood", "limit"),
        ("pipe 2", "crash"),
        ("close", "crash"),
    ],
)
def test_one_bad_answer_leaves_the_others_alone(pool, what, kind):
    scores = pool.score([Answer("", text) for text in ("good", what, "good", what, "good")])
    assert scores == [Score(0.5), Score(error=kind), Score(0.5), Score(error=kind), Score(0.5)]
    assert pool.errors == {"hostile": {kind: 2}} and kind in pool.messages
    assert pool.replaced == (0 if kind in ("exception", "value") else 2)
    if kind == "exception":
        assert "\n" not in pool.messages[kind].replace("no\nsuch thing", "")
    assert pool.score([Answer("", "good")] * 3) == [Score(0.5)] * 3


@brief
def test_an_answer_that_takes_for_ever_leaves_the_others_alone(pool):
    assert pool.score([Answer("", text) for text in ("loop", "good")]) == [Score(error="timeout"), Score(0.5)]
    assert pool.errors == {"hostile": {"timeout": 1}} and pool.replaced == 1


def test_what_rewards_print_and_return_is_bounded(pool):
    assert pool.score([Answer("", "print")]) == [Score(0.5)]
    (score,) = pool.score([Answer("", "text")])
    assert score.value == 0.5 and len(score.parts) == 64
    assert pool.replaced == 0


@brief
def test_a_killed_worker_takes_its_children_and_files_with_it(pool, tmp_path):
    file = tmp_path / "file"
    assert pool.score([Answer("", "children", ground_truth=str(file))])[0].error == "timeout"
    folder, *pids = file.read_text().split()
    assert len(pids) == 6
    wait_until(lambda: not any(lives(int(pid)) for pid in pids))
    ours = Path(folder).parents[1]
    assert not Path(folder).exists() and ours.name.startswith("rewards-") and ours.exists()
    pool.close()
    assert not ours.exists()


def test_long_completions_are_cut(hostile):
    with RewardPool([RewardConfig("exact", options={"extract": "last_line"})], workers=1) as pool:
        answer = Answer("", "a" * (200 << 20) + "\n42", ground_truth="42")
        assert pool.score([answer, answer]) == [Score(1.0)] * 2
        assert pool.cut == 2


def test_order_is_kept_and_scoring_goes_on_meanwhile(tmp_path):
    source = """
        import os, time
        def score(answer):
            while not (answer.ground_truth is None or os.path.exists(answer.ground_truth)):
                time.sleep(0.01)
            return float(answer.completion)
    """
    (tmp_path / "slow.py").write_text(textwrap.dedent(source))
    gate = tmp_path / "gate"
    with RewardPool([RewardConfig(f"{tmp_path}/slow.py:score", seconds=WAIT)], workers=2) as pool:
        first = pool.submit([Answer("", str(i), ground_truth=None if i else str(gate)) for i in range(20)])
        second = pool.submit([Answer("", "7")])
        empty = pool.submit([])
        assert second.result(WAIT) == [Score(7.0)] and empty.result() == []
        assert not first.is_done
        with pytest.raises(TimeoutError, match="1 scores are missing"):
            first.result(0.0)
        gate.touch()
        assert [score.value for score in first.result(WAIT)] == list(range(20)) and first.is_done


def test_several_rewards_fail_one_by_one(hostile):
    configs = [
        RewardConfig(hostile, label="hostile", weight=2.0),
        RewardConfig("exact", options={"extract": "whole"}, weight=0.25),
    ]
    with RewardPool(configs) as pool:
        scores = pool.score([Answer("", "good", ground_truth="good"), Answer("", "exit", ground_truth="exit")])
        assert scores == [
            Score(1.25, {"hostile": 0.5, "exact": 1.0}),
            Score(0.25, {"hostile": 0.0, "exact": 1.0}, "crash"),
        ]
        assert pool.errors == {"hostile": {"crash": 1}, "exact": {}}


def test_one_reward_has_its_weight():
    with RewardPool([RewardConfig("exact", weight=3.0)], workers=1) as pool:
        assert pool.score([Answer("", "a", ground_truth="a")]) == [Score(3.0)]


def test_workers_that_cannot_load_are_refused(tmp_path):
    sources = {"raises": "1 / 0", "exits": "import os; os._exit(3)", "quits": "import sys; sys.exit(3)"}
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(f"{source}\ndef score(answer): return 1.0\n")
        with pytest.raises(ConfigError) as caught:
            RewardPool([RewardConfig(f"{tmp_path}/{name}.py:score")], workers=1)
        expected = {"raises": "ZeroDivisionError", "exits": "ended while they loaded", "quits": "SystemExit"}[name]
        assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_pools_are_refused():
    with pytest.raises(ConfigError):
        RewardPool([RewardConfig()], workers=0)
    with pytest.raises(ConfigError):
        RewardPool([RewardConfig("exakt")])


def test_closing_kills_workers_and_fails_what_is_left(hostile):
    pool = RewardPool([RewardConfig(hostile)])
    batch = pool.submit([Answer("", "sleep")] * 5)
    wait_until(lambda: len(pool.pids) == 2)
    pids = pool.pids
    assert all(map(lives, pids))
    pool.close()
    pool.close()
    assert not any(map(lives, pids))
    with pytest.raises(RuntimeError, match="closed"):
        batch.result(WAIT)
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit([Answer("", "good")])


def test_what_json_cannot_hold_is_refused_at_once():
    with RewardPool([RewardConfig()], workers=1) as pool:
        with pytest.raises(TypeError):
            pool.submit([Answer("", "", ground_truth=object())])
        assert pool.score([Answer("", "a", ground_truth="a")]) == [Score(1.0)]


OWNER = """
import os, sys, time
from trainer.posttraining.rewards.base import Answer
from trainer.posttraining.rewards.registry import RewardConfig
from trainer.posttraining.rewards.workers import RewardPool
pool = RewardPool([RewardConfig(sys.argv[1], seconds=1000), RewardConfig("python_tests", options={"seconds": 1000},
    seconds=1000)], workers=2)
program = "import time, sys\\nsys.stdout.flush()\\ntime.sleep(1000)"
pool.submit([Answer("", "sleep")] + [Answer("", program, ground_truth="1")])
print(*pool.pids, flush=True)
END
"""


@pytest.mark.parametrize("end", ["exit", "killed", "exception"])
@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_workers_end_with_their_owner(hostile, end, tmp_path):
    code = {"exit": "", "killed": "time.sleep(1000)", "exception": "1 / 0"}[end]
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER.replace("END", code), hostile],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    pids = list(map(int, owner.stdout.readline().split()))
    assert len(pids) == 2
    if end == "killed":
        # Time for the sandbox, to end with its worker.
        wait_until(lambda: any(_children(pid) for pid in pids))
        pids += [child for pid in pids for child in _children(pid)]
        assert len(pids) >= 3
        os.kill(owner.pid, signal.SIGKILL)
    owner.wait(WAIT)
    wait_until(lambda: not any(map(lives, pids)))
    # Nothing of its own can run when it is killed.
    assert end == "killed" or not list(tmp_path.glob("rewards-*"))


def _children(pid):
    try:
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except (FileNotFoundError, ProcessLookupError):
        return []


@pytest.mark.parametrize(
    "line",
    [
        {"id": 2, "value": 1, "parts": {}, "error": None},
        {"id": 1, "value": "1", "parts": {}, "error": None},
        {"id": 1, "value": True, "parts": {}, "error": None},
        {"id": 1, "value": float("nan"), "parts": {}, "error": None},
        {"id": 1, "value": 1, "parts": [], "error": None},
        {"id": 1, "value": 1, "parts": {"a": "b"}, "error": None},
        {"id": 1, "value": 1, "parts": {"a" * 101: 1}, "error": None},
        {"id": 1, "value": 1, "parts": {}, "error": "other"},
        {"id": 1, "value": 1, "parts": {}, "error": []},
        {"id": 1, "value": 10**400, "parts": {}, "error": None},
        {},
    ],
)
def test_lines_that_are_no_scores(line):
    good = {"id": 1, "value": 1, "parts": {"a": 2}, "error": "timeout"}
    assert _as_score(_parsed(json.dumps(good)), 1) == Score(1.0, {"a": 2.0}, "timeout")
    assert _as_score(_parsed(json.dumps(line)), 1) is None


@pytest.mark.parametrize("line", [b"", b"[1]", b"[" * 100_000, b"\xff", b"1" * 5000])
def test_lines_that_are_nothing(line):
    assert _parsed(line) == {}


# Attacks by what a model writes, through the pool, as in training.

ATTACKS = {
    "import os; os._exit(0)": "crash",
    "import os\nfor _ in range(5):\n    os.fork() or os._exit(0)": "refused",
    "x = 'a' * (10 << 30)": "memory",
    "open('HERE/written', 'w').write('x')": "refused",
    "import socket; socket.create_connection(('127.0.0.1', PORT))": "refused",
    "while True: print('a' * 1000)": "limit",
}


def test_programs_that_attack(tmp_path):
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        server.setblocking(False)
        marks = {"HERE": str(tmp_path), "PORT": str(server.getsockname()[1])}
        answers = [Answer("", "print(2)", ground_truth={"cases": [{"output": "2"}]})]
        for program in ATTACKS:
            for mark, value in marks.items():
                program = program.replace(mark, value)
            answers += [Answer("", program, ground_truth={"cases": [{"output": ""}]}), answers[0]]
        with RewardPool([RewardConfig("python_tests", options={"seconds": 60}, seconds=WAIT)]) as pool:
            scores = pool.score(answers)
            assert [score.error for score in scores[1::2]] == list(ATTACKS.values())
            assert [score.value for score in scores] == [1, 0] * len(ATTACKS) + [1]
            assert sum(pool.errors["python_tests"].values()) == len(ATTACKS) and pool.replaced == 0
        with pytest.raises(BlockingIOError):
            server.accept()
    assert list(tmp_path.iterdir()) == []


def test_programs_that_never_end():
    with RewardPool([RewardConfig("python_tests", options={"seconds": 0.5}, seconds=WAIT)], workers=1) as pool:
        assert pool.score([Answer("", "while True: pass", ground_truth="1")])[0].error == "timeout"
        assert pool.replaced == 0


def test_queries_that_attack(tmp_path):
    with closing(sqlite3.connect(tmp_path / "d.sqlite")) as connection:
        connection.executescript("CREATE TABLE t (x); INSERT INTO t VALUES (1)")
    before = (tmp_path / "d.sqlite").read_bytes()
    endless = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"
    attacks = ["DROP TABLE t", f"ATTACH '{tmp_path}/new.sqlite' AS n", endless, "SELECT x FROM t"]
    truth = {"gold_sql": "SELECT 1", "db_id": "d.sqlite"}
    options = {"root": str(tmp_path), "seconds": 1.0}
    with RewardPool([RewardConfig("sql", options=options)], workers=1) as pool:
        scores = pool.score([Answer("", query, ground_truth=truth) for query in attacks])
        assert pool.errors == {"sql": {"refused": 2, "timeout": 1}} and pool.replaced == 0
    assert scores == [Score(error="refused"), Score(error="refused"), Score(error="timeout"), Score(1.0)]
    assert (tmp_path / "d.sqlite").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_patterns_that_never_end_are_killed():
    with RewardPool([RewardConfig("pattern", options={"pattern": "(a+)+b"}, seconds=2.0)], workers=1) as pool:
        assert pool.score([Answer("", "a" * 50), Answer("", "ab")]) == [Score(error="timeout"), Score(1.0)]
        assert pool.replaced == 1


def test_functions_of_users_by_module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        textwrap.dedent("""
        def compute_score(data_source, solution_str, ground_truth, extra_info=None, bonus=0):
            return {"score": float(solution_str == ground_truth) + bonus, "level": extra_info["level"]}
    """)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with RewardPool([RewardConfig("my_rewards:compute_score", options={"bonus": 1})], workers=1) as pool:
        assert pool.score([Answer("", "a", "d", "a", {"level": 2})]) == [Score(2.0, {"level": 2.0})]
