"""When callbacks act, with a trainer that pretends: giving up, stopping on signals, saving; and the loop's calls."""

import copy
import functools
import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch

from tests.helpers import FakeCollectives
from trainer.callbacks.base import Callback
from trainer.callbacks.checkpointer import Checkpointer
from trainer.callbacks.evaluator import Evaluator
from trainer.callbacks.health import NonFiniteGuard, TrainingDiverged
from trainer.callbacks.progress import ProgressLine
from trainer.callbacks.signals import StopOnSignal
from trainer.config import OptimConfig, PretrainConfig, RunConfig, TrainConfig
from trainer.engines.base import StepResult
from trainer.loop import Outcome, Trainer
from trainer.stored.checkpoint import Progress


@functools.cache
def idle_trainer(steps, rank):
    engine = SimpleNamespace(
        rank=rank,
        data_parallel_rank=rank,
        data_parallel_size=1,
        model=SimpleNamespace(vocab_size=64),
        device=SimpleNamespace(type="cpu"),
    )
    config = PretrainConfig(run=RunConfig(dir="run"), train=TrainConfig(steps=steps), optim=OptimConfig(warmup_steps=0))
    return Trainer(config, "", engine, None, None, [], Progress(), None)


def fake_trainer(step=0, steps=10, rank=0, resumed=False):
    """A true trainer, over an engine that does nothing, as it is after `step` steps."""
    trainer = copy.copy(idle_trainer(steps, rank))
    trainer.progress, trainer.resumed = Progress(step=step), resumed
    return trainer


# NonFiniteGuard


def skips(pattern, limit, rank=0):
    """Feed a guard steps, "x" for a skipped one; the step at which it gives up, or None."""
    guard = NonFiniteGuard(limit)
    for step, mark in enumerate(pattern, 1):
        metrics = {"step": step, "skipped": mark == "x", "loss": float("nan"), "grad_norm": float("inf")}
        try:
            guard.on_step(fake_trainer(step, rank=rank), metrics)
        except TrainingDiverged as error:
            return step, str(error)
    return None


@pytest.mark.parametrize(
    ("pattern", "limit", "gives_up"),
    [("xxx", 3, 3), ("xx.xx.xx", 3, None), ("..xx.xxx", 3, 8), ("x", 1, 1), ("....", 1, None)],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_gives_up_after_so_many_skips_in_a_row(pattern, limit, gives_up, rank):
    result = skips(pattern, limit, rank)
    assert (result and result[0]) == gives_up
    if result:
        assert f"{limit} steps in a row" in result[1] and f"train.max_skipped_steps={limit}" in result[1]


def test_skipped_steps_are_reported_by_rank_0(log):
    skips(".x.x", 3)
    assert log == [f"step {step} skipped: loss nan, gradient norm inf" for step in (2, 4)]
    skips("xx", 3, rank=1)
    assert len(log) == 2


# StopOnSignal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_asks_to_stop(number, log):
    # The tests may run under nohup.
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    trainer, callback = fake_trainer(), StopOnSignal()
    callback.on_start(trainer)
    try:
        assert trainer.stop_requested is False
        os.kill(os.getpid(), number)
        assert trainer.stop_requested is True
        # Impatience must not end the run without a checkpoint.
        os.kill(os.getpid(), number)
    finally:
        callback.on_end(trainer)
    assert log == [f"{signal.Signals(number).name}: stopping after this step"]
    assert {each: signal.getsignal(each) for each in before} == before
    signal.signal(signal.SIGHUP, hangup)


def test_a_signal_after_the_end_is_as_before(monkeypatch):
    seen = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        trainer, callback = fake_trainer(), StopOnSignal()
        callback.on_start(trainer)
        callback.on_end(trainer)
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM] and trainer.stop_requested is False
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_under_nohup_a_closed_terminal_stops_nothing():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    trainer, callback = fake_trainer(), StopOnSignal()
    try:
        callback.on_start(trainer)
        os.kill(os.getpid(), signal.SIGHUP)
        callback.on_end(trainer)
        assert trainer.stop_requested is False
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_signal_is_a_request_while_the_callbacks_end(loop):
    """Not the end of the process, which would cut short what they have to write."""

    class Ending(Callback):
        def on_end(self, trainer):
            os.kill(os.getpid(), signal.SIGTERM)
            ended.append(trainer.stop_requested)

    def leave(number, frame):
        raise SystemExit(75)

    ended, previous = [], signal.signal(signal.SIGTERM, leave)
    try:
        assert loop([StopOnSignal(), Ending()], steps=1).fit() is Outcome.DONE
        assert ended == [True]
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_a_signal_asks_to_save_and_not_to_stop(log):
    previous = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    trainer, callback = fake_trainer(), StopOnSignal()
    callback.on_start(trainer)
    try:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert trainer.save_requested is True and trainer.stop_requested is False
    finally:
        callback.on_end(trainer)
        assert signal.signal(signal.SIGUSR2, previous) == signal.SIG_IGN
    assert log == ["SIGUSR2: saving after this step"]


# Checkpointer


@pytest.fixture
def saved(monkeypatch):
    """Steps and `keep` of the saves, in place of files."""
    saves = []

    def save(engine, run_dir, state, keep):
        saves.append((state.progress.step, keep))
        return f"{run_dir}/{state.progress.step}"

    monkeypatch.setattr("trainer.stored.checkpoint.save", save)
    return saves


def take_steps(callback, first, last, steps=10, **state):
    callback.on_start(fake_trainer(first - 1, steps, **state))
    for step in range(first, last + 1):
        callback.on_step(fake_trainer(step, steps, **state), {})


@pytest.mark.parametrize(
    ("every", "expected"), [(0, [10]), (3, [3, 6, 9, 10]), (5, [5, 10]), (1, list(range(1, 11))), (100, [10])]
)
def test_when_checkpoints_are_saved(saved, every, expected):
    take_steps(Checkpointer(every, 3), 1, 10)
    assert saved == [(step, 3) for step in expected]


@pytest.mark.parametrize(("every", "expected"), [(0, [4]), (3, [3, 4]), (4, [4])])
def test_a_stop_saves_once(saved, every, expected):
    callback = Checkpointer(every, 0)
    take_steps(callback, 1, 4)
    callback.on_stop(fake_trainer(4))
    assert saved == [(step, 0) for step in expected]


def test_a_save_on_request(saved):
    callback = Checkpointer(5, 3)
    callback.on_start(fake_trainer(0))
    for step in range(1, 7):
        trainer = fake_trainer(step)
        trainer.agreed_to_save = step in (2, 5)
        callback.on_step(trainer, {})
    assert saved == [(2, 3), (5, 3)]


@pytest.mark.parametrize(("resumed", "expected"), [(True, []), (False, [(0, 2)])])
def test_what_was_just_loaded_is_not_saved_again(saved, resumed, expected):
    callback = Checkpointer(3, 2)
    start = fake_trainer(3 if resumed else 0, resumed=resumed)
    callback.on_start(start)
    callback.on_stop(start)
    assert saved == expected


def test_every_rank_saves_and_rank_0_says_so(saved, log):
    take_steps(Checkpointer(5, 3), 1, 10, rank=1)
    assert saved == [(5, 3), (10, 3)] and log == []
    take_steps(Checkpointer(5, 3), 1, 10)
    assert log == ["saved run/5", "saved run/10"]


# ProgressLine


def test_progress_in_plain_lines(log, monkeypatch):
    monkeypatch.setattr("sys.stderr", SimpleNamespace(isatty=lambda: False))
    clock = iter(float(second) for second in range(0, 1000, 4))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    callback = ProgressLine()
    callback.on_start(fake_trainer(5, resumed=True))
    for step in range(6, 11):
        line = {"step": step, "loss": 1.25, "tokens_per_second": 2048.0, "step_seconds": 2.0}
        line["model_flops_utilization"] = 0.5
        callback.on_step(fake_trainer(step), line)
    callback.on_evaluation(fake_trainer(10), {"step": 10, "split": "validation", "loss": 1.5, "bits_per_byte": 2.0})
    callback.on_end(fake_trainer(10))
    assert log[-3].startswith("step 10/10  loss 1.2500  2,048 tokens/s  50 % of peak") and "0 s left" in log[-3]
    assert log[-2] == "step 10  validation loss 1.5000  2.0000 bits per byte"
    assert log[-1] == "5 steps in 10 s of training"
    assert 3 < len(log) < 7  # one every ten seconds and the last, not one a step


@pytest.mark.parametrize(
    ("steps", "seconds", "device", "expected"),
    [
        # Ten steps after the first, which is slow; 600 more take ten minutes.
        (
            2400,
            1.0,
            "cpu",
            [(11, "about 40 minutes to go on this machine", "--train.steps 611 --run.dir run-short")],
        ),
        (1211, 1.0, "cpu", []),
        (1212, 1.0, "cpu", [(11, "about 20 minutes to go", "--train.steps 611")]),
        (2400, 1.0, "cuda", []),
        # Sixty seconds are enough to know.
        (100, 100.0, "cpu", [(2, "about 163 minutes to go", "--train.steps 8")]),
    ],
)
def test_a_long_run_on_a_cpu_is_told_of_once(log, monkeypatch, steps, seconds, device, expected):
    monkeypatch.setattr("sys.stderr", SimpleNamespace(isatty=lambda: False))
    monkeypatch.setattr("time.monotonic", lambda: 0.0)
    callback, said = ProgressLine(), []
    callback.on_start(fake_trainer(0))
    for step in range(1, 31):
        trainer = fake_trainer(step, steps)
        trainer.engine = SimpleNamespace(rank=0, device=SimpleNamespace(type=device))
        line = {"step": step, "loss": 1.25, "tokens_per_second": 2048.0, "model_flops_utilization": None}
        callback.on_step(trainer, line | {"step_seconds": 50 * seconds if step == 1 else seconds})
        said += [(step, message) for message in log if "minutes to go" in message]
        log.clear()
    assert len(said) == len(expected)
    for (step, message), (at, *parts) in zip(said, expected):
        assert step == at and all(part in message for part in parts), message


# The loop


class Recorder(Callback):
    def __init__(self, calls, name, on_step=None):
        self.calls, self.name, self.act = calls, name, on_step

    def on_start(self, trainer):
        self.calls.append((self.name, "start"))

    def on_step(self, trainer, metrics):
        self.calls.append((self.name, metrics["step"]))
        if self.act:
            self.act(trainer, metrics)

    def on_stop(self, trainer):
        self.calls.append((self.name, "stop"))

    def on_end(self, trainer):
        self.calls.append((self.name, "end"))


@pytest.fixture
def loop(monkeypatch):
    """A trainer over an engine that learns nothing; `others` are the flags of other ranks: to stop, to save."""
    monkeypatch.setattr("trainer.loop.flops_per_token", lambda model, seq_len: 1.0)
    monkeypatch.setattr("trainer.loop.peak_memory_bytes", lambda device: 0)
    result = StepResult(loss=1.0, grad_norm=1.0, tokens=10, skipped=False)

    def build(callbacks, steps=3, step=0, others=()):
        rates = []
        engine = SimpleNamespace(
            model=SimpleNamespace(vocab_size=64),
            device=None,
            rank=0,
            data_parallel_rank=0,
            data_parallel_size=1,
            collectives=FakeCollectives(others),
            begin_phase=lambda model, trainable: None,
            evaluate=lambda batches, objective: [float(len(batches))],
            train_step=lambda batches, objective, lr, step: rates.append(lr) or result,
        )
        config = PretrainConfig(train=TrainConfig(steps=steps), optim=OptimConfig(warmup_steps=0))
        source = SimpleNamespace(micro_batches=lambda *args, **kwargs: [], metrics=lambda result: result)
        trainer = Trainer(config, "", engine, source, None, callbacks, Progress(step=step), None)
        trainer.rates = rates
        return trainer

    return build


def test_callbacks_are_called_in_order(loop):
    calls = []
    trainer = loop([Recorder(calls, "a"), Recorder(calls, "b")], steps=2)
    assert trainer.fit() is Outcome.DONE
    ends = [("b", "end"), ("a", "end")]
    assert calls == [(name, what) for what in ("start", 1, 2) for name in ("a", "b")] + ends
    assert len(trainer.rates) == 2 and trainer.progress == Progress(step=2, tokens=20)


def test_a_stop_ends_the_run_after_the_step(loop):
    def stop(trainer, metrics):
        trainer.stop_requested = metrics["step"] == 2

    calls = []
    assert loop([Recorder(calls, "a", stop)], steps=5).fit() is Outcome.STOPPED
    assert [what for _, what in calls] == ["start", 1, 2, "stop", "end"]


def test_a_stop_at_the_last_step_is_the_end(loop):
    def stop(trainer, metrics):
        trainer.stop_requested = True

    calls = []
    assert loop([Recorder(calls, "a", stop)], steps=1).fit() is Outcome.DONE
    assert [what for _, what in calls] == ["start", 1, "end"]


def test_a_save_is_asked_for_once(loop):
    """And every rank hears of it, between two steps."""
    agreed = []

    def ask(trainer, metrics):
        agreed.append(trainer.agreed_to_save)
        # As the checkpointer does that saves.
        trainer.agreed_to_save = False
        trainer.save_requested = metrics["step"] == 2

    assert loop([Recorder([], "a", ask)], steps=4).fit() is Outcome.DONE
    assert agreed == [False, False, True, False]


def test_another_ranks_stop_stops_this_one(loop):
    calls = []
    assert loop([Recorder(calls, "a")], others=(True, False)).fit() is Outcome.STOPPED
    assert [what for _, what in calls] == ["start", "stop", "end"]


def test_the_end_is_called_when_a_step_fails(loop):
    def fail(trainer, metrics):
        raise RuntimeError("broken")

    calls = []
    with pytest.raises(RuntimeError, match="broken"):
        loop([Recorder(calls, "a", fail)]).fit()
    assert [what for _, what in calls] == ["start", 1, "end"]


def test_a_finished_run_takes_no_step(loop):
    calls = []
    trainer = loop([Recorder(calls, "a")], steps=3, step=3)
    assert trainer.fit() is Outcome.DONE and trainer.rates == []
    assert [what for _, what in calls] == ["start", "end"]


def test_a_failing_end_does_not_hide_the_failure(loop, log):
    def fail(trainer, metrics):
        raise OSError("no space left on device")

    class Stuck(Callback):
        def on_end(self, trainer):
            raise OSError("cannot close")

    calls = []
    with pytest.raises(OSError, match="no space left"):
        loop([Recorder(calls, "a", fail), Stuck(), Recorder(calls, "b")]).fit()
    assert calls[-2:] == [("b", "end"), ("a", "end")]
    assert log == ["Stuck could not end: cannot close"]


# Evaluator


class FakeStream:
    """`count` micro-batches; asks the trainer to stop as the `stop_at`-th is read."""

    def __init__(self, trainer, count=20, stop_at=None):
        self.trainer, self.count, self.stop_at, self.read = trainer, count, stop_at, 0

    def __len__(self):
        return self.count

    def __iter__(self):
        for number in range(self.count):
            self.read += 1
            if number == self.stop_at:
                self.trainer.stop_requested = True
            yield SimpleNamespace(loss_mask=torch.ones(1), labels=torch.zeros(1, dtype=torch.int64))


class Evaluations(Callback):
    def __init__(self, lines):
        self.lines = lines

    def on_evaluation(self, trainer, metrics):
        self.lines.append(metrics)


@pytest.fixture
def validating(loop, tmp_path):
    """A trainer that validates 20 micro-batches after its last step, its stream and the validations it reports."""

    def build(stop_at=None, step=0):
        lines, evaluator = [], Evaluator(SimpleNamespace(validation="v", eod_id=0, vocab_size=64, tokenizer=None))
        trainer = loop([evaluator, Evaluations(lines)], steps=2, step=step)
        trainer.engine.model_is_whole = False
        trainer.run_dir = tmp_path
        evaluator._streams[None] = stream = FakeStream(trainer, stop_at=stop_at)
        return trainer, stream, lines

    return build


def test_the_whole_split_is_validated_a_few_micro_batches_at_a_time(validating):
    trainer, stream, lines = validating()
    counts = []
    evaluate = trainer.engine.evaluate
    trainer.engine.evaluate = lambda batches, objective: counts.append(len(batches)) or evaluate(batches, objective)
    assert trainer.fit() is Outcome.DONE
    assert counts == [8, 8, 4] and stream.read == 20
    assert [(line["step"], line["loss"]) for line in lines] == [(2, 1.0)]


def test_a_stop_is_heard_in_the_last_validation(validating):
    trainer, stream, lines = validating(stop_at=3)
    assert trainer.fit() is Outcome.STOPPED
    assert stream.read == 8 and lines == []


@pytest.mark.parametrize(
    ("written", "is_ours", "validates"),
    [
        ([{"step": 2, "loss": 1.0}], True, True),
        ([{"step": 2, "split": "validation"}], True, False),
        ([], True, True),
        # The file is there: the callback before has opened it.
        ([], False, False),
    ],
    ids=["interrupted", "done", "no lines", "another run's checkpoint"],
)
def test_a_run_that_goes_on_validates_what_it_had_no_time_for(validating, tmp_path, written, is_ours, validates):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    if is_ours:
        (tmp_path / "checkpoints/step_00000002").mkdir(parents=True)
    trainer, _, lines = validating(step=2)
    assert trainer.fit() is Outcome.DONE and trainer.rates == []
    assert len(lines) == validates
