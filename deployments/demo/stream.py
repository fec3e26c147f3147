"""The demo of streams: the flights as events into a real NATS server, scored through kills, held against a batch run.

`python -m deployments.demo.stream` publishes every flight, the first of them one a message as JSON and the others many
a message as Arrow IPC, kills the scorer and the server with SIGKILL in between, and compares each score with that of
the batch run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import orjson
import polars as pl
from rich.table import Table

from deployments.demo.flights import KEY
from deployments.demo.prepare import console, prepare_data, use_registry
from infra.local.nats import NatsClient, NatsServer, nats_server

MODEL = "models:/flight-delay@champion"
OUTPUT = "arr_delay_predicted"
STREAM, SCORES, DEAD = "FLIGHTS", "FLIGHT_SCORES", "OVERNIGHT_DEAD"
ROWS_AS_JSON = 60_000
ROWS_PER_MESSAGE = 1_000
KILLS = 3
# Passes over other rows differ in the last bits of a float32.
TOLERANCE = 1e-3
_PATIENCE_SECONDS = 300.0
_POLL_SECONDS = 0.05


def main() -> None:
    """Run the demo in the folder that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m deployments.demo.stream", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".demo"), help="where everything is kept")
    parser.add_argument("--score", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder: Path = arguments.folder.absolute()
    use_registry(folder)
    if arguments.score:
        _score_stream(arguments.score)
        return
    prepare_data(folder)
    _run_demo(folder)


def _run_demo(folder: Path) -> None:
    from infra.local.prefect_server import prefect_server  # noqa: PLC0415

    shutil.rmtree(folder / "nats", ignore_errors=True)
    console.print("Starting a Prefect and a NATS server on loopback")
    with prefect_server(folder / "prefect") as prefect:
        os.environ.update(prefect.environment)
        os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
        expected = _score_as_batch(folder)
        events = _publish_and_score(folder)
    _compare_with_batch(expected, events)


def _score_as_batch(folder: Path) -> pl.DataFrame:
    """Return the prediction of the batch run for every flight."""
    from flows.batch import batch_inference  # noqa: PLC0415 - the server's address must be set before
    from tasks.batch.manifest import open_predictions  # noqa: PLC0415
    from tasks.batch.options import BatchOptions  # noqa: PLC0415

    destination = str(folder / "predictions")
    console.print("Scoring all flights as a batch run, unless that is done")
    report = batch_inference(MODEL, str(folder / "flights"), destination, BatchOptions(key_columns=(KEY,)))
    return open_predictions(destination, report.run).select(KEY, OUTPUT).collect()


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamResult:
    """What was read back: a score for each flight, flights among the dead letters, and ids that occur twice."""

    scores: pl.DataFrame
    dead: pl.DataFrame
    duplicates: int
    kills: int
    seconds: float


def _publish_and_score(folder: Path) -> StreamResult:
    from tasks.stream.score import write_arrow  # noqa: PLC0415

    flights = pl.read_parquet(folder / "flights" / "*.parquet")
    server = nats_server(folder / "nats")
    try:
        with NatsClient(server.url) as client:
            client.make(STREAM, "flights.>")
            console.print(
                f"Publishing {flights.height:,} flights: {ROWS_AS_JSON:,} as JSON, one a message, the others as Arrow "
                f"IPC, {ROWS_PER_MESSAGE:,} a message"
            )
            events = [orjson.dumps(row, default=str) for row in flights[:ROWS_AS_JSON].iter_rows(named=True)]
            table = flights[ROWS_AS_JSON:].to_arrow(compat_level=pl.CompatLevel.oldest())
            starts = range(0, table.num_rows, ROWS_PER_MESSAGE)
            events += [write_arrow(table.slice(start, ROWS_PER_MESSAGE)) for start in starts]
            client.publish("flights.departed", events)
            start = time.perf_counter()
            server = _score_through_kills(folder, server, client, len(events))
            seconds = time.perf_counter() - start
            return _read_back(client, seconds)
    finally:
        server.stop()


def _score_through_kills(folder: Path, server: NatsServer, client: NatsClient, messages: int) -> NatsServer:
    """Start scorers one after the other, and kill each but the last in the middle; the second with the server."""
    command = [sys.executable, "-m", "deployments.demo.stream", "--folder", str(folder), "--score", server.url]
    for kill in range(1, KILLS + 1):
        at = messages * kill // (KILLS + 1)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as scorer:
            _wait_for_messages(client, at, scorer)
            if kill == KILLS // 2 + 1:
                os.kill(server.process.pid, signal.SIGKILL)
                console.print(f"Killed the server with SIGKILL, about message {at:,}, and start it again")
                while server.process.running:
                    time.sleep(_POLL_SECONDS)
                server = nats_server(folder / "nats", port=server.port)
            scorer.kill()
        console.print(f"Killed the scorer with SIGKILL: {_count_emitted(client):,} of {messages:,} messages are done")
    console.print("Starting it once more: it goes on behind them")
    subprocess.run(command, check=True, timeout=_PATIENCE_SECONDS)
    return server


def _wait_for_messages(client: NatsClient, messages: int, scorer: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + _PATIENCE_SECONDS
    while _count_emitted(client) < messages:
        if scorer.poll() is not None or time.monotonic() > until:
            message = f"The scorer must be alive until message {messages:,}, but it ended with {scorer.poll()}."
            raise RuntimeError(message)
        time.sleep(_POLL_SECONDS)


def _count_emitted(client: NatsClient) -> int:
    """Return how many messages have gone out, as scores or dead letters; 0 before there are streams for them."""
    from nats.errors import Error  # noqa: PLC0415

    found = 0
    for name in (SCORES, DEAD):
        try:
            found += client.info(name).state.messages
        except (Error, TimeoutError):
            continue
    return found


def _score_stream(url: str) -> None:
    """Score the stream until it is idle; this is the process that is killed."""
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
    from flows.stream import stream_inference  # noqa: PLC0415
    from tasks.stream.options import FromNats, StreamOptions, ToNats  # noqa: PLC0415

    report = stream_inference(
        MODEL,
        # What a kill leaves unacknowledged comes again after 3 s.
        FromNats(url=url, stream=STREAM, ack_wait_seconds=3, max_deliver=40),
        ToNats(subject="scores.flights", stream=SCORES),
        StreamOptions(key_columns=(KEY,), idle_seconds=5.0, notices="none"),
    )
    sys.stdout.write(f"{json.dumps(report.model_dump(mode='json'))}\n")


def _read_back(client: NatsClient, seconds: float) -> StreamResult:
    from tasks.stream.decode import is_arrow, read_arrow  # noqa: PLC0415

    stored = client.read(SCORES)
    dead = client.read(DEAD)
    rows = [orjson.loads(each.payload) for each in stored if not is_arrow(each.payload)]
    tables = [pl.from_arrow(read_arrow(each.payload)) for each in stored if is_arrow(each.payload)]
    frames = [pl.DataFrame(rows, schema={KEY: pl.Int64, OUTPUT: pl.Float32})]
    frames += [table.select(KEY, OUTPUT) for table in tables if isinstance(table, pl.DataFrame)]
    letters = [orjson.loads(each.payload)[KEY] for each in dead]
    ids = [each.headers["Nats-Msg-Id"] for each in (*stored, *dead)]
    return StreamResult(
        scores=pl.concat(frames),
        dead=pl.DataFrame({KEY: letters}, schema={KEY: pl.Int64}),
        duplicates=len(ids) - len(set(ids)),
        kills=KILLS,
        seconds=seconds,
    )


def _compare_with_batch(expected: pl.DataFrame, read: StreamResult) -> None:
    """Hold every flight against the batch run, show what came of it, and fail where one differs."""
    rows = pl.concat([read.scores, read.dead.with_columns(pl.lit(None, pl.Float32).alias(OUTPUT))])
    both = expected.join(rows, on=KEY, how="full", suffix="_stream", coalesce=True, nulls_equal=True)
    off = (pl.col(OUTPUT) - pl.col(f"{OUTPUT}_stream")).abs()
    same = both.filter(
        (pl.col(OUTPUT).is_null() & pl.col(f"{OUTPUT}_stream").is_null())
        | (off <= TOLERANCE * (1 + pl.col(OUTPUT).abs()))
    ).height
    missing = expected.join(rows, on=KEY, how="anti").height
    duplicates = rows.height - rows.n_unique(KEY) + read.duplicates
    table = Table(title="Every flight, as a stream and as a batch run", title_justify="left", show_header=False)
    for name, value in (
        ("flights", expected.height),
        ("with the score of the batch run", same),
        ("without a score there and here, in the dead letters or with a reason", both[OUTPUT].null_count()),
        ("missing", missing),
        ("duplicates", duplicates),
        ("kills of the scorer, and one of the server", read.kills),
        ("seconds, with every start of a process", round(read.seconds)),
    ):
        table.add_row(name, f"{value:,}")
    console.print(table)
    if missing or duplicates or same != expected.height:
        console.print("[bold red]The stream differs from the batch run.[/]")
        sys.exit(1)
    console.print("[bold green]Each flight once, with the score of the batch run.[/]")


if __name__ == "__main__":
    main()
