from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule

from serving.errors import BadInput
from tasks.endpoint.spec import BentoML
from tasks.scheduler.effect import (
    Standing,
    batch_deployment,
    check_terms,
    endpoint_spec,
    standing_of,
    stream_deployment,
    tags_of,
)
from tasks.scheduler.terms import BatchTerms, OnlineTerms, StreamTerms, Terms
from tasks.scheduler.workload import Table
from tasks.spot.purchase import PurchaseOptions
from tasks.stream.options import FromNats, ToParts
from tests.tasks.scheduler.decisions import BACKFILL, EVENTS, FRAUD, MACHINE, NIGHTLY, NOW, decision, way

TERMS = Terms(
    batch=BatchTerms(source="/lake/customers", destination="/lake/scores"),
    online=OnlineTerms(),
    stream=StreamTerms(source=FromNats(stream="EVENTS"), sink=ToParts(destination="/lake/events")),
)


def test_a_table_on_spot_becomes_a_night_under_its_deadline_with_what_machines_cost_and_do() -> None:
    wanted = batch_deployment(decision(NIGHTLY, way("batch", "spot", 1, machines=3)), TERMS, NOW)
    (schedule,) = wanted.schedules
    buying = PurchaseOptions.model_validate(wanted.parameters["buying"])

    assert "nightly-inference/by-deadline" == wanted.like
    assert "06:00" == wanted.parameters["deadline"]
    assert isinstance(schedule.schedule, CronSchedule)
    assert ("30 1 * * *", True) == (schedule.schedule.cron, schedule.active)
    assert (0.03, 0.09, 1000.0) == (buying.spot_price, buying.on_demand_price, buying.rows_per_second)
    assert 3 == wanted.parameters["options"]["workers"]


def test_a_table_that_is_needed_once_becomes_one_run_under_its_deadline() -> None:
    wanted = batch_deployment(decision(BACKFILL, way("batch", "spot", 1)), TERMS, NOW)

    assert ((), 1) == (wanted.schedules, wanted.runs)
    assert "2026-02-01T06:00:00+01:00" == wanted.parameters["deadline"]


def test_a_table_on_demand_becomes_plain_batch_runs() -> None:
    wanted = batch_deployment(decision(NIGHTLY, way("batch", "on-demand", 1)), TERMS, NOW)

    assert "batch-inference/on-demand" == wanted.like
    assert {"model", "source", "destination", "options"} == set(wanted.parameters)


@pytest.mark.parametrize(("ready", "day"), [("01:30", 31), ("13:00", 30)])
def test_a_table_every_few_days_begins_at_the_next_time_that_its_input_is_there(ready: str, day: int) -> None:
    workload = NIGHTLY.model_copy(update={"consumer": Table(rows=9, ready=ready, due="18:00", every_days=3)})
    (schedule,) = batch_deployment(decision(workload, way("batch", "on-demand", 1)), TERMS, NOW).schedules

    assert isinstance(schedule.schedule, IntervalSchedule)
    assert timedelta(days=3) == schedule.schedule.interval
    first = datetime.fromisoformat(str(schedule.schedule.anchor_date))
    assert (day, ready) == (first.day, f"{first:%H:%M}")


def test_batches_of_events_begin_as_often_as_was_decided() -> None:
    chosen = way("batch", "on-demand", 1, every_seconds=900.0)
    (schedule,) = batch_deployment(decision(EVENTS, chosen), TERMS, NOW).schedules

    assert isinstance(schedule.schedule, IntervalSchedule)
    assert timedelta(minutes=15) == schedule.schedule.interval


def test_an_endpoint_has_the_batching_the_replicas_and_the_keep_warm_time_that_were_decided() -> None:
    batching = {"batch_size_max": 16, "wait_ms_max": 3.0, "machines": 2}
    always_on = endpoint_spec(decision(FRAUD, way("online", "always-on", 1, **batching)), TERMS)
    autoscaled = endpoint_spec(decision(FRAUD, way("online", "autoscaled", 1, machines_min=1, **batching)), TERMS)
    warm = endpoint_spec(decision(FRAUD, way("online", "keep-warm", 1, keep_warm_seconds=0.2)), TERMS)

    assert always_on.batching is not None
    assert (16, 3.0) == (always_on.batching.batch_size_max, always_on.batching.wait_ms_max)
    assert (4, 4) == (always_on.scaling.replicas_min, always_on.scaling.replicas_max)
    assert (2, 4) == (autoscaled.scaling.replicas_min, autoscaled.scaling.replicas_max)
    assert [None, None, 1.0] == [spec.keep_warm for spec in (always_on, autoscaled, warm)]


def test_a_target_that_can_t_sleep_is_refused_in_its_own_words() -> None:
    terms = Terms(online=OnlineTerms(target=BentoML(folder="/releases", python="/bin/python")))
    with pytest.raises(BadInput, match="keep_warm must be left out on bentoml"):
        endpoint_spec(decision(FRAUD, way("online", "keep-warm", 1, keep_warm_seconds=60)), terms)


def test_a_stream_is_as_fresh_as_was_promised_and_has_a_run_for_each_machine() -> None:
    wanted = stream_deployment(decision(EVENTS, way("streaming", "micro-batches", 1, machines=2)), TERMS)

    assert 30.0 == wanted.parameters["options"]["freshness_seconds"]
    assert 2 == wanted.runs


def test_how_a_workload_is_served_is_found_again_by_tags() -> None:
    tags = ["resumes", *tags_of(decision(FRAUD, way("online", "keep-warm", 1)))]

    assert Standing(mode="online", policy="keep-warm", machine=MACHINE) == standing_of(tags)
    assert "workload:fraud" in tags


@pytest.mark.parametrize(
    ("mode", "policy", "missing"),
    [("batch", "spot", "'batch'"), ("online", "always-on", "'online'"), ("streaming", "micro-batches", "'stream'")],
)
def test_terms_that_are_missing_are_named(mode: str, policy: str, missing: str) -> None:
    with pytest.raises(BadInput, match=f"The terms must have {missing}"):
        check_terms(decision(EVENTS, way(mode, policy, 1)), Terms())
