"""Where the time of a step goes."""

from types import SimpleNamespace

import pytest
import torch

from trainer.engines import timing
from trainer.engines.timing import PHASES, PhaseTimer


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now.seconds)
    return now


def test_what_lies_within_a_phase_is_not_counted_twice(clock):
    timer = PhaseTimer(torch.device("cpu"))

    def reduce():
        clock.seconds += 4.0

    with timer.phase("forward_backward"):
        clock.seconds += 1.0
        timer.timed("reduce", reduce)()
        clock.seconds += 2.0
    clock.seconds += 64.0
    with timer.phase("reduce"):
        clock.seconds += 8.0
    with timer.phase("optimizer"):
        clock.seconds += 16.0
    assert timer.take() == {"forward_backward": 3.0, "reduce": 12.0, "optimizer": 16.0}
    assert timer.take() == dict.fromkeys(PHASES, 0.0), "each step has its own"


def test_a_phase_that_fails_has_ended(clock):
    timer = PhaseTimer(torch.device("cpu"))

    def fail():
        clock.seconds += 1.0
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        timer.timed("reduce", fail)()
    with timer.phase("optimizer"):
        clock.seconds += 1.0
    assert timer.take() == {"forward_backward": 0.0, "reduce": 1.0, "optimizer": 1.0}


def test_a_gpu_is_waited_for_once_at_the_end(monkeypatch):
    """Events are only recorded on the way; their times are asked for when the last has come."""
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = len(calls)
            calls.append("record")

        def synchronize(self):
            calls.append("synchronize")

        def elapsed_time(self, end):
            assert "synchronize" in calls
            return 1000.0 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = PhaseTimer(torch.device("cuda"))
    with timer.phase("forward_backward"), timer.phase("reduce"):
        pass
    with timer.phase("optimizer"):
        pass
    assert timer.take() == {"forward_backward": 2.0, "reduce": 1.0, "optimizer": 1.0}
    assert calls == ["record"] * 6 + ["synchronize"]
