"""Calls of one process, each with blocks of its own: every table is scored by the model of its own registry."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import copy_context
from functools import partial
from pathlib import Path
from threading import Condition
from typing import Any

import mlflow
import polars as pl
import pytest

from infra.local.gateway import GatewayServer, gateway_server
from infra.local.nats import NatsServer, nats_server
from infra.local.prefect_server import PrefectServer
from serving.errors import OvernightError
from tasks.batch.backfill import Partitions
from tasks.batch.options import BatchOptions
from tasks.common import blocks
from tasks.common.blocks import OvernightDestination, OvernightRegistry, OvernightSource, open_addresses
from tasks.endpoint.spec import EndpointSpec
from tasks.endpoint.targets import External
from tasks.stream.options import FromNats, ToNats
from tests.eventually import eventually
from tests.servers import hold_port
from tests.support import register_network, write_customers

OPTIONS = BatchOptions(key_columns=("customer",), batch_size=128, rows_per_chunk=1024, experiment=None)


@pytest.mark.parametrize("count", [6, pytest.param(20, marks=pytest.mark.machines)])
def test_calls_at_once_with_a_registry_each_give_right_tables(
    registry: Path, tmp_path: Path, prefect: PrefectServer, count: int
) -> None:
    """One alias is of three versions, by the registry; every third call has no block, and that of the process."""
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
        names = [f"registry-{count}-{call}/{name}@champion", f"customers-{count}-{call}", f"scores-{count}-{call}"]
        addresses.append(tuple(f"block:{each}" for each in names))

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


@pytest.mark.parametrize("kind", ["backfill", "stream", "endpoint"])
def test_a_flow_that_takes_no_blocks_waits_for_a_call_with_some(
    registry: Path,
    tmp_path: Path,
    prefect: PrefectServer,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """The registry of the block has another model under the alias."""
    uris = [register_network("waited", seed) for seed in (0, 1)]
    name = uris[0].split("/")[1]
    copy = f"sqlite:///{tmp_path / 'copy.db'}"
    shutil.copy(registry / "mlflow.db", tmp_path / "copy.db")
    for address, uri in ((copy, uris[0]), (mlflow.get_tracking_uri(), uris[1])):
        mlflow.MlflowClient(address, address).set_registered_model_alias(name, "champion", uri.split("/")[-1])
    OvernightRegistry(tracking_uri=copy).save(f"copy-{kind}")
    model, held = f"models:/{name}@champion", f"block:copy-{kind}/{name}@champion"
    # The levels of Prefect's loggers are set by the first flow of a process: what they log is not looked at.
    waits, condition = threading.Event(), blocks._PROCESS._changed
    monkeypatch.setattr(condition, "wait_for", lambda holds: (waits.set(), Condition.wait_for(condition, holds)))
    server = {"stream": nats_server, "endpoint": gateway_server}.get(kind)

    with ExitStack() as stack:
        started = stack.enter_context(server(tmp_path / "server")) if server else None
        if kind == "endpoint":
            monkeypatch.setenv("OVERNIGHT_ADMIN_KEY", started.admin_key)
        pool = stack.enter_context(ThreadPoolExecutor(1))
        with open_addresses(held, "in", "out", logging.getLogger(__name__)):
            waiting = pool.submit(copy_context().run, CALLS[kind], model, tmp_path, started)
            eventually(lambda: waiting.done() or waits.is_set())
            assert not waiting.done()
        assert waiting.result() in (uris[1], None)


def call_backfill(model: str, place: Path, _started: None) -> str:
    from flows.backfill import backfill_inference

    write_customers(place / "in" / "day=1", rows=100, files=1, rows_per_group=100)
    return backfill_inference(model, place / "in", place / "out", Partitions(column="day"), options=OPTIONS).model


def call_stream(model: str, _place: Path, started: NatsServer) -> None:
    from flows.stream import stream_inference

    with pytest.raises(OvernightError, match="NONE"):
        stream_inference(model, FromNats(url=started.url, stream="NONE"), ToNats(url=started.url, subject="none"))


def call_endpoint(model: str, _place: Path, started: GatewayServer) -> None:
    from flows.endpoint import online_endpoint

    with hold_port() as held:
        closed = f"http://127.0.0.1:{held.getsockname()[1]}"
        spec = EndpointSpec(name="waited", model=model, gateway=started.url, target=External(url=closed))
        with pytest.raises(OvernightError, match=closed):
            online_endpoint(spec)


CALLS: dict[str, Callable[[str, Path, Any], str | None]] = {
    "backfill": call_backfill,
    "stream": call_stream,
    "endpoint": call_endpoint,
}
