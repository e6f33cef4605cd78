"""The engine's thread with an engine that fails, stalls or runs ahead when the test wants it."""

import asyncio
import threading

import pytest

from models.generation import Request, Sampling
from tests.helpers import WAIT
from tests.trainer.serving.fakes import FakeEngine
from trainer.serving.errors import ApiError
from trainer.serving.metrics import Metrics
from trainer.serving.scheduler import Scheduler


def ask(tokens=3, prompt=(1,), samples=1):
    return Request(prompt, Sampling(tokens), samples)


def scheduled(test, engine=None, capacity=4, **options):
    """Run a test in an event loop with a scheduler that runs; return the scheduler."""
    metrics = Metrics()
    engines = iter([engine or FakeEngine(), FakeEngine()])
    scheduler = Scheduler(lambda: next(engines), capacity, metrics, **options)

    async def run():
        scheduler.start()
        try:
            async with asyncio.timeout(WAIT):
                await test(scheduler)
        finally:
            scheduler.stop(ApiError(503, "over"))

    asyncio.run(run())
    assert not scheduler._thread.is_alive()
    return scheduler, metrics


async def all_of(generation):
    """All events until every sample has ended."""
    found, left = [], generation.choices
    while left:
        events = await generation.read()
        left -= sum(event.finish is not None for _, event in events)
        found += events
    return found


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


def value(metrics, name):
    line = next(line for line in metrics.text().decode().splitlines() if line.startswith(f"spiketrain_{name} "))
    return float(line.split()[1])


def test_events_come_to_who_asked_and_are_counted():
    async def test(scheduler):
        with scheduler.submit([ask(3), ask(2, samples=2)]) as one, scheduler.submit([ask(4)]) as other:
            events, others = await asyncio.gather(all_of(one), all_of(other))
        assert [(place, event.token) for place, event in events if event.sample == 0] == sorted(
            [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)], key=lambda pair: (pair[1], pair[0])
        )
        assert len(events) == 7 and [event.token for _, event in others] == [0, 1, 2, 3]

    _, metrics = scheduled(test)
    assert value(metrics, "generated_tokens_total") == 11 and value(metrics, "prompt_tokens_total") == 3
    assert value(metrics, "time_to_first_token_seconds_count") == 3
    assert value(metrics, "time_per_token_seconds_count") == 4


def test_leaving_gives_back_room_and_slots():
    engine = FakeEngine(allowed=threading.Semaphore(0))

    async def test(scheduler):
        with scheduler.submit([ask(1000)]), scheduler.submit([ask(1000)]), scheduler.submit([ask(1000)]):
            with pytest.raises(ApiError) as full:
                scheduler.submit([ask(1), ask(1)])
            assert full.value.status == 429 and "retry-after" in full.value.headers
            engine.allowed.release()
            await until(lambda: scheduler._slots_in_use == 2 and scheduler._waiting == 1)
            scheduler.require_room(1)
        engine.allowed.release(10)
        await until(lambda: engine.is_idle)
        scheduler.require_room(4)

    _, metrics = scheduled(test, engine)
    assert sorted(engine.cancelled) == [0, 1, 2]
    assert value(metrics, "slots_in_use") == value(metrics, "queue_length") == 0


def test_one_sample_may_end_before_the_others():
    engine = FakeEngine(allowed=threading.Semaphore(1))

    async def test(scheduler):
        with scheduler.submit([ask(3), ask(3, samples=2)]) as generation:
            assert len(await generation.read()) == 3
            generation.end(1, 0)
            engine.allowed.release(10)
            rest = []
            while rest.count((0, 0)) + rest.count((1, 1)) < 4:
                rest += [(place, event.sample) for place, event in await generation.read()]
        # A step may have been under way.
        assert rest.count((0, 0)) == rest.count((1, 1)) == 2 and rest.count((1, 0)) <= 1
        # It is fine after the end, too.
        generation.end(1, 1)

    scheduled(test, engine)
    assert engine.ended == {(1, 0)}


def test_who_reads_too_slowly_is_cut_off_and_nobody_else():
    engine = FakeEngine(pause=0.001)

    async def test(scheduler):
        with scheduler.submit([ask(10_000)]) as slow:
            with scheduler.submit([ask(300)]) as other:
                assert len(await all_of(other)) == 300
            # The slot is free although its client has not read anything, nor left.
            await until(lambda: engine.is_idle)
            scheduler.require_room(4)
            early = await slow.read()
            assert 0 < len(early) <= 100 and [event.token for _, event in early] == list(range(len(early)))
            with pytest.raises(ApiError, match="too slowly") as cut:
                await slow.read()
            assert cut.value.code == "slow_client"

    scheduled(test, engine, unread=100)


def test_what_the_engine_refuses_is_a_400_of_that_client_alone():
    async def test(scheduler):
        with scheduler.submit([ask(1)]) as good, scheduler.submit([ask(1), ask(1, prompt=(13,))]) as bad:
            with pytest.raises(ApiError, match="no such token") as refused:
                await all_of(bad)
            assert refused.value.status == 400
            assert len(await all_of(good)) == 1

    scheduled(test)


def test_a_step_that_fails_ends_what_was_running_and_the_next_request_works(capsys):
    engine = FakeEngine(failing_at=[(7, 2)])

    async def test(scheduler):
        with scheduler.submit([ask(5, prompt=(7,))]) as bad:
            assert await bad.read()
            with pytest.raises(ApiError, match="not a number") as failed:
                await all_of(bad)
            assert failed.value.status == 500
        with scheduler.submit([ask(5)]) as good:
            assert len(await all_of(good)) == 5
        scheduler.require_room(4)

    scheduler, _ = scheduled(test, engine)
    assert scheduler.failure is None
    assert "the engine failed: FloatingPointError: not a number" in capsys.readouterr().err


def test_if_no_engine_can_be_made_the_scheduler_says_so():
    engine = FakeEngine(failing_at=[(7, 0), (8, 0)])

    async def test(scheduler):
        scheduler._make_engine = lambda: 1 / 0
        with scheduler.submit([ask(5, prompt=(7,))]) as bad, pytest.raises(ApiError):
            await all_of(bad)
        await until(lambda: scheduler.failure)
        assert scheduler.failure.startswith("ZeroDivisionError")
        with pytest.raises(ApiError) as refused:
            scheduler.submit([ask(1)])
        assert refused.value.status == 503

    scheduled(test, engine)


def test_stopping_fails_what_is_open():
    engine = FakeEngine(allowed=threading.Semaphore(1))

    async def test(scheduler):
        with scheduler.submit([ask(5)]) as generation:
            assert len(await generation.read()) == 1
            engine.allowed.release()
            scheduler.stop(ApiError(503, "shutting down"))
            with pytest.raises(ApiError, match="shutting down"):
                await all_of(generation)

    scheduled(test, engine)
