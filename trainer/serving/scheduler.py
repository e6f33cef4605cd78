"""The thread that owns the generation engine, and what the event loop sees of it.

Requests pass to the thread through a queue, and tokens come back by one call into the event loop for each step of the
engine. Neither side waits for the other, so a client that reads slowly delays nobody. What it has not read waits in
memory, up to a number of tokens. If it falls further behind, its request is cancelled, which frees its slots.
"""

import asyncio
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from queue import Empty, SimpleQueue

from models.generation import Engine, Event, Request
from trainer.errors import describe_failure
from trainer.serving.errors import ApiError, unavailable
from trainer.serving.metrics import Metrics

# Tokens of a choice that may wait for its client: longer than most answers, and some 100 kB without alternatives.
_UNREAD = 1024
# A step that takes longer, or hangs, does not keep the process from ending.
_SECONDS_TO_STOP = 10.0

# The number of a request among those of its generation, and what happened to it.
Numbered = tuple[int, Event]


class Generation:
    """Engine requests that one client waits for, as the event loop sees them. Leaving its context cancels the rest.

    Args:
        requests: The requests.
        unread: Events that may wait to be read.
        scheduler: What it is cancelled in.

    Attributes:
        requests: The requests.
        choices: Number of samples over all requests.
    """

    def __init__(self, requests: Sequence[Request], unread: int, scheduler: "Scheduler") -> None:
        self.requests = tuple(requests)
        self.choices = sum(request.samples for request in requests)
        self._limit, self._scheduler = unread, scheduler
        self._events: deque[Numbered] = deque()
        self._error: ApiError | None = None
        self._news = asyncio.Event()

    async def read(self) -> list[Numbered]:
        """Wait for events, and return all that have arrived.

        Raises:
            ApiError: the requests have failed. What was drawn before comes first.
        """
        await self._news.wait()
        if not self._events:
            assert self._error is not None
            raise self._error
        events = list(self._events)
        self._events.clear()
        if self._error is None:
            self._news.clear()
        return events

    def put(self, events: Sequence[Numbered]) -> bool:
        """Add events. False: there would be more than may wait."""
        if len(self._events) + len(events) > self._limit:
            return False
        self._events.extend(events)
        self._news.set()
        return True

    def fail(self, error: ApiError) -> None:
        """Have `read` raise the error after the events that have arrived."""
        self._error = self._error or error
        self._news.set()

    def end(self, place: int, sample: int) -> None:
        """Give back the slot of one sample of a request, of which no more is wanted."""
        self._scheduler.end(self, place, sample)

    def __enter__(self) -> "Generation":
        return self

    def __exit__(self, *raised: object) -> None:
        self._scheduler.close(self)


class _Progress:
    """One engine request in the thread: where its events go, and when they came.

    Args:
        generation: What it belongs to.
        place: Its number there.
        metrics: Where times and tokens are counted.
    """

    def __init__(self, generation: Generation, place: int, metrics: Metrics) -> None:
        self.generation, self.place, self._metrics = generation, place, metrics
        self._submitted = time.monotonic()
        # Of each sample that has begun, the time of its first token, and its tokens.
        self._begun: dict[int, tuple[float, int]] = {}

    def note(self, event: Event, now: float) -> None:
        """Count a token."""
        if not self._begun:
            self._metrics.first_token.observe(now - self._submitted)
        start, count = self._begun.get(event.sample, (now, 0))
        self._begun[event.sample] = start, count + 1
        self._metrics.new_tokens.inc()
        if event.finish is not None and count:
            self._metrics.per_token.observe((now - start) / count)


class Scheduler:
    """Runs an engine in a thread.

    Args:
        make_engine: Makes the engine; called again after an error in it, whose state is then unknown.
        capacity: Choices that may be running or waiting, over all clients.
        metrics: Where times, tokens and the state are counted.
        unread: Tokens of a choice that may wait for its client.

    Attributes:
        failure: Why the thread has ended; None while it runs, or if it was stopped.
    """

    def __init__(
        self, make_engine: Callable[[], Engine], capacity: int, metrics: Metrics, unread: int = _UNREAD
    ) -> None:
        self.failure: str | None = None
        self._make_engine, self._capacity, self._metrics, self._unread = make_engine, capacity, metrics, unread
        self._engine = make_engine()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        # What the thread is to do between two steps; None: end.
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # Belongs to the event loop.
        self._open: set[Generation] = set()
        # Belong to the thread: engine's numbers, and the requests that have not been cancelled.
        self._numbers: dict[Generation, list[int]] = {}
        self._progress: dict[int, _Progress] = {}
        self._waiting, self._slots_in_use = 0, 0
        metrics.watch("queue_length", "Prompts that wait for a slot", lambda: self._waiting)
        metrics.watch("slots_in_use", "Choices that are being continued", lambda: self._slots_in_use)

    # For the event loop

    def start(self) -> None:
        """Start the thread; what it draws comes to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self, error: ApiError) -> None:
        """Have all open generations fail, and wait a little for the thread to end after its step."""
        self._fail(list(self._open), error)
        self._commands.put(None)
        self._thread.join(_SECONDS_TO_STOP)

    def require_room(self, choices: int) -> None:
        """Check that so many choices can be taken on.

        Raises:
            ApiError: 429, the queue is full; 503, the thread has ended.
        """
        if self.failure is not None:
            raise unavailable("the engine has failed; the server is about to end")
        if sum(generation.choices for generation in self._open) + choices > self._capacity:
            raise ApiError(429, "the queue is full; try again later", code="queue_full", headers={"retry-after": "1"})

    def submit(self, requests: Sequence[Request]) -> Generation:
        """Take on all of the requests, or none.

        Raises:
            ApiError: as `require_room`.
        """
        choices = sum(request.samples for request in requests)
        self.require_room(choices)
        generation = Generation(requests, self._unread * choices, self)
        self._open.add(generation)
        self._commands.put(partial(self._submit, generation))
        return generation

    def close(self, generation: Generation) -> None:
        """Cancel what is left of a generation. Idempotent."""
        if generation in self._open:
            self._open.remove(generation)
            self._commands.put(partial(self._cancel, generation))

    def end(self, generation: Generation, place: int, sample: int) -> None:
        """Cancel one sample of one of a generation's requests."""
        self._commands.put(partial(self._cancel_sample, generation, place, sample))

    def _deliver(self, batch: Sequence[tuple[Generation, Sequence[Numbered]]]) -> None:
        for generation, events in batch:
            if generation in self._open and not generation.put(events):
                self.close(generation)
                generation.fail(ApiError(408, "the client reads too slowly: its answer is cut off", code="slow_client"))

    def _fail(self, generations: Sequence[Generation], error: ApiError) -> None:
        for generation in generations:
            generation.fail(error)

    # The thread

    def _run(self) -> None:
        try:
            while self._obey():
                if not self._engine.is_idle:
                    self._step()
                self._waiting, self._slots_in_use = self._engine.waiting, self._engine.slots_in_use
        except Exception as error:
            self.failure = describe_failure(error)
            self._give_up(ApiError(500, "the engine has failed", code="engine_failed"))

    def _obey(self) -> bool:
        """Carry out commands, and wait for one if there is nothing else to do. False: end."""
        try:
            command = self._commands.get(block=self._engine.is_idle)
            while command is not None:
                command()
                command = self._commands.get_nowait()
        except Empty:
            return True
        return False

    def _submit(self, generation: Generation) -> None:
        numbers = self._numbers[generation] = []
        for place, request in enumerate(generation.requests):
            try:
                number = self._engine.submit(request)
            except ValueError as error:
                self._cancel(generation)
                self._call(self._fail, [generation], ApiError(400, str(error), code="invalid_value"))
                return
            numbers.append(number)
            self._progress[number] = _Progress(generation, place, self._metrics)
            self._metrics.prompt_tokens.inc(len(request.prompt))

    def _cancel(self, generation: Generation) -> None:
        for number in self._numbers.pop(generation, []):
            self._engine.cancel(number)
            del self._progress[number]

    def _cancel_sample(self, generation: Generation, place: int, sample: int) -> None:
        # After an error of the engine there is nothing left to cancel.
        if generation in self._numbers:
            self._engine.cancel(self._numbers[generation][place], sample)

    def _step(self) -> None:
        try:
            events = self._engine.step()
        except Exception as error:
            # Logits that are not finite, or too little memory. Which request is at fault is not known.
            print(f"error: the engine failed: {describe_failure(error)}", file=sys.stderr, flush=True)
            self._give_up(ApiError(500, f"the engine failed: {error}", code="engine_failed"))
            self._engine = self._make_engine()
            return
        now = time.monotonic()
        batch: dict[Generation, list[Numbered]] = {}
        for event in events:
            if (progress := self._progress.get(event.request)) is not None:
                progress.note(event, now)
                batch.setdefault(progress.generation, []).append((progress.place, event))
        if batch:
            self._call(self._deliver, list(batch.items()))

    def _give_up(self, error: ApiError) -> None:
        """Have everything that is in the engine fail."""
        self._call(self._fail, list(self._numbers), error)
        self._numbers.clear()
        self._progress.clear()

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        """Call a function in the event loop."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(function, *arguments)
