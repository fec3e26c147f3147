"""Streams whose scorers, and whose server, are killed again and again: what is missing and what is doubled."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
from rich.progress import track

from infra.local.nats import NatsClient, NatsServer, nats_server
from tests.benchmarks.shared import FEATURES, console
from tests.child_environment import add_project
from tests.kafka_brokers import KafkaBrokers

ROOT = Path(__file__).parents[2]
CHILD = ROOT / "tests" / "flows" / "stream_child.py"
SERVER_KILLS = 2
ROWS_PER_BATCH = 500
AHEAD_MAX = 8_000
_PATIENCE_SECONDS = 600.0


def kills_over_nats(model: str, folder: Path, messages: int, kills: int) -> dict[str, int]:
    """Kill the scorer so often, and the server twice, at random places of the stream; count what is in the output."""
    shutil.rmtree(folder, ignore_errors=True)
    server = nats_server(folder / "nats")
    random.seed(0)
    try:
        with NatsClient(server.url) as client:
            client.make("ROWS", "rows.>")
            client.publish("rows.a", events(messages))
            source = {"kind": "nats", "url": server.url, "stream": "ROWS", "ack_wait_seconds": 2, "max_deliver": 100}
            sink = {"kind": "nats", "subject": "scores", "stream": "SCORES"}
            done = lambda: stored(client, "SCORES")
            for at in track(range(kills), "kills over NATS", console=console):
                scorer = start(model, source, sink, folder)
                reach(done, at_random(at, kills, messages), scorer)
                if at in range(kills // 3, kills, max(1, kills // SERVER_KILLS))[:SERVER_KILLS]:
                    server = killed_and_back(server, folder)
                    reach(done, min(messages - 1, done() + messages // (4 * kills)), scorer)
                scorer.kill()
                scorer.wait()
            finish(start(model, source, sink, folder))
            found = Counter(orjson.loads(each.payload)["customer"] for each in client.read("SCORES"))
    finally:
        server.stop()
    return {
        "nats_kills": kills,
        "nats_server_kills": SERVER_KILLS,
        "nats_missing": messages - len(found),
        "nats_doubled": found.total() - len(found),
    }


def kills_over_kafka(model: str, folder: Path, messages: int, kills: int) -> dict[str, float]:
    """The same over Kafka, as its own library mocks it: three brokers in this process."""
    from confluent_kafka import Consumer, Producer, TopicPartition

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    cluster = KafkaBrokers()
    brokers = cluster.servers
    settings: dict[str, Any] = {"bootstrap.servers": brokers, "log_level": 0}
    producer = Producer(settings)
    for name in ("rows", "scores", "rows.dead"):
        cluster.create(name)
    # The mocked brokers miss a member by its heartbeats alone: they are to do so soon.
    (folder / "settings").write_text("session.timeout.ms=6000\nheartbeat.interval.ms=500\n")
    os.environ["OVERNIGHT_KAFKA_CONFIG"] = str(folder / "settings")
    reader = Consumer({**settings, "group.id": "reader"})
    places = [TopicPartition("scores", at, 0) for at in range(4)]

    reader.assign(places)
    found: Counter[int] = Counter()
    over = threading.Event()

    def done() -> int:
        return found.total()

    # A partition of the mocked brokers forgets what is behind its last 5 MB: events come as they are scored, and scores
    # are read as they come.
    def read() -> None:
        while not over.is_set():
            found.update(orjson.loads(each.value() or b"")["customer"] for each in reader.consume(1000, 0.1))

    def feed() -> None:
        for at, payload in enumerate(events(messages)):
            while at % 100 == 0 and at > done() + AHEAD_MAX:
                time.sleep(0.01)
            producer.produce("rows", payload, partition=at % 4)
            producer.poll(0)
        producer.flush()

    reading = threading.Thread(target=read, daemon=True)
    reading.start()
    threading.Thread(target=feed, daemon=True).start()
    source, sink = {"kind": "kafka", "servers": brokers, "topic": "rows"}, {"kind": "kafka", "topic": "scores"}
    random.seed(1)
    for at in track(range(kills), "kills over Kafka", console=console):
        scorer = start(model, source, sink, folder)
        reach(done, at_random(at, kills, messages), scorer)
        scorer.kill()
        scorer.wait()
    finish(start(model, source, sink, folder))
    # The one that reads waits for messages, and answers no question meanwhile.
    teller = Consumer({**settings, "group.id": "teller"})
    while done() < sum(int(teller.get_watermark_offsets(place, timeout=10)[1]) for place in places):
        time.sleep(0.1)
    over.set()
    reading.join()
    reader.close()
    teller.close()
    doubled = found.total() - len(found)
    return {
        "kafka_kills": kills,
        "kafka_missing": messages - len(found),
        "kafka_doubled": doubled,
        "kafka_doubled_over_batches": doubled / (kills * ROWS_PER_BATCH),
    }


def events(count: int) -> list[bytes]:
    values = itertools.cycle([at / 7 for at in range(100)])
    return [orjson.dumps({"customer": at, **dict(zip(FEATURES, values, strict=False))}) for at in range(count)]


def at_random(at: int, kills: int, messages: int) -> int:
    """Return where the kill number `at` comes: anywhere in its share of the stream."""
    return int(messages * (at + random.uniform(0.2, 0.9)) / (kills + 1))


def start(model: str, source: dict[str, Any], sink: dict[str, Any], folder: Path) -> subprocess.Popen[bytes]:
    options = {
        "key_columns": ["customer"],
        "rows_per_batch": ROWS_PER_BATCH,
        "wait_seconds": 0.02,
        "idle_seconds": 6.0,
        "notices": "none",
    }
    parameters = {"model": model, "source": source, "sink": sink, "options": options}
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, str(CHILD), json.dumps(parameters)],
            env=add_project(),
            stdout=log,
            stderr=log,
        )


def reach(done: Callable[[], int], messages: int, scorer: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + _PATIENCE_SECONDS
    while done() < messages:
        if scorer.poll() is not None or time.monotonic() > until:
            message = f"The scorer must be alive until message {messages:,}, but it ended with {scorer.poll()}."
            raise RuntimeError(message)
        time.sleep(0.05)


def finish(scorer: subprocess.Popen[bytes]) -> None:
    if scorer.wait(_PATIENCE_SECONDS):
        message = f"The last scorer must end by itself, but it ended with {scorer.returncode}; see its log."
        raise RuntimeError(message)


def killed_and_back(server: NatsServer, folder: Path) -> NatsServer:
    os.kill(server.process.pid, signal.SIGKILL)
    while server.process.running:
        time.sleep(0.02)
    time.sleep(random.uniform(0, 0.5))
    return nats_server(folder / "nats", port=server.port)


def stored(client: NatsClient, name: str) -> int:
    from nats.errors import Error

    try:
        return int(client.info(name).state.messages)
    except (Error, TimeoutError):
        return 0
