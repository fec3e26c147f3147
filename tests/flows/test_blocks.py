"""Calls of one process, each with blocks of its own: every table is scored by the model of its own registry."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from pathlib import Path

import mlflow
import polars as pl
import pytest

from infra.local.prefect_server import PrefectServer
from tasks.batch.options import BatchOptions
from tasks.common.blocks import OvernightDestination, OvernightRegistry, OvernightSource
from tests.support import register_network, write_customers

OPTIONS = BatchOptions(key_columns=("customer",), batch_size=128, rows_per_chunk=1024, experiment=None)


@pytest.mark.parametrize("count", [6, pytest.param(20, marks=pytest.mark.machines)])
def test_calls_at_once_with_a_registry_each_give_right_tables(
    registry: Path, tmp_path: Path, prefect: PrefectServer, count: int
) -> None:
    """The same alias is one of three versions, by the registry; every third call has no block, and the process's own."""
    from flows.batch import batch_inference

    uris = [register_network("blocked", seed) for seed in (0, 1, 2)]
    name = uris[0].split("/")[1]
    mlflow.MlflowClient().set_registered_model_alias(name, "champion", uris[2].split("/")[-1])
    addresses = []
    for call in range(count):
        moved = partial(pl.DataFrame.with_columns, customer=pl.col("customer") + call * 1_000)
        source = write_customers(tmp_path / f"{call}", rows=1_000, files=1, rows_per_group=500, edit=moved)
        if call % 3 == 2:
            addresses.append((f"models:/{name}@champion", str(source), str(tmp_path / f"scores-{call}")))
            continue
        copy = tmp_path / f"{call}.db"
        shutil.copy(registry / "mlflow.db", copy)
        client = mlflow.MlflowClient(f"sqlite:///{copy}", f"sqlite:///{copy}")
        client.set_registered_model_alias(name, "champion", uris[call % 3].split("/")[-1])
        OvernightRegistry(tracking_uri=f"sqlite:///{copy}").save(f"registry-{count}-{call}")
        OvernightSource(address=str(source)).save(f"customers-{count}-{call}")
        OvernightDestination(address=str(tmp_path / f"scores-{call}")).save(f"scores-{count}-{call}")
        blocks = [f"registry-{count}-{call}/{name}@champion", f"customers-{count}-{call}", f"scores-{count}-{call}"]
        addresses.append(tuple(f"block:{each}" for each in blocks))

    with ThreadPoolExecutor(count) as pool:
        calls = [pool.submit(copy_context().run, batch_inference, *given, OPTIONS) for given in addresses]

    assert [uris[call % 3] for call in range(count)] == [call.result().model for call in calls]
    tables = [pl.read_parquet(tmp_path / f"scores-{call}" / "run=*" / "*.parquet") for call in range(count)]
    assert [list(range(call * 1_000, call * 1_000 + 1_000)) for call in range(count)] == [
        table["customer"].to_list() for table in tables
    ]
    scores = [tuple(table["score"].to_list()) for table in tables]
    assert 3 == len(set(scores))
    assert [scores[call % 3] for call in range(count)] == scores
