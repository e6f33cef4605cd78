"""One owner for a run directory: who is refused, who takes over, and that a killed run can be started again at once."""

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest

from tests.helpers import WAIT
from tests.trainer.conftest import ROOT
from trainer import run_lock
from trainer.errors import ConfigError
from trainer.run_lock import Owner, _create, _Lock, _taking_over, belongs_to_this_launch, other_owner, owned

HOLDER = """
import sys, time
from trainer.run_lock import owned
with owned(sys.argv[1]):
    print(flush=True)
    time.sleep(99)
"""


@pytest.fixture(autouse=True)
def outside_of_a_job(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def holder(tmp_path):
    """Another process that owns the directory."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def write(folder, age=0.0, **changes):
    """A lock of another machine, renewed `age` seconds ago."""
    owner = replace(Owner.this_process(), machine="elsewhere", host="node7", pid=1, launch="another", **changes)
    (folder / "lock").write_text(json.dumps(asdict(owner)))
    os.utime(folder / "lock", times=(time.time() - age, time.time() - age))


def test_it_is_given_back(tmp_path):
    with owned(tmp_path / "new" / "run"), owned(tmp_path / "new" / "run"):
        assert (tmp_path / "new" / "run" / "lock").exists()
        assert belongs_to_this_launch(tmp_path / "new" / "run") and other_owner(tmp_path / "new" / "run") is None
    assert list((tmp_path / "new" / "run").iterdir()) == []


def test_a_second_process_is_refused_and_changes_nothing(holder, tmp_path):
    before = (tmp_path / "lock").read_text()
    said = rf"in use by pid {holder.pid} on .*, since 20.*, last heard of \d+ s ago; stop that run, or choose another"
    with pytest.raises(ConfigError, match=said), owned(tmp_path):
        pass
    assert (tmp_path / "lock").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    assert other_owner(tmp_path).pid == holder.pid and not belongs_to_this_launch(tmp_path)


def test_a_killed_run_is_taken_over_at_once(holder, tmp_path, capsys):
    holder.kill()
    holder.wait()
    with owned(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert f"pid {holder.pid} on " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_process_id_that_is_used_again_owns_nothing(tmp_path):
    ours = Owner.this_process()
    (tmp_path / "lock").write_text(json.dumps(asdict(replace(ours, pid=os.getppid(), began=1))))
    with owned(tmp_path):
        pass


@pytest.mark.parametrize(("age", "taken"), [(0.0, False), (100.0, False), (130.0, True)])
def test_on_another_machine_the_renewal_tells(tmp_path, age, taken):
    write(tmp_path, age)
    if taken:
        with owned(tmp_path):
            pass
    else:
        with pytest.raises(ConfigError, match=r"pid 1 on node7.* 120 s is taken over"), owned(tmp_path):
            pass


@pytest.mark.parametrize(("job", "restarts", "taken"), [("7", "1", True), ("7", "0", False), ("8", "1", False)])
def test_a_job_that_was_queued_again_takes_over_its_earlier_start(tmp_path, monkeypatch, job, restarts, taken):
    write(tmp_path, job="7", restarts=0)
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    if taken:
        with owned(tmp_path):
            pass
    else:
        with pytest.raises(ConfigError, match=r"\(SLURM job 7\)"), owned(tmp_path):
            pass


def test_a_lock_that_cannot_be_read_is_not_taken_while_it_is_new(tmp_path):
    (tmp_path / "lock").touch()
    with pytest.raises(ConfigError, match="in use by another process"), owned(tmp_path):
        pass
    os.utime(tmp_path / "lock", times=(0, 0))
    with owned(tmp_path):
        pass


def test_it_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.01)
    with owned(tmp_path):
        os.utime(tmp_path / "lock", times=(0, 0))
        end = time.monotonic() + 60
        while (tmp_path / "lock").stat().st_mtime == 0:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_it_is_not_made_again_once_it_was_given_back(tmp_path, monkeypatch):
    """The renewing thread has just seen that somebody removed the file."""
    lock, renews, go_on, given_back = _Lock(tmp_path), *(threading.Event() for _ in range(3))
    _create(lock.path, lock.owner)

    def see_it_removed(path):
        path.unlink()
        renews.set()
        assert go_on.wait(WAIT)
        raise FileNotFoundError

    def create_late(path, owner):
        assert given_back.wait(WAIT)
        _create(path, owner)

    ended = lock._ended
    lock._ended = SimpleNamespace(wait=ended.wait, is_set=ended.is_set, set=lambda: (ended.set(), go_on.set()))
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(run_lock.os, "utime", see_it_removed)
    monkeypatch.setattr(run_lock, "_create", create_late)
    lock.hold()
    assert renews.wait(WAIT)
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "run lock")
    lock.release()
    given_back.set()
    thread.join(WAIT)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_renewed_at_the_last_moment_is_not_taken(tmp_path, monkeypatch):
    @contextmanager
    def renewed(directory):
        os.utime(directory / "lock")
        yield

    write(tmp_path, age=130.0)
    before = (tmp_path / "lock").read_text()
    monkeypatch.setattr(run_lock, "_taking_over", renewed)
    with pytest.raises(ConfigError, match="pid 1 on node7"), owned(tmp_path):
        pass
    assert (tmp_path / "lock").read_text() == before


def test_who_takes_over_removes_no_other_ones_mark(tmp_path):
    with _taking_over(tmp_path):
        write(tmp_path)
        (tmp_path / "lock").rename(tmp_path / "lock.takeover")
    assert (tmp_path / "lock.takeover").exists()


def test_the_mark_of_a_killed_process_is_removed_once(tmp_path, monkeypatch):
    mark = tmp_path / "lock.takeover"
    mark.write_text("killed")
    seen = run_lock._mark(mark)
    monkeypatch.setattr(run_lock, "_TAKEOVER_SECONDS", 0.0)
    with _taking_over(tmp_path):
        ours = mark.read_text()
        # Another that has waited for the killed one comes too late.
        run_lock._clear(mark, seen)
        assert mark.read_text() == ours != "killed"
    assert list(tmp_path.iterdir()) == []
    run_lock._clear(mark, seen)


def test_launches_on_two_machines_are_told_apart(monkeypatch):
    """Each has a first port of its own, which may be the same, at an address that each has."""
    monkeypatch.setenv("MASTER_PORT", "29500")
    for address, differ in (("127.0.0.1", True), ("localhost", True), ("node1", False)):
        monkeypatch.setenv("MASTER_ADDR", address)
        here = run_lock.launch_id()
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(run_lock.socket, "gethostname", lambda: "elsewhere")
            assert (run_lock.launch_id() != here) == differ
    monkeypatch.setenv("SPIKETRAIN_LAUNCH", "another")
    assert run_lock.launch_id() != here


def test_other_ranks_take_no_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with owned(tmp_path):
        assert list(tmp_path.iterdir()) == []
