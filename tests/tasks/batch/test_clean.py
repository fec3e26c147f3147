"""What no run of a destination has any more goes, at any kill nothing else, and a dry run changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from typer.testing import CliRunner

from deployments.command_line import app
from serving.errors import BadInput, DestinationUnusable
from tasks.batch import clean as cleaning
from tasks.batch.clean import CleanReport, clean
from tasks.batch.manifest import Manifest, find_damaged_parts, find_newest_run, open_predictions
from tasks.batch.plan import Plan
from tasks.batch.publish import audit_parts, claim_order_number, publish
from tasks.batch.run_records import order_path
from tasks.batch.runs import list_runs
from tasks.batch.verify import verify_run
from tasks.storage import Entry, LocalStorage, Storage, open_storage
from tests.tasks.batch.small import numbers, put, put_parts
from tests.tasks.batch.test_reuse import OPTIONS, call, plan_call, published, read_parts, score_plan, write
from tests.tasks.batch.test_runs import plan_run, publish_run

LATER = datetime.now(UTC) + timedelta(days=1)


class Killed(BaseException):
    """The end of the process, as the cleaning sees it."""


class MortalStorage(LocalStorage):
    """A folder whose process is ended before it deletes one object too many."""

    def __init__(self, root: Path, deletes_left: int) -> None:
        super().__init__(root)
        self._left = deletes_left

    def delete(self, paths: list[str]) -> None:
        for path in paths:
            self._left -= 1
            if self._left < 0:
                raise Killed
            super().delete([path])


def storage_of(place: Path) -> Storage:
    return open_storage(str(place))


def list_files(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


def sum_sizes(before: dict[str, bytes], after: dict[str, bytes]) -> tuple[int, int]:
    """Return how many files went, and their bytes."""
    gone = before.keys() - after.keys()
    assert all(after[path] == before[path] for path in after)
    return len(gone), sum(len(before[path]) for path in gone)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Five files of 24 rows."""
    for at in range(5):
        write(tmp_path / "in" / f"f{at}.parquet", at * 100, 24, group=12)
    return tmp_path / "in"


@pytest.fixture
def runs(source: Path, tmp_path: Path) -> list[str]:
    """Three runs, each of which has most parts from the ones before."""
    found = [call(source, tmp_path / "out")[0].run]
    for at in (0, 1):
        write(source / f"f{at}.parquet", 5000 + 100 * at, 24, group=12)
        found.append(call(source, tmp_path / "out")[0].run)
    return found


def test_a_clean_destination_has_nothing_to_delete(runs: list[str], tmp_path: Path) -> None:
    before = list_files(tmp_path / "out")
    report = clean(storage_of(tmp_path / "out"), delete=True)

    assert (0, 0, ()) == (report.objects, report.bytes, report.runs)
    assert before == list_files(tmp_path / "out")
    assert tuple(reversed(runs)) == report.runs_kept


def test_dropped_runs_lose_what_no_other_has_and_the_newest_stays_the_newest(runs: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    before, wanted = list_files(out), read_parts(out, runs[2])
    shown = clean(storage_of(out), keep=1)
    assert before == list_files(out)
    report = clean(storage_of(out), keep=1, delete=True)

    assert shown == report.model_copy(update={"is_deleted": False})
    assert (report.objects, report.bytes) == sum_sizes(before, list_files(out))
    assert tuple(runs[:2]) == report.runs_dropped
    assert [(runs[2], "complete")] == [(run.run, run.state) for run in list_runs(storage_of(out))]
    assert "complete" == verify_run(storage_of(out), runs[2]).state
    assert wanted == read_parts(out, runs[2])
    # Parts of the two files that are others by now, and nothing more: the third run has the rest.
    assert {"part": 4} == {kind: count for kind, count in report.runs[0].removed.items() if kind == "part"}
    assert not list(out.glob(f"_overnight/{runs[0]}"))
    assert 0 == clean(storage_of(out), keep=1, delete=True).objects


def test_the_next_run_refers_to_parts_of_a_dropped_one_and_takes_the_next_number(
    runs: list[str], source: Path, tmp_path: Path
) -> None:
    clean(storage_of(tmp_path / "out"), keep=1, delete=True)
    write(source / "f2.parquet", 9000, 24, group=12)
    plan, scored = call(source, tmp_path / "out")

    assert (24, 4) == (scored, plan.order)
    newest = find_newest_run(storage_of(tmp_path / "out"))
    assert newest is not None
    assert plan.run == newest.run


def test_a_dropped_run_can_be_called_again(source: Path, tmp_path: Path) -> None:
    first, _ = call(source, tmp_path / "out")
    wanted = read_parts(tmp_path / "out", first.run)
    call(source, tmp_path / "out", OPTIONS.model_copy(update={"rescore": "again"}))
    clean(storage_of(tmp_path / "out"), keep=1, delete=True)
    assert [] == list((tmp_path / "out" / f"run={first.run}").glob("*"))
    again, scored = call(source, tmp_path / "out")

    assert (first.run, 3, 120) == (again.run, again.order, scored)
    assert wanted == read_parts(tmp_path / "out", again.run)


def test_files_set_aside_torn_writes_and_orphans_go_and_foreign_files_stay(runs: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    folder = out / f"run={runs[2]}"
    (folder / ".part-00000-0000.parquet.0badcafe.aside").write_bytes(b"12345")
    (folder / ".part-00000-0000.parquet.0badcafe.tmp").write_bytes(b"123")
    (folder / "part-00007-0000-0123456789ab.parquet").write_bytes(b"1234567")
    (folder / "README").write_bytes(b"not Overnight's")
    (out / "run=nobodys").mkdir()
    (out / "run=nobodys/part-00000-0000-0123456789ab.parquet").write_bytes(b"12")
    (out / "notes.txt").write_bytes(b"not Overnight's")
    before = list_files(out)
    report = clean(storage_of(out), delete=True)

    assert (4, 17) == (report.objects, report.bytes)
    assert (4, 17) == sum_sizes(before, list_files(out))
    kinds = {kind: count for run in report.runs for kind, count in run.removed.items() if run.run == runs[2]}
    assert {"file set aside": 1, "torn write": 1, "part": 1} == kinds
    assert (folder / "README").exists()
    assert not (out / "run=nobodys").exists()


def test_an_unfinished_run_keeps_all_that_it_has_until_it_is_old(runs: list[str], source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(source / "f3.parquet", 9000, 24, group=12)
    plan = plan_call(source, out).plan
    score_plan(plan, storage_of(out), [0])
    (out / f"run={plan.run}").mkdir(exist_ok=True)
    (out / f"run={plan.run}/.part-00000-0000.parquet.0badcafe.tmp").write_bytes(b"123")
    young = clean(storage_of(out), keep=1, unfinished_before=plan.planned_at, delete=True)
    assert tuple(runs[:2]) == young.runs_dropped
    assert all((out / part.path).exists() for part in plan.reused)
    assert (out / f"run={plan.run}/.part-00000-0000.parquet.0badcafe.tmp").exists()
    assert any(f"Run {plan.run} of" in note for note in young.notes)
    old = clean(storage_of(out), unfinished_before=LATER, delete=True)

    assert (plan.run,) == old.runs_dropped
    assert not (out / f"run={plan.run}").exists()
    assert not (out / f"_overnight/{plan.run}").exists()
    assert "complete" == verify_run(storage_of(out), runs[2]).state
    assert 120 == open_predictions(str(out)).collect().height


def test_an_unfinished_run_ends_after_a_cleaning_to_the_same_table(
    runs: list[str], source: Path, tmp_path: Path
) -> None:
    write(source / "f3.parquet", 9000, 24, group=12)
    score_plan(plan_call(source, tmp_path / "out").plan, storage_of(tmp_path / "out"), [0])
    clean(storage_of(tmp_path / "out"), keep=1, delete=True)
    plan, _ = call(source, tmp_path / "out")
    full, _ = call(source, tmp_path / "full")

    assert 48 >= plan.rows - plan.rows_reused
    assert read_parts(tmp_path / "full", full.run) == read_parts(tmp_path / "out", plan.run)


def test_a_damaged_run_is_no_kept_one_and_stays_as_it_is(runs: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = published(runs[2], out)
    own = next(part.path for part in manifest.parts if part.path.startswith(f"run={runs[2]}"))
    (out / own).unlink()
    report = clean(storage_of(out), keep=1, delete=True)

    assert ((runs[1],), (runs[0],)) == (report.runs_kept, report.runs_dropped)
    assert any(f"Run {runs[2]} is damaged" in note for note in report.notes)
    assert (own,) == find_damaged_parts(storage_of(out), manifest)


def test_starts_of_dropped_runs_go(runs: list[str], tmp_path: Path) -> None:
    clean(storage_of(tmp_path / "out"), keep=2, delete=True)
    starts = [json.loads(path.read_text())["run"] for path in (tmp_path / "out/_overnight/starts").iterdir()]

    assert sorted(runs[1:]) == sorted(starts)


def test_all_that_lies_beside_the_plan_of_a_dropped_run_goes_and_nothing_of_others(
    runs: list[str], tmp_path: Path
) -> None:
    storage = storage_of(tmp_path / "out")
    names = ("statistics.json", "refused-0badcafe.json", "approved-0badcafe.json", "report.html", "trace.json")
    for run in (runs[0], runs[2]):
        for name in (*names, "costs/call-1-2.json", "publishers/001.json"):
            storage.put_new(f"_overnight/{run}/{name}", b"{}")
    for path in ("backfill/owner-00000003.json", "backfill/beat-00000003-00000001.json", "create-only.json"):
        storage.put_new(f"_overnight/{path}", b"{}")
    storage.put_new("_overnight/being-staged/staged/a.csv/0-0.parquet", b"12345")
    before = list_files(tmp_path / "out")
    clean(storage, keep=1, delete=True)
    after = list_files(tmp_path / "out")

    assert not (tmp_path / "out/_overnight" / runs[0]).exists()
    others = ("_overnight/backfill", "_overnight/create", "_overnight/being-staged", f"_overnight/{runs[2]}")
    assert {path for path in before if path.startswith(others)} == {path for path in after if path.startswith(others)}


def test_copies_of_text_go_once_their_run_is_published(tmp_path: Path) -> None:
    put(f"{tmp_path}/in", {"a.parquet": numbers(0, 25)})
    storage, plan = plan_run(str(tmp_path), "text")
    storage.put_new("_overnight/text/staged/a.csv/0-0.parquet", b"12345")
    storage.put_new("_overnight/text/marks/00000-shard", b"{}")
    put_parts(plan, storage)
    assert 0 == clean(storage, delete=True).objects
    publish(storage, plan, audit_parts(storage, plan))
    storage.put_new("_overnight/text/staged/a.csv/0-0.parquet", b"12345")
    storage.put_new("_overnight/text/marks/00000-shard", b"{}")
    report = clean(storage, delete=True)

    assert ((2, 7), {"staged copy": 1, "mark": 1}) == ((report.objects, report.bytes), report.runs[0].removed)
    assert not (tmp_path / "out/_overnight/text/staged").exists()


def test_what_a_run_keeps_beside_it_stays_where_it_is_published_while_a_destination_is_cleaned(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its plan was confirmed before the cleaning took that, and its manifest comes after it."""
    storage = storage_of(tmp_path / "out")
    plan, _ = call(source, tmp_path / "out")
    claim_order_number(storage, "next")
    manifest = tmp_path / "out/_overnight" / plan.run / "manifest.json"
    data = manifest.read_bytes()
    manifest.unlink()
    names = ("challengers.json", "challengers/1/part-00000-0000-0123456789ab.parquet", "statistics.json")
    kept = [*(f"_overnight/{plan.run}/{name}" for name in names), order_path(plan.order)]
    for path in kept[:-1]:
        storage.put_new(path, b"{}")
    inner = cleaning.read_records

    def read_late(storage: Storage, known: Any = None) -> Any:
        if known is not None:
            manifest.write_bytes(data)
        return inner(storage, known)

    monkeypatch.setattr(cleaning, "read_records", read_late)
    report = clean(storage, unfinished_before=LATER, delete=True)

    assert (plan.run,) == report.runs_dropped
    assert all(storage.exists(path) for path in kept)
    assert any("objects stay, since a run that came meanwhile has them." in note for note in report.notes)


@pytest.mark.parametrize("record", ["plan", "manifest"])
def test_nothing_goes_while_a_record_does_not_read(runs: list[str], source: Path, tmp_path: Path, record: str) -> None:
    write(source / "f3.parquet", 9000, 24, group=12)
    run = plan_call(source, tmp_path / "out").plan.run if record == "plan" else runs[1]
    (tmp_path / f"out/_overnight/{run}/{record}.json").write_text("{")
    before = list_files(tmp_path / "out")
    with pytest.raises(DestinationUnusable, match="nobody knows which parts it names, and none is deleted"):
        clean(storage_of(tmp_path / "out"), keep=1, delete=True)

    assert before == list_files(tmp_path / "out")


def test_keeping_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="At least one run must be kept, got keep=0"):
        clean(storage_of(tmp_path), keep=0)


def test_files_of_a_delta_table_stay_and_its_runs_are_not_dropped(tmp_path: Path) -> None:
    put(f"{tmp_path}/in", {"a.parquet": numbers(0, 25)})
    storage = storage_of(tmp_path / "out")
    publish_run(str(tmp_path), "night", output="delta")
    storage.put_new("run=night/part-00009-0000-0123456789ab.parquet", b"of some version of the table")
    storage.put_new("_overnight/night/marks/00000-shard", b"{}")
    report = clean(storage, delete=True)

    assert {"mark": 1} == report.runs[0].removed
    assert "VACUUM" in report.notes[0]
    with pytest.raises(BadInput, match=r"VACUUM of Delta, expire_snapshots of Iceberg"):
        clean(storage, keep=1)


def test_the_table_of_a_stream_stays(runs: list[str], tmp_path: Path) -> None:
    storage = storage_of(tmp_path / "out")
    text = (tmp_path / f"out/_overnight/{runs[0]}/plan.json").read_text()
    plan = Plan.model_validate_json(text).model_copy(update={"run": "events", "digest": "", "shards": (), "reused": ()})
    storage.put_new("_overnight/events/plan.json", plan.model_dump_json().encode())
    storage.put_new("_overnight/events/log.json", b"{}")
    commit = published(runs[0], tmp_path / "out").model_copy(
        update={"run": "events-00000003", "commit": 3, "parts": ()}
    )
    storage.put_new("_overnight/events-00000003/manifest.json", commit.model_dump_json().encode())
    storage.put_new("run=events/part-00000-0000.parquet", b"not committed yet")
    kept = {path: data for path, data in list_files(tmp_path / "out").items() if "events" in path}
    report = clean(storage, keep=1, unfinished_before=LATER, delete=True)

    assert tuple(runs[:2]) == report.runs_dropped
    assert kept.items() <= list_files(tmp_path / "out").items()


def test_what_a_run_has_that_is_planned_while_a_destination_is_cleaned_stays(
    runs: list[str], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan that refers to parts of a dropped run may be written after its manifest was read, and has gone."""
    out = tmp_path / "out"
    write(source / "f2.parquet", 9000, 24, group=12)
    plan = plan_call(source, out).plan
    text = (out / f"_overnight/{plan.run}/plan.json").read_text()
    (out / f"_overnight/{plan.run}/plan.json").unlink()
    orphan = f"run={runs[0]}/part-00009-0000-0123456789ab.parquet"
    (out / orphan).write_bytes(b"1")
    extra = plan.reused[0].model_copy(update={"path": orphan, "bytes": 1})
    late = Plan.model_validate_json(text).model_copy(update={"reused": (*plan.reused[1:], extra)})
    inner: Callable[..., Any] = cleaning.read_records
    calls = []

    def read_late(storage: Storage, known: Any = None) -> Any:
        calls.append(known)
        if len(calls) == 1:
            storage.put_new(f"_overnight/{plan.run}/plan.json", late.model_dump_json().encode())
        return inner(storage, known)

    monkeypatch.setattr(cleaning, "read_records", read_late)
    report = clean(storage_of(out), keep=1, delete=True)

    assert (out / orphan).exists()
    assert plan.run in {json.loads(path.read_text())["run"] for path in (out / "_overnight/starts").iterdir()}
    assert any("2 objects stay, since a run that came meanwhile has them." in note for note in report.notes)


class BusyStorage(LocalStorage):
    """A folder in which somebody plans or publishes a run right after all records were listed."""

    def __init__(self, root: Path, work: Callable[[], Any]) -> None:
        super().__init__(root)
        self._work = work

    def entries(self, prefix: str = "", depth: int | None = None) -> list[Entry]:
        found = super().entries(prefix, depth)
        if prefix == "_overnight" and depth is None:
            self._work()
        return found


def test_a_run_that_is_planned_while_a_destination_is_listed_is_no_old_one_and_is_published(
    runs: list[str], source: Path, tmp_path: Path
) -> None:
    """Its planner's clock may be wrong."""
    out = tmp_path / "out"
    write(source / "f3.parquet", 9000, 24, group=12)

    def plan_late() -> None:
        plan_call(source, out)
        # With a number above it, that of the run is not the highest, which stays in any case.
        claim_order_number(open_storage(str(out)), "next")

    storage = BusyStorage(out, plan_late)
    report = clean(storage, unfinished_before=LATER, delete=True)
    plan, _ = call(source, out)

    assert () == report.runs_dropped
    assert 4 == plan.order
    assert "complete" == verify_run(storage, plan.run).state


def test_an_older_run_that_is_published_while_a_destination_is_listed_is_dropped_the_next_time(
    runs: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "out/_overnight" / runs[0] / "manifest.json"
    data = path.read_bytes()
    path.unlink()
    first = clean(BusyStorage(tmp_path / "out", lambda: path.write_bytes(data)), keep=1, delete=True)
    standing = verify_run(storage_of(tmp_path / "out"), runs[0])
    second = clean(storage_of(tmp_path / "out"), keep=1, delete=True)

    assert ((runs[1],), (runs[2], runs[0])) == (first.runs_dropped, first.runs_kept)
    assert ("complete", ()) == (standing.state, standing.damages)
    assert ((runs[0],), (runs[2],)) == (second.runs_dropped, second.runs_kept)


def test_a_destination_is_cleaned_in_an_object_store_as_on_a_disk(place: str) -> None:
    put(f"{place}/in", {"a.parquet": numbers(0, 25)})
    plans = [publish_run(place, name) for name in ("first", "second", "third")]
    storage = open_storage(f"{place}/out")
    storage.put_new("run=third/part-00007-0000-0123456789ab.parquet", b"1234567")
    before = {entry.path: entry.size for entry in storage.entries()}
    shown = clean(storage, keep=1)
    assert before == {entry.path: entry.size for entry in storage.entries()}
    report = clean(storage, keep=1, delete=True)
    gone = before.keys() - {entry.path for entry in storage.entries()}

    assert (shown.objects, shown.bytes) == (report.objects, report.bytes)
    assert (len(gone), sum(before[path] for path in gone)) == (report.objects, report.bytes)
    assert (("first", "second"), ("third",)) == (report.runs_dropped, report.runs_kept)
    assert "complete" == verify_run(storage, plans[2].run).state
    assert 25 == open_predictions(f"{place}/out").collect().height
    assert 4 == claim_order_number(storage, "next")


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["run", "begin", "clean"]), st.integers(0, 4), st.sampled_from([None, 1, 2]), st.integers(0, 30)
    ),
    min_size=2,
    max_size=7,
)


@settings(max_examples=10)
@given(steps=STEPS)
def test_after_any_runs_cleanings_and_kills_every_manifest_that_is_left_is_whole(
    steps: list[tuple[str, int, int | None, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("cleanings")
    tables: dict[str, list[bytes]] = {}
    for at in range(5):
        write(folder / "in" / f"f{at}.parquet", at * 100, 24, group=12)
    newest = None
    for number, (kind, at, keep, deletes) in enumerate([("run", 0, None, 0), *steps]):
        if kind != "clean":
            write(folder / "in" / f"f{at}.parquet", 10_000 + 100 * number, 24, group=12)
        if kind == "run":
            newest, _ = call(folder / "in", folder / "out", OPTIONS)
            tables[newest.run] = read_parts(folder / "out", newest.run)
        elif kind == "begin":
            score_plan(plan_call(folder / "in", folder / "out").plan, storage_of(folder / "out"), [0])
        else:
            before = list_files(folder / "out")
            shown = clean(storage_of(folder / "out"), keep=keep)
            assert before == list_files(folder / "out")
            report = clean_until_killed(folder / "out", keep, deletes)
            if report is not None:
                assert shown == report.model_copy(update={"is_deleted": False})
                assert (report.objects, report.bytes) == sum_sizes(before, list_files(folder / "out"))
        left = list_manifests(folder / "out")
        for manifest in left:
            assert not find_damaged_parts(storage_of(folder / "out"), manifest)
            assert tables[manifest.run] == read_parts(folder / "out", manifest.run)
        assert newest is not None
        assert newest.run == max(left, key=lambda manifest: manifest.position).run
        assert 120 == open_predictions(str(folder / "out")).collect().height
    clean(storage_of(folder / "out"), keep=1, unfinished_before=LATER, delete=True)
    assert newest is not None
    assert {part.path for part in published(newest.run, folder / "out").parts} == {
        path for path in list_files(folder / "out") if path.startswith("run=")
    }
    assert "complete" == verify_run(storage_of(folder / "out"), newest.run).state


def clean_until_killed(place: Path, keep: int | None, deletes: int) -> CleanReport | None:
    try:
        return clean(MortalStorage(place, deletes), keep=keep, delete=True)
    except Killed:
        return None


def list_manifests(place: Path) -> list[Manifest]:
    paths = place.glob("_overnight/*/manifest.json")
    return [Manifest.model_validate_json(path.read_text()) for path in paths]


def test_the_command_shows_what_would_go_and_deletes_on_request(runs: list[str], tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    before = list_files(tmp_path / "out")
    shown = CliRunner().invoke(app, ["clean", out, "--keep", "1"])
    assert before == list_files(tmp_path / "out")
    done = CliRunner().invoke(app, ["clean", out, "--keep", "1", "--delete", "--json"])
    again = CliRunner().invoke(app, ["clean", out, "--keep", "1", "--unfinished-older-than", "30"])

    assert 0 == shown.exit_code, shown.output
    for text in (runs[0], "older than the newest 1", "part: 4", "would go. Nothing was deleted: --delete does it."):
        assert text in shown.stdout
    report = json.loads(done.stdout)
    assert runs[:2] == report["runs_dropped"]
    assert f"{report['objects']:,} objects of {report['bytes']:,} bytes would go" in shown.stdout
    assert "Nothing is to be deleted." in again.stdout


def test_a_folder_without_runs_has_nothing_to_delete(tmp_path: Path) -> None:
    (tmp_path / "data.parquet").write_bytes(b"not Overnight's")

    assert 0 == clean(storage_of(tmp_path), keep=3, unfinished_before=LATER, delete=True).objects
    assert ["data.parquet"] == [path.name for path in tmp_path.iterdir()]
