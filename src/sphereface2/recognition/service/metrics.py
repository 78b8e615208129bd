"""Counters and timings in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """One registry an application."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        counter = partial(Counter, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        self.requests = counter(
            "sphereface2_requests", "Requests answered.", ["route", "method", "status"]
        )
        self.seconds = histogram(
            "sphereface2_request_seconds",
            "From the first byte of a request to the last of its answer.",
            ["route"],
            buckets=_SECONDS,
        )
        self.refused = counter(
            "sphereface2_refused", "Requests refused, by the code of the error.", ["code"]
        )
        self._batch = histogram(
            "sphereface2_batch_size", "Faces in one forward pass.", buckets=_SIZES
        )
        self._forward = histogram(
            "sphereface2_forward_seconds", "One forward pass.", buckets=_SECONDS
        )

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A gauge that is read when somebody asks."""
        Gauge(name, text, registry=self.registry).set_function(value)

    def batch(self, size: int, seconds: float) -> None:
        """Count one forward pass."""
        self._batch.observe(size)
        self._forward.observe(seconds)
