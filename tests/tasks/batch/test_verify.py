"""Verification: a whole run is found whole, and every damage of one is named."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.errors import NoCompleteRun
from serving.model.contract import Output
from tasks.batch.manifest import find_manifest
from tasks.batch.options import BatchOptions
from tasks.batch.part_check import ExpectedPart, PartReader, expect_part
from tasks.batch.parts import part_path
from tasks.batch.plan import Plan, manifest_path
from tasks.batch.publish import audit_parts, claim_order_number, publish
from tasks.batch.run_records import order_path, save_plan
from tasks.batch.verify import RunVerification, choose_runs, verify_run
from tasks.storage import LocalStorage, Storage, open_storage
from tests.tasks.batch.small import a_contract, a_part, a_plan, forget_digests, numbers, put, put_parts

OUTPUTS = (
    Output(name="score", dtype="float32"),
    Output(name="embedding", dtype="float64", shape=(3,)),
    Output(name="label", dtype="str"),
)


def publish_run(place: str, options: BatchOptions | None = None, **given: Any) -> Plan:
    """Plan, score and publish a run of 34 rows below a place."""
    if not open_storage(f"{place}/in").entries():
        put(f"{place}/in", {"a.parquet": numbers(0, 25), "b.parquet": numbers(25, 34)})
    storage = open_storage(f"{place}/out")
    plan = a_plan(f"{place}/in", storage.url, options, slots=2, **given)
    plan = save_plan(storage, plan.model_copy(update={"order": claim_order_number(storage, plan.run)}))
    put_parts(plan, storage)
    publish(storage, plan, audit_parts(storage, plan))
    return plan


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """A published run of five parts, without keys of its own."""
    return publish_run(str(tmp_path))


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "out"))


def paths_of(storage: Storage, plan: Plan) -> list[Path]:
    return [Path(storage.url) / part_path(plan, chunk) for chunk in plan.chunks]


def kinds_of(result: RunVerification) -> dict[str, set[str]]:
    """Return the kinds of damage by file."""
    found: dict[str, set[str]] = {}
    for damage in result.damages:
        found.setdefault(damage.path, set()).add(damage.kind)
    return found


@pytest.mark.parametrize(
    ("options", "contract"),
    [
        (BatchOptions(rows_per_chunk=10), None),
        (BatchOptions(rows_per_chunk=10, key_columns=("id",)), None),
        (BatchOptions(rows_per_chunk=10, name="mine"), a_contract("a", "b", outputs=OUTPUTS)),
        (BatchOptions(rows_per_chunk=10, output="delta"), a_contract("a", outputs=OUTPUTS)),
        (BatchOptions(output="delta", delta_mode="replace", key_columns=("id",)), None),
    ],
)
def test_a_published_run_is_complete_and_all_of_it_is_read(place: str, options: BatchOptions, contract: Any) -> None:
    plan = publish_run(place, options, contract=contract)
    result = verify_run(open_storage(f"{place}/out"), plan.run)

    assert ("complete", (), ()) == (result.state, result.damages, result.notes)
    assert (34, 34) == (result.rows, result.rows_read)
    assert (len(plan.chunks), len(plan.chunks)) == (result.parts, result.parts_read)


def test_an_incomplete_run_is_told_with_what_it_lacks(tmp_path: Path) -> None:
    put(f"{tmp_path}/in", {"a.parquet": numbers(0, 34)})
    storage = open_storage(f"{tmp_path}/out")
    plan = save_plan(storage, a_plan(f"{tmp_path}/in", storage.url))
    put_parts(plan, storage, list(plan.chunks)[:1])
    result = verify_run(storage, plan.run)

    assert ("incomplete", ()) == (result.state, result.damages)
    assert (plan.chunks[0, 0].rows, 1, len(plan.chunks)) == (result.rows_read, result.parts_read, result.parts)
    assert (f"{len(plan.chunks) - 1} of {len(plan.chunks)} parts are not scored yet.",) == result.notes


def change_a_page(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[60] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "kinds"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), {"size", "bytes"}),
        (lambda path: path.write_bytes(b""), {"size", "unreadable"}),
        (Path.unlink, {"missing"}),
        (change_a_page, {"bytes"}),
    ],
)
@pytest.mark.parametrize("output", ["parquet", "delta"])
def test_a_damaged_part_is_named(
    damage: Callable[[Path], None], kinds: set[str], output: Any, tmp_path: Path, storage: Storage
) -> None:
    plan = publish_run(str(tmp_path), BatchOptions(rows_per_chunk=10, output=output))
    damage(paths_of(storage, plan)[1])
    result = verify_run(storage, plan.run)

    assert "damaged" == result.state
    assert {part_path(plan, list(plan.chunks)[1]): kinds} == kinds_of(result)
    assert result.rows - plan.chunks[list(plan.chunks)[1]].rows == result.rows_read


def test_parts_under_each_others_names_are_named_with_whose_they_are(plan: Plan, storage: Storage) -> None:
    first, second, *_ = paths_of(storage, plan)
    data = first.read_bytes(), second.read_bytes()
    second.write_bytes(data[0])
    first.write_bytes(data[1])
    result = verify_run(storage, plan.run)
    one, other = (part_path(plan, chunk) for chunk in list(plan.chunks)[:2])
    told = {damage.path: damage.message for damage in result.damages if damage.kind == "identity"}

    assert {one, other} == set(told)
    assert other in told[one]
    assert one in told[other]


def test_a_part_that_is_made_of_something_else_is_named(tmp_path: Path, plan: Plan, storage: Storage) -> None:
    other = publish_run(str(tmp_path), BatchOptions(rows_per_chunk=10, rescore="again"))
    chunk = next(iter(plan.chunks))
    shutil.copyfile(Path(storage.url) / part_path(other, chunk), Path(storage.url) / part_path(plan, chunk))
    result = verify_run(storage, plan.run)

    assert {"bytes", "identity"} == kinds_of(result)[part_path(plan, chunk)]
    assert "got that of no chunk of the plan" in result.damages[0].message


def rewrite(path: Path, edit: Callable[[pa.Table], pa.Table]) -> None:
    """Write a part again with other rows, and all that it says of itself as it was."""
    before = pq.read_table(path)
    after = edit(before)
    pq.write_table(
        after.replace_schema_metadata(before.schema.metadata), path, compression="zstd", write_page_checksum=True
    )


def swap(rows: int) -> list[int]:
    return [1, 0, *range(2, rows)]


def set_column(at: int, name: str, make: Callable[[pa.ChunkedArray], object]) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(at, name, make(table.column(name)))


@pytest.mark.parametrize(
    ("edit", "kind"),
    [
        (lambda table: table.take(swap(table.num_rows)), "row order"),
        (set_column(2, "score", lambda scores: scores.take(swap(len(scores)))), "bytes"),
        (set_column(2, "score", lambda scores: pa.array([0.5] * len(scores), pa.float32())), "rejects"),
        (set_column(2, "score", lambda scores: pa.nulls(len(scores), pa.float32())), "rejects"),
        (set_column(4, "reject_reason", lambda reasons: pa.nulls(len(reasons), pa.string())), "rejects"),
        (set_column(2, "score", lambda scores: scores.cast(pa.float64())), "schema"),
        (lambda table: table.slice(1), "rows"),
        (lambda table: table.drop_columns(["score"]), "schema"),
        (lambda table: table.replace_schema_metadata(None), "schema"),
    ],
)
def test_a_part_that_was_written_again_with_other_rows_is_named(
    edit: Callable[[pa.Table], pa.Table], kind: str, plan: Plan, storage: Storage
) -> None:
    path = paths_of(storage, plan)[1]
    if kind == "schema" and edit(pq.read_table(path)).schema.metadata is None:
        pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
        kind = "unreadable"
    else:
        rewrite(path, edit)
    result = verify_run(storage, plan.run)

    assert kind in kinds_of(result)[part_path(plan, list(plan.chunks)[1])]


def test_keys_of_another_type_than_in_the_other_parts_are_named(tmp_path: Path, storage: Storage) -> None:
    plan = publish_run(str(tmp_path), BatchOptions(rows_per_chunk=10, key_columns=("id",)))
    path = paths_of(storage, plan)[1]
    rewrite(path, lambda table: table.set_column(0, "id", table.column("id").cast(pa.int32())))
    damages = [damage for damage in verify_run(storage, plan.run).damages if damage.kind == "schema"]

    assert [(part_path(plan, list(plan.chunks)[1]), True)] == [
        (damage.path, "id (int64), got id (int32)" in damage.message) for damage in damages
    ]


@pytest.fixture(scope="module")
def one_part(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Storage, bytes, pa.Table]:
    place = str(tmp_path_factory.mktemp("part"))
    put(f"{place}/in", {"a.parquet": numbers(0, 10)})
    plan = a_plan(f"{place}/in", f"{place}/out", contract=a_contract("a", outputs=OUTPUTS))
    data = bytes(a_part(plan, (0, 0), rejects=[3]))
    return plan, open_storage(f"{place}/out"), data, pq.read_table(pa.BufferReader(data)).replace_schema_metadata(None)


@settings(derandomize=True, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_changed_byte_changes_what_is_read_unnoticed(
    one_part: tuple[Plan, Storage, bytes, pa.Table], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    plan, storage, whole, rows = one_part
    at, mask = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(1, 255))
    changed = bytearray(whole)
    changed[at] ^= mask
    path = part_path(plan, (0, 0))
    storage.delete([path])
    storage.put_new(path, bytes(changed))
    entry = storage.find(path)
    assert entry is not None
    part = ExpectedPart(path=path, chunk=plan.chunks[0, 0], rows=10, bytes=len(whole))
    check = PartReader(storage, plan).check(part, entry)

    if not check.damages:
        assert rows.equals(pq.read_table(pa.BufferReader(bytes(changed))).replace_schema_metadata(None))


def test_the_footer_of_a_part_without_digest_that_lacks_ranges_is_named(plan: Plan, storage: Storage) -> None:
    forget_digests(Path(storage.url))
    path = paths_of(storage, plan)[1]
    pq.write_table(pq.read_table(path), path, compression="zstd", write_page_checksum=True, write_statistics=False)

    assert {"size", "statistics"} == kinds_of(verify_run(storage, plan.run))[part_path(plan, list(plan.chunks)[1])]


LISTS = (Output(name="embedding", dtype="float64", shape=(3,)),)
TEXTS = (Output(name="label", dtype="str"),)


@pytest.mark.parametrize(
    ("outputs", "keys"), [(TEXTS, ()), (LISTS, ()), (TEXTS, ("k",))], ids=["texts", "lists", "keys of a dictionary"]
)
def test_every_flipped_bit_of_a_part_is_found(
    tmp_path: Path, outputs: tuple[Output, ...], keys: tuple[str, ...]
) -> None:
    put(f"{tmp_path}/in", {"a.parquet": {"a": [1.0, 2.0, 3.0, 4.0], "k": ["x", "y"] * 2}})
    options = BatchOptions(rows_per_chunk=10, key_columns=keys)
    plan = publish_run(str(tmp_path), options, contract=a_contract("a", outputs=outputs))
    storage = open_storage(f"{tmp_path}/out")
    manifest = find_manifest(storage, plan.run)
    assert manifest is not None
    (listed,) = manifest.parts
    (path,) = paths_of(storage, plan)
    whole = path.read_bytes()
    reader, part = PartReader(storage, plan), expect_part(listed.path, plan.chunks[0, 0], listed)
    entry = storage.find(listed.path)
    assert entry is not None
    unnoticed = []
    with path.open("r+b", buffering=0) as file:
        for bit in range(8 * len(whole)):
            at, changed = bit // 8, bytes([whole[bit // 8] ^ 1 << bit % 8])
            os.pwrite(file.fileno(), changed, at)
            os.utime(path, ns=(int(entry.tag), int(entry.tag)))
            damages = reader.check(part, entry).damages
            if not damages or "SourceChanged" in damages[0].message:
                unnoticed.append(bit)
            os.pwrite(file.fileno(), whole[at : at + 1], at)
        os.utime(path, ns=(int(entry.tag), int(entry.tag)))

    assert () == reader.check(part, entry).damages
    assert [] == unnoticed


def test_parts_of_a_release_whose_parts_bore_no_digest_are_noted(tmp_path: Path, plan: Plan, storage: Storage) -> None:
    forget_digests(tmp_path / "out")
    result = verify_run(storage, plan.run)

    assert ("complete", ()) == (result.state, result.damages)
    assert ["5 parts are of a release before parts bore a digest of their bytes"] == [
        note.partition(":")[0] for note in result.notes
    ]


def edit_json(storage: Storage, path: str, edit: Callable[[dict[str, Any]], None]) -> None:
    file = Path(storage.url) / path
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda m: m.update(rows=35), "Its rows must be"),
        (lambda m: m.update(rejects=[]), "Its rejects must be"),
        (lambda m: m.update(order=7), "Its order must be"),
        (lambda m: m.update(source="elsewhere"), "Its source must be"),
        (lambda m: m.update(key="0" * 32), "Its key must be"),
        (lambda m: m["model"].update(version="9"), "Its model must be"),
        (lambda m: m["parts"].pop(), "Its parts must be"),
        (lambda m: m["parts"].reverse(), "Its parts must be what the plan and the parts say, in the same order"),
        (lambda m: m["parts"][0].update(bytes=1), "must have the 1 bytes that it was published with"),
        (lambda m: m["parts"][0].update(rows=1), "must hold the 1 rows that the manifest has"),
        (lambda m: m["parts"].append({"path": "run=x/part.parquet", "rows": 1, "bytes": 1}), "must be there"),
        (lambda m: m.update(plan_digest="0" * 64), "must be that by which the run was published"),
        (lambda m: m.pop("rows"), "must be a manifest that this version of Overnight reads"),
        (lambda m: m.update(format_version=99), "newer Overnight has written it"),
    ],
)
def test_an_edited_manifest_is_named(
    edit: Callable[[dict[str, Any]], None], said: str, plan: Plan, storage: Storage
) -> None:
    edit_json(storage, manifest_path(plan.run), edit)
    result = verify_run(storage, plan.run)

    assert "damaged" == result.state
    assert any(said in damage.message for damage in result.damages), result.damages


@pytest.mark.parametrize(
    ("edit", "kind"),
    [
        (lambda p: p["shards"].reverse(), "plan"),
        (lambda p: p.update(batch_size=3), "plan"),
        (lambda p: p.update(order=9), "manifest"),
        (lambda p: p["model"].update(digest="e" * 64), "identity"),
        (lambda p: p["contract"]["outputs"][0].update(dtype="float64"), "schema"),
        (lambda p: p["options"].update(key_columns=["id"]), "schema"),
        (lambda p: p.pop("rows"), "plan"),
    ],
)
def test_an_edited_plan_is_named(
    edit: Callable[[dict[str, Any]], None], kind: str, plan: Plan, storage: Storage
) -> None:
    edit_json(storage, f"{plan.folder}/plan.json", edit)

    assert kind in {damage.kind for damage in verify_run(storage, plan.run).damages}


def test_without_its_plan_the_parts_are_held_against_the_manifest(plan: Plan, storage: Storage) -> None:
    storage.delete([f"{plan.folder}/plan.json", part_path(plan, next(iter(plan.chunks)))])
    result = verify_run(storage, plan.run)

    assert ["plan", "missing"] == [damage.kind for damage in result.damages]
    assert "the parts of the run were not opened" in result.notes[0]


def test_what_else_lies_in_the_folder_of_a_run_is_named(plan: Plan, storage: Storage) -> None:
    folder = Path(storage.url) / f"run={plan.run}"
    for name in ("part-00009-0000.parquet", "notes.txt", "deep/part.parquet"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / ".part-00000-0000.parquet.1234.aside").write_bytes(b"x")
    result = verify_run(storage, plan.run)

    assert {
        f"run={plan.run}/{name}": {"extra"} for name in ("part-00009-0000.parquet", "notes.txt", "deep/part.parquet")
    } == (kinds_of(result))
    assert 1 == len(result.notes)
    assert "is set aside" in result.notes[0]


@pytest.mark.parametrize("record", [None, b'{"run": "another"}', b"{"])
def test_a_number_that_the_run_does_not_hold_is_named(record: bytes | None, plan: Plan, storage: Storage) -> None:
    storage.delete([order_path(plan.order)])
    if record is not None:
        storage.put_new(order_path(plan.order), record)

    assert {order_path(plan.order): {"order"}} == kinds_of(verify_run(storage, plan.run))


@pytest.fixture
def delta(tmp_path: Path) -> Plan:
    return publish_run(str(tmp_path), BatchOptions(rows_per_chunk=10, key_columns=("id",), output="delta"))


def test_a_delta_table_without_the_run_is_named(delta: Plan, storage: Storage) -> None:
    log = Path(storage.url) / "_delta_log/00000000000000000000.json"
    actions = [line for line in log.read_text().splitlines() if '"txn"' not in line]
    log.write_text("\n".join(actions))
    without = verify_run(storage, delta.run)
    shutil.rmtree(log.parent)
    gone = verify_run(storage, delta.run)

    assert {"_delta_log": {"table"}} == kinds_of(without) == kinds_of(gone)
    assert "its log has no commit of it" in without.damages[0].message
    assert "there is no table" in gone.damages[0].message
    # What the messages say.
    storage.delete([manifest_path(delta.run)])
    publish(storage, delta, audit_parts(storage, delta))
    assert "complete" == verify_run(storage, delta.run).state


def test_a_delta_table_that_says_otherwise_of_a_part_is_named(delta: Plan, storage: Storage) -> None:
    log = Path(storage.url) / "_delta_log/00000000000000000000.json"
    log.write_text(re.sub(r"(numRecords\W+)8\b", r"\g<1>9", log.read_text()))

    assert "table" in {damage.kind for damage in verify_run(storage, delta.run).damages}


def test_parts_that_a_delta_table_has_rewritten_are_no_damage(delta: Plan, storage: Storage) -> None:
    table = DeltaTable(storage.url)
    table.optimize.compact()
    change_a_page(paths_of(storage, delta)[1])
    kept = verify_run(storage, delta.run)
    table.vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
    removed = verify_run(storage, delta.run)

    for result in (kept, removed):
        assert ("complete", 0) == (result.state, result.rows_read)
        assert any("has replaced or rewritten them since" in note for note in result.notes)


def test_a_file_of_a_delta_table_that_is_gone_is_named(delta: Plan, storage: Storage) -> None:
    DeltaTable(storage.url).optimize.compact()
    (compacted,) = Path(storage.url).glob("part-*.parquet")
    compacted.unlink()

    assert {compacted.name: {"table"}} == kinds_of(verify_run(storage, delta.run))


def test_the_newest_run_is_chosen_and_others_by_name(tmp_path: Path, plan: Plan, storage: Storage) -> None:
    newer = publish_run(str(tmp_path), BatchOptions(rows_per_chunk=10, name="newer"))
    save_plan(storage, a_plan(f"{tmp_path}/in", storage.url, BatchOptions(name="begun")))

    assert ["newer"] == choose_runs(storage, None)
    assert [plan.run] == choose_runs(storage, plan.run)
    assert {"newer", plan.run, "begun"} == set(choose_runs(storage, None, every=True))
    with pytest.raises(NoCompleteRun, match=r"must hold a run 'nwer', got: .*newer"):
        choose_runs(storage, "nwer")
    (Path(storage.url) / manifest_path(newer.run)).write_text("{")
    assert [plan.run, "newer"] == choose_runs(storage, None)


def test_a_place_without_a_published_run_is_refused(tmp_path: Path) -> None:
    storage = open_storage(f"{tmp_path}/out")
    with pytest.raises(NoCompleteRun, match="must hold a run that was published, got none\\."):
        choose_runs(storage, None)
    put(f"{tmp_path}/in", {"a.parquet": numbers(0, 34)})
    save_plan(storage, a_plan(f"{tmp_path}/in", storage.url, BatchOptions(name="begun")))
    with pytest.raises(NoCompleteRun, match="begun is incomplete"):
        choose_runs(storage, None)


def test_nothing_is_changed_by_it(plan: Plan, storage: Storage) -> None:
    change_a_page(paths_of(storage, plan)[1])
    assert isinstance(storage, LocalStorage)
    before = {path: path.read_bytes() for path in storage.root.rglob("*") if path.is_file()}
    verify_run(storage, plan.run)

    assert before == {path: path.read_bytes() for path in storage.root.rglob("*") if path.is_file()}
