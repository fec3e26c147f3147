"""The inputs and the output of a batch run as lineage describes them: address, version, digest, columns and sizes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.batch.column_types import unpack_types
from tasks.batch.dataset import Snapshot, join_fields
from tasks.batch.feature_pins import FeaturePin
from tasks.batch.parts import part_path
from tasks.batch.plan import Plan
from tasks.batch.report import BatchReport
from tasks.batch.struct_fields import list_fields
from tasks.storage import Storage, open_storage

# What MLflow takes for the digest of a dataset has 36 characters at most.
_DIGEST_LENGTH = 32
_COLUMNS_MAX = 2000

TableKind = Literal["files", "delta", "iceberg", "overnight"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribedDataset:
    """A dataset that a run has read or written.

    `address` is a local folder or the address of a prefix, the same for every version. `version` is that of a table,
    or the run of an Overnight destination. `schema` is None where nothing could be read of it.
    """

    address: str
    kind: TableKind
    version: str | None
    digest: str
    format: str
    schema: pa.Schema | None
    rows: int | None
    files: int | None
    bytes: int | None


def describe_input(plan: Plan) -> DescribedDataset:
    """Return the dataset that a plan was made for. Reads one footer of a Parquet source."""
    source, files = plan.source, plan.source.files
    return DescribedDataset(
        address=source.root,
        kind=_find_kind(source),
        version=source.version,
        digest=hashlib.sha256(source.model_dump_json().encode()).hexdigest()[:_DIGEST_LENGTH],
        format=source.format,
        schema=_read_source_schema(plan),
        rows=plan.rows,
        files=len(files),
        bytes=sum(file.size for file in files),
    )


def describe_feature_tables(plan: Plan) -> list[DescribedDataset]:
    """Return the feature tables that a plan joins to its source, in its order. Reads one footer of each."""
    return [_describe_table(pin) for pin in plan.features]


def _describe_table(pin: FeaturePin) -> DescribedDataset:
    snapshot, used = pin.snapshot, (*pin.table.join_keys, pin.table.time, *pin.columns)
    storage = open_storage(snapshot.root)
    schema = _try_reading(lambda: _read_schema(storage, snapshot.files[0].path))
    fields = [] if schema is None else [field for field in list_fields(schema) if field.name in used]
    parted = [pa.field(name, kind) for name, kind in pin.partitions.items()]
    return DescribedDataset(
        address=snapshot.root,
        kind=_find_kind(snapshot),
        version=snapshot.version,
        digest=hashlib.sha256(snapshot.model_dump_json().encode()).hexdigest()[:_DIGEST_LENGTH],
        format=snapshot.format,
        schema=None if schema is None else pa.schema([*fields, *parted]),
        rows=pin.rows,
        files=len(snapshot.files),
        bytes=sum(file.size for file in snapshot.files),
    )


def describe_output(plan: Plan, destination: str, report: BatchReport | None = None) -> DescribedDataset:
    """Return what a run writes: with the report, as it was published. Reads the footer of one part."""
    storage = open_storage(destination)
    digest = report.plan_digest if report else plan.digest
    schema = _try_reading(lambda: _read_schema(storage, part_path(plan, min(plan.chunks)))) if report else None
    return DescribedDataset(
        address=storage.url,
        kind="overnight" if plan.options.output == "parquet" else plan.options.output,
        version=plan.run,
        digest=(digest or plan.key)[:_DIGEST_LENGTH],
        format="parquet",
        schema=schema,
        rows=report.rows if report else None,
        files=report.parts if report else None,
        bytes=None,
    )


def _find_kind(source: Snapshot) -> TableKind:
    if source.version is None:
        return "files"
    if source.iceberg is not None:
        return "iceberg"
    return "overnight" if all(file.path.startswith(f"run={source.version}/") for file in source.files) else "delta"


def _read_source_schema(plan: Plan) -> pa.Schema | None:
    """Return the columns of the source's files and partitions; of formats but Parquet, those that the run reads."""
    if plan.source.format != "parquet":
        types = {column.name: _guess_type(column.dtype, column.shape) for column in plan.contract.columns}
        names = [name for name in plan.columns if name not in plan.source.columns_missing]
        return pa.schema([(name, types.get(name, pa.string())) for name in names])
    file = next(file for file in plan.snapshot.files if sum(file.row_groups))
    storage = open_storage(plan.snapshot.root)
    schema = _try_reading(lambda: _read_schema(storage, file.path))
    if schema is None:
        return None
    # Of the fields of structs those that are read are listed too.
    listed = {*plan.columns, *(schema.names if len(schema) <= _COLUMNS_MAX else ())}
    schema = pa.schema([field for field in list_fields(schema) if field.name in listed])
    fields = join_fields(schema, unpack_types(plan.snapshot.types))
    return pa.schema([*fields, *(pa.field(name, kind) for name, kind in plan.partitions.items())])


def _guess_type(dtype: str, shape: tuple[int, ...]) -> pa.DataType:
    """Return the Arrow type of what a model takes from a column."""
    named = {"str": pa.string(), "binary": pa.binary(), "bool": pa.bool_(), "datetime64[ns]": pa.timestamp("ns")}
    scalar = named[dtype] if dtype in named else getattr(pa, dtype)()
    return pa.list_(scalar) if shape else scalar


def _read_schema(storage: Storage, path: str) -> pa.Schema | None:
    entry = storage.find(path)
    if entry is None:
        return None
    with storage.open_pinned(entry) as stream:
        return pq.read_schema(stream).remove_metadata()


def _try_reading(read: Callable[[], pa.Schema | None]) -> pa.Schema | None:
    try:
        return read()
    except Exception:  # noqa: BLE001 - lineage goes without a schema, whatever ails a file that was read before
        return None
