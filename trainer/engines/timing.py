"""Times the phases of a step on the device, without synchronising between them."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import torch

T = TypeVar("T")

# The phases of an engine's step. metrics.jsonl calls them `forward_backward_seconds` and so on.
PHASES = ("forward_backward", "reduce", "optimizer")


@dataclass(frozen=True)
class _Span:
    name: str
    outer: str | None
    start: Any
    end: Any


class PhaseTimer:
    """Measures seconds per phase. Phases may nest; an inner phase's time is not counted in the outer one.

    On a GPU the timer records events in the current stream and reads them at the end of the step. Work on another
    stream counts only where this stream waits for it. On a CPU the timer reads the clock.

    Args:
        device: Device that computes the step.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._open: list[str] = []
        self._spans: list[_Span] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the enclosed block as a phase."""
        outer = self._open[-1] if self._open else None
        self._open.append(name)
        start = self._mark()
        try:
            yield
        finally:
            self._open.pop()
            self._spans.append(_Span(name, outer, start, self._mark()))

    def timed(self, name: str, function: Callable[..., T]) -> Callable[..., T]:
        """Wrap a function so that each call is timed as a phase."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> T:
            with self.phase(name):
                return function(*args, **kwargs)

        return call

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> dict[str, float]:
        """Return seconds per phase of PHASES since the last call. Synchronises the device once."""
        spans, self._spans = self._spans, []
        if self._on_gpu and spans:
            # The spans' events are in stream order: the last end covers all of them.
            spans[-1].end.synchronize()
        seconds: Counter[str] = Counter()
        for span in spans:
            # CUDA events report milliseconds.
            elapsed = span.start.elapsed_time(span.end) / 1e3 if self._on_gpu else span.end - span.start
            seconds[span.name] += elapsed
            if span.outer is not None:
                seconds[span.outer] -= elapsed
        return {name: float(seconds[name]) for name in PHASES}
