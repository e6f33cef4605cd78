"""Layouts that cannot run are refused at once, and once; a rank that dies takes the others with it, by name."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from models.config import MIXERS, MixerLayoutConfig, ModelConfig
from tests.helpers import WAIT
from tests.trainer.conftest import ROOT, finish, status
from trainer import peers
from trainer.config import ParallelConfig, PretrainConfig
from trainer.events import read_events
from trainer.stored.checkpoint import damage

WRONG = {
    "heads": (["--parallel.tensor=8"], 8, "does not divide by parallel.tensor=8"),
    "layers": (["--parallel.pipeline=16"], 16, "use at most 8 stages"),
    "world-size": (["--parallel.tensor=2"], 3, "world size 3 does not divide"),
    "length": (["--parallel.context=3"], 3, "train.seq_len=512 does not divide over 3 ranks"),
}


@pytest.mark.parametrize(("overrides", "ranks", "message"), list(WRONG.values()), ids=list(WRONG))
def test_check_refuses_a_wrong_layout_without_torch(tmp_path, overrides, ranks, message):
    program = "import runpy, sys\ntry: runpy.run_path(sys.argv.pop(1), run_name='__main__')\n"
    program += "finally: assert 'torch' not in sys.modules\n"
    command = [sys.executable, "-c", program, str(ROOT / "launch/pretrain.py"), "--check", f"--world-size={ranks}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *overrides], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        pytest.param("--parallel.tensor=8", "does not divide by parallel.tensor=8", id="heads"),
        pytest.param("--parallel.pipeline=8", "use at most 2 stages", id="layers", marks=pytest.mark.slow),
        pytest.param(
            "--parallel.tensor=3",
            "world size 8 does not divide by tensor*pipeline*context=3",
            id="world-size",
            marks=pytest.mark.slow,
        ),
        pytest.param("--parallel.context=8", "train.seq_len=36 does not divide over 8 ranks", id="length"),
    ],
)
def test_torchrun_says_a_wrong_layout_once_at_eight_ranks(tiny_run, tmp_path, layout, message):
    batch = ("--train.global_batch_size=2", "--train.seq_len=36")
    true_torchrun = "tensor=8" in layout
    code, output = finish(tiny_run(tmp_path / "run", layout, *batch, ranks=8, torchrun=true_torchrun))
    assert code == 1
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], output
    # torchrun's report, which cannot be had shorter, ends with the same line.
    assert not true_torchrun or re.search(rf"traceback : error: .*{re.escape(message)}", output), output
    told = status(tmp_path / "run")
    assert told["state"] == "config_error" and message in told["message"]


def test_every_mixer_takes_context_parallel_ranks():
    """There is no mixer that would have to be refused; tests/parity trains each over such ranks."""
    for mixer in MIXERS:
        PretrainConfig(
            model=ModelConfig(mixers=MixerLayoutConfig(pattern=mixer)), parallel=ParallelConfig(context=2)
        ).validate_layout(2)


def wait_until(condition):
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.05)


def listens(pid):
    """Whether a process has a handler for SIGTERM."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def owner_of(run_dir):
    """The process that the lock names, None while it is being written."""
    try:
        return json.loads((run_dir / "lock").read_text())["pid"]
    except (FileNotFoundError, ValueError):
        return None


def steps_taken(run_dir):
    path = run_dir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


ENDLESS = ("--train.steps=1000000", "--checkpoint.every=0", "--evaluation.every=0")
DEATHS = {
    "rank 1 of 2": (2, 1, (), 5, False),
    "rank 0 of 2, torchrun": (2, 0, (), 5, True),
    "rank 3 of PP2 x DP2": (4, 3, ("--parallel.pipeline=2",), 5, False),
    "rank 1 of 2, ZeRO 2": (2, 1, ("--engine.name=deepspeed", "--engine.zero_stage=2"), 5, False),
    "rank 1 of 2, in start-up": (2, 1, (), 0, False),
}


@pytest.mark.parametrize(("ranks", "victim", "overrides", "steps", "torchrun"), list(DEATHS.values()), ids=list(DEATHS))
def test_a_rank_that_dies_takes_the_others_down_and_is_named(
    tiny_run, tmp_path, ranks, victim, overrides, steps, torchrun
):
    run_dir = tmp_path / "run"
    process = tiny_run(run_dir, *ENDLESS, *overrides, ranks=ranks, torchrun=torchrun)
    wait_until(lambda: len(peers.ranks_of(process.pid)) == ranks)
    pids = peers.ranks_of(process.pid)
    wait_until(lambda: all(listens(pid) for pid in pids.values()) and steps_taken(run_dir) >= steps)
    os.kill(pids[victim], signal.SIGKILL)
    code, output = finish(process)
    assert code == 1
    named = f"rank {victim} (pid {pids[victim]}) on {socket.gethostname()} died"
    told = status(run_dir)
    assert (told["state"], told["exit_code"]) == ("failed", 1) and told["message"].startswith(named)
    assert output.count(f"error: {named}") == 1 and ("(SIGKILL)" in output) == torchrun
    assert named in (run_dir / "run.log").read_text()
    failure = read_events(run_dir)[-1]
    assert (failure["kind"], failure["ranks"], failure["message"]) == ("failure", [victim], told["message"])
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())


def test_a_rank_that_fails_says_so_itself(tiny_run, tmp_path):
    """Not rank 0's broken connection, which follows from it, but what happened on the rank that failed first."""
    run_dir = tmp_path / "run"
    code, output = finish(tiny_run(run_dir, *ENDLESS, ranks=2, script="tests/trainer/pretrain_failing.py"))
    assert code == 1
    told = status(run_dir)
    assert told["state"] == "failed"
    assert re.match(r"rank 1 \(pid \d+\) on .* failed: OSError: the disk is gone", told["message"])
    assert told["message"] in (run_dir / "run.log").read_text()
    assert "died" not in output
    failure = read_events(run_dir)[-1]
    assert (failure["kind"], failure["ranks"], failure["message"]) == ("failure", [1], told["message"])


def test_a_stop_on_request_during_start_up_is_no_death(tiny_run, tmp_path):
    torchrun = tiny_run(tmp_path / "run", *ENDLESS, ranks=2, torchrun=True)
    wait_until(lambda: len(peers.ranks_of(torchrun.pid)) == 2)
    wait_until(lambda: all(listens(pid) for pid in peers.ranks_of(torchrun.pid).values()))
    torchrun.terminate()
    _, output = finish(torchrun)
    assert "died" not in output
    assert status(tmp_path / "run")["state"] == "stopped"


def test_a_rank_that_hangs_is_named(tiny_run, tmp_path):
    """Not the one whose collective waits for it. Ranks that are stopped neither compute nor say so."""
    run_dir = tmp_path / "run"
    process = tiny_run(run_dir, *ENDLESS, "--run.timeout_seconds=6", ranks=2)
    wait_until(lambda: steps_taken(run_dir) >= 5)
    pids = peers.ranks_of(process.pid)
    os.kill(pids[1], signal.SIGSTOP)
    wait_until((run_dir / "status.json").exists)
    os.kill(pids[1], signal.SIGKILL)
    code, output = finish(process)
    assert code == 1, output
    named = rf"no progress for 6 s in train, step \d+: rank 1 \(pid {pids[1]}\) on \S+ does not respond since "
    assert re.match(named, status(run_dir)["message"])
    assert output.count("error: no progress") == 1
    assert "no progress" in (run_dir / "run.log").read_text()
    failure = read_events(run_dir)[-1]
    assert (failure["kind"], failure["ranks"]) == ("failure", [1]) and failure["step"] >= 4


def test_a_signal_to_the_whole_process_group_stops_and_saves(tiny_run, tmp_path):
    """As Ctrl-C, scancel and torchrun send it: to every rank at once, and to every process that a rank has started."""
    run_dir = tmp_path / "run"
    launcher = tiny_run(run_dir, *ENDLESS, "--checkpoint.asynchronous=true", ranks=2, own_launcher=True)
    wait_until(lambda: steps_taken(run_dir) >= 2)
    os.killpg(launcher.pid, signal.SIGTERM)
    code, output = finish(launcher)
    assert code == 75, output
    assert status(run_dir) == {"state": "stopped", "exit_code": 75, "message": ""}
    (saved,) = (run_dir / "checkpoints").iterdir()
    assert damage(saved) is None
    assert not (run_dir / "lock").exists() and not (run_dir / "ranks").exists()


def test_a_second_run_in_the_same_directory_is_refused(tiny_run, tmp_path):
    run_dir = tmp_path / "run"
    first = tiny_run(run_dir, *ENDLESS)
    wait_until(lambda: steps_taken(run_dir) >= 2)
    code, output = finish(tiny_run(run_dir, *ENDLESS, "--train.seed=7"))
    assert code == 2 and len(output.splitlines()) == 1
    assert re.match(rf"error: run\.dir: {run_dir} is in use by pid {first.pid} on ", output)
    assert not (run_dir / "status.json").exists()
    first.kill()
    first.wait()
    # A killed run can be started again at once.
    again = tiny_run(run_dir, *ENDLESS)
    wait_until(lambda: owner_of(run_dir) == again.pid and listens(again.pid))
    again.terminate()
    code, output = finish(again)
    assert code == 75 and f"{run_dir}/lock is taken over: pid {first.pid} on " in output
