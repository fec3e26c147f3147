from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from serving.errors import BadWorkload, NoFeasibleMode
from serving.model.batching import CostModel
from tasks.scheduler.arrivals import Arrivals, read_arrivals
from tasks.scheduler.decide import decide
from tasks.scheduler.decision import Decision
from tasks.scheduler.prices import PriceQuote
from tasks.scheduler.scenario import DecisionInputs
from tasks.scheduler.workload import ArrivalRate, Events, Machine, Prices, Requests, Table, Workload
from tests.pages import ROOT, read_blocks
from tests.tasks.scheduler.values import HOUR, PRICES, availability, profile, workload

NOW = datetime(2026, 1, 30, 12, tzinfo=UTC)


def decided(asked: Workload, **changes: Any) -> Decision:
    values: dict[str, Any] = {
        "profile": profile(),
        "arrivals": None if asked.consumer.kind == "table" else read_arrivals(asked),
        "quote": PriceQuote(prices=PRICES, price_origin="a test, today"),
        "availability": availability(),
        "now": NOW,
    }
    if "prices" in changes:
        changes["quote"] = PriceQuote(prices=changes.pop("prices"), price_origin="a test, today")
    return decide(DecisionInputs(workload=asked, **(values | changes)))


def name(decision: Decision) -> tuple[str, str]:
    return decision.chosen.mode, decision.chosen.policy


FILES = [yaml.safe_load(block.text) for block in read_blocks(ROOT / "docs/scheduler.md") if block.language == "yaml"]


@pytest.mark.parametrize("document", FILES, ids=lambda document: document["name"])
def test_each_file_of_the_docs_is_decided_on(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "arrivals.csv").write_text("minute,events\n0,60\n1,90\n")
    asked = Workload.model_validate(document | {"horizon_days": 0.25})
    fast = profile(pass_time=CostModel(fixed_seconds=1e-4, row_seconds=1e-5), batch_rows_per_second=10_000.0)
    decision = decided(asked, profile=fast, prices={"c7i.large": Prices(on_demand=0.0893, spot=0.0381)})

    assert decision.alternatives


def test_the_docs_have_a_file_of_each_kind_of_consumer() -> None:
    assert ["table", "requests", "events"] == [document["consumer"]["kind"] for document in FILES]


@pytest.fixture(scope="module")
def nightly() -> Decision:
    return decided(workload(consumer=Table(rows=180 * 9 * HOUR), horizon_days=30))


@pytest.fixture(scope="module")
def fraud() -> Decision:
    return decided(workload(arrivals=ArrivalRate(per_second=200, peak=2)))


@pytest.fixture(scope="module")
def hourly() -> Decision:
    return decided(workload(consumer=Events(within_seconds=HOUR), arrivals=ArrivalRate(per_second=2)))


def test_a_nightly_table_is_a_batch_run_on_spot(nightly: Decision) -> None:
    assert ("batch", "spot") == name(nightly)
    assert 30 * 180 * 9 * HOUR == nightly.rows
    assert 86_400 == nightly.chosen.period_seconds


def test_a_table_that_is_needed_once_costs_one_run_and_what_waits_until_its_deadline() -> None:
    rows = 180 * 9 * HOUR
    once = decided(workload(consumer=Table(rows=rows, once_by=NOW + timedelta(hours=6))))
    nightly = decided(workload(consumer=Table(rows=rows), horizon_days=1))

    always = next(each for each in once.alternatives if each.policy == "always-on")
    assert name(nightly) == name(once)
    assert (rows, NOW) == (once.rows, once.decided_at)
    assert nightly.chosen.usd == pytest.approx(once.chosen.usd)
    assert always.usd == pytest.approx(0.36 * always.machines * 6)


def test_the_waste_is_what_an_endpoint_that_is_always_on_costs_more(nightly: Decision) -> None:
    always = next(each for each in nightly.alternatives if each.policy == "always-on")

    assert always.usd == pytest.approx(0.36 * always.machines * 24 * 30)
    assert always.usd - nightly.chosen.usd == pytest.approx(nightly.waste_usd)
    assert nightly.waste_factor is not None
    assert nightly.waste_factor > 5


def test_requests_with_a_short_latency_are_served_by_an_endpoint(fraud: Decision) -> None:
    assert "online" == fraud.chosen.mode
    assert fraud.chosen.age_seconds_p99 <= 0.2
    assert fraud.chosen.late_share <= 0.01


def test_endpoints_are_held_against_the_mean_rate_and_twice_of_it_where_their_fewest_machines_carry_that() -> None:
    low, high = (decided(workload(arrivals=ArrivalRate(per_second=rate, peak=1))).chosen for rate in (20, 150))

    assert 20 == pytest.approx(low.checked_rate, rel=0.01)
    # One machine carries this rate, but not twice of it.
    assert (1, "always-on") == (high.machines, high.policy)
    assert high.checked_rate is not None
    assert 75 < high.checked_rate < 100


def test_what_is_no_endpoint_is_held_against_no_rate(hourly: Decision, nightly: Decision) -> None:
    assert {"online"} == {each.mode for each in hourly.alternatives if each.checked_rate is not None}
    assert all(each.checked_rate is None for each in nightly.alternatives)


def test_events_that_have_an_hour_are_scored_by_batch_runs(hourly: Decision) -> None:
    assert "batch" == hourly.chosen.mode
    assert hourly.chosen.age_seconds_p99 <= HOUR


def test_events_that_must_be_scored_within_seconds_are_not_batches() -> None:
    found = decided(workload(consumer=Events(within_seconds=3), arrivals=ArrivalRate(per_second=30)))

    assert found.chosen.mode in ("online", "streaming")
    assert all(each.mode != "batch" for each in found.alternatives if each.is_feasible)


@pytest.mark.parametrize("which", ["nightly", "fraud", "hourly"])
def test_every_alternative_has_its_cost_and_why_it_lost(which: str, request: pytest.FixtureRequest) -> None:
    decision = request.getfixturevalue(which)

    costs = [(not each.is_feasible, each.usd) for each in decision.alternatives]
    assert sorted(costs, key=lambda cost: (cost[0], float(f"{cost[1]:.9g}"))) == costs
    assert decision.chosen == decision.alternatives[0]
    for each in decision.alternatives[1:]:
        assert each.reason.startswith("Keeps the promise" if each.is_feasible else "Breaks the promise of")
    assert "keep the promise" in decision.chosen.reason or "only one" in decision.chosen.reason
    assert decision == Decision.model_validate_json(decision.model_dump_json())


@pytest.mark.parametrize("which", ["nightly", "fraud", "hourly"])
def test_break_evens_are_within_a_hundredfold_and_the_nearest_comes_first(
    which: str, request: pytest.FixtureRequest
) -> None:
    decision = request.getfixturevalue(which)

    distances = [abs(np.log(each.factor)) for each in decision.break_evens]
    assert sorted(distances) == distances
    assert all(1 / 100 <= each.factor <= 100 for each in decision.break_evens)
    assert decision.break_evens


def test_another_choice_is_made_at_a_break_even(hourly: Decision) -> None:
    spot_price = next(each for each in hourly.break_evens if each.input == "spot price" and each.factor > 1)

    def with_spot(factor: float) -> str:
        asked = workload(consumer=Events(within_seconds=HOUR), arrivals=ArrivalRate(per_second=2))
        found = decided(asked, prices={"this": Prices(on_demand=0.36, spot=0.12 * factor)})
        return f"{found.chosen.mode} {found.chosen.policy}"

    assert spot_price.to == with_spot(spot_price.factor * 1.2)
    assert spot_price.to != with_spot(spot_price.factor / 1.2)


def test_the_cheapest_kind_of_machine_is_chosen() -> None:
    asked = workload(
        consumer=Table(rows=10**6),
        machines=(Machine(), Machine(kind="fast", speed=4.0), Machine(kind="slow", speed=0.5)),
    )
    prices = {"this": Prices(on_demand=1), "fast": Prices(on_demand=2), "slow": Prices(on_demand=0.75)}

    found = decided(asked, prices=prices)

    assert "fast" == found.chosen.machine
    assert {"this", "fast", "slow"} == {each.machine for each in found.alternatives}
    assert all(each.policy != "spot" for each in found.alternatives)


def test_without_traffic_nothing_is_needed_and_nothing_paid() -> None:
    found = decided(workload(arrivals=ArrivalRate(per_second=0)))

    assert (0, 0) == (found.chosen.usd, found.chosen.machines)
    assert found.waste_factor is None
    assert "Nothing comes" in found.chosen.reason
    assert 0.36 * 6 == pytest.approx(found.waste_usd)


def test_a_single_request_with_time_for_a_cold_start_is_kept_warm() -> None:
    counts_T = np.zeros(24 * HOUR, dtype=np.int64)
    counts_T[HOUR] = 1
    asked = workload(consumer=Requests(latency_ms=60_000), arrivals=ArrivalRate(per_second=0), horizon_days=1)

    found = decided(asked, arrivals=Arrivals(counts_T=counts_T))

    assert ("online", "keep-warm") == name(found)
    assert 1 == found.chosen.cold_starts


def test_a_latency_below_the_models_own_passes_is_refused_with_what_would_be_needed() -> None:
    asked = workload(consumer=Requests(latency_ms=15), arrivals=ArrivalRate(per_second=1), horizon_days=0.1)

    with pytest.raises(NoFeasibleMode) as refused:
        decided(asked)

    assert "A request takes 11.5 ms on this, 11 ms of it the model's forward pass" in str(refused.value)
    assert "at least 23.5 ms must be allowed" in str(refused.value)


def test_too_much_traffic_is_refused_with_the_machines_that_would_be_needed() -> None:
    asked = workload(arrivals=ArrivalRate(per_second=500), machines_max=1)

    with pytest.raises(NoFeasibleMode, match=r"\d+ machines would keep it: raise machines_max\."):
        decided(asked)


def test_a_table_that_cannot_be_in_time_is_refused_with_the_machines_or_hours_it_takes() -> None:
    asked = workload(consumer=Table(rows=180 * 60 * HOUR), machines_max=4)

    with pytest.raises(NoFeasibleMode) as refused:
        decided(asked)

    assert "the table takes 15 h on 4 machines, 6 h are left for it" in str(refused.value)
    assert "16 machines would keep it" in str(refused.value)
    assert "18 h would be kept; give the input earlier or move the deadline" in str(refused.value)


def test_a_kind_of_machine_without_its_speed_or_its_price_is_refused() -> None:
    asked = workload(consumer=Table(rows=1), machines=(Machine(kind="c7i.large"),))

    with pytest.raises(BadWorkload, match=r"must have its speed, got none for 'c7i\.large'"):
        decided(asked)
    with pytest.raises(BadWorkload, match="must have a price, got none for 'this'"):
        decided(workload(consumer=Table(rows=1)), prices={})


def test_requests_without_arrivals_are_refused() -> None:
    with pytest.raises(BadWorkload, match="must have arrivals"):
        decided(workload(arrivals=ArrivalRate(per_second=1)), arrivals=None)


def test_a_longer_horizon_costs_in_proportion() -> None:
    month, year = (decided(workload(consumer=Table(rows=10**6), horizon_days=days)).chosen.usd for days in (30, 360))

    assert 12 * month == pytest.approx(year)


def test_a_slow_model_is_decided_on_too() -> None:
    slow = profile(pass_time=CostModel(fixed_seconds=4, row_seconds=2), batch_rows_per_second=0.8)
    asked = workload(consumer=Requests(latency_ms=60_000), arrivals=ArrivalRate(per_second=0.5))

    found = decided(asked, profile=slow)

    assert "online" == found.chosen.mode
    assert found.chosen.age_seconds_p99 < 60
