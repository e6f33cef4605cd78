"""Checkpoints are whole or not there."""

import json
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer import checkpoint
from trainer.checkpoint import Progress
from trainer.cli import ConfigError


class FakeEngine(SimpleNamespace):
    """Writes two small files; may break on the way."""

    rank = 0
    fail = False

    def barrier(self):
        """One rank never waits."""

    def save(self, directory):
        (directory / "a.distcp").write_bytes(bytes(range(200)))
        if self.fail:
            raise OSError("no space left on device")
        (directory / "b.distcp").write_bytes(b"parameters" * 50)


def save(run_dir, step, keep=0, engine=None):
    return checkpoint.save(engine or FakeEngine(), run_dir, Progress(step, step * 10), "model: {}\n", None, keep)


def test_a_saved_checkpoint_is_whole_and_found(tmp_path):
    path = save(tmp_path, 100)
    assert path == tmp_path / "checkpoints" / "step_00000100"
    assert checkpoint.damage(path) is None
    assert checkpoint.find_latest(tmp_path) == (path, [])
    assert checkpoint.read_progress(path) == Progress(100, 1000)
    assert checkpoint.step_of(path) == 100
    assert set(json.loads((path / "checksums.json").read_text())) == {
        "state/a.distcp",
        "state/b.distcp",
        "config.yaml",
        "progress.json",
    }


def test_no_checkpoint(tmp_path):
    assert checkpoint.find_latest(tmp_path) == (None, [])
    with pytest.raises(ConfigError, match="step_00000100"):
        checkpoint.step_of(tmp_path / "something")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_of_any_file_is_noticed(tmp_path_factory, data):
    run_dir = tmp_path_factory.mktemp("run")
    old, new = save(run_dir, 1), save(run_dir, 2)
    files = sorted(path for path in new.rglob("*") if path.is_file())
    file = data.draw(st.sampled_from(files))
    content = bytearray(file.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    if file.name == "checksums.json":
        # Its own damage shows as an unreadable file, an unknown name or a digest that does not fit.
        assert checkpoint.damage(new) is not None or json.loads(content) == json.loads(file.read_bytes())
    else:
        latest, complaints = checkpoint.find_latest(run_dir)
        assert latest == old
        assert len(complaints) == 1
        assert str(new) in complaints[0] and file.name in complaints[0]


@pytest.mark.parametrize("name", ["checksums.json", "state/a.distcp", "config.yaml"])
def test_a_missing_file_is_named(tmp_path, name):
    path = save(tmp_path, 1)
    (path / name).unlink()
    assert f"{name} is missing" in checkpoint.damage(path)


def test_a_truncated_file_is_noticed(tmp_path):
    path = save(tmp_path, 1)
    file = path / "state/b.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    assert checkpoint.damage(path) == "state/b.distcp does not match its checksum"


def test_a_failed_save_leaves_the_others_and_is_named(tmp_path):
    old = save(tmp_path, 1)
    with pytest.raises(OSError, match="no space left"):
        save(tmp_path, 2, engine=FakeEngine(fail=True))
    latest, complaints = checkpoint.find_latest(tmp_path)
    assert latest == old
    assert complaints == [f"{tmp_path}/checkpoints/.saving_step_00000002 was not finished and is passed over"]
    save(tmp_path, 3)
    assert checkpoint.find_latest(tmp_path)[1] == [], "the next save clears what a failed one left"


def test_keeps_the_newest(tmp_path):
    for step in (5, 10, 15, 20):
        save(tmp_path, step, keep=2)
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)] == [15, 20]
    for step in (25, 30):
        save(tmp_path, step, keep=0)
    assert len(checkpoint.list_checkpoints(tmp_path)) == 4


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path):
    path = save(tmp_path, 2)
    (path / "state/a.distcp").write_bytes(b"")
    assert save(tmp_path, 2) == path
    assert checkpoint.damage(path) is None
