"""What Prometheus scrapes at /metrics. Labels are names that a route has, never what a client sent."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """The metrics of one gateway, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        named: dict[str, Any] = {"registry": self._registry, "namespace": "overnight"}
        version = ("endpoint", "version")
        self.requests = Counter("requests", "Requests by the status of their answer.", ("endpoint", "status"), **named)
        self.rows = Counter("rows", "Rows of requests that a version answered.", version, **named)
        self.answers = Counter("answers", "Answers of versions by status.", (*version, "status"), **named)
        self.seconds = Histogram("request_seconds", "Arrival to answer.", ("endpoint",), buckets=_SECONDS, **named)
        self.upstream_seconds = Histogram(
            "upstream_seconds", "What a version took to answer.", version, buckets=_SECONDS, **named
        )
        self.in_flight = Gauge("in_flight", "Requests that are with the servers.", ("endpoint",), **named)
        self.queued = Gauge("queued", "Requests that wait.", ("endpoint",), **named)
        self.awake = Gauge("awake", "Whether the models are loaded.", ("endpoint",), **named)
        self.wakes = Histogram("wake_seconds", "Loading models for a request.", ("endpoint",), **named)
        self.shadows = Counter("shadows", "Answers of the shadow, compared.", ("endpoint", "compared"), **named)
        self.verdicts = Counter("verdicts", "Trials that ended.", ("endpoint", "outcome"), **named)
        self.fallbacks = Counter(
            "fallbacks", "Requests that a version on trial failed and another answered.", ("endpoint",), **named
        )
        self.metering_lost = Gauge("metering_lost", "Requests missing from the metering log.", **named)

    def forget(self, endpoint: str) -> None:
        """Drop what is known of an endpoint that is there no more."""
        for each in vars(self).values():
            if "endpoint" in getattr(each, "_labelnames", ()):
                each.remove_by_labels({"endpoint": endpoint})

    def page(self) -> bytes:
        """Return the page in Prometheus's text format."""
        return generate_latest(self._registry)
