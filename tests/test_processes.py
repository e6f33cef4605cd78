"""Forked processes are true ones: exit codes, signals, environments, output; ranks end together as torchrun's do."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers import WAIT
from tests.processes import finish, run_ranks, start
from trainer import peers

TELLS = """
import os, sys, pathlib
import torch.distributed as dist
names = ("RANK", "WORLD_SIZE", "COLOUR", "FORK_SERVER_ROOM", "PYTEST_CURRENT_TEST")
print(__name__, sys.argv[1:], pathlib.Path.cwd().name, [os.environ.get(name) for name in names])
print("as main:", sys.modules["__main__"].__dict__ is globals(), "imported:", "megatron.core" in sys.modules)
dist.init_process_group("gloo") if "RANK" in os.environ else None
assert not dist.is_initialized() or dist.get_world_size() == int(os.environ["WORLD_SIZE"])
print("in /proc:", b"COLOUR=red\\0" in pathlib.Path("/proc/self/environ").read_bytes())
print("to stderr", file=sys.stderr)
"""
ENDS = """
import atexit, os, signal, sys, time
atexit.register(lambda: print("atexit", flush=True))
how, victim = sys.argv[1:] if len(sys.argv) > 2 else (sys.argv[1], None)
if victim is not None and os.environ["RANK"] != victim:
    time.sleep(3600)
if how == "raise":
    raise ValueError("broken")
if how == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(how if how == "in words" else int(how))
"""


@pytest.fixture
def script(tmp_path):
    def write(text):
        (tmp_path / "script.py").write_text(text)
        return tmp_path / "script.py"

    return write


def test_a_script_runs_as_from_a_command_line(script, tmp_path):
    code, output = finish(start(script(TELLS), "a", 1, folder=tmp_path, COLOUR="red"))
    assert code == 0, output
    first, second, third, _ = output.splitlines()
    assert first == f"__main__ ['a', '1'] {tmp_path.name} [None, None, 'red', None, None]"
    assert (second, third) == ("as main: True imported: True", "in /proc: True")
    assert "to stderr" in output


def test_ranks_find_each_other(script, tmp_path):
    code, output = finish(start(script(TELLS), ranks=3, folder=tmp_path, COLOUR="red"))
    assert code == 0, output
    for rank in range(3):
        assert f"['{rank}', '3', 'red', None, None]" in output
    assert output.count("in /proc: True") == 3


@pytest.mark.parametrize(
    ("how", "expected", "told"),
    [("0", 0, "atexit"), ("75", 75, "atexit"), ("raise", 1, "ValueError: broken"), ("in words", 1, "in words")],
)
def test_exit_codes(script, how, expected, told):
    code, output = finish(start(script(ENDS), how))
    assert code == expected and told in output and "atexit" in output


def test_a_signals_exit_code(script):
    assert finish(start(script(ENDS), "kill"))[0] == -signal.SIGKILL
    process = start(script("import time; time.sleep(3600)"))
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.terminate()
    assert process.wait(WAIT) == process.poll() == -signal.SIGTERM


@pytest.mark.parametrize("how", ["3", "kill"])
def test_a_rank_that_fails_ends_the_others(script, how):
    code, _ = finish(start(script(ENDS), how, "1", ranks=3))
    assert code == 1
    with pytest.raises(AssertionError):
        run_ranks(2, script(ENDS), how, "1")


def running(process, ranks):
    end = time.monotonic() + WAIT
    while len(pids := peers.ranks_of(process.pid)) < ranks:
        assert time.monotonic() < end
        time.sleep(0.01)
    return pids.values()


def gone(pids):
    end = time.monotonic() + WAIT
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.01)
    return True


def test_ranks_are_seen_by_their_peers_and_signalled_through_their_parent(script):
    process = start(script("import time; time.sleep(3600)"), ranks=2)
    pids = running(process, 2)
    process.terminate()
    assert process.wait(WAIT) == 1 and gone(pids)


def test_ranks_end_with_the_test_that_wants_them(script):
    process = start(script("import time; time.sleep(3600)"), ranks=2)
    pids = running(process, 2)
    process.kill()
    assert gone(pids)
    process = start(script("import time; time.sleep(3600)"))
    pid = process.pid
    del process
    assert gone([pid])


def test_servers_of_a_session_are_one_for_each_set_of_imports(script):
    """Also where another process of pytest asks: what a process forks is the server's, not its own."""
    text = script("import os; print(open(f'/proc/{os.getppid()}/stat').read().rsplit(')', 1)[1].split()[1])")
    servers = {finish(start(text))[1] for _ in range(2)}
    assert len(servers) == 1 and int(servers.pop()) != os.getpid()


def test_an_environment_may_be_large_but_not_endless(script):
    process = start(script("import os; print(len(os.environ['LARGE']))"), LARGE="x" * 30_000)
    assert finish(process) == (0, "30000\n")
    code, output = finish(start(script("print('ran')"), LARGE="x" * 70_000))
    assert code == 1 and "does not fit" in output and "ran" not in output


def test_the_port_is_free(script):
    output = run_ranks(2, script("import os; print(os.environ['MASTER_ADDR'], os.environ['MASTER_PORT'])"))
    (address, port), other = (line.split() for line in output.splitlines())
    assert [address, port] == other
    with socket.socket() as taken:
        taken.bind((address, int(port)))
