"""What the report and the log line say are the counts of what was emitted."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from serving.model.batching import BatchingConfig
from tasks.stream.report import StreamMetrics, format_progress
from tasks.stream.score import ScoredBatch
from tests.tasks.stream.messages import json_row, message, score


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


def test_the_progress_line_counts_since_the_last_one() -> None:
    metrics = StreamMetrics(lag=lambda: 1234)
    before = metrics.totals
    metrics.count_emitted([score([json_row(1), json_row(2), message(b"no", 3)])], 1, 0.5, 1.0)

    assert (
        "3 messages, 2 rows (1 a second), lag 1,234, 2 rows a batch of at most 8, p99 1 s, 1 dead letters, 0 rejects, "
        "0 events ahead of clock"
    ) == format_progress(before, metrics, 2.0, BatchingConfig(batch_size_max=8, wait_ms_max=100))
