"""What the tests of streams share: events, scorers in processes of their own, and what is read back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import polars as pl

from infra.local.nats import NatsClient, NatsServer
from serving.model.contract import Frozen
from tasks.stream.options import FromNats, StreamOptions, ToNats
from tasks.stream.score import write_arrow
from tests.child_environment import add_project
from tests.eventually import eventually

CHILD = Path(__file__).with_name("stream_child.py")
KEYS = ("customer",)
# Tuning takes seconds, and is tested where it belongs.
OPTIONS = StreamOptions(
    key_columns=KEYS, batch_size=64, slots=2, rows_per_batch=100, wait_seconds=0.02, idle_seconds=0.5, notices="none"
)


def customers(rows: int) -> pl.DataFrame:
    """A seeded table of customers with the features a, b and c, as tests.support writes it."""
    random = np.random.default_rng(7)
    return pl.DataFrame(
        {"customer": np.arange(rows), **{name: random.standard_normal(rows, dtype=np.float32) for name in "abc"}}
    )


def as_json(table: pl.DataFrame) -> list[bytes]:
    """Return each row as an event."""
    return [orjson.dumps(row) for row in table.iter_rows(named=True)]


def as_arrow(table: pl.DataFrame, rows: int) -> list[bytes]:
    """Return so many rows at a time as an event."""
    arrow = table.to_arrow()
    return [write_arrow(arrow.slice(start, rows)) for start in range(0, arrow.num_rows, rows)]


def count_customers(payloads: Sequence[bytes]) -> Counter[int]:
    """Return how often each customer was scored."""
    return Counter(orjson.loads(payload)["customer"] for payload in payloads)


def source_and_sink(server: NatsServer, name: str, **source: Any) -> tuple[FromNats, ToNats]:
    """Return a stream named so as the source, and one beside it as the sink."""
    return (
        FromNats(url=server.url, stream=name, **source),
        ToNats(subject=f"{name}.scores", stream=f"{name}-scores"),
    )


def fill_stream(client: NatsClient, name: str, payloads: Sequence[bytes]) -> None:
    """Make a stream and publish to it."""
    client.make(name, f"{name}.in.>")
    client.publish(f"{name}.in.a", payloads)


def start(model: str, source: Frozen, sink: Frozen, options: StreamOptions, log: Path) -> subprocess.Popen[bytes]:
    """Start a scorer in a process of its own, which writes to a log."""
    parameters = {"model": model} | {
        name: value.model_dump(mode="json")
        for name, value in (("source", source), ("sink", sink), ("options", options))
    }
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, str(CHILD), json.dumps(parameters)],
            env={**add_project(), "PREFECT_LOGGING_LEVEL": "INFO"},
            stdout=out,
            stderr=subprocess.STDOUT,
        )


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process as a lost machine does."""
    process.send_signal(signal.SIGKILL)
    process.wait()


def kill_server(server: NatsServer) -> None:
    """Kill a server as a lost machine does."""
    os.kill(server.process.pid, signal.SIGKILL)
    eventually(lambda: not server.process.running)
