"""How many instances a queue asks for."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.model.batching import BatchingConfig
from serving.model.release import Scaling
from serving.targets.triton_autoscale import (
    InstanceScaler,
    QueueStats,
    TritonCounters,
    choose_instance_count,
    measure_queue,
    parse_counters,
)

BATCHING = BatchingConfig(batch_size_max=8, wait_ms_max=5)
SCALING = Scaling(replicas_min=1, replicas_max=4)
METRICS = """
# HELP nv_inference_request_success Number of successful inference requests, all batch sizes
# TYPE nv_inference_request_success counter
nv_inference_request_success{model="fraud",version="1"} 30
nv_inference_request_success{model="fraud",version="2"} 10
nv_inference_request_success{model="words",version="1"} 5000
nv_inference_exec_count{model="fraud",version="1"} 20
nv_inference_queue_duration_us{model="fraud",version="1"} 400000
nv_inference_compute_infer_duration_us{model="fraud",version="1"} 1.2e+06
nv_inference_pending_request_count{model="fraud",version="2"} 3
"""


def queue(wait_ms: float = 0, pass_ms: float = 10, busy: float = 0, pending: int = 0) -> QueueStats:
    return QueueStats(wait_ms=wait_ms, pass_ms=pass_ms, busy=busy, pending=pending)


def test_the_counters_of_an_endpoint_are_the_sums_over_its_versions_and_models() -> None:
    counters = parse_counters(METRICS, {"fraud"})

    assert TritonCounters(requests=40, passes=20, queued_us=400_000, computed_us=1_200_000, pending=3) == counters
    assert TritonCounters() == parse_counters(METRICS, {"other"})
    assert 5040 == parse_counters(METRICS, {"fraud", "words"}).requests


def test_what_requests_met_is_counted_between_two_looks() -> None:
    before = TritonCounters(requests=10, passes=5, queued_us=100_000, computed_us=200_000)
    now = TritonCounters(requests=30, passes=15, queued_us=300_000, computed_us=600_000, pending=2)

    assert queue(wait_ms=10, pass_ms=20, busy=0.1, pending=2) == measure_queue(before, now, 2.0)
    assert queue(pass_ms=0, pending=2) == measure_queue(now, now, 2.0)


def test_a_model_that_was_loaded_again_counts_from_zero() -> None:
    before, now = TritonCounters(requests=500, passes=500), TritonCounters(requests=10, passes=10, queued_us=50_000)

    assert 5 == measure_queue(before, now, 1.0).wait_ms


@pytest.mark.parametrize(
    ("measured", "instances", "idle_checks", "expected"),
    [
        (queue(wait_ms=16, busy=1.0), 1, 0, 2),
        (queue(wait_ms=16, busy=0.5), 1, 0, 1),
        (queue(wait_ms=14, busy=1.0), 1, 0, 1),
        (queue(wait_ms=0, busy=0.9, pending=9), 1, 0, 2),
        (queue(wait_ms=0, busy=1.9, pending=9), 2, 0, 2),
        (queue(wait_ms=900, busy=4.0, pending=99), 4, 0, 4),
        (queue(busy=0.4), 2, 3, 1),
        (queue(busy=0.4), 2, 2, 2),
        (queue(busy=0.6), 2, 9, 2),
        (queue(busy=1.4), 4, 3, 3),
        (queue(), 1, 9, 1),
        (queue(), 7, 0, 4),
    ],
)
def test_more_for_requests_that_wait_and_less_once_it_is_calm(
    measured: QueueStats, instances: int, idle_checks: int, expected: int
) -> None:
    assert expected == choose_instance_count(
        measured, instances, scaling=SCALING, batching=BATCHING, idle_checks=idle_checks
    )


@given(
    st.builds(queue, st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 1e3), st.integers(0, 10**6)),
    st.integers(1, 64),
    st.integers(0, 64),
    st.integers(1, 64),
)
def test_there_are_never_more_or_less_than_the_bounds(
    measured: QueueStats, instances: int, low: int, high: int
) -> None:
    scaling = Scaling(replicas_min=low, replicas_max=high)
    expected = choose_instance_count(measured, instances, scaling=scaling, batching=BATCHING)

    assert max(1, low) <= expected <= max(1, low, high)


class Asked:
    """A host of one model that keeps which instances it was to restart."""

    def __init__(self) -> None:
        self.known: list[set[str]] = []

    def list_models(self, _endpoint: str) -> set[str]:
        return {"words"}

    def restart_dead_instances(self, _endpoint: str, known: set[str]) -> bool:
        self.known.append(known)
        return bool(known)


def failures(backend: int, cancelled: int, passes: int) -> str:
    return (
        f'nv_inference_request_failure{{model="words",reason="BACKEND",version="1"}} {backend}\n'
        f'nv_inference_request_failure{{model="words",reason="CANCELED",version="1"}} {cancelled}\n'
        f'nv_inference_exec_count{{model="words",version="1"}} {passes}\n'
    )


@pytest.mark.parametrize(
    ("metrics", "known", "restarts"),
    [
        (failures(1, 0, 7), [], 0),
        (failures(1, 9, 7), [], 0),
        (failures(2, 0, 8), [set()], 0),
        (failures(2, 0, 7), [{"words"}], 1),
    ],
    ids=["nothing failed", "requests were cancelled", "the model failed", "no pass ended"],
)
def test_an_instance_is_dead_where_requests_fail_and_no_pass_ends(
    metrics: str, known: list[set[str]], restarts: int
) -> None:
    host: Any = Asked()
    scaler = InstanceScaler(host=host, metrics_url="", endpoint="words", scaling=SCALING, batching=BATCHING)
    first, second = scaler.restart_dead(failures(1, 0, 7)), scaler.restart_dead(metrics)

    assert (False, bool(restarts)) == (first, second)
    assert known == host.known
    assert restarts == scaler.restarts
