"""Figures of the server for Prometheus (https://prometheus.io/docs/instrumenting/exposition_formats)."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_SECONDS_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.0, 2.0)


class Metrics:
    """Counters, gauges and histograms of one server.

    Attributes:
        requests: Requests by endpoint and status; 499 counts clients that left before the end.
        prompt_tokens: Tokens of the prompts that were taken on.
        new_tokens: Tokens drawn.
        first_token: Seconds from a prompt's submission to its first token.
        per_token: Seconds between two tokens of a choice, on average over the choice.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self.requests = Counter(
            "spiketrain_requests", "Requests, by endpoint and status", ["endpoint", "status"], registry=self._registry
        )
        self.prompt_tokens = self._counter("spiketrain_prompt_tokens", "Tokens of the prompts that were taken on")
        self.new_tokens = self._counter("spiketrain_generated_tokens", "Tokens drawn")
        self.first_token = self._histogram(
            "spiketrain_time_to_first_token_seconds", "From submission of a prompt to its first token", _SECONDS
        )
        self.per_token = self._histogram(
            "spiketrain_time_per_token_seconds", "Between two tokens, the mean of each choice", _SECONDS_PER_TOKEN
        )

    def watch(self, name: str, description: str, read: Callable[[], float]) -> None:
        """Add a gauge that calls `read` whenever the figures are asked for."""
        Gauge(f"spiketrain_{name}", description, registry=self._registry).set_function(read)

    def text(self) -> bytes:
        """All figures in Prometheus' text format, version 0.0.4."""
        return generate_latest(self._registry)

    def _counter(self, name: str, description: str) -> Counter:
        return Counter(name, description, registry=self._registry)

    def _histogram(self, name: str, description: str, bounds: tuple[float, ...]) -> Histogram:
        return Histogram(name, description, buckets=bounds, registry=self._registry)
