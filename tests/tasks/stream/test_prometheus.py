"""What Prometheus reads are the counts of what was emitted."""

from __future__ import annotations

import socket
import urllib.request

import pytest

from serving.errors import BadInput
from tasks.stream.prometheus import StreamCollector, serve_metrics
from tasks.stream.report import StreamMetrics, Totals
from tests.tasks.stream.messages import json_row, message, score


def collect_samples(metrics: StreamMetrics) -> dict[str, float]:
    return {
        sample.name + "".join(sample.labels.values()): sample.value
        for family in StreamCollector(metrics).collect()
        for sample in family.samples
    }


def test_everything_that_was_emitted_is_counted() -> None:
    metrics = StreamMetrics(lag=lambda: 7)
    metrics.count_emitted(
        [score([json_row(1), message(b"no", 2)]), score([json_row(3), json_row(4, a=None)])], 2, 0.5, 10.0
    )
    found = collect_samples(metrics)

    assert Totals(messages=4, rows=3, rejects=1, dead_lettered=2, batches=2) == metrics.totals
    assert (4, 3, 1, 2, 7) == tuple(
        found[f"overnight_stream_{name}"]
        for name in ("messages_total", "rows_total", "rejects_total", "dead_letters_total", "lag_messages")
    )
    assert (1, 2) == (found["overnight_stream_batch_rows_bucket1"], found["overnight_stream_batch_rows_bucket4"])
    assert (0, 4) == (
        found["overnight_stream_latency_seconds_bucket5"],
        found["overnight_stream_latency_seconds_bucket10"],
    )
    assert 2 == len(metrics.batch_timings)


def test_a_lag_that_is_not_known_is_minus_one() -> None:
    assert -1 == collect_samples(StreamMetrics(lag=lambda: None))["overnight_stream_lag_messages"]


def test_the_metrics_are_served_on_loopback_and_a_port_that_is_taken_is_named() -> None:
    with serve_metrics(StreamMetrics(lag=lambda: 3), 0) as port:
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with (
            pytest.raises(BadInput, match=r"metrics_port must be free on loopback, got \d+: .*in use"),
            serve_metrics(StreamMetrics(lag=lambda: 3), taken.getsockname()[1]),
        ):
            pass

    assert "overnight_stream_lag_messages 3.0" in page
