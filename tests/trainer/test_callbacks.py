"""When callbacks act, with a trainer that pretends: giving up, stopping on signals, saving; and the loop's calls."""

import logging
import os
import signal
from types import SimpleNamespace

import pytest

from trainer.callbacks.base import Callback
from trainer.callbacks.checkpointer import Checkpointer
from trainer.callbacks.health import NonFiniteGuard, TrainingDiverged
from trainer.callbacks.progress import ProgressLine
from trainer.callbacks.signals import StopOnSignal
from trainer.checkpoint import Progress
from trainer.config import OptimConfig, PretrainConfig, TrainConfig
from trainer.engines.base import StepResult
from trainer.loop import Outcome, Trainer


def fake_trainer(step=0, steps=10, rank=0, resumed=False):
    return SimpleNamespace(
        engine=SimpleNamespace(rank=rank),
        progress=Progress(step=step),
        finished=step >= steps,
        resumed=resumed,
        stop_requested=False,
        save_requested=False,
        agreed_to_save=False,
        run_dir="run",
        config_yaml="",
        tokenizer=None,
        config=PretrainConfig(train=TrainConfig(steps=steps), optim=OptimConfig(warmup_steps=0)),
    )


@pytest.fixture
def log():
    """The messages of the logger spiketrain, which other tests may have cut off from pytest's."""
    logger, messages = logging.getLogger("spiketrain"), []
    level, handler = logger.level, logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)
    logger.setLevel(level)


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_to_stop(number, log):
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
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

    def save(engine, run_dir, progress, config_yaml, tokenizer, keep):
        saves.append((progress.step, keep))
        return f"{run_dir}/{progress.step}"

    monkeypatch.setattr("trainer.checkpoint.save", save)
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
    """A trainer over an engine that learns nothing; `others` is the number of other ranks that ask to stop."""
    monkeypatch.setattr("trainer.loop.flops_per_token", lambda model, seq_len: 1.0)
    monkeypatch.setattr("trainer.loop.peak_memory_bytes", lambda device: 0)
    result = StepResult(loss=1.0, grad_norm=1.0, tokens=10, skipped=False)

    def build(callbacks, steps=3, step=0, others=0.0):
        rates = []
        engine = SimpleNamespace(
            model=SimpleNamespace(vocab_size=64),
            device=None,
            rank=0,
            data_parallel_rank=0,
            data_parallel_size=1,
            all_reduce=lambda values: [value + others for value in values],
            train_step=lambda batches, count, lr, step: rates.append(lr) or result,
        )
        config = PretrainConfig(train=TrainConfig(steps=steps), optim=OptimConfig(warmup_steps=0))
        sampler = SimpleNamespace(micro_batches=lambda *args, **kwargs: [])
        trainer = Trainer(config, "", engine, sampler, None, callbacks, Progress(step=step), None)
        trainer.rates = rates
        return trainer

    return build


def test_callbacks_are_called_in_order(loop):
    calls = []
    trainer = loop([Recorder(calls, "a"), Recorder(calls, "b")], steps=2)
    assert trainer.fit() is Outcome.DONE
    assert calls == [(name, what) for what in ("start", 1, 2, "end") for name in ("a", "b")]
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
        trainer.save_requested = metrics["step"] == 2

    assert loop([Recorder([], "a", ask)], steps=4).fit() is Outcome.DONE
    assert agreed == [False, False, True, False]


def test_another_ranks_stop_stops_this_one(loop):
    calls = []
    assert loop([Recorder(calls, "a")], others=1.0).fit() is Outcome.STOPPED
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
