"""Iceberg tables for tests: a real catalog on sqlite, and deletes as other writers leave them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyiceberg.catalog import Catalog, load_catalog
from pyiceberg.manifest import (
    DataFile,
    DataFileContent,
    FileFormat,
    ManifestContent,
    ManifestEntry,
    ManifestEntryStatus,
    ManifestFile,
    ManifestWriterV2,
)
from pyiceberg.table import Table
from pyiceberg.typedef import Record

from tasks.batch.iceberg_catalog import StorageIO


def configure(patch: Any, folder: str, name: str = "lake", warehouse: str | None = None) -> None:
    """Say in the environment that there is a catalog, on sqlite in a folder."""
    settings = {"TYPE": "sql", "URI": f"sqlite:///{folder}/catalog.db", "WAREHOUSE": warehouse or f"file://{folder}"}
    for setting, value in settings.items():
        patch.setenv(f"PYICEBERG_CATALOG__{name.upper()}__{setting}", value)


def open_lake(folder: str, name: str = "lake", warehouse: str | None = None) -> Catalog:
    """Open such a catalog, with the namespace sales."""
    catalog = load_catalog(
        name,
        **{
            "type": "sql",
            "uri": f"sqlite:///{folder}/catalog.db",
            "warehouse": warehouse or f"file://{folder}",
            "py-io-impl": f"{StorageIO.__module__}.{StorageIO.__name__}",
        },
    )
    catalog.create_namespace_if_not_exists("sales")
    return catalog


class _DeletesWriter(ManifestWriterV2):
    def content(self) -> ManifestContent:
        return ManifestContent.DELETES

    @property
    def _meta(self) -> dict[str, str]:
        return {**super()._meta, "content": "deletes"}


def delete_rows(table: Table, path: str, places: Sequence[int], *, by_equality: bool = False) -> Table:
    """Delete rows of a data file by their places in it, or leave a delete by equality, as Spark and Flink do."""
    data = _write_deletes(path, places)
    location = f"{table.location()}/data/{table.metadata.last_sequence_number}-deletes.parquet"
    with table.io.new_output(location).create() as stream:
        stream.write(data)
    deletes = DataFile.from_args(
        content=DataFileContent.EQUALITY_DELETES if by_equality else DataFileContent.POSITION_DELETES,
        file_path=location,
        file_format=FileFormat.PARQUET,
        partition=Record(),
        record_count=len(places),
        file_size_in_bytes=len(data),
        equality_ids=[1] if by_equality else None,
        sort_order_id=None,
        key_metadata=None,
    )
    deletes.spec_id = table.spec().spec_id
    with table.transaction() as transaction:
        producer = transaction.update_snapshot().fast_append()
        inner = producer._manifests

        def with_deletes() -> list[ManifestFile]:
            with _DeletesWriter(
                table.spec(), table.schema(), producer.new_manifest_output(), producer.snapshot_id, "gzip"
            ) as writer:
                writer.add(
                    ManifestEntry.from_args(
                        status=ManifestEntryStatus.ADDED,
                        snapshot_id=producer.snapshot_id,
                        sequence_number=None,
                        file_sequence_number=None,
                        data_file=deletes,
                    )
                )
            return [*inner(), writer.to_manifest_file()]

        producer._manifests = with_deletes  # type: ignore[method-assign]
        producer.commit()
    return table.refresh()


def _write_deletes(path: str, places: Sequence[int]) -> bytes:
    schema = pa.schema(
        [
            pa.field("file_path", pa.string(), nullable=False, metadata={"PARQUET:field_id": "2147483546"}),
            pa.field("pos", pa.int64(), nullable=False, metadata={"PARQUET:field_id": "2147483545"}),
        ]
    )
    sink = io.BytesIO()
    pq.write_table(pa.table({"file_path": [path] * len(places), "pos": list(places)}, schema), sink)
    return sink.getvalue()
