"""Calls of one process, each with blocks of its own: every table is scored by the model of its own registry."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from pathlib import Path

import mlflow
import polars as pl

from infra.local.prefect_server import PrefectServer
from tasks.batch.options import BatchOptions
from tasks.common.blocks import OvernightDestination, OvernightRegistry, OvernightSource
from tests.support import register_network, write_customers

CALLS = 8
OPTIONS = BatchOptions(key_columns=("customer",), batch_size=128, rows_per_chunk=1024, experiment=None)


def test_calls_at_once_with_a_registry_each_give_right_tables(
    registry: Path, tmp_path: Path, prefect: PrefectServer
) -> None:
    """The same alias is one of two versions, by the registry; the call without blocks asks the process's own."""
    from flows.batch import batch_inference

    uris = [register_network("blocked", seed) for seed in (0, 1)]
    name = uris[0].split("/")[1]
    for call in range(CALLS):
        copy = tmp_path / f"{call}.db"
        shutil.copy(registry / "mlflow.db", copy)
        client = mlflow.MlflowClient(f"sqlite:///{copy}", f"sqlite:///{copy}")
        client.set_registered_model_alias(name, "champion", uris[call % 2].split("/")[-1])
        OvernightRegistry(tracking_uri=f"sqlite:///{copy}").save(f"registry-{call}")
        moved = partial(pl.DataFrame.with_columns, customer=pl.col("customer") + call * 1_000)
        source = write_customers(tmp_path / f"{call}", rows=1_000, files=1, rows_per_group=500, edit=moved)
        OvernightSource(address=str(source)).save(f"customers-{call}")
        OvernightDestination(address=str(tmp_path / f"scores-{call}")).save(f"scores-{call}")

    def infer(call: int) -> str:
        to = f"block:scores-{call}"
        return batch_inference(f"block:registry-{call}/{name}@champion", f"block:customers-{call}", to, OPTIONS).model

    with ThreadPoolExecutor(CALLS) as pool:
        calls = [pool.submit(copy_context().run, infer, call) for call in range(CALLS)]

    assert [uris[call % 2] for call in range(CALLS)] == [call.result() for call in calls]
    tables = [pl.read_parquet(tmp_path / f"scores-{call}" / "run=*" / "*.parquet") for call in range(CALLS)]
    assert [list(range(call * 1_000, call * 1_000 + 1_000)) for call in range(CALLS)] == [
        table["customer"].to_list() for table in tables
    ]
    scores = [table["score"].to_list() for table in tables]
    assert scores[0] != scores[1]
    assert [scores[0], scores[1]] * (CALLS // 2) == scores
