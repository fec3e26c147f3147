"""Publishing: everything or nothing, once, whichever worker comes first."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace as replace_fields
from datetime import timedelta
from pathlib import Path
from time import sleep

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from serving.errors import DestinationUnusable, PublishRefused, RunDamaged, RunNameTaken, StorageFault
from tasks.batch.chunk_scheduler import MARKS
from tasks.batch.dataset import Snapshot
from tasks.batch.delta import delta_options
from tasks.batch.manifest import (
    OTHER_REASONS,
    Manifest,
    find_damaged_parts,
    find_intact_manifest,
    find_manifest,
)
from tasks.batch.options import BatchOptions
from tasks.batch.parts import part_path
from tasks.batch.plan import Plan, manifest_path
from tasks.batch.publish import (
    audit_parts,
    claim_order_number,
    count_rejects,
    find_earlier_keys,
    make_manifest,
    publish,
    sum_rejects,
    wait_for_publisher,
)
from tasks.batch.run_records import load_plan, save_plan
from tasks.batch.source import pin_source
from tasks.batch.staging import stage
from tasks.storage import LocalStorage, Storage, open_storage
from tests.tasks.batch.small import a_contract, a_part, a_plan, numbers, put, put_parts
from tests.tasks.batch.waiting import Time


@pytest.fixture
def plan(place: str) -> Plan:
    """A run of 34 rows in five chunks over four shards."""
    source = put(f"{place}/in", {"a.parquet": numbers(0, 25), "b.parquet": numbers(25, 34)})
    return a_plan(source, f"{place}/out", slots=2)


def replace(storage: Storage, path: str, data: bytes | memoryview) -> None:
    storage.delete([path])
    assert storage.put_new(path, data)


def publish_whole(destination: Storage, plan: Plan) -> Manifest:
    """Write every part of a run, and publish it."""
    put_parts(plan, destination)
    return publish(destination, plan, audit_parts(destination, plan))


def test_a_run_whose_parts_are_all_there_is_published(destination: Storage, plan: Plan) -> None:
    put_parts(plan, destination)
    audit = audit_parts(destination, plan)
    manifest = publish(destination, plan, audit)

    assert (audit.missing, audit.set_aside, audit.rows_set_aside) == ((), (), 0)
    assert manifest == find_manifest(destination, plan.run)
    assert (plan.key, plan.run, plan.planned_at, plan.model, plan.rows) == (
        *(manifest.key, manifest.run, manifest.planned_at, manifest.model, manifest.rows),
    )
    assert [part_path(plan, chunk) for chunk in plan.chunks] == [part.path for part in manifest.parts]
    assert [chunk.rows for chunk in plan.chunks.values()] == [part.rows for part in manifest.parts]
    assert [entry.size for entry in destination.entries(f"run={plan.run}")] == [part.bytes for part in manifest.parts]
    assert [("a", "null", len(plan.chunks))] == [(count.column, count.reason, count.rows) for count in manifest.rejects]
    assert manifest.rows_rejected == len(plan.chunks)


def test_a_manifest_that_is_not_there_once_written_is_told(plan: Plan, tmp_path: Path) -> None:
    class Forgetful(LocalStorage):
        def put_new(self, path: str, data: bytes | memoryview) -> bool:
            return path.endswith("manifest.json") or super().put_new(path, data)

    storage = Forgetful(tmp_path / "elsewhere")
    put_parts(plan, storage)

    with pytest.raises(StorageFault, match=f"The manifest of run {plan.run} must be readable once written"):
        publish(storage, plan, audit_parts(storage, plan))


@pytest.mark.parametrize("left_out", [0, 1, -1])
def test_a_run_that_lacks_a_part_is_refused_and_nothing_is_written(
    destination: Storage, plan: Plan, left_out: int
) -> None:
    chunks = list(plan.chunks)
    lacking = chunks.pop(left_out)
    put_parts(plan, destination, chunks)
    audit = audit_parts(destination, plan)

    assert audit.missing == (lacking,)
    told = rf"must hold the 34 rows of the dataset, got \d+ in {len(chunks)} parts, 1 parts missing"
    with pytest.raises(PublishRefused, match=told):
        publish(destination, plan, audit)
    assert find_manifest(destination, plan.run) is None
    assert destination.entries("_overnight") == []


def test_a_run_without_any_part_is_refused(destination: Storage, plan: Plan) -> None:
    with pytest.raises(PublishRefused, match="got 0 in 0 parts, 5 parts missing"):
        publish(destination, plan, audit_parts(destination, plan))


def test_a_plan_that_disagrees_with_its_own_snapshot_is_refused(destination: Storage, plan: Plan) -> None:
    put_parts(plan, destination)
    audit = audit_parts(destination, plan)
    files = plan.snapshot.files
    longer = plan.snapshot.model_copy(update={"files": (files[0].model_copy(update={"row_groups": (26,)}), *files[1:])})
    for wrong in (plan.model_copy(update={"snapshot": longer}), plan.model_copy(update={"rows": 35})):
        with pytest.raises(PublishRefused, match="Nothing was published"):
            publish(destination, wrong, audit)

    assert find_manifest(destination, plan.run) is None


@pytest.mark.parametrize(
    "tear",
    [
        lambda _: b"",
        lambda plan: bytes(a_part(plan, (1, 0)))[:-1],
        lambda _: b"PAR1 nonsense PAR1",
        lambda plan: a_part(plan, (0, 0))[:200],
        lambda plan: a_part(plan.model_copy(update={"shape": "0" * 32}), (1, 0)),
        lambda plan: bytes(a_part(plan, (1, 0))).replace(b"overnight.part_digest", b"overnight.part_digesu"),
    ],
    ids=["no bytes", "a byte short", "nonsense", "cut", "another model's", "a bit of the digest's name"],
)
def test_a_torn_part_is_set_aside_where_no_reader_looks_and_is_missing(
    destination: Storage, plan: Plan, tear: Callable[[Plan], bytes]
) -> None:
    put_parts(plan, destination)
    path = part_path(plan, (1, 0))
    replace(destination, path, tear(plan))
    audit = audit_parts(destination, plan)
    (aside,) = audit.set_aside

    assert audit.missing == ((1, 0),)
    assert audit.rows_set_aside == plan.chunks[1, 0].rows
    assert len(audit.footers) == len(plan.chunks) - 1
    assert aside.startswith(f"run={plan.run}/.part-00001-0000-{plan.digest[:12]}.parquet.")
    assert not destination.exists(path)
    put_parts(plan, destination, [(1, 0)])
    assert publish(destination, plan, audit_parts(destination, plan)).rows == 34


def test_two_audits_of_one_torn_part_set_it_aside_once(destination: Storage, plan: Plan) -> None:
    put_parts(plan, destination)
    replace(destination, part_path(plan, (1, 0)), b"torn")
    barrier = threading.Barrier(4)

    def race(_: int) -> tuple[str, ...]:
        barrier.wait()
        audit = audit_parts(destination, plan)
        assert audit.missing == ((1, 0),)
        return audit.set_aside

    with ThreadPoolExecutor(4) as pool:
        aside = [name for names in pool.map(race, range(4)) for name in names]

    assert len(aside) >= 1
    assert not destination.exists(part_path(plan, (1, 0)))


def test_a_part_that_was_scored_again_during_an_audit_stays(
    destination: Storage, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_parts(plan, destination)
    path = part_path(plan, (1, 0))
    replace(destination, path, b"torn")
    real = type(destination).set_aside

    def late(self: Storage, entry: object) -> str | None:
        # Another worker has set the torn part aside and scored its chunk in the meantime.
        replace(destination, path, a_part(plan, (1, 0), rejects=[0]))
        return real(self, entry)  # type: ignore[arg-type]

    monkeypatch.setattr(type(destination), "set_aside", late)
    audit = audit_parts(destination, plan)

    assert audit.missing == ((1, 0),)
    assert audit.set_aside == ()
    assert audit_parts(destination, plan).missing == ()


def test_a_second_call_finds_the_manifest_of_the_first(destination: Storage, plan: Plan) -> None:
    put_parts(plan, destination)
    audit = audit_parts(destination, plan)
    first = publish(destination, plan, audit)
    later = plan.model_copy(update={"planned_at": plan.planned_at + timedelta(hours=1)})

    assert first == publish(destination, later, audit)


def test_of_racing_publishers_all_have_the_one_manifest(destination: Storage, plan: Plan) -> None:
    put_parts(plan, destination)
    barrier = threading.Barrier(6)

    def race(at: int) -> object:
        mine = plan.model_copy(update={"planned_at": plan.planned_at + timedelta(seconds=at)})
        audit = audit_parts(destination, mine)
        barrier.wait()
        return publish(destination, mine, audit)

    with ThreadPoolExecutor(6) as pool:
        manifests = list(pool.map(race, range(6)))

    assert [find_manifest(destination, plan.run)] * 6 == manifests


def test_the_copies_that_were_staged_are_deleted_and_the_plan_stays(destination: Storage, place: str) -> None:
    put(f"{place}/raw", {"a.csv": b"id,a,b\n" + b"1,2,3\n" * 20})
    snapshot = a_snapshot(f"{place}/raw", destination)

    assert len(destination.entries("_overnight/key/staged")) == 2
    put(f"{place}/in2", {"a.parquet": numbers(0, 5)})
    plan = a_plan(f"{place}/in2", destination.url).model_copy(update={"run": "key", "source": snapshot})
    save_plan(destination, plan)
    publish_whole(destination, plan)

    assert ["_overnight/create-only.json", "_overnight/key/manifest.json", "_overnight/key/plan.json"] == [
        entry.path for entry in destination.entries("_overnight")
    ]
    assert plan == load_plan(destination, "key")


def a_snapshot(source: str, destination: Storage) -> Snapshot:
    return stage(pin_source(source, destination.url), destination, "_overnight/key", a_contract("a", "b"), ("id",))


def test_what_killed_writers_left_is_swept(tmp_path: object) -> None:
    put(f"{tmp_path}/in", {"a.parquet": numbers(0, 25)})
    destination = open_storage(f"{tmp_path}/out")
    assert isinstance(destination, LocalStorage)
    plan = a_plan(f"{tmp_path}/in", destination.url)
    put_parts(plan, destination)
    save_plan(destination, plan)
    left = [f"run={plan.run}/.part-00000-0000.parquet.ab.tmp", f"_overnight/{plan.run}/.plan.json.cd.tmp"]
    for path in left:
        (destination.root / path).write_bytes(b"torn")
    publish(destination, plan, audit_parts(destination, plan))

    assert not list(destination.root.rglob("*.tmp"))


def test_rejects_are_counted_over_all_parts_by_column_and_reason(destination: Storage, plan: Plan) -> None:
    for chunk in plan.chunks:
        destination.put_new(part_path(plan, chunk), a_part(plan, chunk, rejects=range(plan.chunks[chunk].rows)))
    counts = count_rejects(audit_parts(destination, plan))

    assert [("a", "null", 34)] == [(count.column, count.reason, count.rows) for count in counts]


def test_rare_reasons_are_counted_together_and_the_frequent_ones_by_themselves(
    destination: Storage, plan: Plan
) -> None:
    for chunk in plan.chunks:
        destination.put_new(part_path(plan, chunk), a_part(plan, chunk))
    footers = audit_parts(destination, plan).footers
    of_a_row = Counter({("", f"no row {row:05}"): 1 for row in range(3_000)})
    rejects = [of_a_row | Counter({("a", "null"): 7}), Counter({("a", "null"): 2})]
    counts = sum_rejects([replace_fields(footers[0], rejects=each) for each in rejects])
    again = sum_rejects([replace_fields(footers[0], rejects=each) for each in reversed(rejects)])

    assert 3_009 == sum(count.rows for count in counts)
    assert ("a", "null", 9) in [(count.column, count.reason, count.rows) for count in counts]
    assert ("", OTHER_REASONS, 2_901) == (counts[-1].column, counts[-1].reason, counts[-1].rows)
    assert 101 == len(counts)
    assert counts == again


def test_rows_whose_key_holds_a_null_are_counted_over_all_parts(place: str, destination: Storage) -> None:
    table = numbers(0, 25).set_column(0, "id", pa.array([None if at % 5 == 0 else at for at in range(25)]))
    put(f"{place}/in", {"a.parquet": table})
    plan = a_plan(f"{place}/in", destination.url, BatchOptions(key_columns=("id",), rows_per_chunk=10))
    put_parts(plan, destination)

    assert 5 == publish(destination, plan, audit_parts(destination, plan)).rows_key_null


def test_parts_that_are_gone_or_of_another_size_are_told_from_a_listing(destination: Storage, plan: Plan) -> None:
    manifest = publish_whole(destination, plan)
    assert ((), manifest) == (find_damaged_parts(destination, manifest), find_intact_manifest(destination, plan.run))

    gone, cut = part_path(plan, (1, 0)), part_path(plan, (2, 0))
    destination.delete([gone])
    replace(destination, cut, bytes(a_part(plan, (2, 0)))[:-1])
    assert ((gone, cut), None) == (
        find_damaged_parts(destination, manifest),
        find_intact_manifest(destination, plan.run),
    )


def test_a_part_that_a_delta_table_names_is_missed_and_one_that_it_has_rewritten_is_not(
    destination: Storage, plan: Plan
) -> None:
    plan = plan.model_copy(update={"options": plan.options.model_copy(update={"output": "delta"})})
    manifest = publish_whole(destination, plan)
    gone, data = part_path(plan, (1, 0)), bytes(a_part(plan, (1, 0), [0]))
    destination.delete([gone])
    named = find_damaged_parts(destination, manifest)
    destination.put_new(gone, data)
    DeltaTable(destination.url, storage_options=delta_options(destination)).optimize.compact()
    destination.delete([gone])

    assert ((gone,), ()) == (named, find_damaged_parts(destination, manifest))


def test_a_part_that_is_not_the_one_published_is_told_with_both_sizes(destination: Storage, plan: Plan) -> None:
    manifest = publish_whole(destination, plan)
    path, other = part_path(plan, (1, 0)), a_part(plan, (1, 0), rejects=[])
    replace(destination, path, other)
    (published,) = (part for part in manifest.parts if part.path == path)
    sizes = f"{len(other)} bytes of digest .*, published with {published.bytes} bytes of digest {published.digest[:12]}"

    with pytest.raises(RunDamaged, match=rf"{path} \({sizes}\)"):
        publish(destination, plan, audit_parts(destination, plan))
    assert manifest == find_manifest(destination, plan.run)


def test_a_run_that_was_published_from_another_plan_of_the_same_call_stands(destination: Storage, plan: Plan) -> None:
    manifest = publish_whole(destination, plan)
    replanned = plan.model_copy(update={"digest": "0" * 64})
    put_parts(replanned, destination)

    assert manifest == publish(destination, replanned, audit_parts(destination, replanned))
    destination.delete([part_path(plan, (1, 0))])
    with pytest.raises(RunDamaged, match="must be those that it was published with"):
        publish(destination, replanned, audit_parts(destination, replanned))


def test_a_name_under_which_another_call_was_published_meanwhile_is_taken(destination: Storage, plan: Plan) -> None:
    mine, other = (plan.model_copy(update={"run": "n", "key": key * 32, "digest": key * 64}) for key in "ab")
    for each in (mine, other):
        put_parts(each, destination)
    publish(destination, other, audit_parts(destination, other))
    with pytest.raises(RunNameTaken, match="a run of another call was published there"):
        publish(destination, mine, audit_parts(destination, mine))


@pytest.mark.parametrize("racers", [1, 8])
def test_numbers_in_the_order_of_runs_are_given_once(destination: Storage, racers: int) -> None:
    with ThreadPoolExecutor(racers) as pool:
        numbers = list(pool.map(lambda run: claim_order_number(destination, run), ["a"] * 16))

    assert list(range(1, 17)) == sorted(numbers)


def test_the_order_goes_on_where_its_numbers_were_deleted(destination: Storage, plan: Plan) -> None:
    plan = plan.model_copy(update={"order": 5})
    publish_whole(destination, plan)

    assert 6 == claim_order_number(destination, "next")


def test_a_manifest_of_another_version_is_told_by_its_address(destination: Storage) -> None:
    destination.put_new("_overnight/x/manifest.json", b'{"parts": "many"}')
    with pytest.raises(DestinationUnusable, match=r"_overnight/x/manifest\.json must be a manifest that this version"):
        find_manifest(destination, "x")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A plan of 10,000 chunks, of which one worker publishes for all."""
    folder = tmp_path_factory.mktemp("large")
    put(f"{folder}/in", {"a.parquet": numbers(0, 10_000)})
    return a_plan(f"{folder}/in", f"{folder}/out", BatchOptions(rows_per_chunk=1), batch_size=1)


def test_of_the_workers_of_a_large_run_one_publishes_and_the_others_get_its_manifest(
    destination: Storage, large: Plan
) -> None:
    manifest = make_manifest(large, ())
    assert wait_for_publisher(destination, large, may_wait=lambda: True) is None

    with ThreadPoolExecutor(2) as pool:
        others = [
            pool.submit(wait_for_publisher, destination, large, may_wait=lambda: True, sleep=lambda _: sleep(0.01))
            for _ in range(2)
        ]
        destination.put_new(manifest_path(large.run), manifest.model_dump_json().encode())

        assert [manifest, manifest] == [other.result(60) for other in others]


@pytest.mark.parametrize(("times", "seconds"), [(1, 120), (10, 500)])
def test_where_a_publisher_does_not_come_to_its_end_in_time_another_follows(
    tmp_path: Path, large: Plan, times: int, seconds: int
) -> None:
    storage, time = open_storage(f"{tmp_path}/out"), Time()
    plan = large.model_copy(update={"shards": large.shards * times})
    found = [
        wait_for_publisher(storage, plan, may_wait=lambda: True, clock=time.clock, sleep=time.sleep) for _ in range(2)
    ]

    assert [None, None] == found
    assert seconds == time.now
    assert ["001.json", "002.json"] == [
        entry.path.rpartition("/")[2] for entry in storage.entries(f"{plan.folder}/publishers")
    ]


def test_a_worker_that_must_leave_or_whose_run_is_small_waits_for_no_publisher(
    destination: Storage, plan: Plan, large: Plan
) -> None:
    for _ in range(2):
        assert wait_for_publisher(destination, plan, may_wait=lambda: True) is None
        assert wait_for_publisher(destination, large, may_wait=lambda: False) is None


def test_marks_of_helpers_are_gone_once_a_run_is_published(destination: Storage, plan: Plan) -> None:
    put_parts(plan, destination)
    destination.put_new(f"{plan.folder}/{MARKS}/00000-0001-001", b"{}")
    publish(destination, plan, audit_parts(destination, plan))

    assert [] == destination.entries(f"{plan.folder}/{MARKS}")


def as_of_an_earlier_release(plan: Plan, **change: object) -> Plan:
    return plan.model_copy(update={"run": "earlier", "key": "key of then", "digest": "", **change})


def keys_found(storage: Storage, plan: Plan, earlier: Plan, manifest: Manifest | None = None) -> list[str]:
    """Return the keys of a call that are found where an earlier plan lies, and perhaps its manifest."""
    storage.put_new("_overnight/earlier/plan.json", earlier.model_dump_json().encode())
    if manifest is not None:
        storage.put_new(manifest_path("earlier"), manifest.model_dump_json().encode())
    return find_earlier_keys(storage, plan.model, plan.source, plan.options)


@pytest.mark.parametrize(
    ("published", "is_found"),
    [
        (None, True),
        ({"output": "delta"}, True),
        ({"output": "parquet"}, False),
        ({"output": "delta", "plan_digest": "d" * 64}, False),
    ],
    ids=["killed before its manifest", "to a table", "as files", "by a release of today"],
)
def test_a_call_that_an_earlier_release_has_added_to_a_table_is_found_by_its_key(
    destination: Storage, plan: Plan, published: dict[str, str] | None, *, is_found: bool
) -> None:
    earlier = as_of_an_earlier_release(plan)
    manifest = None if published is None else make_manifest(earlier, ()).model_copy(update=published)
    # What can't be read is no call of an earlier release.
    destination.put_new("_overnight/broken/plan.json", b"{")

    assert (["key of then"] if is_found else []) == keys_found(destination, plan, earlier, manifest)


@pytest.mark.parametrize(
    ("change", "is_found"),
    [
        (lambda _: {"digest": "d" * 64}, False),
        (lambda plan: {"model": plan.model.model_copy(update={"version": "4"})}, False),
        (lambda plan: {"model": plan.model.model_copy(update={"name": "other"})}, False),
        (lambda plan: {"model": plan.model.model_copy(update={"digest": "e" * 64})}, True),
        (lambda plan: {"options": plan.options.model_copy(update={"key_columns": ("id",)})}, False),
        (lambda plan: {"options": plan.options.model_copy(update={"slots": 3})}, True),
        (lambda plan: {"source": plan.source.model_copy(update={"root": "/other"})}, False),
        (lambda plan: {"source": plan.source.model_copy(update={"files": ()})}, False),
        (lambda plan: {"source": retagged(plan.source, "another/time")}, False),
        # Once the first of a local file's times alone was kept.
        (lambda plan: {"source": retagged(plan.source, plan.source.files[0].tag.partition("/")[0])}, True),
    ],
)
def test_only_the_very_call_is_found_again(
    tmp_path: Path, change: Callable[[Plan], dict[str, object]], *, is_found: bool
) -> None:
    put(f"{tmp_path}/in", {"a.parquet": numbers(0, 25)})
    plan = a_plan(f"{tmp_path}/in", f"{tmp_path}/out")
    earlier = as_of_an_earlier_release(plan, **change(plan))

    assert is_found is bool(keys_found(open_storage(f"{tmp_path}/out"), plan, earlier))


def retagged(source: Snapshot, tag: str) -> Snapshot:
    return source.model_copy(update={"files": tuple(file.model_copy(update={"tag": tag}) for file in source.files)})
