"""Checkpoints are whole or not there."""

import json
import pickle
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers import FakeCollectives
from trainer.callbacks.base import Callback
from trainer.engines.pieces import Piece, Writer
from trainer.errors import ConfigError
from trainer.stored import checkpoint, checksums
from trainer.stored.checkpoint import Progress, Retention, RunState


class FakeEngine(SimpleNamespace):
    """One rank with a small parameter; may break on the way."""

    rank, world_size = 0, 1
    collectives = FakeCollectives()
    fail = False

    def save(self, directory):
        digests = Writer().write({"model.weight": Piece.of(torch.arange(50.0).view(5, 10))}, 1, directory)
        if self.fail:
            raise OSError("no space left on device")
        return digests


def save(run_dir, step, keep=0, keep_steps=0, engine=None):
    retention = Retention(keep, keep_steps)
    state = RunState(Progress(step, step * 10), "model: {}\n", None, {})
    return checkpoint.save(engine or FakeEngine(), run_dir, state, retention)


@pytest.fixture(params=["one process", "over ranks"])
def damage(request):
    """What is wrong with a checkpoint, as a command and as a run looks at it."""
    if request.param == "one process":
        return checkpoint.damage
    return lambda path: checkpoint._damage_over_ranks(FakeEngine(), path)


def test_a_saved_checkpoint_is_whole_and_found(tmp_path):
    path = save(tmp_path, 100)
    assert path == tmp_path / "checkpoints" / "step_00000100"
    assert checkpoint.damage(path) is None
    assert checkpoint.find_latest(tmp_path) == (path, [])
    assert checkpoint.read_progress(path) == Progress(100, 1000)
    assert checkpoint.step_of(path) == 100
    assert set(json.loads((path / "checksums.json").read_text())) == {
        "state/__0_0.distcp",
        "state/.metadata",
        "state/facts.json",
        "state/random_00000.json",
        "config.yaml",
        "progress.json",
        "callbacks.json",
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
    # How long a file is differs a little from save to save.
    position = data.draw(st.integers(0, 1 << 30)) % len(content)
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


@pytest.mark.parametrize("name", ["checksums.json", "state/__0_0.distcp", "config.yaml", "state/.metadata"])
def test_a_missing_file_is_named(tmp_path, damage, name):
    path = save(tmp_path, 1)
    (path / name).unlink()
    assert f"{name} is missing" in damage(path)


def test_a_truncated_file_is_noticed(tmp_path, damage):
    path = save(tmp_path, 1)
    file = path / "state/__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    assert damage(path) == "state/__0_0.distcp does not match its checksum"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{}", "checksums.json does not list state/.metadata"),
        ("[]", "checksums.json does not hold checksums"),
        ("7", "checksums.json does not hold checksums"),
        ('{"config.yaml": 7}', "checksums.json does not hold checksums"),
        ('{"config.yaml": "7"}', "checksums.json does not hold checksums"),
        ("", "checksums.json is not readable"),
        ('{"a"', "checksums.json is not readable"),
    ],
)
def test_a_list_of_checksums_that_is_none(tmp_path, damage, content, reason):
    path = save(tmp_path, 1)
    (path / "checksums.json").write_text(content)
    assert damage(path) == reason


@pytest.mark.parametrize("name", ["state/__0_0.distcp", "config.yaml", "progress.json", "state/.metadata"])
def test_a_file_that_is_not_listed(tmp_path, damage, name):
    """A listing of a shared directory may miss what another host has written."""
    path = save(tmp_path, 1)
    listed = json.loads((path / "checksums.json").read_text())
    del listed[name]
    (path / "checksums.json").write_text(json.dumps(listed))
    assert damage(path) == f"checksums.json does not list {name}"


def test_a_checkpoint_of_an_earlier_format_is_passed_over_in_one_line(tmp_path, damage):
    path = save(tmp_path, 1)
    listed = json.loads((path / "checksums.json").read_text())
    del listed["state/facts.json"]
    (path / "checksums.json").write_text(json.dumps(listed))
    assert damage(path) == "its format is that of an earlier version, which is not read: it has no state/facts.json"


def test_metadata_run_no_code(tmp_path):
    """Though they are a pickle: names of other things than metadata are refused."""

    class Malicious:
        def __reduce__(self):
            return print, ("ran",)

    path = save(tmp_path, 1)
    (path / "state/.metadata").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(ValueError, match=r"builtins\.print has no place"):
        checkpoint.pieces.read_metadata(path / "state")


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x05", b"no pickle", pickle.dumps((1, 2)), b"cno.such.module\nName\n.", b"ctorch\nno_such_name\n."],
    ids=["empty", "cut", "text", "other", "module", "name"],
)
def test_metadata_that_cannot_be_read_are_damage(tmp_path, damage, content):
    """Though they are as they were written: by another version of torch, or by a host whose disk was failing."""
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    (new / "state/.metadata").write_bytes(content)
    listed = json.loads((new / "checksums.json").read_text())
    listed["state/.metadata"] = checksums.digest(new / "state/.metadata")
    (new / "checksums.json").write_text(json.dumps(listed))
    assert damage(new).startswith("state/.metadata ")
    latest, (complaint,) = checkpoint.find_latest(tmp_path)
    assert latest == old and f"{new} is damaged and passed over: state/.metadata" in complaint


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


def test_keeps_every_so_many_th(tmp_path):
    for step in (5, 10, 13, 15, 20, 25, 30):
        save(tmp_path, step, keep=2, keep_steps=10)
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)] == [10, 20, 25, 30]


def damaged(path):
    (path / "state/__0_0.distcp").write_bytes(b"")
    return path


def test_a_run_that_goes_back_past_a_damaged_checkpoint_keeps_what_it_saves(tmp_path):
    save(tmp_path, 100)
    damaged(save(tmp_path, 200))
    saved = save(tmp_path, 150, keep=1)
    assert checkpoint.find_latest(tmp_path)[0] == saved


def test_a_run_that_goes_back_sets_the_damaged_checkpoints_aside(tmp_path):
    folder, whole = tmp_path / "checkpoints", save(tmp_path, 100)
    for step in (200, 300):
        damaged(save(tmp_path, step))
    names = ["damaged_step_00000200", "damaged_step_00000300"]
    assert checkpoint.set_damaged_aside(tmp_path, whole) == [folder / name for name in names]
    damaged(save(tmp_path, 200))
    assert checkpoint.set_damaged_aside(tmp_path, whole) == [folder / "damaged_step_00000200.1"]
    assert checkpoint.list_checkpoints(tmp_path) == [whole]
    assert checkpoint.find_latest(tmp_path) == (whole, [])


def test_an_old_checkpoint_that_cannot_be_removed_ends_no_run(tmp_path, monkeypatch, log):
    def refuse(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError("device or resource busy")

    save(tmp_path, 1)
    with monkeypatch.context() as busy:
        busy.setattr(checkpoint.shutil, "rmtree", refuse)
        save(tmp_path, 2, keep=1)
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)] == [2]
    left = tmp_path / "checkpoints/.removing_step_00000001"
    assert left.is_dir() and log == [f"{left} could not be removed, and is left for now: device or resource busy"]
    assert checkpoint.find_latest(tmp_path)[1] == []
    save(tmp_path, 3, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000003"]


def test_names_reach_the_disk_before_the_checkpoint_has_its_own(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(checkpoint, "flush_to_disk", flushed.append)
    tokenizer = SimpleNamespace(save=lambda directory: (directory / "tokenizer.json").write_text("{}"))
    path = checkpoint.save(FakeEngine(), tmp_path, RunState(Progress(1), "model: {}\n", tokenizer, {}), Retention())
    unfinished = path.with_name(".saving_step_00000001")
    for name in ("tokenizer/tokenizer.json", "tokenizer", "state", "."):
        assert unfinished / name in flushed
    assert flushed[-2:] == [tmp_path / "checkpoints", tmp_path]


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path):
    path = damaged(save(tmp_path, 2))
    assert save(tmp_path, 2) == path
    assert checkpoint.damage(path) is None


# The states of callbacks


class Counter(Callback):
    """Has a state; `version` is what this version of the program writes and reads."""

    state_name = "counter"

    def __init__(self, count=0, version=1):
        self.count, self.state_version = count, version

    def state_dict(self):
        return {"count": self.count}


def save_with(run_dir, *callbacks):
    state = RunState(Progress(1), "model: {}\n", None, RunState.of_callbacks(callbacks))
    return checkpoint.save(FakeEngine(), run_dir, state, Retention())


def test_the_states_of_callbacks_are_saved_by_name_and_sealed(tmp_path):
    path = save_with(tmp_path, Callback(), Counter(7, version=2))
    assert json.loads((path / "callbacks.json").read_text()) == {"counter": {"version": 2, "state": {"count": 7}}}
    reader = Counter(version=3)
    assert checkpoint.read_callbacks(path, [Callback(), reader]) == [(reader, {"count": 7}, 2)]
    (path / "callbacks.json").write_text("{}")
    assert checkpoint.damage(path) == "callbacks.json does not match its checksum"


def test_a_state_of_a_later_version_is_refused(tmp_path):
    path = save_with(tmp_path, Counter(7, version=2))
    with pytest.raises(ConfigError, match=r"state of counter in version 2, and this version reads up to 1") as error:
        checkpoint.read_callbacks(path, [Counter()])
    assert "\n" not in str(error.value)


def test_a_checkpoint_without_a_state_leaves_the_callback_as_it_is(tmp_path):
    assert checkpoint.read_callbacks(save_with(tmp_path), [Counter()]) == []
    assert checkpoint.read_callbacks(tmp_path / "written before there were states", [Counter()]) == []
