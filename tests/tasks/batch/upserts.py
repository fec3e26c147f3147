"""Runs whose rows have chosen keys and scores, for upserts into tables."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from serving.model.encoding import Flags
from tasks.batch.options import BatchOptions
from tasks.batch.parts import encode_part, part_path
from tasks.batch.plan import Plan
from tasks.storage import open_storage
from tests.tasks.batch.small import a_contract, a_plan, put, read_keys

UPSERT = BatchOptions(rows_per_chunk=10, output="delta", delta_mode="upsert", key_columns=("id",))

Rows = Mapping[int, float | None]


def an_upsert(place: str, name: str, rows: Rows, order: int, options: BatchOptions = UPSERT) -> Plan:
    """Plan a run over these keys, and write its parts with these scores; None is a reject."""
    ids = np.array(list(rows))
    values = ids.astype(np.float32)
    source = put(f"{place}/in-{name}", {"a.parquet": pa.table({"id": ids, "a": values, "b": values})})
    plan = a_plan(source, f"{place}/out", options, contract=a_contract("a", "b"))
    plan = plan.model_copy(update={"order": order})
    put_scores(plan, f"{place}/out", rows)
    return plan


def put_scores(plan: Plan, destination: str, rows: Rows) -> None:
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
