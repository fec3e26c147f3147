"""Tables that runs are added to, Delta or Iceberg, with one set of calls for the promises of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from deltalake import DeltaTable
from pyiceberg.catalog import Catalog
from pyiceberg.table import Table

from serving.model.contract import Output
from serving.model.encoding import Flags
from tasks.batch.dataset import open_dataset
from tasks.batch.delta import check_delta, commit_delta, delta_options
from tasks.batch.iceberg_table import check_iceberg, commit_iceberg
from tasks.batch.options import BatchOptions
from tasks.batch.part_footer import PartFooter
from tasks.batch.parts import encode_part, part_path, part_schema
from tasks.batch.plan import Plan
from tasks.batch.publish import audit_parts
from tasks.storage import Storage, open_storage
from tests.tasks.batch.small import a_contract, a_plan, numbers, put, put_parts, read_keys

NAME = "lake.sales.scores"
NEW = "0" * 32  # the key of a run that no table holds
OUTPUTS = (
    Output(name="score", dtype="float32"),
    Output(name="label", dtype="str"),
    Output(name="count", dtype="uint16"),
    Output(name="tiny", dtype="int8"),
    Output(name="wide", dtype="float32", shape=(2, 2)),
)

Rows = list[dict[str, Any]]
Scores = Mapping[int, float | None]


class DeltaOutput:
    """The Delta table at a destination."""

    @staticmethod
    def options(mode: Any = "append", **more: Any) -> BatchOptions:
        return BatchOptions(rows_per_chunk=10, key_columns=("id",), output="delta", delta_mode=mode, **more)

    def open(self, destination: Storage) -> DeltaTable:
        return DeltaTable(destination.url, storage_options=delta_options(destination))

    def read(self, destination: Storage) -> list[Rows]:
        """Return the rows as each reader has them."""
        polars = pl.scan_delta(destination.url, storage_options=delta_options(destination)).collect().sort("id")
        arrow = self.open(destination).to_pyarrow_dataset().to_table().sort_by("id")
        return [polars.to_dicts(), arrow.to_pylist()]

    def count_commits(self, destination: Storage) -> int:
        return self.open(destination).version() + 1

    def list_files(self, destination: Storage) -> list[tuple[str, int, int]]:
        """Return the path, the bytes and the rows of each file."""
        adds = pa.table(self.open(destination).get_add_actions(flatten=True)).to_pylist()
        return [(add["path"], add["size_bytes"], add["num_records"]) for add in adds]

    def describe_commit(self, destination: Storage) -> dict[str, Any]:
        """Return what the newest commit says of its run."""
        return self.open(destination).history()[0]


class IcebergOutput:
    """The table `sales.scores` of a catalog."""

    def __init__(self, lake: Catalog) -> None:
        self.lake = lake

    @staticmethod
    def options(mode: Any = "append", **more: Any) -> BatchOptions:
        given = {"rows_per_chunk": 10, "key_columns": ("id",), "iceberg_table": NAME, "iceberg_mode": mode, **more}
        return BatchOptions(output="iceberg", **given)

    def open(self) -> Table:
        return self.lake.load_table(("sales", "scores"))

    def read(self, destination: Storage) -> list[Rows]:
        """Return the rows as each reader has them."""
        return [self.open().scan().to_arrow().sort_by("id").to_pylist()]

    def count_commits(self, destination: Storage) -> int:
        return len(self.open().snapshots())

    def list_files(self, destination: Storage) -> list[tuple[str, int, int]]:
        """Return the path, the bytes and the rows of each file."""
        files = [task.file for task in self.open().scan().plan_files()]
        return [(file.file_path.partition("/out/")[2], file.file_size_in_bytes, file.record_count) for file in files]

    def describe_commit(self, destination: Storage) -> dict[str, Any]:
        """Return what the newest snapshot says of its run."""
        return self.open().current_snapshot().summary.additional_properties


TableOutput = DeltaOutput | IcebergOutput


def read_ids(table: TableOutput, destination: Storage) -> list[int]:
    return [row["id"] for row in table.read(destination)[0]]


def read_scores(table: TableOutput, destination: Storage) -> list[tuple[int, float | None]]:
    return [(row["id"], row["score"]) for row in table.read(destination)[0]]


def a_run(place: str, options: BatchOptions, rows: range = range(25), order: int = 0) -> Plan:
    """Plan a run over rows with keys of their own, and write its parts."""
    source = put(f"{place}/in-{rows.start}-{rows.stop}", {"a.parquet": numbers(rows.start, rows.stop)})
    plan = a_plan(source, f"{place}/out", options, contract=a_contract("a", "b", outputs=OUTPUTS))
    put_parts(plan, open_storage(f"{place}/out"))
    return plan.model_copy(update={"order": order})


def find_footers(destination: Storage, plan: Plan) -> tuple[PartFooter, ...]:
    return audit_parts(destination, plan).footers


def commit(destination: Storage, plan: Plan, parts: Sequence[PartFooter] | None = None) -> None:
    """Add the parts of a run to its table."""
    add = commit_delta if plan.options.output == "delta" else commit_iceberg
    add(destination, plan, find_footers(destination, plan) if parts is None else parts)


def describe_parts(plan: Plan) -> pa.Schema:
    """Return the columns of a run's parts."""
    names = [column.name for column in plan.contract.columns]
    return part_schema(plan.contract, plan.options, open_dataset(plan.source, names, plan.options.key_columns))


def check(destination: Storage, plan: Plan, key: str = NEW) -> int:
    """Hold the table against a run, as is done before one is planned."""
    return check_schema(destination, describe_parts(plan), plan.options, key)


def check_schema(destination: Storage, schema: pa.Schema, options: BatchOptions, key: str = NEW) -> int:
    if options.output == "delta":
        return check_delta(destination, schema, key, mode=options.delta_mode)
    return check_iceberg(destination, schema, key, options)


def an_upsert(place: str, name: str, rows: Scores, order: int, options: BatchOptions | None = None) -> Plan:
    """Plan a run over these keys, into a Delta table unless told; write parts with these scores, None for a reject."""
    ids = np.array(list(rows))
    values = ids.astype(np.float32)
    source = put(f"{place}/in-{name}", {"a.parquet": pa.table({"id": ids, "a": values, "b": values})})
    plan = a_plan(source, f"{place}/out", options or DeltaOutput.options("upsert"), contract=a_contract("a", "b"))
    plan = plan.model_copy(update={"order": order})
    put_scores(plan, f"{place}/out", rows)
    return plan


def put_scores(plan: Plan, destination: str, rows: Scores) -> None:
    """Write the parts of a plan with these scores by key."""
    storage = open_storage(destination)
    for at, chunk in plan.chunks.items():
        keys = read_keys(plan, at)
        scores = [rows[key] for key in keys.column("id").to_pylist()]
        flags = Flags.all_good(len(scores))
        for row, score in enumerate(scores):
            if score is None:
                flags.mark_row(row, "a", "null")
        predictions = {"score": np.array([score or 0 for score in scores], np.float32)}
        storage.put_new(part_path(plan, at), encode_part(plan, chunk, keys, predictions, flags, plan.batch_size))
