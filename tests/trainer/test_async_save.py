"""Saves beside the training: the state of their step, whole or not there, waited for, and heard of when they fail."""

import json
import math
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch
from torch.distributed.checkpoint import filesystem

from models.config import MixerLayoutConfig, MoEConfig, RouterConfig
from tests.helpers import WAIT, FakeCollectives
from tests.trainer.conftest import finish, in_process_config, leave_groups, status, trajectory
from tests.trainer.test_callbacks import fake_trainer as idle_trainer
from tests.trainer.test_deepspeed_engine import read_parameters
from tests.trainer.test_megatron_engine import build, run_step
from trainer import pretrain
from trainer.callbacks.checkpointer import Checkpointer
from trainer.callbacks.health import NonFiniteGuard, TrainingDiverged
from trainer.config import CheckpointConfig, EngineConfig
from trainer.data.sources import find_sources
from trainer.engines.base import PendingSave
from trainer.engines.pieces import Piece, Writer
from trainer.engines.spec import EngineSpec
from trainer.stored import checkpoint
from trainer.stored.checkpoint import BackgroundSave, Progress, Retention, RunState


class FakeEngine:
    """One of several ranks: writes when it is let, may break, and hears of the others what the test says."""

    def __init__(self, rank=0, others=()):
        self.rank, self.collectives = rank, FakeCollectives(others)
        self.may_write, self.fail = threading.Event(), False

    def begin_save(self, directory):
        def write():
            assert self.may_write.wait(WAIT)
            if self.fail:
                raise OSError("no space left on device")
            return Writer().write({"model.weight": Piece.of(torch.arange(200.0))}, 1, directory)

        return PendingSave(write)


def start(run_dir, step, engine, keep=0):
    state = RunState(Progress(step, step * 10), "model: {}\n", None, {})
    return BackgroundSave(engine, run_dir, state, Retention(keep))


def names(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def soon(condition):
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def written(tmp_path, step, keep=0):
    engine = FakeEngine()
    engine.may_write.set()
    assert start(tmp_path, step, engine, keep).advance(wait=True)


def test_a_checkpoint_has_its_name_when_it_is_whole_and_not_before(tmp_path):
    engine = FakeEngine()
    save = start(tmp_path, 7, engine)
    assert not save.advance() and names(tmp_path) == [".saving_step_00000007"]
    engine.may_write.set()
    soon(save.advance)
    assert names(tmp_path) == ["step_00000007"]
    assert save.path == tmp_path / "checkpoints" / "step_00000007"
    assert checkpoint.damage(save.path) is None
    assert checkpoint.read_progress(save.path) == Progress(7, 70)
    assert checkpoint.find_latest(tmp_path) == (save.path, [])


def test_older_ones_go_when_the_new_one_is_whole(tmp_path):
    written(tmp_path, 1)
    written(tmp_path, 2)
    engine = FakeEngine()
    save = start(tmp_path, 3, engine, keep=1)
    save.advance()
    assert names(tmp_path) == [".saving_step_00000003", "step_00000001", "step_00000002"]
    engine.may_write.set()
    assert save.advance(wait=True)
    assert names(tmp_path) == ["step_00000003"]


def test_a_failed_write_is_raised_and_the_earlier_checkpoints_stay(tmp_path):
    written(tmp_path, 1)
    engine = FakeEngine()
    engine.fail = True
    save = start(tmp_path, 2, engine, keep=1)
    engine.may_write.set()
    with pytest.raises(OSError, match="no space left on device"):
        soon(save.advance)
    assert checkpoint.find_latest(tmp_path)[0].name == "step_00000001"


def test_a_failed_publication_is_raised(tmp_path, monkeypatch):
    def refuse(directory, digests):
        raise PermissionError("read-only file system")

    monkeypatch.setattr(checkpoint, "_seal", refuse)
    engine = FakeEngine()
    engine.may_write.set()
    with pytest.raises(PermissionError, match="read-only"):
        start(tmp_path, 1, engine).advance(wait=True)
    assert names(tmp_path) == [".saving_step_00000001"]


def test_another_ranks_failure_is_heard_of_also_by_one_that_still_writes(tmp_path):
    save = start(tmp_path, 1, FakeEngine(others=(False, True)))
    with pytest.raises(RuntimeError, match="step_00000001 could not be written: another rank failed"):
        save.advance(wait=True)


def test_all_ranks_have_to_have_written(tmp_path):
    engine = FakeEngine(others=(True, False))
    engine.may_write.set()
    save = start(tmp_path, 1, engine)
    save._work.join(WAIT)
    assert not save.advance() and names(tmp_path) == [".saving_step_00000001"]
    engine.collectives.others = ()
    assert save.advance(wait=True) and names(tmp_path) == ["step_00000001"]


# The callback


def fake_trainer(tmp_path, engine, step, steps=10):
    """A true trainer, over an engine that only saves, as it is after `step` steps."""
    trainer = idle_trainer(step, steps)
    trainer.engine, trainer.run_dir = engine, tmp_path
    return trainer


def test_training_goes_on_meanwhile_and_the_next_save_waits(tmp_path):
    engine, callback = FakeEngine(), Checkpointer(2, Retention(), asynchronous=True)
    callback.on_start(fake_trainer(tmp_path, engine, 0))
    for step in (1, 2, 3):
        callback.on_step(fake_trainer(tmp_path, engine, step), {})
    assert names(tmp_path) == [".saving_step_00000002"]
    threading.Timer(0.2, engine.may_write.set).start()
    callback.on_step(fake_trainer(tmp_path, engine, 4), {})
    assert "step_00000002" in names(tmp_path), "before the save of step 4 begins"
    soon(lambda: callback.on_step(fake_trainer(tmp_path, engine, 5), {}) or "step_00000004" in names(tmp_path))


@pytest.mark.parametrize("end", ["stop", "last step", "stop right after a save"])
def test_the_end_of_a_run_waits(tmp_path, end):
    engine, callback = FakeEngine(), Checkpointer(3, Retention(), asynchronous=True)
    callback.on_start(fake_trainer(tmp_path, engine, 0))
    callback.on_step(fake_trainer(tmp_path, engine, 3), {})
    threading.Timer(0.2, engine.may_write.set).start()
    if end == "last step":
        callback.on_step(fake_trainer(tmp_path, engine, 4, steps=4), {})
    else:
        callback.on_stop(fake_trainer(tmp_path, engine, 4 if end == "stop" else 3))
    last = ["step_00000004"] if end != "stop right after a save" else []
    assert names(tmp_path) == ["step_00000003", *last]


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_that_gives_up_finishes_its_save_first(tmp_path, log, fails):
    """On all ranks alike; its failure does not hide why the run gave up."""
    engine, callback = FakeEngine(), Checkpointer(3, Retention(), asynchronous=True)
    engine.fail = fails
    trainer = fake_trainer(tmp_path, engine, 3)
    trainer.callbacks = [callback]

    def take_steps():
        callback.on_step(trainer, {})
        threading.Timer(0.2, engine.may_write.set).start()
        raise TrainingDiverged("20 steps in a row")

    trainer._take_steps = take_steps
    with pytest.raises(TrainingDiverged):
        trainer.fit()
    if fails:
        assert log == ["Checkpointer could not end: no space left on device"]
    else:
        assert names(tmp_path) == ["step_00000003"]


def test_a_failure_ends_the_run_at_the_next_step(tmp_path):
    engine, callback = FakeEngine(), Checkpointer(2, Retention(), asynchronous=True)
    engine.fail = True
    callback.on_start(fake_trainer(tmp_path, engine, 0))
    callback.on_step(fake_trainer(tmp_path, engine, 2), {})
    engine.may_write.set()
    callback._saving._work.join(WAIT)
    with pytest.raises(OSError, match="no space left"):
        callback.on_step(fake_trainer(tmp_path, engine, 3), {})


def test_the_state_of_a_callback_is_that_of_the_step_that_is_saved(tmp_path):
    """Training goes on before the checkpoint is whole, and so does the callback."""
    engine, callback, guard = FakeEngine(), Checkpointer(2, Retention(), asynchronous=True), NonFiniteGuard(9)
    skipped = {"step": 2, "skipped": True, "loss": math.nan, "grad_norm": math.nan}
    for step in (1, 2, 3):
        trainer = fake_trainer(tmp_path, engine, step)
        trainer.callbacks = [guard, callback]
        for each in trainer.callbacks:
            each.on_step(trainer, skipped)
    engine.may_write.set()
    callback.on_give_up(trainer)
    (saved,) = checkpoint.list_checkpoints(tmp_path)
    assert checkpoint.read_callbacks(saved, [guard]) == [(guard, {"in_a_row": 2}, 1)]
    assert guard.state_dict() == {"in_a_row": 3}


# The engines


def asynchronous(config, engine="megatron", stage=1):
    saving = CheckpointConfig(every=3, asynchronous=True)
    return replace(config, checkpoint=saving, engine=EngineConfig(engine, stage))


def build_any(config):
    if config.engine.name == "megatron":
        return build(config)
    from trainer.engines.deepspeed import DeepSpeedEngine

    sources = find_sources(config)
    spec = EngineSpec.of(config, config.model.padded_vocab_size(sources.vocab_size))
    return DeepSpeedEngine(spec, torch.device("cpu")), sources.open_training(config)


@pytest.mark.parametrize(
    ("engine", "stage", "precision", "layers", "experts"),
    [
        ("megatron", 1, "fp32", ["gated_delta_net", "full_attention"], 0),
        ("megatron", 1, "bf16", ["gated_delta_net", "full_attention"], 0),
        # Routers' biases and loads change at the end of a step, beside the parameters.
        ("megatron", 1, "fp32", ["full_attention"], 4),
        ("deepspeed", 2, "bf16", ["full_attention"], 4),
        # Whose lower bounds, 4 x 32 float32 numbers, fill a buffer of mcore's: the one parameter that is not a view.
        ("megatron", 1, "bf16", ["hgrn"] * 4, 0),
        ("deepspeed", 0, "fp32", ["gated_delta_net", "full_attention"], 0),
        ("deepspeed", 2, "bf16", ["gated_delta_net", "full_attention"], 0),
        ("deepspeed", 3, "fp32", ["gated_delta_net", "full_attention"], 0),
    ],
)
def test_what_is_written_is_the_state_of_the_step(tiny_data, tmp_path, engine, stage, precision, layers, experts):
    """Training goes on before a byte is written: the checkpoint is that of the step, to the last bit."""
    config = asynchronous(in_process_config(tiny_data, tmp_path / "run", precision=precision), engine, stage)
    mixers = MixerLayoutConfig(pattern=", ".join(layers))
    moe = MoEConfig(num_experts=experts, router=RouterConfig(bias_update_rate=0.1))
    config = replace(config, model=replace(config.model, num_layers=len(layers), mixers=mixers, moe=moe))
    built, sampler = build_any(config)
    for step in range(2):
        run_step(built, sampler, config, step)
    (tmp_path / "state").mkdir()
    parameters = {f"model.{name}": values.detach().clone() for name, values in built.model.state_dict().items()}
    pending = built.begin_save(tmp_path / "state")
    expected = [run_step(built, sampler, config, step) for step in range(2, 4)]
    writer = threading.Thread(target=pending.write)
    writer.start()
    run_step(built, sampler, config, 4)
    writer.join(WAIT)
    saved = read_parameters(tmp_path / "state")
    assert saved.keys() == parameters.keys()
    # Under ZeRO 3 the engine's model has shapes alone.
    assert all(torch.equal(saved[name], values) for name, values in parameters.items() if built.model_is_whole)
    torch.manual_seed(7)
    built.load(tmp_path / "state")
    assert [run_step(built, sampler, config, step) for step in range(2, 4)] == expected
    built.close()


def test_megatron_reports_what_a_write_raised(tiny_data, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError("no space left on device")

    config = asynchronous(in_process_config(tiny_data, tmp_path / "run"))
    monkeypatch.setattr(filesystem, "_write_item", refuse)
    with pytest.raises(OSError, match="no space left on device"):
        pretrain.run(config, "")
    leave_groups()
    assert status(tmp_path / "run")["state"] == "failed"
    assert "no space left on device" in json.dumps(status(tmp_path / "run"))
    assert names(tmp_path / "run") == [".saving_step_00000003"]


# Runs


def test_a_run_saves_beside_the_training_and_resumes_to_the_last_bit(tiny_data, tmp_path):
    plain = in_process_config(tiny_data, tmp_path / "whole")
    assert pretrain.run(plain, "") == 0
    config = asynchronous(in_process_config(tiny_data, tmp_path / "run"))
    assert pretrain.run(config, "") == 0
    assert trajectory(tmp_path / "run") == trajectory(tmp_path / "whole")
    assert names(tmp_path / "run") == ["step_00000003", "step_00000006"]
    assert all(checkpoint.damage(path) is None for path in checkpoint.list_checkpoints(tmp_path / "run"))
    resumed = replace(config, run=replace(config.run, dir=str(tmp_path / "resumed")))
    resumed = replace(
        resumed, checkpoint=replace(config.checkpoint, resume=str(tmp_path / "run/checkpoints/step_00000003"))
    )
    assert pretrain.run(resumed, "") == 0
    steps, _ = trajectory(tmp_path / "whole")
    assert trajectory(tmp_path / "resumed")[0] == steps[3:]


@pytest.mark.parametrize(
    ("ranks", "where", "victim"),
    [(1, "writing", 0), pytest.param(2, "publishing", 0, marks=pytest.mark.slow)],
)
def test_killed_during_an_asynchronous_save(tiny_run, tmp_path, ranks, where, victim):
    run_dir, settings = tmp_path / "run", ("--checkpoint.asynchronous=true", "--evaluation.every=0")
    arguments = (where, str(victim), "2")
    killed = tiny_run(
        run_dir, *settings, ranks=ranks, script="tests/trainer/pretrain_killed.py", script_arguments=arguments
    )
    code, output = finish(killed)
    assert code == (-signal.SIGKILL if ranks == 1 else 1), output
    assert names(run_dir) == [".saving_step_00000006", "step_00000003"]
    code, output = finish(tiny_run(run_dir, *settings, ranks=ranks))
    assert code == 0, output
    assert ".saving_step_00000006 was not finished and is passed over" in output
    assert f"resumed from {run_dir}/checkpoints/step_00000003" in output
    assert names(run_dir) == ["step_00000003", "step_00000006", "step_00000008"]
    assert len(trajectory(run_dir)[0]) == 8
