"""The list of a destination's runs, as records and one listing tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.batch.manifest import Manifest, find_manifest
from tasks.batch.options import BatchOptions
from tasks.batch.parts import part_path
from tasks.batch.plan import Plan, manifest_path
from tasks.batch.publish import audit_parts, claim_order_number, publish
from tasks.batch.run_records import save_plan
from tasks.batch.runs import choose_newest, list_runs
from tasks.storage import Storage, open_storage
from tests.tasks.batch.small import a_plan, numbers, put, put_parts


def plan_run(place: str, name: str, **options: Any) -> tuple[Storage, Plan]:
    storage = open_storage(f"{place}/out")
    plan = a_plan(f"{place}/in", storage.url, BatchOptions(rows_per_chunk=10, name=name, **options))
    return storage, save_plan(storage, plan.model_copy(update={"order": claim_order_number(storage, plan.run)}))


def publish_run(place: str, name: str, **options: Any) -> Plan:
    storage, plan = plan_run(place, name, **options)
    put_parts(plan, storage)
    publish(storage, plan, audit_parts(storage, plan))
    return plan


def test_runs_are_listed_newest_first_with_what_each_has_come_to(place: str) -> None:
    put(f"{place}/in", {"a.parquet": numbers(0, 25)})
    first, second = publish_run(place, "first"), publish_run(place, "second")
    storage, begun = plan_run(place, "begun")
    put_parts(begun, storage, list(begun.chunks)[:1])
    storage.delete([part_path(second, next(iter(second.chunks)))])
    runs = list_runs(storage)

    assert [("begun", "incomplete"), ("second", "damaged"), ("first", "complete")] == [(r.run, r.state) for r in runs]
    assert [(3, 8, None), (2, 17, 4), (1, 25, 4)] == [(r.order, r.rows_done, r.rows_rejected) for r in runs]
    assert [(1, 4), (3, 4), (4, 4)] == [(r.parts, r.parts_planned) for r in runs]
    assert {"models:/churn/3"} == {r.model for r in runs}
    assert [first.planned_at] == [r.planned_at for r in runs if r.run == "first"]
    assert "1 parts are gone or of another size" in runs[1].note
    assert "second" == (newest.run if (newest := choose_newest(runs)) else None)


def test_a_place_without_runs_has_none(place: str) -> None:
    assert [] == list_runs(open_storage(f"{place}/nowhere"))
    assert choose_newest([]) is None


def test_a_record_that_does_not_read_is_a_damaged_run_and_no_error(tmp_path: Path) -> None:
    place = str(tmp_path)
    put(f"{place}/in", {"a.parquet": numbers(0, 25)})
    publish_run(place, "whole")
    publish_run(place, "broken")
    storage, _ = plan_run(place, "begun")
    (tmp_path / "out" / manifest_path("broken")).write_text("{}")
    (tmp_path / "out/_overnight/begun/plan.json").write_text("{}")
    runs = {run.run: run for run in list_runs(storage)}

    assert {"whole": "complete", "broken": "damaged", "begun": "damaged"} == {r.run: r.state for r in runs.values()}
    assert "must be a manifest that this version" in runs["broken"].note
    assert "whole" == (newest.run if (newest := choose_newest(list(runs.values()))) else None)


def test_of_a_table_of_a_stream_the_newest_commit_is_listed(tmp_path: Path) -> None:
    place = str(tmp_path)
    put(f"{place}/in", {"a.parquet": numbers(0, 25)})
    storage, plan = plan_run(place, "events")
    put_parts(plan, storage)
    manifest = publish(storage, plan, audit_parts(storage, plan))
    storage.delete([manifest_path("events")])
    for commit in (1, 2, 10):
        update = {"run": f"events-{commit:08d}", "commit": commit}
        record = manifest.model_copy(update=update)
        storage.put_new(manifest_path(record.run), record.model_dump_json().encode())

    assert isinstance(find_manifest(storage, "events-00000010"), Manifest)
    assert [("events-00000010", "complete", 10)] == [(r.run, r.state, r.commit) for r in list_runs(storage)]
