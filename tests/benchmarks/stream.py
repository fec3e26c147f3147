"""Streams over NATS and Kafka: rows and messages a second, latency, memory, and what kills miss or double.

The broker and whoever publishes run on the same cores. Prints a table, then one JSON object as the last line.

Taken from the environment: ROWS (2,000,000) in Arrow IPC messages of up to 1 MB, MESSAGES (100,000) of one JSON row,
ROUNDS (3), SECONDS (20) of publishing at half the maximum rate, KILLS (10) of the scorer, FIGURES (rates,nats,kafka,
each of them some minutes) and BENCH_FOLDER.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from infra.local.nats import NatsClient, NatsServer, nats_server
from tests.benchmarks.shared import (
    FEATURES,
    FOLDER,
    ROUNDS,
    child,
    console,
    machine,
    make_customers,
    make_models,
    open_registry,
    prefect,
)
from tests.benchmarks.stream_kills import kills_over_kafka, kills_over_nats, stored
from tests.child_environment import add_project

ROWS = int(os.environ.get("ROWS", "2000000"))
MESSAGES = int(os.environ.get("MESSAGES", "100000"))
SECONDS = float(os.environ.get("SECONDS", "20"))
KILLS = int(os.environ.get("KILLS", "10"))
PARTS = os.environ.get("FIGURES", "rates,nats,kafka").split(",")
# 136 bytes a row and the schema: just below the 1 MiB that NATS takes.
ROWS_PER_MESSAGE = 7_600
WAIT_SECONDS = 0.05
CHILD = Path(__file__).parents[1] / "flows" / "stream_child.py"


def main() -> None:
    start = time.perf_counter()
    open_registry()
    models = make_models()
    figures: dict[str, float] = {}
    with prefect():
        if "rates" in PARTS:
            figures |= against_batch(models["mlp"])
            figures |= one_row_a_message(models["mlp"])
            figures |= latency(models["mlp"], figures["messages_per_second"] / 2)
        if "nats" in PARTS:
            figures |= kills_over_nats(models["mlp"], FOLDER / "stream-kills", MESSAGES, KILLS)
        if "kafka" in PARTS:
            figures |= kills_over_kafka(models["mlp"], FOLDER / "stream-kills", MESSAGES, KILLS)
    show(figures, time.perf_counter() - start)
    print(json.dumps({"machine": machine(), "rows": ROWS, "messages": MESSAGES, **figures}))


def against_batch(model: str) -> dict[str, float]:
    """Rows a second of a batch run and of a stream of the same rows, in turn."""
    source = make_customers(ROWS)
    batch: list[float] = []
    stream: list[float] = []
    peaks: list[float] = []
    for _ in track(range(ROUNDS), "rows as a batch run and as a stream", console=console):
        run = child("overnight", model, source)
        batch.append(run["rows"] / run["score"])
        with fresh_server() as server, NatsClient(server.url) as client:
            client.make("ROWS", "rows.>")
            client.publish("rows.a", arrow_messages(source))
            report = scorer(model, server, "ROWS", {"idle_seconds": 3.0}).wait()
            stream.append(rate(client, rows=ROWS))
            peaks.append(report["peak_rss_mb"])
    return {
        "batch_rows_per_second": statistics.median(batch),
        "stream_rows_per_second": statistics.median(stream),
        "stream_vs_batch": statistics.median(stream) / statistics.median(batch),
        "stream_peak_rss_mb": max(peaks),
    }


def one_row_a_message(model: str) -> dict[str, float]:
    """JSON messages a second through score, publish and ack, and memory at a fifth of them and at the end."""
    found: list[float] = []
    growth: list[float] = []
    for _ in track(range(ROUNDS), "one JSON row a message", console=console):
        with fresh_server() as server, NatsClient(server.url) as client:
            client.make("ROWS", "rows.>")
            client.publish("rows.a", json_messages(MESSAGES))
            run = scorer(model, server, "ROWS", {"idle_seconds": 3.0})
            memory = Memory(run.process.pid, lambda client=client: stored(client, "ROWS-scores"))
            run.wait()
            found.append(rate(client, rows=MESSAGES))
            growth.append(memory.growth())
    known = [each for each in growth if not math.isnan(each)]
    return {"messages_per_second": statistics.median(found)} | ({"memory_growth": max(known)} if known else {})


def latency(model: str, per_second: float) -> dict[str, float]:
    """Seconds from the input's time in its stream to the score's in its own, at a steady rate."""
    with fresh_server() as server, NatsClient(server.url) as client:
        client.make("ROWS", "rows.>")
        run = scorer(model, server, "ROWS", {"idle_seconds": 6.0, "wait_seconds": WAIT_SECONDS})
        # The scorer starts, loads and measures on the first messages.
        client.publish("rows.a", json_messages(500))
        while not stored(client, "ROWS-scores"):
            time.sleep(0.1)
        time.sleep(1.0)
        first = client.info("ROWS").state.last_seq
        pace(client, per_second)
        report = run.wait()
        published = {each.number: each.time for each in client.read("ROWS", headers_only=True)}
        late = [
            each.time - published[number]
            for each in client.read("ROWS-scores", headers_only=True)
            if (number := int(each.headers["Nats-Msg-Id"].rpartition(".")[2])) > first
        ]
    allowed = 2 * WAIT_SECONDS + report["batch_seconds"]
    p50, p99 = np.quantile(late, [0.5, 0.99])
    return {
        "latency_messages_per_second": len(late) / SECONDS,
        "latency_p50_seconds": float(p50),
        "latency_p99_seconds": float(p99),
        "latency_allowed_seconds": allowed,
        "p99_over_allowed": float(p99) / allowed,
    }


def pace(client: NatsClient, per_second: float) -> None:
    """Publish so many messages a second, a few at a time, and do not fall behind the clock."""
    rows = list(json_messages(2_000))
    start, sent = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < SECONDS:
        due = int(elapsed * per_second)
        if due > sent:
            client.publish("rows.a", [rows[at % len(rows)] for at in range(sent, due)])
            sent = due
        time.sleep(0.005)


def rate(client: NatsClient, rows: int) -> float:
    """Rows a second between the first and the last score, by the times that the server gave them."""
    messages = stored(client, "ROWS-scores")
    first = client.call(client.js.get_msg("ROWS-scores", 1))
    last = client.call(client.js.get_msg("ROWS-scores", messages))
    seconds = (last.time - first.time).total_seconds()
    return rows * (messages - 1) / messages / seconds


def arrow_messages(source: Path) -> Generator[bytes]:
    import polars as pl

    from tasks.stream.score import write_arrow

    for file in sorted(source.glob("*.parquet")):
        table = pl.read_parquet(file).to_arrow()
        for at in range(0, table.num_rows, ROWS_PER_MESSAGE):
            yield write_arrow(table.slice(at, ROWS_PER_MESSAGE))


def json_messages(count: int) -> Generator[bytes]:
    import orjson

    random = np.random.default_rng(1)
    for start in range(0, count, 1000):
        x_NF = random.standard_normal((min(1000, count - start), len(FEATURES)), dtype=np.float32)
        for at, row in enumerate(x_NF.tolist()):
            yield orjson.dumps({"customer": start + at, **dict(zip(FEATURES, row, strict=True))})


@contextmanager
def fresh_server() -> Generator[NatsServer]:
    folder = FOLDER / "stream-nats"
    shutil.rmtree(folder, ignore_errors=True)
    with nats_server(folder) as server:
        yield server
    shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A scorer in a process of its own."""

    process: subprocess.Popen[str]

    def wait(self) -> dict[str, Any]:
        """Wait for its end and return its report."""
        out, error = self.process.communicate()
        if self.process.returncode:
            raise RuntimeError(error[-4000:])
        return dict(json.loads([line for line in out.splitlines() if line.startswith("{")][-1]))


def scorer(model: str, server: NatsServer, stream: str, options: dict[str, object]) -> Run:
    parameters = {
        "model": model,
        "source": {"kind": "nats", "url": server.url, "stream": stream},
        "sink": {"kind": "nats", "subject": f"{stream}.scores", "stream": f"{stream}-scores"},
        "options": {"key_columns": ["customer"], "notices": "none", **options},
    }
    command = [sys.executable, str(CHILD), json.dumps(parameters)]
    return Run(
        process=subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=add_project())
    )


class Memory:
    """What a process holds while it works, sampled by the scores that are there."""

    def __init__(self, pid: int, done: Callable[[], int]) -> None:
        self._pid, self._done = pid, done
        self._samples: list[tuple[int, float]] = []
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def growth(self) -> float:
        """Memory in the last fifth over memory in the second fifth."""
        self._thread.join()
        most = max(done for done, _ in self._samples)
        parts = [
            [mb for done, mb in self._samples if low * most <= done <= high * most]
            for low, high in ((0.2, 0.4), (0.8, 1.0))
        ]
        return max(parts[1]) / max(parts[0]) if all(parts) else float("nan")

    def _watch(self) -> None:
        status = Path(f"/proc/{self._pid}/statm")
        with suppress(OSError):
            while pages := status.read_text().split():
                with suppress(Exception):
                    self._samples.append((self._done(), int(pages[1]) * 4096 / 2**20))
                if int(pages[1]) == 0:
                    return
                time.sleep(0.2)


WANTED = {
    "stream_vs_batch": "at least 0.6",
    "messages_per_second": "at least 5,000",
    "memory_growth": "about 1",
    "p99_over_allowed": "at most 1",
    "nats_missing": "0",
    "nats_doubled": "0",
    "kafka_missing": "0",
    "kafka_doubled_over_batches": "at most 1",
}


def show(figures: dict[str, Any], seconds: float) -> None:
    table = Table("figure", "measured", "wanted", title=f"{machine()}; {seconds:,.0f} s", title_justify="left")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.4g}" if isinstance(value, float) else f"{value:,}", WANTED.get(name, ""))
    Console().print(table)


if __name__ == "__main__":
    main()
