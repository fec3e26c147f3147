"""A table as the output, Delta or Iceberg: one commit adds exactly the parts, once, whichever worker commits."""

from __future__ import annotations

import multiprocessing
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from serving.errors import DestinationUnusable, OvernightError, PublishRefused
from tasks.batch.manifest import find_manifest, open_predictions
from tasks.batch.plan import Plan
from tasks.batch.publish import audit_parts, claim_order_number, publish
from tasks.batch.run_records import save_plan
from tasks.storage import Storage, open_storage
from tests.tasks.batch.small import put_parts
from tests.tasks.batch.tables import TableOutput, a_run, check, check_schema, commit, find_footers, read_ids


def test_every_reader_sees_the_same_rows(table: TableOutput, destination: Storage, place: str) -> None:
    plan = save_plan(destination, a_run(place, table.options()))
    manifest = publish(destination, plan, audit_parts(destination, plan))
    expected = open_predictions(destination.url).collect().sort("id")

    assert (25, plan.options.output) == (expected.height, manifest.output)
    assert all(expected.to_dicts() == rows for rows in table.read(destination))


def test_one_commit_adds_exactly_the_parts_and_says_of_which_run(
    table: TableOutput, destination: Storage, place: str
) -> None:
    plan = a_run(place, table.options())
    commit(destination, plan)
    told = table.describe_commit(destination)

    assert 1 == table.count_commits(destination)
    assert sorted((part.path, part.bytes, part.rows) for part in find_footers(destination, plan)) == sorted(
        table.list_files(destination)
    )
    assert (plan.run, "models:/churn/3") == (told["overnight.run"], told["overnight.model"])


def test_a_second_commit_of_a_run_adds_nothing(table: TableOutput, destination: Storage, place: str) -> None:
    plan = a_run(place, table.options())
    for _ in range(3):
        commit(destination, plan)
    publish(destination, plan, audit_parts(destination, plan))

    assert 1 == table.count_commits(destination)
    assert list(range(25)) == read_ids(table, destination)


def test_another_run_is_appended(table: TableOutput, destination: Storage, place: str) -> None:
    first, second = a_run(place, table.options()), a_run(place, table.options(), range(25, 40))
    for plan in (first, second, first):
        commit(destination, plan)

    assert list(range(40)) == read_ids(table, destination)
    assert 2 == table.count_commits(destination)


def test_another_run_replaces_the_rows_of_the_first_in_one_commit(
    table: TableOutput, destination: Storage, place: str
) -> None:
    first, second = a_run(place, table.options("replace")), a_run(place, table.options("replace"), range(25, 40))
    commit(destination, first)
    # A late call of the first run finds that it was committed, and does not bring its rows back.
    for plan in (second, first):
        commit(destination, plan)

        assert list(range(25, 40)) == read_ids(table, destination)
        assert 2 == table.count_commits(destination)


@pytest.mark.parametrize("mode", ["append", "replace"])
@pytest.mark.parametrize("standing", [False, True], ids=["a new table", "a table"])
def test_threads_that_race_commit_a_run_once(
    table: TableOutput, destination: Storage, place: str, mode: str, *, standing: bool
) -> None:
    if standing:
        commit(destination, a_run(place, table.options(), range(100, 120)))
    plan = a_run(place, table.options(mode))
    parts, barrier = find_footers(destination, plan), threading.Barrier(6)

    def race(_: int) -> None:
        barrier.wait()
        commit(destination, plan, parts)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(race, range(6)))

    kept = list(range(100, 120)) if standing and mode == "append" else []
    assert list(range(25)) + kept == read_ids(table, destination)
    assert 1 + standing == table.count_commits(destination)


def test_runs_that_race_are_all_appended(table: TableOutput, destination: Storage, place: str) -> None:
    plans = [a_run(place, table.options(), range(start, start + 10)) for start in (0, 10, 20)]
    barrier = threading.Barrier(3)

    def race(plan: Plan) -> None:
        parts = find_footers(destination, plan)
        barrier.wait()
        commit(destination, plan, parts)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(race, plans))

    assert list(range(30)) == read_ids(table, destination)


def commit_in_child(address: str, plan: str, start: float) -> str:
    """Commit a run in a process of its own, all at one time."""
    destination, mine = open_storage(address), Plan.model_validate_json(plan)
    parts = find_footers(destination, mine)
    time.sleep(max(0.0, start - time.time()))
    try:
        commit(destination, mine, parts)
    except OvernightError as error:
        return f"{type(error).__name__}: {error}"
    return "done"


@pytest.mark.machines
def test_processes_that_race_commit_each_run_once(table: TableOutput, destination: Storage, place: str) -> None:
    plans = [a_run(place, table.options()), a_run(place, table.options(), range(25, 40))]
    given = [plan.model_dump_json() for plan in plans for _ in range(2)]
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        start = time.time() + 5
        told = list(pool.map(commit_in_child, [destination.url] * 4, given, [start] * 4))

    assert told == ["done"] * 4
    assert list(range(40)) == read_ids(table, destination)
    assert 2 == table.count_commits(destination)


def test_an_older_run_does_not_replace_a_newer_one(table: TableOutput, destination: Storage, place: str) -> None:
    replacing = table.options("replace")
    older, newer = a_run(place, replacing, order=1), a_run(place, replacing, range(25, 40), order=2)
    commit(destination, newer)
    with pytest.raises(PublishRefused, match=r"must not go back to an older run.*number 2.*number 1: it was planned"):
        publish(destination, older, audit_parts(destination, older))

    assert list(range(25, 40)) == read_ids(table, destination)
    assert find_manifest(destination, older.run) is None
    # What the message says: planned again, it is the newest, and the parts that are there are those of its plan.
    number = claim_order_number(destination, older.run, above=check(destination, older))
    again = older.model_copy(update={"order": number})
    publish(destination, again, audit_parts(destination, again))
    assert list(range(25)) == read_ids(table, destination)


def test_an_older_run_is_appended_beside_newer_ones_but_not_after_one_that_replaced_all(
    table: TableOutput, destination: Storage, place: str
) -> None:
    first, second, third = (a_run(place, table.options(), range(at, at + 5), at // 5 + 1) for at in (0, 5, 10))
    for plan in (second, first):
        commit(destination, plan)
    assert list(range(10)) == read_ids(table, destination)
    commit(destination, a_run(place, table.options("replace"), range(25, 40), order=9))
    with pytest.raises(PublishRefused, match="must not go back to an older run"):
        commit(destination, third)

    assert list(range(25, 40)) == read_ids(table, destination)


def test_a_run_that_the_table_holds_from_another_plan_is_not_added_again(
    table: TableOutput, destination: Storage, place: str
) -> None:
    plan = a_run(place, table.options())
    commit(destination, plan)
    replanned = plan.model_copy(update={"digest": "0" * 64})
    put_parts(replanned, destination)
    with pytest.raises(PublishRefused, match="holds those of another plan of the run"):
        publish(destination, replanned, audit_parts(destination, replanned))
    with pytest.raises(DestinationUnusable, match="already, whose plan below _overnight is gone"):
        check(destination, plan, plan.key)

    assert list(range(25)) == read_ids(table, destination)


def test_the_order_goes_on_above_what_the_table_holds(table: TableOutput, destination: Storage, place: str) -> None:
    plan = a_run(place, table.options(), order=7)
    before = check(destination, plan)
    commit(destination, plan)
    held = check(destination, plan)

    assert (0, 7, 8) == (before, held, claim_order_number(destination, "b", above=held))
    assert 9 == claim_order_number(destination, "c")


def test_an_address_that_readers_would_decode_is_refused(table: TableOutput, tmp_path: Path) -> None:
    destination, schema = open_storage(f"{tmp_path}/100%20"), pa.schema([("id", pa.int64())])
    with pytest.raises(DestinationUnusable, match=r"must not hold %, which (its|some) readers take for an escape"):
        check_schema(destination, schema, table.options())
