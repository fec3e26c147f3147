"""What runs cost, by the records of their calls: nothing is made up where a price is not known."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from serving.errors import BadInput
from tasks.batch.cost_report import (
    DestinationCosts,
    list_notes,
    make_cost_page,
    name_artifact,
    plot_costs,
    sum_costs,
    tabulate_costs,
)
from tasks.batch.costs import (
    ON_DEMAND_VARIABLE,
    PRICE_VARIABLE,
    CallCost,
    MachinePrice,
    NightCost,
    RunCost,
    RunRecords,
    compute_run_costs,
    count_machines,
    read_machine_price,
    read_run_costs,
    save_call_begin,
    save_call_cost,
    save_night_cost,
)
from tasks.batch.manifest import Manifest
from tasks.batch.options import BatchOptions
from tasks.batch.plan import manifest_path
from tasks.storage import open_storage
from tests.tasks.batch.small import PIN, a_plan, numbers, put

FIRST = datetime(2030, 1, 1, 1, tzinfo=UTC)
KNOWN = MachinePrice(dollars_per_hour=0.5, on_demand_dollars_per_hour=2.0)


def a_manifest(day: int) -> Manifest:
    run = f"run-{day}"
    at = FIRST + timedelta(days=day)
    return Manifest(
        key=run, run=run, order=day + 1, planned_at=at, model=PIN, source="s", output="parquet", rows=2_000_000,
        rejects=(), parts=(),
    )  # fmt: skip


def a_call(
    day: int = 0, *, after: float = 0, seconds: float = 1800, flow_run: str = "f", price: MachinePrice = KNOWN
) -> CallCost:
    began = FIRST + timedelta(days=day, seconds=after)
    return CallCost(flow_run_id=flow_run, began_at=began, seconds=seconds, state="complete", price=price)


def a_night() -> NightCost:
    return NightCost(
        flow_run_id="n", machines=3, machine_seconds=7200, cost=1.5, cost_on_demand=4.0, on_demand_price=2.0
    )


def compute(*records: RunRecords) -> list[RunCost]:
    """The costs of runs that were planned a day apart."""
    manifests = [a_manifest(day) for day in range(len(records))]
    return compute_run_costs(manifests, {each.run: own for each, own in zip(manifests, records, strict=True)})


def test_a_run_costs_the_seconds_of_its_calls_and_is_held_against_on_demand_and_an_endpoint() -> None:
    first, second = compute(
        RunRecords(calls=[a_call()]), RunRecords(calls=[a_call(1), a_call(1, after=1800, seconds=900)])
    )

    assert (1800, 0.25, 1.0, None) == (first.machine_seconds, first.spent, first.on_demand, first.always_on)
    assert ("the first run has none before it: how long an endpoint would have been on is not known",) == first.notes
    assert (2700, 0.375, 1.5, 48.0) == (second.machine_seconds, second.spent, second.on_demand, second.always_on)
    assert ((), 0.1875) == (second.notes, second.spent_per_million_rows)


def test_a_night_costs_what_its_report_says_and_not_its_calls_again() -> None:
    _, night = compute(RunRecords(), RunRecords(nights=[a_night()], calls=[a_call(1)], begun=2))

    assert (7200, 1.5, 4.0, 3 * 2.0 * 24) == (night.machine_seconds, night.spent, night.on_demand, night.always_on)
    assert ((), False) == (night.notes, night.is_lower_bound)


@pytest.mark.parametrize(
    ("records", "note"),
    [
        (RunRecords(), "none of its calls left a record: they were killed, or made by an earlier release"),
        (
            RunRecords(calls=[a_call(), a_call(price=MachinePrice())]),
            "the price of its machine is not known: OVERNIGHT_DOLLARS_PER_HOUR was not set",
        ),
        (
            RunRecords(calls=[a_call().model_copy(update={"on_ray": True})]),
            "it was scored on Ray: which machines of the cluster worked is not known",
        ),
    ],
)
def test_what_is_not_known_is_null_and_says_why(records: RunRecords, note: str) -> None:
    (run,) = compute(records)

    assert (None, None, None) == (run.spent, run.on_demand, run.always_on)
    assert run.spent_per_million_rows is None
    assert note == run.notes[0]


def test_without_an_on_demand_price_only_the_cost_is_known() -> None:
    _, run = compute(RunRecords(), RunRecords(calls=[a_call(1, price=MachinePrice(dollars_per_hour=0.5))]))

    assert (0.25, None, None) == (run.spent, run.on_demand, run.always_on)
    assert ("the on-demand price is not known: OVERNIGHT_ON_DEMAND_DOLLARS_PER_HOUR was not set",) == run.notes


def test_a_killed_call_makes_the_cost_a_lower_bound() -> None:
    one, two = compute(RunRecords(calls=[a_call()], begun=2), RunRecords(calls=[a_call(1)], begun=3))

    assert (True, 0.25) == (one.is_lower_bound, one.spent)
    assert "1 call was killed and left no record: it cost at least this much" in one.notes
    assert ("2 calls were killed and left no record: it cost at least this much",) == two.notes
    assert ["at least $0.25", "at least $0.25"] == [row["cost"] for row in tabulate_costs([one, two])]


def test_calls_at_the_same_time_are_machines_at_a_time() -> None:
    beside = [a_call(after=0, seconds=100), a_call(after=50, seconds=100), a_call(after=100, seconds=100)]

    assert (1, 1, 2) == (count_machines([]), count_machines([a_call()]), count_machines(beside))


def test_records_are_read_back_beside_the_plans_of_a_destination(tmp_path: Path) -> None:
    source = put(str(tmp_path / "source"), {"a.parquet": numbers(0, 10)})
    storage = open_storage(str(tmp_path / "scores"))
    plan = a_plan(source, str(tmp_path / "scores"), BatchOptions(name="run-0", rows_per_chunk=10))
    for day in (0, 1):
        manifest = a_manifest(day)
        storage.put_new(manifest_path(manifest.run), manifest.model_dump_json().encode())
    call = a_call(flow_run="mine")
    save_call_cost(storage, plan, call)
    save_call_cost(storage, plan, a_call(after=3600, flow_run="mine"))
    save_call_cost(storage, plan, call)
    save_night_cost(storage, "run-1", a_night())
    # Of four attempts of a flow run two were killed.
    for after in (0, 600, 1200, 3600):
        save_call_begin(storage, plan, "mine", FIRST + timedelta(seconds=after))
    first, second = read_run_costs(storage)

    assert ("run-0", 3600, 0.5, True) == (first.run, first.machine_seconds, first.spent, first.is_lower_bound)
    assert first.notes[0].startswith("2 calls were killed")
    assert ("run-1", 1.5) == (second.run, second.spent)
    assert [] == read_run_costs(open_storage(str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (None, None)),
        ({PRICE_VARIABLE: "0.07", ON_DEMAND_VARIABLE: "0.2"}, (0.07, 0.2)),
        ({PRICE_VARIABLE: "0.07"}, (0.07, None)),
        # On-demand machines are given their one price.
        ({ON_DEMAND_VARIABLE: "0.2"}, (0.2, 0.2)),
        ({PRICE_VARIABLE: " "}, (None, None)),
    ],
)
def test_the_price_of_a_machine_is_that_of_its_environment(
    environment: dict[str, str], expected: tuple[float | None, float | None]
) -> None:
    price = read_machine_price(environment)

    assert expected == (price.dollars_per_hour, price.on_demand_dollars_per_hour)


@pytest.mark.parametrize("text", ["cheap", "-1", "0", "nan", "inf", "0,07"])
def test_what_is_no_price_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match=f"{PRICE_VARIABLE} must be the price of an hour in dollars, .* got '{text}'"):
        read_machine_price({PRICE_VARIABLE: text})


def test_the_sum_compares_runs_that_know_both() -> None:
    runs = compute(RunRecords(calls=[a_call()]), RunRecords(), RunRecords(calls=[a_call(2)]))

    assert (
        "2 of 3 runs have a known cost, $0.5 in all. 2 of them cost $0.5, 25.0% of $2.00 for on-demand machines alone. "
        "1 of them cost $0.25, 0.5% of $48.00 for an endpoint that is always on."
    ) == sum_costs(runs)
    assert "What the 1 runs cost is not known." == sum_costs(compute(RunRecords()))


def test_the_table_says_what_is_not_known_and_notes_say_it_once() -> None:
    runs = compute(*[RunRecords() for _ in range(5)])
    row = tabulate_costs(runs)[0]

    assert {"not known"} == {row[name] for name in ("machines worked", "cost", "on-demand alone", "always-on endpoint")}
    assert ("2030-01-05 01:00", "churn v3", "2,000,000") == (row["planned (UTC)"], row["model"], row["rows"])
    (note,) = list_notes(runs)
    assert note.startswith("2030-01-03 01:00, 2030-01-04 01:00, 2030-01-05 01:00 and 2 earlier: none of its calls left")


def test_the_page_needs_nothing_else_and_escapes_what_others_have_named() -> None:
    known = DestinationCosts(
        destination="s3://lake/<b>scores</b>", runs=compute(RunRecords(calls=[a_call()]), RunRecords(calls=[a_call(1)]))
    )
    unknown = DestinationCosts(destination="/data/other", runs=compute(RunRecords()))
    page = make_cost_page([known, unknown]).decode()

    assert page.startswith("<!doctype html>")
    assert "&lt;b&gt;scores" in page
    assert "<b>" not in page
    assert "http" not in page
    assert '<td class="unknown">not known</td>' in page
    assert '<img alt="dollars of each run over time" src="data:image/png;base64,' in page
    assert "<img" not in make_cost_page([unknown]).decode()


def test_the_plot_is_a_picture_with_a_row_for_each_destination_whose_costs_are_known() -> None:
    runs = compute(RunRecords(calls=[a_call()]), RunRecords(), RunRecords(calls=[a_call(2)]))
    one = plot_costs([DestinationCosts(destination="a", runs=runs)])
    two = plot_costs([DestinationCosts(destination=name, runs=runs) for name in "ab"])
    none = plot_costs([DestinationCosts(destination="a", runs=compute(RunRecords()))])

    assert one is not None
    assert two is not None
    assert none is None
    assert {b"\x89PNG\r\n\x1a\n"} == {one[:8], two[:8]}
    assert 1.5 < math.ceil(int.from_bytes(two[20:24]) / int.from_bytes(one[20:24]) * 10) / 10 < 2.5


def test_the_artifact_of_a_destination_has_a_key_that_prefect_takes() -> None:
    assert name_artifact("s3://lake/My Scores/").startswith("costs-my-scores-")
    assert name_artifact("s3://a/scores") != name_artifact("s3://b/scores")
