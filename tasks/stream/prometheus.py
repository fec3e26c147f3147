"""The metrics of a stream for Prometheus, served on loopback."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from tasks.common.metrics import serve_registry
from tasks.stream.report import StreamMetrics


class StreamCollector(Collector):
    """What Prometheus collects of a stream."""

    def __init__(self, metrics: StreamMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        """Return everything as metrics of Prometheus."""
        counts, lag = self._metrics.read_counts(), self._metrics.lag()
        totals = counts.totals
        counters = [
            ("messages", totals.messages, "Messages that were scored and emitted, or went to the dead letters."),
            ("rows", totals.rows, "Rows that were read from them."),
            ("rejects", totals.rejects, "Rows without a prediction."),
            ("dead_letters", totals.dead_lettered, "Messages that went to the dead letters."),
            ("events_ahead", totals.events_ahead, "Messages whose event is ahead of this machine's clock."),
        ]
        return [
            *(CounterMetricFamily(f"overnight_stream_{name}", words, value=value) for name, value, words in counters),
            HistogramMetricFamily(
                "overnight_stream_latency_seconds",
                "From event to emit.",
                buckets=counts.latency_buckets,
                sum_value=counts.latency_sum,
            ),
            HistogramMetricFamily(
                "overnight_stream_batch_rows",
                "Rows of a micro-batch.",
                buckets=counts.rows_buckets,
                sum_value=float(totals.rows),
            ),
            GaugeMetricFamily(
                "overnight_stream_lag_messages",
                "Messages that wait in the source; -1 while that is not known.",
                value=-1 if lag is None else lag,
            ),
        ]


@contextmanager
def serve_metrics(metrics: StreamMetrics, port: int) -> Generator[int]:
    """Serve the metrics for Prometheus on loopback while the block runs; yields the port.

    Raises:
        BadInput: The port is taken.
    """
    registry = CollectorRegistry()
    registry.register(StreamCollector(metrics))
    with serve_registry(registry, port, "metrics_port") as served:
        yield served
