"""A run that is interrupted and resumed equals the uninterrupted one, to the last bit, on one process and on two."""

import math
import os
import signal
import time

import pytest

from tests.helpers import WAIT
from tests.trainer.conftest import finish, in_process_config, leave_groups, status, trajectory
from trainer.events import read_events


@pytest.fixture(scope="module")
def uninterrupted():
    """Trajectories of undisturbed runs, by ranks and overrides."""
    return {}


@pytest.fixture
def reference(uninterrupted, tiny_run, tmp_path):
    def get(ranks, *overrides):
        key = (ranks, *overrides)
        if key not in uninterrupted:
            code, output = finish(tiny_run(tmp_path / "whole", *overrides, ranks=ranks))
            assert code == 0, output
            uninterrupted[key] = trajectory(tmp_path / "whole")
        return uninterrupted[key]

    return get


def wait_for(condition, process):
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end and process.poll() is None, process.communicate(timeout=1)[0]
        time.sleep(0.01)


WAITING = "tests/trainer/pretrain_waiting.py"


@pytest.mark.parametrize(
    ("ranks", "number", "torchrun"),
    [
        pytest.param(1, signal.SIGTERM, False, id="1-SIGTERM"),
        pytest.param(1, signal.SIGINT, False, id="1-SIGINT"),
        pytest.param(2, signal.SIGTERM, False, id="2-SIGTERM"),
        pytest.param(2, signal.SIGTERM, True, id="2-SIGTERM, torchrun", marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_the_resumed_run_is_the_same(reference, tiny_run, tmp_path, ranks, number, torchrun):
    run_dir, no_others = tmp_path / "run", "--checkpoint.every=0"
    process = tiny_run(run_dir, no_others, ranks=ranks, script=WAITING, script_arguments=("4",), torchrun=torchrun)
    wait_for((run_dir / "waiting").exists, process)
    process.send_signal(number)
    code, output = finish(process)
    # torchrun turns every failure into 1: status.json tells.
    assert code == 75 if ranks == 1 else code != 0, output
    assert status(run_dir) == {"state": "stopped", "exit_code": 75, "message": ""}
    (saved,) = (run_dir / "checkpoints").iterdir()
    assert saved.name == "step_00000005", "the step that is under way is taken"
    (stop,) = [event for event in read_events(run_dir) if event["kind"] == "stop"]
    assert (stop["step"], stop["why"]) == (5, signal.Signals(number).name)
    code, output = finish(tiny_run(run_dir, no_others, ranks=ranks))
    assert code == 0, output
    assert f"resumed from {saved}" in output
    assert status(run_dir)["state"] == "done"
    assert trajectory(run_dir) == reference(ranks)


def test_a_signal_during_set_up_leaves_a_resumable_run(tiny_run, tmp_path):
    run_dir = tmp_path / "run"
    process = tiny_run(run_dir, script=WAITING, script_arguments=("set-up",))
    wait_for((run_dir / "run.log").exists, process)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 75, output
    assert status(run_dir)["state"] == "stopped"
    (stop,) = read_events(run_dir)
    assert (stop["kind"], stop["why"]) == ("stop", "SIGTERM: stopped before the first step")
    assert finish(tiny_run(run_dir, "--train.steps=1"))[0] == 0


@pytest.mark.parametrize(
    ("ranks", "where", "victim"),
    [(1, "writing", 0), (1, "sealing", 0), (1, "publishing", 0), (2, "writing", 1), (2, "sealing", 0)],
)
def test_killed_during_a_save(reference, tiny_run, tmp_path, ranks, where, victim):
    run_dir = tmp_path / "run"
    arguments = (where, str(victim), "2")
    killed = tiny_run(run_dir, ranks=ranks, script="tests/trainer/pretrain_killed.py", script_arguments=arguments)
    code, output = finish(killed)
    assert code == (-signal.SIGKILL if ranks == 1 else 1), output
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        ".saving_step_00000006",
        "step_00000003",
    ]
    code, output = finish(tiny_run(run_dir, ranks=ranks))
    assert code == 0, output
    assert ".saving_step_00000006 was not finished and is passed over" in output
    assert "resumed from" in output and "step_00000003" in output
    assert trajectory(run_dir) == reference(ranks)
    assert not list((run_dir / "checkpoints").glob(".saving_*"))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tiny_run, tmp_path):
    run_dir = tmp_path / "run"
    assert finish(tiny_run(run_dir))[0] == 0
    for name in ("step_00000006", "step_00000008"):
        file = next((run_dir / "checkpoints" / name / "state").glob("*.distcp"))
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    # By its name the run has finished; a longer one has to look.
    more = "--train.steps=9"
    code, output = finish(tiny_run(run_dir, more))
    assert code == 0, output
    assert "step_00000008 is damaged and passed over" in output
    assert "step_00000006 is damaged and passed over" in output
    assert f"resumed from {run_dir}/checkpoints/step_00000003" in output
    # Out of the way of what the run saves now.
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        *("damaged_step_00000006", "damaged_step_00000008", "step_00000003", "step_00000006", "step_00000009"),
    ]
    steps, _ = trajectory(run_dir)
    assert [step for step, _, _ in steps] == list(range(1, 10))


@pytest.mark.parametrize("damaged", ["progress.json", "state/__0_0.distcp"])
def test_all_checkpoints_damaged_are_refused_and_set_aside_on_request(tiny_data, tmp_path, damaged):
    """One is seen by its name, the other by its checksum: neither is a new start, and nothing is lost."""
    from dataclasses import replace

    from trainer import pretrain
    from trainer.errors import ConfigError

    config = in_process_config(tiny_data, tmp_path / "run", steps=3)
    config = replace(config, checkpoint=replace(config.checkpoint, every=2))
    run_dir = tmp_path / "run"
    assert pretrain.run(config, "") == 0
    for path in (run_dir / "checkpoints").iterdir():
        content = (path / damaged).read_bytes()
        (path / damaged).unlink()
        if damaged.startswith("state"):
            (path / damaged).write_bytes(content[:-1])
    before = {path: path.read_bytes() for path in (run_dir / "checkpoints").rglob("*") if path.is_file()}
    lines = (run_dir / "metrics.jsonl").read_text()
    longer = replace(config, train=replace(config.train, steps=4))
    with pytest.raises(ConfigError, match=rf"none can be read \(.*step_00000003.* {damaged} .*resume=never") as error:
        pretrain.run(longer, "")
    assert "\n" not in str(error.value)
    leave_groups()
    assert (run_dir / "metrics.jsonl").read_text() == lines
    assert {path: path.read_bytes() for path in before} == before
    again = replace(longer, checkpoint=replace(longer.checkpoint, resume="never"))
    assert pretrain.run(again, "") == 0
    assert [step for step, _, _ in trajectory(run_dir)[0]] == [1, 2, 3, 4]
    assert (run_dir / "metrics.1.jsonl").read_text() == lines
    moved = {run_dir / "checkpoints.1" / path.relative_to(run_dir / "checkpoints"): before[path] for path in before}
    assert {path: path.read_bytes() for path in moved} == moved


@pytest.mark.parametrize("bits", [0, 8])
def test_stopped_at_any_step(tiny_data, tmp_path, monkeypatch, bits):
    """Every step of a short run is once the last before a stop; also with what is rounded at random."""
    from dataclasses import replace

    from trainer import pretrain
    from trainer.config import CompressionConfig
    from trainer.loop import Trainer

    config = in_process_config(tiny_data, tmp_path / "whole", compression=CompressionConfig(bits, min_bytes=0))
    assert pretrain.run(config, "") == 0
    whole = trajectory(tmp_path / "whole")
    original = Trainer._step
    for stop in range(config.train.steps):
        run_dir = tmp_path / f"stop{stop}"
        stopping = replace(config, run=replace(config.run, dir=str(run_dir)))

        def step(self, stop=stop):
            result = original(self)
            if self.progress.step == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return result

        monkeypatch.setattr(Trainer, "_step", step)
        if stop:
            assert pretrain.run(stopping, "") == 75
            assert status(run_dir)["state"] == "stopped"
        monkeypatch.setattr(Trainer, "_step", original)
        assert pretrain.run(stopping, "") == 0
        assert trajectory(run_dir) == whole


@pytest.mark.parametrize("asynchronous", [False, True])
def test_skipped_steps_are_counted_across_a_resume(tiny_data, tmp_path, monkeypatch, asynchronous):
    """A run that skips step after step gives up where it would have without the stop, and not later."""
    from dataclasses import replace

    from trainer import pretrain
    from trainer.engines.megatron import MegatronEngine
    from trainer.loop import Trainer

    config = in_process_config(tiny_data, tmp_path / "whole", max_skipped_steps=3)
    config = replace(config, checkpoint=replace(config.checkpoint, asynchronous=asynchronous))
    norm, step = MegatronEngine._grad_norm, Trainer._step
    # The third step and all after it.
    monkeypatch.setattr(MegatronEngine, "_grad_norm", lambda self: norm(self) if self._updates < 2 else math.nan)

    def stop_after_the_fourth(self):
        self.stop_requested = self.progress.step == 3
        return step(self)

    assert pretrain.run(config, "") == 1
    leave_groups()
    stopped = replace(config, run=replace(config.run, dir=str(tmp_path / "stopped")))
    monkeypatch.setattr(Trainer, "_step", stop_after_the_fourth)
    assert pretrain.run(stopped, "") == 75
    monkeypatch.setattr(Trainer, "_step", step)
    assert pretrain.run(stopped, "") == 1
    leave_groups()
    assert trajectory(tmp_path / "stopped") == trajectory(tmp_path / "whole")
    assert len(trajectory(tmp_path / "whole")[0]) == 5
    assert status(tmp_path / "stopped") == status(tmp_path / "whole")


def test_another_number_of_ranks_goes_on_with_the_same_batches(reference, tiny_run, tmp_path):
    """Changing the data-parallel size keeps the run: the same batches, losses equal up to rounding."""
    run_dir = tmp_path / "run"
    assert finish(tiny_run(run_dir, "--train.steps=3", "--optim.min_lr_ratio=1", ranks=1))[0] == 0
    code, output = finish(tiny_run(run_dir, "--train.steps=6", "--optim.min_lr_ratio=1", ranks=2))
    assert code == 0, output
    whole, _ = reference(1, "--train.steps=6", "--optim.min_lr_ratio=1")
    steps, _ = trajectory(run_dir)
    for (step, loss, norm), (step_1, loss_1, norm_1) in zip(steps, whole, strict=True):
        assert step == step_1
        assert loss == pytest.approx(loss_1, rel=1e-5)
        assert norm == pytest.approx(norm_1, rel=1e-4)
