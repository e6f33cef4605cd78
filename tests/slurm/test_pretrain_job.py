"""launch/slurm/pretrain.sbatch on two nodes: it trains, stops in time and goes on, and queues again only then."""

import json
import os
import signal
import subprocess

import pytest

from tests.slurm import stand_in
from tests.slurm.conftest import SCRIPT
from tests.trainer.conftest import ROOT, status, trajectory

STEPS = 150
NODES = "--nodes=2"
CONFIG = "configs/pretrain/laptop.yaml"


def last_step(run_dir):
    """The last step that metrics.jsonl has a whole line of."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def checkpoints(run_dir):
    return sorted(int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").glob("step_*"))


@pytest.fixture(scope="module")
def whole(submit, configuration):
    """A job that nobody disturbs, at its end, and its run directory."""
    config, run_dir = configuration(STEPS)
    job = submit([NODES], [config, "--optim.lr", "0.005"])
    job.wait()
    return job, run_dir


def test_two_nodes_train_to_the_end(whole):
    job, run_dir = whole
    assert (job.field("JobState"), job.field("ExitCode")) == ("COMPLETED", "0:0"), job.output()
    assert status(run_dir) == {"state": "done", "exit_code": 0, "message": ""}
    assert "2 data-parallel" in job.output()
    assert last_step(run_dir) == STEPS and checkpoints(run_dir) == [STEPS]


def test_a_stopped_run_queues_again_and_is_the_same(whole, cluster, submit, configuration):
    # It has saved before it is stopped.
    config, run_dir = configuration(STEPS, every=20)
    job = submit([NODES], [config, "--optim.lr", "0.005"])
    job.wait_until(lambda: last_step(run_dir) >= 25, "at step 25")
    cluster.run("scancel", "--batch", "--signal=USR1", str(job.number))
    assert job.wait() == "COMPLETED", job.output()
    assert job.field("Restarts") == "1"
    assert "the run is stopped" in job.output() and "resumed from" in job.output(), job.output()
    assert status(run_dir)["state"] == "done"
    assert trajectory(run_dir) == trajectory(whole[1])


def test_the_time_limit_queues_it_again_and_scancel_does_not(cluster, submit, configuration):
    config, run_dir = configuration(1_000_000, every=50)
    # SLURM looks at the limits every 30 seconds: the signal comes 30 to 60 seconds after the start.
    job = submit([NODES, "--time=3", "--signal=B:USR1@120"], [config])
    job.wait_until(lambda: job.field("Restarts") == "1", "queued again")
    assert status(run_dir)["state"] == "stopped"
    cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
    (*_, saved) = checkpoints(run_dir)
    job.wait_until(lambda: last_step(run_dir) > saved + 50, "going on")
    assert f"resumed from {run_dir}/checkpoints/step_{saved:08d}" in job.output()
    cluster.run("scancel", str(job.number))
    assert job.wait() == "CANCELLED"
    # The state changes at once, the processes have half a minute.
    job.wait_until(lambda: "not queued again" in job.output(), "at its end", ended=True)
    assert status(run_dir)["state"] == "stopped" and job.field("Restarts") == "1"
    assert checkpoints(run_dir)[-1] == last_step(run_dir)


def test_a_configuration_error_does_not_queue_again(submit, configuration):
    config, run_dir = configuration(STEPS)
    job = submit([NODES], [config, "--train.stepz", "3"])
    assert job.wait() == "FAILED" and (job.field("ExitCode"), job.field("Restarts")) == ("2:0", "0")
    assert "error: unknown key 'train.stepz'; did you mean 'train.steps'?" in job.output()
    assert status(run_dir)["state"] == "config_error"


# What the script does with the end of a run: torchrun's place is taken.


@pytest.mark.parametrize(
    ("state", "exit_code", "job_exit_code"),
    [("done", 0, 0), ("config_error", 2, 2), ("failed", 1, 1), ("stopped", 75, 75), (None, 1, 1), (None, 0, 0)],
)
def test_only_what_was_told_to_stop_queues_again(submit, tmp_path, state, exit_code, job_exit_code):
    """`None` is a run that dies without a word, or one that had nothing left to do."""
    python = stand_in.write(tmp_path / "python", tmp_path, state, exit_code)
    # An earlier start was stopped: that must not be taken for the end of this one.
    (tmp_path / "status.json").write_text('{"state": "stopped", "exit_code": 75, "message": ""}\n')
    job = submit([NODES], [CONFIG, "--run.dir", tmp_path], python=python)
    job.wait()
    assert (job.field("ExitCode"), job.field("Restarts")) == (f"{job_exit_code}:0", "0"), job.output()


def test_a_job_too_short_for_a_step_does_not_queue_again(cluster, submit, tmp_path):
    python = stand_in.write(tmp_path / "python", tmp_path, "stopped", 75, waits_for=signal.SIGUSR1)
    job = submit([NODES], [CONFIG, "--run.dir", tmp_path], python=python)
    job.wait_until((tmp_path / "waiting").exists, "waiting for the signal")
    cluster.run("scancel", "--batch", "--signal=USR1", str(job.number))
    job.wait()
    assert (job.field("ExitCode"), job.field("Restarts")) == ("75:0", "0"), job.output()
    assert "no step was taken in the time there was" in job.output()


def test_ranks_of_a_node(submit, tmp_path):
    """As many as it has GPUs, else as --ntasks-per-node says; always one torchrun on each node."""
    python = stand_in.write(tmp_path / "python", tmp_path, "done", 0)
    for options, ranks in (
        ([], "1"),
        (["--ntasks-per-node=2"], "2"),
        (["--ntasks-per-node=2", "--export=ALL,SLURM_GPUS_ON_NODE=4"], "4"),
    ):
        job = submit([NODES, *options], [CONFIG, "--run.dir", tmp_path], python=python)
        assert job.wait() == "COMPLETED", job.output()
        starts = [line for line in job.output().splitlines() if line.startswith("torchrun ")]
        assert len(starts) == 2 and all(f"--nnodes 2 --nproc-per-node {ranks} " in start for start in starts)
        assert sorted("is_host=true" in start for start in starts) == [False, True]
        assert all(f"--rdzv-endpoint 127.0.0.1:{10000 + job.number} " in start for start in starts)


# What it refuses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no configuration file; submit with one"),
        (["--run.dir", "runs/x"], "no configuration file; submit with one"),
        (["configs/pretrain/laptob.yaml"], "configs/pretrain/laptob.yaml does not exist; check the path"),
    ],
)
def test_a_job_without_a_configuration_is_refused(submit, arguments, message):
    job = submit([], arguments)
    assert job.wait() == "FAILED" and job.field("ExitCode") == "2:0"
    assert job.output().startswith("error: ") and message in job.output()


def test_other_wrong_submissions_are_refused(submit, tmp_path):
    elsewhere = submit([], [CONFIG], chdir=tmp_path)
    no_python = submit([], [CONFIG], python=tmp_path / "python3")
    for job, message in ((elsewhere, "not the repository's root"), (no_python, "run make install, or set PYTHON")):
        assert job.wait() == "FAILED" and job.field("ExitCode") == "2:0"
        assert job.output().startswith("error: ") and message in job.output()


@pytest.mark.parametrize("script", [SCRIPT, "launch/slurm/posttrain.sbatch"])
def test_outside_of_a_job_it_says_how_to_submit(script):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    result = subprocess.run(["bash", script, CONFIG], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith(f"error: this is not a SLURM job; submit it: sbatch {script} CONFIG.yaml")
