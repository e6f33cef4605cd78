"""Whether a configuration may go on in a run directory, decided from names and lists of checksums."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from models.config import AttentionConfig, MixerLayoutConfig, ModelConfig, MoEConfig
from trainer.config import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    OptimConfig,
    PretrainConfig,
    RunConfig,
    TrainConfig,
)
from trainer.errors import ConfigError
from trainer.run_directory import (
    change_of_schedule,
    check,
    checkpoint_steps,
    differing_keys,
    list_checkpoints,
    precision_of_the_run,
    set_aside,
    settle_restart,
)
from trainer.stored import checksums


def configuration(run_dir, resume="auto", init=None, **parts):
    train = parts.pop("train", TrainConfig(steps=300))
    return PretrainConfig(
        run=RunConfig(dir=str(run_dir)), train=train, checkpoint=CheckpointConfig(resume=resume, init=init), **parts
    )


def make_checkpoint(path):
    """The files that every checkpoint has, and their checksums."""
    names = ["config.yaml", "progress.json", checksums.FACTS, checksums.METADATA]
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("{}")
    (path / checksums.NAME).write_text(json.dumps({name: checksums.digest(path / name) for name in names}))


@pytest.fixture
def run_dir(tmp_path):
    """A run of 300 steps that has reached step 200."""
    folder = tmp_path / "run"
    for step in (100, 200):
        make_checkpoint(folder / "checkpoints" / f"step_{step:08d}")
    (folder / "config.yaml").write_text(yaml.safe_dump(asdict(configuration(folder))))
    return folder


def test_steps_are_read_from_names(run_dir, tmp_path):
    folder = run_dir / "checkpoints"
    for name in (".saving_step_00000300", "step_", "step_last", "notes"):
        (folder / name).mkdir()
    for name in ("step_100000000", "step_99999999"):
        (folder / name).mkdir()
    assert checkpoint_steps(run_dir) == [100, 200, 99999999, 100000000]
    assert list_checkpoints(run_dir)[-1] == folder / "step_100000000"
    assert checkpoint_steps(tmp_path / "nothing") == []


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_fresh_directory(tmp_path, resume):
    assert check(configuration(tmp_path / "new" / "deeper", resume)) is False
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "metrics.jsonl").touch()
    assert check(configuration(tmp_path, resume)) is False


@pytest.mark.parametrize(
    ("steps", "state", "finished"),
    [(200, "done", True), (200, "stopped", False), (200, None, False), (201, "done", False), (300, "done", False)],
)
def test_a_finished_run(run_dir, steps, state, finished):
    """The last step's checkpoint is not all: its validation may have been interrupted."""
    if state is not None:
        (run_dir / "status.json").write_text(json.dumps({"state": state, "exit_code": 0, "message": ""}))
    assert check(configuration(run_dir, train=TrainConfig(steps=steps))) is finished


def test_fewer_steps_than_were_taken(run_dir):
    with pytest.raises(ConfigError, match=r"has reached step 200, past train\.steps=100; set train\.steps to 200 or"):
        check(configuration(run_dir, train=TrainConfig(steps=100)))


def test_a_schedule_that_jumps_is_said_with_its_figures(run_dir):
    flat = OptimConfig(warmup_steps=0)
    saved = configuration(run_dir, train=TrainConfig(steps=100), optim=flat)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(asdict(saved)))
    longer = configuration(run_dir, train=TrainConfig(steps=200), optim=flat)
    said = change_of_schedule(run_dir, longer, 100)
    assert said == (
        "the learning rate goes from 3.00e-05 (0.10 of the peak) at step 100 to 1.64e-04 (0.55 of the peak) at step "
        "101, for the settings have changed: train.steps: 100 -> 200"
    )
    other = configuration(run_dir, train=TrainConfig(steps=100), optim=OptimConfig(warmup_steps=0, lr=6e-4))
    assert "optim.lr: 0.0003 -> 0.0006" in change_of_schedule(run_dir, other, 50)
    assert change_of_schedule(run_dir, saved, 50) is None
    assert change_of_schedule(run_dir, longer, 0) is None


def test_a_stable_schedule_may_be_lengthened_without_a_word(run_dir):
    stable = OptimConfig(warmup_steps=0, schedule="wsd")
    saved = configuration(run_dir, train=TrainConfig(steps=100), optim=stable)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(asdict(saved)))
    assert change_of_schedule(run_dir, configuration(run_dir, train=TrainConfig(steps=200), optim=stable), 50) is None


def test_a_run_whose_last_checkpoint_is_not_whole_has_not_finished(run_dir):
    (run_dir / "checkpoints/step_00000200/progress.json").unlink()
    (run_dir / "status.json").write_text(json.dumps({"state": "done"}))
    assert check(configuration(run_dir, train=TrainConfig(steps=200))) is False
    assert check(configuration(run_dir, train=TrainConfig(steps=100))) is True


def test_checkpoints_of_which_none_is_whole_are_no_new_start(run_dir):
    for path in (run_dir / "checkpoints").iterdir():
        (path / "progress.json").unlink()
    with pytest.raises(ConfigError) as error:
        check(configuration(run_dir))
    assert str(error.value) == (
        f"{run_dir} holds checkpoints, of which none can be read (step_00000200: progress.json is missing); restore "
        "one of them, choose another run.dir, or start again with checkpoint.resume=never, which sets them aside"
    )


def test_never_starts_again_and_sets_aside_what_is_there(run_dir):
    assert check(configuration(run_dir, "never", model=ModelConfig(hidden_size=128))) is False
    (run_dir / "metrics.jsonl").write_text("first")
    first = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert set_aside(run_dir) == [run_dir / "metrics.1.jsonl", run_dir / "checkpoints.1"]
    assert set_aside(run_dir) == []
    assert sorted(path.name for path in (run_dir / "checkpoints.1").iterdir()) == first
    (run_dir / "checkpoints").mkdir()
    (run_dir / "metrics.jsonl").write_text("second")
    assert set_aside(run_dir) == [run_dir / "metrics.2.jsonl", run_dir / "checkpoints.2"]
    assert (run_dir / "metrics.1.jsonl").read_text() == "first"


def test_what_was_set_aside_in_part_is_set_aside_in_full_by_the_next_start(run_dir, monkeypatch):
    """The checkpoints come last: while they are there, the start after a kill finds something to set aside."""
    (run_dir / "metrics.jsonl").write_text("first")
    rename = Path.rename

    def killed_after_the_first(path, target):
        rename(path, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(Path, "rename", killed_after_the_first)
        with pytest.raises(KeyboardInterrupt):
            set_aside(run_dir)
    assert set_aside(run_dir) == [run_dir / "checkpoints.1"]
    assert (run_dir / "metrics.1.jsonl").read_text() == "first"


def test_metrics_without_checkpoints_are_kept_and_an_empty_file_is_not(run_dir):
    set_aside(run_dir)
    (run_dir / "metrics.jsonl").touch()
    assert set_aside(run_dir) == []
    (run_dir / "metrics.jsonl").write_text("lines")
    assert set_aside(run_dir) == [run_dir / "metrics.1.jsonl"]


RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")


@pytest.mark.parametrize("name", RESTARTS)
@pytest.mark.parametrize(
    ("resume", "count", "expected"),
    [("never", "0", "never"), ("never", "1", "auto"), ("auto", "1", "auto"), (".", "1", "."), ("never", None, "never")],
)
def test_a_restart_does_not_begin_anew(run_dir, monkeypatch, name, resume, count, expected):
    for each in RESTARTS:
        monkeypatch.delenv(each, raising=False)
    if count is not None:
        monkeypatch.setenv(name, count)
    config, said = settle_restart(configuration(run_dir, resume))
    assert config.checkpoint.resume == expected
    assert (said is not None) == (resume != expected)


CUT = {"": "it is empty", "train: {steps: [": "while parsing", "7": "it holds no keys"}


@pytest.mark.parametrize("content", CUT)
def test_a_configuration_that_was_cut_short_is_said(run_dir, content):
    (run_dir / "config.yaml").write_text(content)
    for ask in (check, precision_of_the_run):
        with pytest.raises(ConfigError) as error:
            ask(configuration(run_dir))
        said = str(error.value)
        assert said.startswith(f"{run_dir}/config.yaml cannot be read ({CUT[content]}") and "\n" not in said
        assert said.endswith("; put the config.yaml of a whole checkpoint of that run in its place")
    # A word about the learning rate is not worth the run.
    assert change_of_schedule(run_dir, configuration(run_dir), 100) is None


CHANGES = {
    "model.hidden_size: 256 -> 128": {"model": ModelConfig(hidden_size=128)},
    "model.attention.window: 1024 -> 64": {"model": ModelConfig(attention=AttentionConfig(window=64))},
    "model.mixers.linear_per_full: None -> 3": {"model": ModelConfig(mixers=MixerLayoutConfig(linear_per_full=3))},
    "data.document_mask: True -> False": {"data": DataConfig(document_mask=False)},
    "train.seed: 1234 -> 1": {"train": TrainConfig(seed=1)},
    "train.seq_len: 512 -> 64": {"train": TrainConfig(seq_len=64)},
    "train.global_batch_size: 8 -> 16": {"train": TrainConfig(global_batch_size=16)},
    "train.precision: fp32 -> bf16": {"train": TrainConfig(precision="bf16")},
    "checkpoint.init: None -> weights": {"init": "weights"},
}


@pytest.mark.parametrize("difference", CHANGES)
def test_another_run_is_refused_by_its_keys(run_dir, difference):
    config = configuration(run_dir, **CHANGES[difference])
    assert differing_keys(run_dir, config) == [difference]
    with pytest.raises(ConfigError) as error:
        check(config)
    assert str(error.value) == (
        f"{run_dir} holds another run ({difference}); restore these keys, or choose another run.dir"
    )


def test_every_differing_key_is_named(run_dir):
    config = configuration(run_dir, train=TrainConfig(seed=1, seq_len=64), data=DataConfig(blend={"stdlib": 2.0}))
    differing = differing_keys(run_dir, config)
    assert [entry.split(":")[0] for entry in differing] == [
        "data.blend",
        "data.blend.stdlib",
        "train.seed",
        "train.seq_len",
    ]


@pytest.mark.parametrize(
    "parts",
    [
        {"train": TrainConfig(steps=400, micro_batch_size=4)},
        {"optim": OptimConfig(lr=1.0, schedule="wsd")},
        {"logging": LoggingConfig(every=7)},
        {"data": DataConfig(cache_dir="elsewhere")},
    ],
    ids=["length and micro-batch", "optimizer", "logging", "cache"],
)
def test_what_may_change(run_dir, parts):
    assert check(configuration(run_dir, **parts)) is False


def test_keys_that_an_older_version_did_not_have_stand_at_their_defaults(run_dir):
    values = yaml.safe_load((run_dir / "config.yaml").read_text())
    del values["model"]["norm_eps"]
    (run_dir / "config.yaml").write_text(yaml.safe_dump(values))
    ours = configuration(run_dir)
    assert differing_keys(run_dir, ours) == []
    ours.model.norm_eps = 1e-5
    assert differing_keys(run_dir, ours) == ["model.norm_eps: 1e-06 -> 1e-05"]


def test_going_back_is_refused(run_dir):
    checkpoints = run_dir / "checkpoints"
    assert check(configuration(run_dir, str(checkpoints / "step_00000200"))) is False
    with pytest.raises(
        ConfigError, match="holds the newer step 200, which going back to step_00000100 would overwrite"
    ):
        check(configuration(run_dir, str(checkpoints / "step_00000100")))
    # Into a fresh directory it may go back.
    assert check(configuration(run_dir.parent / "new", str(checkpoints / "step_00000100"))) is False


def test_going_back_is_refused_by_any_name_of_the_place(run_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(run_dir)
    for place in (
        "run/checkpoints/step_00000100",
        "link/checkpoints/step_00000100",
        "run/../run/checkpoints/step_00000100",
    ):
        with pytest.raises(ConfigError, match="holds the newer step 200"):
            check(configuration("run", place))


def test_a_checkpoint_of_another_run_does_not_continue_this_one(run_dir, tmp_path):
    (tmp_path / "other" / "checkpoints" / "step_00000050").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds checkpoints of its own"):
        check(configuration(run_dir, str(tmp_path / "other" / "checkpoints" / "step_00000050")))


def test_a_fresh_directory_goes_on_from_another_run_with_its_model_alone(tmp_path):
    """A step for spawning experts that has passed, too, would leave experts that are no copies."""

    def spawning(step, **changes):
        return {"model": ModelConfig(moe=MoEConfig(num_experts=4, spawn_step=step), **changes)}

    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000100"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.yaml").write_text(yaml.safe_dump(asdict(configuration(tmp_path / "run", **spawning(150)))))
    others = TrainConfig(steps=300, seq_len=64)
    assert check(configuration(tmp_path / "new", str(checkpoint), train=others, **spawning(150))) is False
    for model, key in (
        (spawning(90), "moe.spawn_step: 150 -> 90"),
        (spawning(150, norm_eps=0.1), "norm_eps: 1e-06 ->"),
    ):
        with pytest.raises(ConfigError, match=rf"step_00000100 is of another model \(model\.{key}"):
            check(configuration(tmp_path / "new", str(checkpoint), **model))


@pytest.mark.parametrize("place", ["file", "file/below/that"])
def test_a_place_that_cannot_be_a_directory(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^run\.dir: .* name a(nother)? directory$"):
        check(configuration(tmp_path / place))


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_place_that_is_not_ours(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match=r"cannot be written under"):
        check(configuration(tmp_path / "run"))


def test_the_check_writes_nothing(run_dir):
    before = sorted(run_dir.rglob("*"))
    check(configuration(run_dir))
    check(replace(configuration(run_dir), logging=LoggingConfig(every=2)))
    assert sorted(run_dir.rglob("*")) == before
