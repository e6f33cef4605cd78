"""Which rank hangs, told from the ranks' notes; a stopped rank of two, for real, is in test_failures."""

import sys
from dataclasses import replace

import pytest

from trainer.config import RunConfig
from trainer.watchdog import Note, _innermost, waits_for_others, who_is_behind


def notes(*changes):
    """A note of each rank, waiting in step 7."""
    plain = Note(0, "node", 0, "launch", progress=20, phase="train", step=7, where="all_reduce", waits=True, beat=5)
    return {number: replace(plain, rank=number, pid=100 + number, **change) for number, change in enumerate(changes)}


def later(before, but=()):
    return {number: replace(note, beat=note.beat + (number not in but)) for number, note in before.items()}


def test_a_rank_whose_thread_is_silent_is_named():
    before = notes({}, {}, {})
    assert who_is_behind(before, later(before, but=[1]), 3) == {
        1: "rank 1 (pid 101) on node does not respond since train, step 7"
    }


def test_a_rank_that_has_come_less_far_is_named():
    before = notes({"progress": 21}, {"step": 6, "where": "read (dataset.py:9)"}, {"progress": 21})
    assert who_is_behind(before, later(before), 3) == {
        1: "rank 1 (pid 101) on node is behind, in train, step 6, in read (dataset.py:9)"
    }


def test_at_the_same_step_the_rank_that_does_not_wait_is_named():
    before = notes({}, {"waits": False, "where": "read (dataset.py:9)"})
    assert list(who_is_behind(before, later(before), 2)) == [1]


def test_a_rank_that_never_came_is_named():
    before = notes({}, {})
    assert who_is_behind(before, later(before), 3) == {2: "rank 2 has not started"}


def test_nobody_is_named_where_all_wait_or_none_does():
    waiting, busy = notes({}, {}), notes({"waits": False}, {"waits": False})
    assert who_is_behind(waiting, later(waiting), 2) == who_is_behind(busy, later(busy), 2) == {}


def test_where_a_thread_is():
    where, waits = _innermost(sys._getframe())
    assert where.startswith("test_where_a_thread_is (test_watchdog.py:") and waits is False
    library = compile("import sys\nframe = sys._getframe()", "/x/torch/distributed/distributed_c10d.py", "exec")
    names = {}
    exec(library, names)
    assert _innermost(names["frame"])[1] is True


C10D, WRITER = "/x/torch/distributed/distributed_c10d.py", "/x/torch/distributed/checkpoint/filesystem.py"
SCHEDULES = "/x/megatron/core/pipeline_parallel/schedules.py"
STACKS = {
    "a collective": ([C10D, "/x/trainer/engines/megatron.py", "/x/trainer/loop.py"], True),
    "a collective of a save": ([C10D, WRITER, "/x/trainer/engines/pieces.py"], True),
    "writing a file": ([WRITER, "/x/trainer/engines/pieces.py", "/x/trainer/loop.py"], False),
    "flushing it": (["/x/trainer/durable.py", WRITER, "/x/trainer/engines/pieces.py"], False),
    "a pipeline's neighbour": (["/x/megatron/core/pipeline_parallel/p2p_communication.py", SCHEDULES], True),
    "a pipeline's schedule": ([SCHEDULES, "/x/trainer/engines/megatron.py"], True),
    "gradients": (["/x/megatron/core/distributed/param_and_grad_buffer.py", SCHEDULES], True),
    "computing below the schedule": (["/x/models/decoder.py", SCHEDULES, "/x/trainer/engines/megatron.py"], False),
    "reading data": (["/x/trainer/data/dataset.py", SCHEDULES, "/x/trainer/loop.py"], False),
}


@pytest.mark.parametrize(("files", "waits"), STACKS.values(), ids=STACKS)
def test_who_waits_is_told_from_the_stack(files, waits):
    assert waits_for_others(files) is waits


@pytest.mark.parametrize(("phase", "seconds"), [("train", 10), ("validate", 10), ("start", 60), ("save", 60)])
def test_the_time_that_a_phase_may_take(phase, seconds):
    assert RunConfig(timeout_seconds=10).phase_seconds(phase) == seconds
    assert RunConfig(timeout_seconds=10).collective_seconds == 90
