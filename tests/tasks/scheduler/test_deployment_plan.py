from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule

from serving.errors import BadInput
from serving.model.batching import BatchingConfig
from tasks.endpoint.spec import Budget, EndpointSpec
from tasks.endpoint.targets import BentoML
from tasks.scheduler.deployment_plan import (
    ApplyConfig,
    BatchApplyConfig,
    CurrentDeployment,
    OnlineApplyConfig,
    StreamApplyConfig,
    check_apply_config,
    deployment_tags,
    make_endpoint_spec,
    plan_batch_deployment,
    plan_stream_deployment,
    read_current_deployment,
)
from tasks.scheduler.workload import Events, Table, Workload
from tasks.spot.purchase import PurchaseOptions
from tasks.stream.options import FromNats, ToParts
from tests.tasks.scheduler.decisions import BACKFILL, EVENTS, FRAUD, MACHINE, NIGHTLY, NOW, alternative, decision

CONFIG = ApplyConfig(
    batch=BatchApplyConfig(source="/lake/customers", destination="/lake/scores"),
    online=OnlineApplyConfig(),
    stream=StreamApplyConfig(source=FromNats(stream="EVENTS"), sink=ToParts(destination="/lake/events")),
)


def test_a_table_on_spot_becomes_a_night_under_its_deadline_with_prices_and_speed() -> None:
    desired = plan_batch_deployment(decision(NIGHTLY, alternative("batch", "spot", 1, machines=3)), CONFIG, NOW)
    (schedule,) = desired.schedules
    buying = PurchaseOptions.model_validate(desired.parameters["buying"])

    assert "nightly-inference/by-deadline" == desired.template
    assert "06:00" == desired.parameters["deadline"]
    assert isinstance(schedule.schedule, CronSchedule)
    assert ("30 1 * * *", True) == (schedule.schedule.cron, schedule.active)
    assert (0.03, 0.09, 1000.0) == (buying.spot_price, buying.on_demand_price, buying.rows_per_second)
    assert 3 == desired.parameters["options"]["workers"]


def test_a_table_that_is_needed_once_becomes_one_run_under_its_deadline() -> None:
    desired = plan_batch_deployment(decision(BACKFILL, alternative("batch", "spot", 1)), CONFIG, NOW)

    assert ((), 1) == (desired.schedules, desired.runs)
    assert "2026-02-01T06:00:00+01:00" == desired.parameters["deadline"]


def test_a_table_on_demand_becomes_plain_batch_runs() -> None:
    desired = plan_batch_deployment(decision(NIGHTLY, alternative("batch", "on-demand", 1)), CONFIG, NOW)

    assert "batch-inference/on-demand" == desired.template
    assert {"model", "source", "destination", "options"} == set(desired.parameters)


@pytest.mark.parametrize(("ready", "day"), [("01:30", 31), ("13:00", 30)])
def test_a_table_every_few_days_begins_at_the_next_time_that_its_input_is_there(ready: str, day: int) -> None:
    workload = NIGHTLY.model_copy(update={"consumer": Table(rows=9, ready=ready, due="18:00", every_days=3)})
    (schedule,) = plan_batch_deployment(decision(workload, alternative("batch", "on-demand", 1)), CONFIG, NOW).schedules

    assert isinstance(schedule.schedule, IntervalSchedule)
    assert timedelta(days=3) == schedule.schedule.interval
    first = datetime.fromisoformat(str(schedule.schedule.anchor_date))
    assert (day, ready) == (first.day, f"{first:%H:%M}")


def test_batches_of_events_have_the_period_that_was_decided() -> None:
    chosen = alternative("batch", "on-demand", 1, period_seconds=900.0)
    (schedule,) = plan_batch_deployment(decision(EVENTS, chosen), CONFIG, NOW).schedules

    assert isinstance(schedule.schedule, IntervalSchedule)
    assert timedelta(minutes=15) == schedule.schedule.interval


def test_an_endpoint_has_the_batching_the_replicas_and_the_keep_warm_time_that_were_decided() -> None:
    changes = {"batching": BatchingConfig(batch_size_max=16, wait_ms_max=3.0), "machines": 2}
    always_on = make_endpoint_spec(decision(FRAUD, alternative("online", "always-on", 1, **changes)), CONFIG)
    autoscaled = make_endpoint_spec(
        decision(FRAUD, alternative("online", "autoscaled", 1, machines_min=1, **changes)), CONFIG
    )
    warm = make_endpoint_spec(decision(FRAUD, alternative("online", "keep-warm", 1, keep_warm_seconds=0.2)), CONFIG)

    assert changes["batching"] == always_on.batching
    assert (4, 4) == (always_on.scaling.replicas_min, always_on.scaling.replicas_max)
    assert (2, 4) == (autoscaled.scaling.replicas_min, autoscaled.scaling.replicas_max)
    assert [None, None, 1.0] == [spec.keep_warm for spec in (always_on, autoscaled, warm)]


@pytest.mark.parametrize(
    ("workload", "latency_ms"),
    [(FRAUD, 50), (EVENTS, 30_000), (EVENTS.model_copy(update={"consumer": Events(within_seconds=3600)}), 60_000)],
)
def test_an_endpoint_is_held_against_the_promise_at_the_rate_that_was_decided_for(
    workload: Workload, latency_ms: float
) -> None:
    chosen = alternative("online", "always-on", 1, checked_rate=12.3456)
    spec = make_endpoint_spec(decision(workload, chosen), CONFIG)

    assert Budget(latency_ms=latency_ms, rate=12.3) == spec.budget
    assert chosen.batching == spec.batching
    assert spec == EndpointSpec.model_validate_json(spec.model_dump_json())


@pytest.mark.parametrize("rate", [None, 0.0, 1e-9])
def test_an_endpoint_that_hardly_anyone_asks_is_held_against_the_promise_by_one_request(rate: float | None) -> None:
    chosen = alternative("online", "always-on", 1, checked_rate=rate)

    assert Budget(latency_ms=50, rate=0.01) == make_endpoint_spec(decision(FRAUD, chosen), CONFIG).budget


def test_an_endpoint_of_a_table_promises_no_latency() -> None:
    chosen = alternative("online", "always-on", 1)

    assert make_endpoint_spec(decision(NIGHTLY, chosen), CONFIG).budget is None


def test_the_time_that_an_endpoint_is_measured_for_can_be_chosen() -> None:
    config = ApplyConfig(online=OnlineApplyConfig(measure_seconds=0))

    assert 0 == make_endpoint_spec(decision(FRAUD, alternative("online", "always-on", 1)), config).measure_seconds


def test_a_target_without_scale_to_zero_is_refused_with_its_message() -> None:
    config = ApplyConfig(online=OnlineApplyConfig(target=BentoML(folder="/releases", python="/bin/python")))
    with pytest.raises(BadInput, match="keep_warm must be left out on bentoml"):
        make_endpoint_spec(decision(FRAUD, alternative("online", "keep-warm", 1, keep_warm_seconds=60)), config)


def test_a_stream_has_the_promised_freshness_and_a_run_for_each_machine() -> None:
    desired = plan_stream_deployment(decision(EVENTS, alternative("streaming", "micro-batches", 1, machines=2)), CONFIG)

    assert 30.0 == desired.parameters["options"]["freshness_seconds"]
    assert 2 == desired.runs


def test_tags_say_how_a_workload_is_served() -> None:
    tags = ["resumes", *deployment_tags(decision(FRAUD, alternative("online", "keep-warm", 1)))]

    assert CurrentDeployment(mode="online", policy="keep-warm", machine=MACHINE) == read_current_deployment(tags)
    assert "workload:fraud" in tags


@pytest.mark.parametrize(
    ("mode", "policy", "missing"),
    [("batch", "spot", "'batch'"), ("online", "always-on", "'online'"), ("streaming", "micro-batches", "'stream'")],
)
def test_a_configuration_that_is_missing_is_named(mode: str, policy: str, missing: str) -> None:
    with pytest.raises(BadInput, match=f"The configuration must have {missing}"):
        check_apply_config(decision(EVENTS, alternative(mode, policy, 1)), ApplyConfig())
