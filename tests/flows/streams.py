"""What the tests of streams share: events, scorers in processes of their own, and what is read back."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import polars as pl

from infra.local.nats import NatsServer
from infra.local.nats_client import NatsClient
from serving.contract import Frozen
from tasks.stream.addresses import FromNats, ToNats
from tasks.stream.options import StreamOptions
from tasks.stream.score import write_arrow
from tests.flows.stream_child import PRELOADED, forked

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


def ids(payloads: Sequence[bytes]) -> Counter[int]:
    """Return how often each customer was scored."""
    return Counter(orjson.loads(payload)["customer"] for payload in payloads)


def ends(server: NatsServer, name: str, **source: Any) -> tuple[FromNats, ToNats]:
    """Return a stream named so as the source, and one beside it as the sink."""
    return (
        FromNats(url=server.url, stream=name, **source),
        ToNats(subject=f"{name}.scores", stream=f"{name}-scores"),
    )


def filled(client: NatsClient, name: str, payloads: Sequence[bytes]) -> None:
    """Make a stream and publish to it."""
    client.make(name, f"{name}.in.>")
    client.publish(f"{name}.in.a", payloads)


class Scorer:
    """A scorer in a process of its own, with what subprocess.Popen has."""

    def __init__(self, parameters: str, log: Path) -> None:
        environment = {**os.environ, "PREFECT_LOGGING_LEVEL": "INFO"}
        # Each would import for seconds what one server of forks imports once.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._process = context.Process(target=forked, args=(parameters, environment, str(log)), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        """The process's id."""
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """How it ended, if it has."""
        return self._process.exitcode

    def wait(self, seconds: float) -> int:
        """Wait for its end, and return how it was."""
        self._process.join(seconds)
        code = self._process.exitcode
        assert code is not None, f"the scorer must end within {seconds:g} s"
        return code

    def send_signal(self, signal: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, signal)


def start(model: str, source: Frozen, sink: Frozen, options: StreamOptions, log: Path) -> Scorer:
    """Start a scorer in a process of its own, which writes to a log."""
    parameters = {"model": model} | {
        name: value.model_dump(mode="json")
        for name, value in (("source", source), ("sink", sink), ("options", options))
    }
    return Scorer(json.dumps(parameters), log)


def wait_until(holds: Callable[[], bool], what: str, scorer: Scorer | None = None, seconds: float = 200.0) -> None:
    """Wait until something holds, or fail by name, at once where the scorer has ended."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, f"{what} must happen within {seconds:g} s"
        assert scorer is None or scorer.poll() is None, f"{what} must happen while the scorer lives"
        time.sleep(0.02)


def kill(scorer: Scorer) -> None:
    """Kill a scorer as a lost machine does."""
    scorer.send_signal(signal.SIGKILL)
    scorer.wait(20)


def kill_server(server: NatsServer) -> None:
    """Kill a server as a lost machine does."""
    os.kill(server.process.pid, signal.SIGKILL)
    wait_until(lambda: not server.process.running, "the server's end")
