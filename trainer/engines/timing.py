"""Where the time of a step goes: seconds of its phases, measured on the device without stopping it in between."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import torch

T = TypeVar("T")

# Of an engine's step, in metrics.jsonl as `forward_backward_seconds` and so on.
PHASES = ("forward_backward", "reduce", "optimizer")


@dataclass(frozen=True)
class _Span:
    name: str
    outer: str | None
    start: Any
    end: Any


class PhaseTimer:
    """Seconds of phases, which may lie in one another: the inner one's are then not the outer one's.

    On a GPU events are recorded in its stream between the kernels, and read at the end of the step; what another stream
    does meanwhile counts where this one waits for it. On a CPU the clock is read.

    Args:
        device: Where the step is computed.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._open: list[str] = []
        self._spans: list[_Span] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what is in the block."""
        outer = self._open[-1] if self._open else None
        self._open.append(name)
        start = self._mark()
        try:
            yield
        finally:
            self._open.pop()
            self._spans.append(_Span(name, outer, start, self._mark()))

    def timed(self, name: str, function: Callable[..., T]) -> Callable[..., T]:
        """The function, each of whose calls is a phase."""

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
        """Seconds of each of PHASES since the last call. Waits for the device, once, to have come to the end of all."""
        spans, self._spans = self._spans, []
        if self._on_gpu and spans:
            spans[-1].end.synchronize()
        seconds: Counter[str] = Counter()
        for span in spans:
            elapsed = span.start.elapsed_time(span.end) / 1e3 if self._on_gpu else span.end - span.start
            seconds[span.name] += elapsed
            if span.outer is not None:
                seconds[span.outer] -= elapsed
        return {name: float(seconds[name]) for name in PHASES}
