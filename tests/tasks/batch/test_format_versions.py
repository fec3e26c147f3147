"""Plans, manifests and parts state their format version, and one of a newer Overnight is refused by name."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from serving.errors import FormatTooNew
from tasks.batch.manifest import find_manifest
from tasks.batch.part_digest import NO_DIGEST, PART_DIGEST
from tasks.batch.parts import part_path
from tasks.batch.plan import FORMAT_VERSION, Plan, digest_plan
from tasks.batch.publish import audit_parts, publish
from tasks.batch.run_records import load_plan, save_plan
from tasks.storage import LocalStorage
from tests.tasks.batch.small import a_plan, numbers, put, put_parts


@pytest.fixture
def destination(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "out")


@pytest.fixture(params=[1, 2])
def plan(request: pytest.FixtureRequest, tmp_path: Path, destination: LocalStorage) -> Plan:
    """A plan of each format version, whose run is published."""
    planned = a_plan(put(f"{tmp_path}/in", {"a.parquet": numbers(0, 25)}), destination.url)
    planned = planned.model_copy(update={"format_version": request.param})
    plan = save_plan(destination, planned.model_copy(update={"digest": digest_plan(planned)}))
    put_parts(plan, destination)
    publish(destination, plan, audit_parts(destination, plan))
    return plan


def write_version(path: Path, version: int | None) -> None:
    """Write a plan or manifest with another version, or as it was before there were versions."""
    record = json.loads(path.read_bytes())
    assert record.pop("format_version") in (1, FORMAT_VERSION)
    path.write_text(json.dumps(record if version is None else record | {"format_version": version}))


@pytest.mark.parametrize("plan", [1], indirect=True)
def test_records_without_a_version_are_read(plan: Plan, destination: LocalStorage) -> None:
    for name in ("plan.json", "manifest.json"):
        write_version(destination.root / plan.folder / name, None)

    assert plan == load_plan(destination, plan.run)
    manifest = find_manifest(destination, plan.run)
    assert manifest is not None
    assert plan.run == manifest.run


@pytest.mark.parametrize("fields", [{}, {"a_field_of_later": 1}], ids=["the same fields", "other fields"])
@pytest.mark.parametrize("name", ["plan.json", "manifest.json"])
def test_records_of_a_newer_version_are_refused(
    plan: Plan, destination: LocalStorage, name: str, fields: dict[str, int]
) -> None:
    path = destination.root / plan.folder / name
    write_version(path, FORMAT_VERSION + 1)
    path.write_text(json.dumps(json.loads(path.read_bytes()) | fields))
    read = load_plan if name == "plan.json" else find_manifest

    with pytest.raises(FormatTooNew, match=rf"{name} must be of format version 2 or lower.*Update Overnight"):
        read(destination, plan.run)


@pytest.mark.parametrize(("version", "is_read"), [(None, True), (1, True), (2, True), (3, False)])
def test_a_part_of_a_newer_version_is_refused_and_stays(
    plan: Plan, destination: LocalStorage, version: int | None, *, is_read: bool
) -> None:
    path = destination.root / part_path(plan, (0, 0))
    table = pq.read_table(path)
    metadata = dict(table.schema.metadata) | {PART_DIGEST.encode(): NO_DIGEST.encode()}
    assert str(plan.format_version).encode() == metadata.pop(b"overnight.format_version")
    if version is not None:
        metadata[b"overnight.format_version"] = str(version).encode()
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), sink)
    path.write_bytes(sink.getvalue())
    if is_read:
        assert () == audit_parts(destination, plan).missing
        return

    with pytest.raises(FormatTooNew, match=r"part-00000-0000.*\.parquet must be of format version 2 or lower"):
        audit_parts(destination, plan)
    assert path.exists()
