"""Programs that are run, and programs that attack whoever runs them."""

import json
import os
import time

import pytest

from trainer.errors import ConfigError
from trainer.posttraining.rewards import confined, sandbox
from trainer.posttraining.rewards.base import Answer, ScoringError
from trainer.posttraining.rewards.python_tests import python_tests
from trainer.posttraining.rewards.sandbox import Limits, run

SQUARE = "Here it is:\n```python\ndef square(x):\n    return x * x\n```\n"
ECHO = "```python\nfor line in open(0):\n    print(line.strip()[::-1])\n```"

THREADS = "import threading, time\nfor _ in range(9999): threading.Thread(target=time.sleep, args=(9,)).start()"
FORGERY = """
import os
for descriptor in range(3, 1024):
    try: os.write(descriptor, b'{"passed": 1}' * TIMES)
    except OSError: pass
"""


def judge(completion, truth, **options):
    return python_tests(**options)(Answer("", completion, ground_truth=truth))


def attack(program, **limits):
    """How a program ends that fails unless it does what it should not."""
    return run(program, None, limits=Limits(**({"seconds": 20.0} | limits)))


@pytest.mark.parametrize(
    ("truth", "share"),
    [
        ("assert square(3) == 9", 1.0),
        (["assert square(3) == 9", "assert square(2) == 5"], 0.5),
        (json.dumps(["assert square(3) == 9", "1 / 0", "exit()", "import sys; sys.exit(0)"]), 0.25),
        ({"test_list": ["assert math.isclose(square(3), 9)"], "setup": "import math"}, 1.0),
        ({"test": "def check(f):\n    assert f(4) == 16", "entry_point": "square"}, 1.0),
        ({"tests": ["square = None", "assert square(1) == 1"]}, 1.0),
        ({"tests": ["syntax error"]}, 0.0),
    ],
)
def test_assertions(truth, share):
    assert judge(SQUARE, truth) == {"score": float(share == 1), "passed": share}
    assert judge(SQUARE, truth, partial=True)["score"] == share


@pytest.mark.parametrize(
    ("completion", "truth", "share"),
    [
        (ECHO, {"cases": [{"input": "ab\ncd\n", "output": "ba\ndc"}]}, 1.0),
        (ECHO, json.dumps({"inputs": ["ab", "é"], "outputs": ["ba \n\n", "e"]}), 0.5),
        ("```\nprint(1)\n```", {"cases": [{"output": "1"}]}, 1.0),
        ("<think>```\nprint(2)\n```</think><answer>print(1)</answer>", {"cases": [{"output": "1"}]}, 1.0),
        ("print(1); exit()", {"cases": [{"output": "1"}]}, 1.0),
        ("print(1); exit(1)", {"cases": [{"output": "1"}]}, 0.0),
        ("print(1); 1 / 0", {"cases": [{"output": "1"}]}, 0.0),
        ("import sys; sys.stdout.buffer.write(b'\\xff')", {"cases": [{"output": "1"}]}, 0.0),
        ("print('\\ud800')", {"cases": [{"output": "?"}]}, 1.0),
        ("this is no program", {"cases": [{"output": ""}]}, 0.0),
    ],
)
def test_cases_of_stdin_and_stdout(completion, truth, share):
    assert judge(completion, truth, partial=True) == {"score": share, "passed": share}


@pytest.mark.parametrize("truth", [None, 3, {}, "{", [], [1], {"cases": []}, {"cases": [{"input": "a"}]}, {"x": 1}])
def test_a_broken_ground_truth_is_named(truth):
    with pytest.raises(ScoringError) as caught:
        judge(SQUARE, truth)
    assert caught.value.kind == "truth"


def test_wrong_options_are_refused():
    for options in ({"second": 1}, {"seconds": 0}, {"most_tests": 0}):
        with pytest.raises(ConfigError):
            python_tests(**options)


def test_tests_beyond_the_most_are_left_out():
    assert judge(SQUARE, ["assert square(1) == 1", "assert False"], most_tests=1)["score"] == 1


def test_packages_only_if_asked_for():
    program = "```\nimport numpy\n```"
    assert judge(program, "assert numpy.ones(2).sum() == 2")["score"] == 0
    assert judge(program, "assert numpy.ones(2).sum() == 2", packages=True, seconds=60)["score"] == 1


# What the sandbox refuses. If it did not, these programs would still be harmless.


@pytest.mark.parametrize(
    "program",
    [
        "open('OUTSIDE/new', 'w')",
        "open('OUTSIDE/file', 'a')",
        "open('OUTSIDE/file').read()",
        "import os; os.open('OUTSIDE/file', os.O_RDONLY | os.O_TRUNC)",
        "import os; os.truncate('OUTSIDE/file', 0)",
        "import os; os.remove('OUTSIDE/file')",
        "import os; os.rename('OUTSIDE/file', 'here')",
        "import os; os.link('OUTSIDE/file', 'here')",
        "import os; os.mkdir('OUTSIDE/new')",
        "import os; os.symlink('OUTSIDE/file', 'here'); open('here', 'w')",
        "import os; os.listdir('OUTSIDE')",
        "import os; os.setxattr('OUTSIDE/file', 'user.x', b'y')",
        "open('/proc/self/environ').read()",
        "open('/etc/passwd').read()",
        "import socket; socket.socket()",
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import os; [os.fork() or os._exit(0) for _ in range(5)]",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.kill(os.getppid(), 0)",
        "import os; os.setuid(0)",
        "import os; os.setsid()",
        "import os; os.memfd_create('x')",
        "import os; os.setpriority(os.PRIO_PROCESS, os.getppid(), 1)",
        "import os; os.sched_setaffinity(os.getppid(), {0})",
        "import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_CORE, (0, 0))",
        "import fcntl, os; fcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())",
        "import mmap, ctypes; libc = ctypes.CDLL(None, use_errno=True)\n"
        "if libc.unshare(0) < 0: raise OSError(ctypes.get_errno(), '')",
    ],
)
def test_the_kernel_refuses(tmp_path, program):
    (tmp_path / "file").write_text("kept")
    program = program.replace("OUTSIDE", str(tmp_path))
    assert attack(program).error == "refused", program
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "kept"


def test_modes_and_times_of_files_do_not_change(tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    os.utime(file, (1, 1))
    before = file.stat()
    assert attack(f"import os; os.chmod({str(file)!r}, 0o777); os.utime({str(file)!r})").error is None
    assert file.stat() == before


@pytest.mark.parametrize(
    ("program", "limits", "kind"),
    [
        ("while True: pass", {"seconds": 0.5}, "timeout"),
        ("import time; time.sleep(1000)", {"seconds": 0.5}, "timeout"),
        ("import threading, time; threading.Thread(target=time.sleep, args=(1000,)).start()", {}, None),
        ("import os; os._exit(0)", {}, "crash"),
        ("import ctypes; ctypes.string_at(0)", {}, "crash"),
        ("x = 'a' * (10 << 30)", {}, "memory"),
        ("x = []\nwhile True: x.append('a' * (1 << 20) + str(len(x)))", {}, "memory"),
        (THREADS, {}, "memory"),
        ("while True: print('a' * 1000)", {}, "limit"),
        ("f = open('x', 'wb')\nwhile True: f.write(bytes(1 << 20))", {}, "limit"),
        ("i = 0\nwhile True:\n    i += 1; open(str(i), 'wb').write(bytes(1 << 20))", {}, "limit"),
        ("i = 0\nwhile True:\n    i += 1; open(str(i), 'w').close()", {"files": 50}, "limit"),
        ("x = [open('/dev/null') for _ in range(1000)]", {}, "limit"),
        (FORGERY.replace("TIMES", "9999"), {}, "limit"),
        (FORGERY.replace("TIMES", "1") + "os._exit(0)", {}, "crash"),
        ("def f(): f()\nf()", {}, "exception"),
        ("import os; open('x', 'w').write('a'); os.mkdir('d'); assert os.listdir('.') != []", {}, None),
        ("import socket; a, b = socket.socketpair(); a.send(b'x'); assert b.recv(1) == b'x'", {}, None),
        ("import asyncio; asyncio.run(asyncio.sleep(0))", {}, None),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", {}, "crash"),
    ],
)
def test_how_programs_end(program, limits, kind):
    begin = time.monotonic()
    assert attack(program, **limits).error == kind
    assert time.monotonic() - begin < 60


def test_directories_are_removed(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    attack("import os; os.makedirs('a/b'); open('a/b/c', 'w'); os.symlink('/', 'root')")
    attack("while True: pass", seconds=0.2)
    assert list(tmp_path.iterdir()) == []


def test_machines_without_a_sandbox_are_refused(monkeypatch):
    monkeypatch.setattr(confined, "_landlock_version", lambda: -1)
    with pytest.raises(ConfigError, match="sandbox: false"):
        python_tests()
    assert judge(SQUARE, "assert square(2) == 4", sandbox=False)["score"] == 1


def test_without_the_sandbox_only_limits_remain(tmp_path):
    program = f"open({str(tmp_path / 'written')!r}, 'w')"
    assert run(program, None, limits=Limits(), sandbox=False).error is None
    assert (tmp_path / "written").exists()
    assert run("while True: pass", None, limits=Limits(seconds=0.3), sandbox=False).error == "timeout"
