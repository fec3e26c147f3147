"""What Prometheus reads and the log line says are the counts of what was emitted."""

from __future__ import annotations

import socket
import urllib.request

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import BadInput
from serving.model.batching import BatchingConfig
from tasks.stream.report import StreamMetrics, Totals, format_progress, serve_metrics
from tasks.stream.score import ScoredBatch
from tests.tasks.stream.messages import json_row, message, score


def collect_samples(metrics: StreamMetrics) -> dict[str, float]:
    return {
        sample.name + "".join(sample.labels.values()): sample.value
        for family in metrics.collect()
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


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99]))
def test_a_quantile_of_the_latency_is_right_within_its_bin(late: list[float], quantile: float) -> None:
    metrics = StreamMetrics(lag=lambda: None)
    messages = tuple(message(b"", number, event_time=-seconds) for number, seconds in enumerate(late))
    metrics.count_emitted([ScoredBatch(messages=messages)], 0, 0.0, 0.0)
    exact = np.quantile(late, quantile, method="inverted_cdf")

    assert exact * 0.999 <= metrics.latency(quantile) <= exact * 1.13


def test_an_event_ahead_of_the_clock_has_no_latency() -> None:
    metrics = StreamMetrics(lag=lambda: None)
    metrics.count_emitted(
        [ScoredBatch(messages=(message(b"", event_time=100.0), message(b"", event_time=10.5)))], 0, 0.0, 10.0
    )

    assert 1 == metrics.totals.events_ahead
    assert 0.001 > metrics.latency(1.0)
    assert -1 == collect_samples(metrics)["overnight_stream_lag_messages"]


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


def test_the_progress_line_counts_since_the_last_one() -> None:
    metrics = StreamMetrics(lag=lambda: 1234)
    before = metrics.totals
    metrics.count_emitted([score([json_row(1), json_row(2), message(b"no", 3)])], 1, 0.5, 1.0)

    assert (
        "3 messages, 2 rows (1 a second), lag 1,234, 2 rows a batch of at most 8, p99 1 s, 1 dead letters, 0 rejects, "
        "0 events ahead of clock"
    ) == format_progress(before, metrics, 2.0, BatchingConfig(batch_size_max=8, wait_ms_max=100))
