"""The command `spiketrain`: its commands, and ranks that end together."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import main
from tests.trainer.conftest import ROOT


def spiketrain(*arguments):
    command = [sys.executable, str(ROOT / "launch/main.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_its_commands_are_the_scripts():
    scripts = {path.stem for path in (ROOT / "launch").glob("*.py")} - {"main"}
    assert set(main.COMMANDS) == scripts
    done = spiketrain("--help")
    assert done.returncode == 0 and all(name in done.stdout for name in scripts)


def test_a_command_runs_as_its_script_does():
    done = spiketrain("pretrain", "--check", "--train.stepz", "3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown key 'train.stepz'; did you mean 'train.steps'?\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "no command 'train'; choose from prepare_data, pretrain"),
        (["pretrain", "--ranks", "0"], "--ranks 0: give the number of processes"),
        (["pretrain", "--ranks=two"], "--ranks two: give the number of processes"),
        (["generate", "--ranks", "2"], "only pretrain, posttrain and convert run use several ranks"),
    ],
)
def test_what_it_refuses(arguments, message):
    done = spiketrain(*arguments)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_its_own_option_is_taken_out():
    assert main.take_ranks(["--config", "a", "--ranks", "3", "--b=1"]) == (3, ["--config", "a", "--b=1"])
    assert main.take_ranks(["--ranks=2"]) == (2, []) and main.take_ranks(["--a"]) == (1, ["--a"])


RANK = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
rank = os.environ["RANK"]
if rank == "1" and sys.argv[2] == "fails":
    sys.exit(3)
if rank == "0" and sys.argv[2] == "saves":
    os.kill(os.getpid(), signal.SIGUSR2)
    sys.exit(0)
if rank == "1" and sys.argv[2] in ("leaves", "saves"):
    sys.exit(0)
if rank == "1" and sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "ends":
    (folder / rank).write_text(" ".join(os.environ[n] for n in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK")))
    sys.exit(0)
def stop(number, frame):
    with (folder / f"heard{rank}").open("a") as file:
        file.write(signal.Signals(number).name + " ")
    time.sleep(0.3)
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, stop)
(folder / f"ready{rank}").touch()
time.sleep(60)
sys.exit(9)
"""


def ranks(folder, how, seconds_to_leave=30.0):
    """Two ranks of the program above, supervised in a process of its own, in a process group of its own."""
    (folder / "rank.py").write_text(RANK)
    program = (
        "import signal, sys\nfrom launch import main\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        f"main._SECONDS_TO_LEAVE = {seconds_to_leave}\n"
        f"command = [sys.executable, {str(folder / 'rank.py')!r}, {str(folder)!r}, {how!r}]\n"
        "sys.exit(main.Ranks(command, main.environments_of(2)).wait())"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def when_ready(folder):
    end = time.monotonic() + 60
    while not ((folder / "ready0").exists() and (folder / "ready1").exists()):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_free_port_is_not_one_that_systems_give_away(monkeypatch):
    """Nor one that somebody listens at, at which it tries another."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", main.free_port()))
        port = taken.getsockname()[1]
        assert 16384 <= port < 32768
        tried = iter([port - 16384, (port - 16384 + 1) % 16384])
        monkeypatch.setattr(main.secrets, "randbelow", lambda most: next(tried))
        assert main.free_port() == 16384 + (port - 16384 + 1) % 16384


def test_ranks_are_told_who_they_are_and_end(tmp_path):
    process = ranks(tmp_path, "ends")
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 0
    assert [(tmp_path / name).read_text() for name in "01"] == ["2 2 0", "2 2 1"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_is_handed_on_once(tmp_path, number):
    process = ranks(tmp_path, "waits")
    when_ready(tmp_path)
    process.send_signal(number)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 75
    assert [(tmp_path / f"heard{rank}").read_text().split() for rank in "01"] == [[number.name]] * 2


def test_a_stop_and_a_continuation_end_nobody(tmp_path):
    process = ranks(tmp_path, "waits")
    when_ready(tmp_path)
    process.send_signal(signal.SIGSTOP)
    # Longer than it waits for a signal.
    time.sleep(0.8)
    process.send_signal(signal.SIGCONT)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 75


def test_a_rank_that_fails_ends_the_others_with_its_exit_code(tmp_path):
    process = ranks(tmp_path, "fails")
    errors = process.communicate(timeout=60)[1]
    assert errors.startswith("error: rank 1 (pid ") and errors.endswith(") exited with 3\n")
    assert process.returncode == 3
    # Rank 0 was asked to stop, whether it was ready for that or not.
    assert not Path(f"/proc/{process.pid}").exists()


def test_a_rank_that_is_killed_is_named(tmp_path):
    process = ranks(tmp_path, "killed")
    errors = process.communicate(timeout=60)[1]
    assert errors.startswith("error: rank 1 (pid ") and errors.endswith(") was ended by SIGKILL\n")
    assert process.returncode == 128 + signal.SIGKILL


def test_a_rank_that_leaves_in_peace_gives_the_others_a_time_too(tmp_path):
    """They would wait for it."""
    process = ranks(tmp_path, "leaves", seconds_to_leave=0.2)
    errors = process.communicate(timeout=120)[1]
    assert errors.startswith("error: rank 0 (pid ") and errors.endswith(") was ended by SIGKILL\n")
    assert process.returncode == 128 + signal.SIGKILL


def test_a_request_to_save_ends_no_rank_that_cannot_yet(tmp_path):
    process = ranks(tmp_path, "saves")
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 0


def test_under_nohup_a_closed_terminal_is_not_handed_on(monkeypatch):
    class Started:
        def __init__(self, *args, **kwargs):
            pass

    monkeypatch.setattr(main.subprocess, "Popen", Started)
    for handler, hears in ((signal.SIG_IGN, False), (signal.SIG_DFL, True)):
        previous, mask = signal.signal(signal.SIGHUP, handler), signal.pthread_sigmask(signal.SIG_BLOCK, [])
        try:
            assert (signal.SIGHUP in main.Ranks([], [])._signals) is hears
        finally:
            signal.signal(signal.SIGHUP, previous)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_ranks_are_asked_to_stop_when_it_is_killed(tmp_path):
    process = ranks(tmp_path, "waits")
    when_ready(tmp_path)
    process.kill()
    process.communicate(timeout=60)
    end = time.monotonic() + 60
    while not all((tmp_path / f"heard{rank}").exists() for rank in "01"):
        assert time.monotonic() < end
        time.sleep(0.01)
