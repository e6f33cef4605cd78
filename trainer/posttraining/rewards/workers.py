"""A pool of processes that score answers, each of which can be killed.

A reward runs code that nobody has checked on text that a model has written: it hangs, crashes and fills the memory. So
each worker is a process of its own, started afresh and never forked from this one. It scores one answer at a time
within a limit of wall time. One that passes a limit or ends is killed with its process group and replaced; the answer
is worth 0, with the kind of error. Workers answer in lines of JSON of limited length, so nothing that they write is
ever executed here or fills this process's memory.

A thread attends to the workers, so answers are scored while the caller goes on. All workers end when the pool is
closed, when the interpreter exits, and, on Linux by the kernel, when this process dies in any way.
"""

import atexit
import json
import logging
import math
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeGuard

import trainer
from trainer.errors import ConfigError
from trainer.posttraining.rewards.base import ERRORS, MOST_CHARACTERS, MOST_PARTS, Answer, Score
from trainer.posttraining.rewards.registry import RewardConfig, check
from trainer.posttraining.rewards.weighted import weighted_sum

_LOG = logging.getLogger(__name__)

# Bytes of a worker's line, beyond which it is killed.
_MOST_LINE_BYTES = 1 << 16
_CHUNK = 1 << 16
# Loading may import torch from a cold disk.
_SECONDS_TO_LOAD = 120.0
# Workers in a row that end while they load before the pool gives up.
_MOST_FAILURES = 3
_SECONDS_TO_CLOSE = 10.0


class Batch:
    """Answers that are being scored."""

    def __init__(self, answers: int, rewards: Sequence[RewardConfig]) -> None:
        self._rewards = rewards
        self._scores: list[list[Score | None]] = [[None] * len(rewards) for _ in range(answers)]
        self._left = answers * len(rewards)
        self._ended = threading.Event()
        self._failure: str | None = None
        if not self._left:
            self._ended.set()

    @property
    def is_done(self) -> bool:
        """Whether all answers have their scores."""
        return self._ended.is_set()

    def result(self, timeout: float | None = None) -> list[Score]:
        """Wait for the scores, in the order of the answers.

        Args:
            timeout: Longest wait in seconds; None waits as long as the rewards' limits allow.

        Raises:
            TimeoutError: they are not all there.
            RuntimeError: the pool was closed or has failed.
        """
        if not self._ended.wait(timeout):
            raise TimeoutError(f"{self._left} scores are missing after {timeout} s")
        if self._failure is not None:
            raise RuntimeError(self._failure)
        return [self._combined(scores) for scores in self._scores]

    def _combined(self, scores: Sequence[Score | None]) -> Score:
        by_label = {config.shown: score for config, score in zip(self._rewards, scores) if score is not None}
        if len(self._rewards) == 1:
            (score,) = by_label.values()
            return replace(score, value=self._rewards[0].weight * score.value)
        return weighted_sum(by_label, {config.shown: config.weight for config in self._rewards})

    def _set(self, answer: int, reward: int, score: Score) -> None:
        self._scores[answer][reward] = score
        self._left -= 1
        if not self._left:
            self._ended.set()

    def _fail(self, reason: str) -> None:
        if not self.is_done:
            self._failure = reason
            self._ended.set()


@dataclass
class _Task:
    batch: Batch
    place: int
    reward: int
    answer: Answer


@dataclass(eq=False)
class _Worker:
    """A process, its pipes, and what it is doing until when."""

    process: subprocess.Popen[bytes]
    requests: int
    results: int
    folder: str
    deadline: float
    outgoing: bytearray
    incoming: bytearray = field(default_factory=bytearray)
    is_ready: bool = False
    task: _Task | None = None
    number: int = 0


class RewardPool:
    """Scores answers by one reward, or by the weighted sum of several.

    Every reward of an answer is scored by itself: an error of one leaves the others' values. Use it as a context, or
    close it.

    Args:
        rewards: The rewards.
        workers: Processes.
        most_characters: Longer prompts and completions lose their beginning before they are scored.

    Raises:
        ConfigError: a reward cannot be made; nothing is left running.
    """

    def __init__(self, rewards: Sequence[RewardConfig], workers: int = 2, most_characters: int = 1 << 17) -> None:
        if workers < 1 or most_characters < 1:
            raise ConfigError("workers and most_characters must be at least 1")
        check(rewards)
        self._rewards, self._most_characters = list(rewards), most_characters
        self._errors: dict[str, Counter[str]] = {config.shown: Counter() for config in rewards}
        self._replaced = self._cut = 0
        self._messages: dict[str, str] = {}
        self._lock = threading.Lock()
        self._waiting: deque[_Task] = deque()
        self._workers: set[_Worker] = set()
        self._started = threading.Event()
        self._failure: str | None = None
        self._is_closing = self._has_ended = False
        self._owner = os.getpid()
        self._folder = tempfile.mkdtemp(prefix="rewards-")
        os.chmod(self._folder, 0o711)
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        # The kernel ends workers with the thread that has started them, so one thread starts all.
        self._thread = threading.Thread(target=self._run, args=(workers,), name="rewards", daemon=True)
        self._thread.start()
        # The registry of exits must not keep a pool alive.
        this = weakref.ref(self)
        self._at_exit = lambda: None if (pool := this()) is None else pool.close()
        atexit.register(self._at_exit)
        self._started.wait()
        if self._failure is not None:
            self.close()
            raise ConfigError(self._failure)

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    @property
    def errors(self) -> dict[str, dict[str, int]]:
        """How many answers of each reward had each kind of error, by the rewards' labels."""
        with self._lock:
            return {label: dict(counter) for label, counter in self._errors.items()}

    @property
    def messages(self) -> dict[str, str]:
        """The last message of each kind of error, to find out what is wrong."""
        with self._lock:
            return dict(self._messages)

    @property
    def replaced(self) -> int:
        """Workers that were replaced."""
        return self._replaced

    @property
    def cut(self) -> int:
        """Answers that were too long and lost their beginning."""
        return self._cut

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.process.pid for worker in list(self._workers)]

    def submit(self, answers: Sequence[Answer]) -> Batch:
        """Begin to score answers, behind those that were submitted before.

        Args:
            answers: The answers.

        Returns:
            What their scores can be had of, at once.

        Raises:
            TypeError: an answer holds what JSON cannot.
            RuntimeError: the pool was closed or has failed.
        """
        shortened = [self._shortened(answer) for answer in answers]
        for answer in shortened:
            json.dumps([answer.ground_truth, answer.extra])
        batch = Batch(len(answers), self._rewards)
        with self._lock:
            if self._is_closing or self._failure is not None:
                raise RuntimeError(self._failure or "the pool is closed")
            for place, answer in enumerate(shortened):
                self._waiting += [_Task(batch, place, reward, answer) for reward in range(len(self._rewards))]
            self._wake()
        return batch

    def score(self, answers: Sequence[Answer]) -> list[Score]:
        """Submit answers and wait for their scores, in the same order."""
        return self.submit(answers).result()

    def close(self) -> None:
        """Kill all workers. Batches that are not done fail. May be called again."""
        # A fork of this process has neither the thread nor the workers.
        if os.getpid() != self._owner:
            return
        atexit.unregister(self._at_exit)
        with self._lock:
            self._is_closing = True
            # Under the lock: the thread closes the pipe at its end.
            self._wake()
        self._thread.join(_SECONDS_TO_CLOSE)

    def _shortened(self, answer: Answer) -> Answer:
        most = self._most_characters
        if len(answer.completion) <= most and len(answer.prompt) <= most:
            return answer
        self._cut += 1
        return replace(answer, prompt=answer.prompt[-most:], completion=answer.completion[-most:])

    def _wake(self) -> None:
        """Wake the pool's thread; under the lock."""
        # A pipe that is full wakes it as well.
        if not self._has_ended:
            with suppress(BlockingIOError):
                os.write(self._wake_write, b".")

    # The rest runs in the pool's thread.

    def _run(self, workers: int) -> None:
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._count = self._failed_to_load = 0
        try:
            for _ in range(workers):
                self._start()
            while not self._is_closing and self._failure is None:
                self._step()
        # Whatever it is, nobody may wait for ever.
        except BaseException as error:
            self._failure = f"the pool of rewards has failed: {type(error).__name__}: {error}"
            _LOG.exception("the pool of rewards has failed")
        finally:
            self._end()

    def _end(self) -> None:
        reason = self._failure or "the pool was closed before the answer was scored"
        with self._lock:
            left = list(self._waiting)
            self._waiting.clear()
            self._is_closing = True
        for worker in list(self._workers):
            if worker.task is not None:
                left.append(worker.task)
            self._kill(worker)
        for task in left:
            task.batch._fail(reason)
        self._selector.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        with self._lock:
            self._has_ended = True
            os.close(self._wake_read)
            os.close(self._wake_write)
        self._started.set()

    def _start(self) -> None:
        """Start a worker; it is ready when it says so."""
        # Its temporary files go with it, and are not left to it. Programs in the sandbox may not be this user.
        folder = tempfile.mkdtemp(prefix="worker-", dir=self._folder)
        os.chmod(folder, 0o711)
        read_end, write_end = os.pipe()
        root = str(Path(trainer.__file__).parents[1])
        paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "trainer.posttraining.rewards.worker", str(write_end)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(write_end,),
                # Its own session, so its own group, and no terminal. No GPU: it would take memory of it.
                start_new_session=True,
                env=os.environ
                | {"PYTHONPATH": os.pathsep.join(paths), "TMPDIR": folder}
                | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            )
        finally:
            os.close(write_end)
        assert process.stdin is not None
        first = {
            "parent": os.getpid(),
            "path": [root, *(path for path in sys.path if path != root)],
            "rewards": [asdict(config) for config in self._rewards],
        }
        worker = _Worker(
            process,
            process.stdin.fileno(),
            read_end,
            folder,
            time.monotonic() + _SECONDS_TO_LOAD,
            bytearray(json.dumps(first).encode() + b"\n"),
        )
        os.set_blocking(worker.requests, False)
        os.set_blocking(read_end, False)
        self._workers.add(worker)
        self._selector.register(read_end, selectors.EVENT_READ, worker)
        self._selector.register(worker.requests, selectors.EVENT_WRITE, worker)

    def _step(self) -> None:
        """Wait for the next event, and deal with all that have happened."""
        self._hand_out()
        next_end = min((worker.deadline for worker in self._workers), default=math.inf)
        wait = None if next_end == math.inf else max(0.0, next_end - time.monotonic())
        for key, _ in self._selector.select(wait):
            if key.data is None:
                with suppress(BlockingIOError):
                    os.read(self._wake_read, _CHUNK)
            # It may have been killed by an event before.
            elif key.data in self._workers:
                self._attend(key.data, key.fd)
        now = time.monotonic()
        for worker in [worker for worker in self._workers if worker.deadline <= now]:
            self._lose(worker, "timeout", "it took longer than its limit")

    def _hand_out(self) -> None:
        for worker in self._workers:
            if worker.is_ready and worker.task is None:
                with self._lock:
                    if not self._waiting:
                        return
                    worker.task = self._waiting.popleft()
                self._count += 1
                worker.number = self._count
                answer = asdict(worker.task.answer)
                request = {"id": worker.number, "reward": worker.task.reward, "answer": answer}
                worker.outgoing += json.dumps(request).encode() + b"\n"
                worker.deadline = time.monotonic() + self._rewards[worker.task.reward].seconds
                self._selector.register(worker.requests, selectors.EVENT_WRITE, worker)

    def _attend(self, worker: _Worker, descriptor: int) -> None:
        """Write to a worker, or read from it."""
        try:
            if descriptor == worker.requests:
                del worker.outgoing[: os.write(descriptor, worker.outgoing[:_CHUNK])]
                if not worker.outgoing:
                    self._selector.unregister(descriptor)
                return
            content = os.read(descriptor, _CHUNK)
        except BlockingIOError:
            return
        except OSError:
            content = b""
        if not content:
            self._lose(worker, "crash", "its worker ended")
            return
        worker.incoming += content
        line, found, rest = worker.incoming.partition(b"\n")
        if len(line) > _MOST_LINE_BYTES:
            self._lose(worker, "limit", f"its score is longer than {_MOST_LINE_BYTES} bytes")
        elif found:
            worker.incoming = bytearray()
            # One line for each request: whatever else comes was not asked for.
            self._take(worker, {} if rest else _parsed(line))

    def _take(self, worker: _Worker, line: dict[str, Any]) -> None:
        """Take a worker's line."""
        if not worker.is_ready:
            if line.get("ready") is True:
                worker.is_ready, worker.deadline = True, math.inf
                self._failed_to_load = 0
                self._started.set()
            elif isinstance(line.get("failure"), str):
                self._failure = " ".join(line["failure"].split())
            else:
                self._lose(worker, "crash", "it wrote what is no line of a worker")
            return
        score = _as_score(line, worker.number)
        if worker.task is None or score is None:
            self._lose(worker, "crash", "it wrote what is no score")
            return
        task, worker.task, worker.deadline = worker.task, None, math.inf
        message = line.get("message")
        self._finish(task, score, message if isinstance(message, str) else "")
        # The reward itself ran out of memory: what is left of it is not known.
        if line.get("exhausted") is True:
            self._lose(worker, "memory", "")

    def _lose(self, worker: _Worker, kind: str, message: str) -> None:
        """Kill a worker and start another; its task, if it has one, is worth 0."""
        self._kill(worker)
        if worker.task is not None:
            self._finish(worker.task, Score(error=kind), message)
        if not worker.is_ready:
            self._failed_to_load += 1
            if self._failed_to_load >= _MOST_FAILURES:
                self._failure = (
                    f"rewards: {_MOST_FAILURES} workers in a row ended while they loaded their rewards ({kind}); "
                    "import them by hand to see why"
                )
                return
        self._replaced += 1
        self._start()

    def _finish(self, task: _Task, score: Score, message: str) -> None:
        if score.error is not None:
            with self._lock:
                self._errors[self._rewards[task.reward].shown][score.error] += 1
                self._messages[score.error] = message
        task.batch._set(task.place, task.reward, score)

    def _kill(self, worker: _Worker) -> None:
        """Kill a worker's process group and take it out of the pool."""
        self._workers.discard(worker)
        # Until it is waited for, its number and its group are nobody else's.
        with suppress(ProcessLookupError):
            os.killpg(worker.process.pid, signal.SIGKILL)
        for descriptor in (worker.requests, worker.results):
            with suppress(KeyError):
                self._selector.unregister(descriptor)
        os.close(worker.results)
        assert worker.process.stdin is not None
        worker.process.stdin.close()
        worker.process.wait()
        shutil.rmtree(worker.folder, ignore_errors=True)


def _parsed(line: bytes | bytearray) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _as_score(line: dict[str, Any], number: int) -> Score | None:
    """The score of a line; None if it is none of the task of this number."""
    value, parts, error = line.get("value"), line.get("parts"), line.get("error")
    if line.get("id") != number or not _is_number(value) or not isinstance(parts, dict) or len(parts) > MOST_PARTS:
        return None
    if not all(len(name) <= MOST_CHARACTERS and _is_number(part) for name, part in parts.items()):
        return None
    if error is not None and (not isinstance(error, str) or error not in ERRORS):
        return None
    text = line.get("text")
    return Score(
        float(value), {name: float(part) for name, part in parts.items()}, error, text if isinstance(text, str) else ""
    )


def _is_number(value: Any) -> TypeGuard[float]:
    # Integers may be too large to be compared with a float.
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False
