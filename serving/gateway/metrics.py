"""The metrics that Prometheus scrapes at /metrics. Labels are names from routes, never text that a client sent."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """The metrics of one gateway, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        common: dict[str, Any] = {"registry": self._registry, "namespace": "overnight"}
        version = ("endpoint", "version")
        self.requests = Counter("requests", "Requests by the status of their answer.", ("endpoint", "status"), **common)
        self.rows = Counter("rows", "Rows of requests that a version answered.", version, **common)
        self.answers = Counter("answers", "Answers of versions by status.", (*version, "status"), **common)
        self.seconds = Histogram("request_seconds", "Arrival to answer.", ("endpoint",), buckets=_SECONDS, **common)
        self.upstream_seconds = Histogram(
            "upstream_seconds", "Seconds that a version took to answer.", version, buckets=_SECONDS, **common
        )
        self.in_flight = Gauge("in_flight", "Requests that the model servers have.", ("endpoint",), **common)
        self.queued = Gauge("queued", "Requests that wait for a model server.", ("endpoint",), **common)
        self.loaded = Gauge("awake", "Whether the models are loaded.", ("endpoint",), **common)
        self.load_seconds = Histogram("wake_seconds", "Loading models for a request.", ("endpoint",), **common)
        self.shadows = Counter("shadows", "Answers of the shadow by comparison.", ("endpoint", "compared"), **common)
        self.verdicts = Counter("verdicts", "Canaries that ended.", ("endpoint", "outcome"), **common)
        self.fallbacks = Counter(
            "fallbacks", "Requests that a canary failed and another version answered.", ("endpoint",), **common
        )
        self.metering_lost = Gauge("metering_lost", "Requests missing from the metering log.", **common)

    def remove_endpoint(self, endpoint: str) -> None:
        """Remove every series of an endpoint that was deleted."""
        for metric in vars(self).values():
            if "endpoint" in getattr(metric, "_labelnames", ()):
                metric.remove_by_labels({"endpoint": endpoint})

    def render(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self._registry)
