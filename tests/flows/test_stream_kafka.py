"""Streams over Kafka, whose brokers its own library mocks: at least once, and exact into a table."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

from infra.local.nats import NatsClient, NatsServer
from serving.errors import BadInput, StreamUnfit
from tasks.batch.manifest import open_predictions
from tasks.stream.options import FromKafka, ToKafka, ToNats, ToParts
from tasks.stream.report import StreamReport
from tests.eventually import eventually
from tests.flows.streams import OPTIONS, as_json, count_customers, customers, kill, start
from tests.kafka_brokers import KafkaBrokers

ROWS = 3_000
# As the mocked brokers have it.
PARTITIONS = 4

pytestmark = pytest.mark.usefixtures("prefect")


@pytest.fixture(scope="module")
def brokers() -> Generator[str]:
    """The address of three brokers that live in this process."""
    made = KafkaBrokers()
    yield made.servers
    made.close()


@pytest.fixture(scope="module", autouse=True)
def settings(tmp_path_factory: pytest.TempPathFactory) -> Generator[None]:
    """The mocked brokers miss a member that has left by its heartbeats alone: they are to do so soon."""
    file = tmp_path_factory.mktemp("kafka") / "settings"
    file.write_text("session.timeout.ms=3000\nheartbeat.interval.ms=500\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OVERNIGHT_KAFKA_CONFIG", str(file))
        yield


def filled(brokers: str, topic: str, payloads: Sequence[bytes], partitions: int = PARTITIONS) -> None:
    """Make topics for input, scores and dead letters, and produce to the first."""
    producer = Producer({"bootstrap.servers": brokers, "log_level": 0})
    for name in (topic, f"{topic}.scores", f"{topic}.dead"):
        # The mocked brokers make a topic when it is asked for, and know no other way.
        producer.list_topics(name, timeout=10)
    for at, payload in enumerate(payloads):
        producer.produce(topic, payload, partition=at % partitions)
        producer.poll(0)
    assert producer.flush(30) == 0


def read(brokers: str, topic: str, partitions: int = PARTITIONS) -> list[Any]:
    """Return every message of a topic."""
    consumer = Consumer({"bootstrap.servers": brokers, "group.id": "reader", "log_level": 0})
    parts = [TopicPartition(topic, at, 0) for at in range(partitions)]
    left = sum(consumer.get_watermark_offsets(part, timeout=10)[1] for part in parts)
    consumer.assign(parts)
    found: list[Any] = []
    while len(found) < left:
        found += consumer.consume(left - len(found), 1.0)
    consumer.close()
    return found


def committed(brokers: str, topic: str, group: str = "overnight", partitions: int = PARTITIONS) -> int:
    """Return how many messages of a topic are committed."""
    consumer = Consumer({"bootstrap.servers": brokers, "group.id": group, "log_level": 0})
    parts = consumer.committed([TopicPartition(topic, at) for at in range(partitions)], timeout=10)
    consumer.close()
    return sum(max(0, part.offset) for part in parts)


def stream(model: str, source: FromKafka, sink: Any, **options: Any) -> StreamReport:
    from flows.stream import stream_inference

    return stream_inference(model, source, sink, OPTIONS.model_copy(update={"idle_seconds": 1.0, **options}))


def test_each_message_is_scored_or_dead_lettered_and_its_offset_committed(
    linear: str, brokers: str, fresh: str
) -> None:
    events = as_json(customers(300))
    # There is more to say of the second than a message holds: a character of three bytes is told of in six.
    events[17], events[18] = b"not json", orjson.dumps({"\ue000" * 300_000: 1})
    filled(brokers, fresh, events)
    report = stream(linear, FromKafka(servers=brokers, topic=fresh), ToKafka(topic=f"{fresh}.scores"))
    scores = read(brokers, f"{fresh}.scores")
    dead = {each.value(): dict(each.headers()) for each in read(brokers, f"{fresh}.dead")}

    assert (300, 2, "idle") == (report.messages, report.dead_letters, report.ended)
    assert Counter(set(range(300)) - {17, 18}) == count_customers([each.value() for each in scores])
    assert b"linear/1" == dict(scores[0].headers())["Overnight-Model"]
    assert 298 == len({dict(each.headers())["Overnight-Source"] for each in scores})
    assert set(events[17:19]) == set(dead)
    assert dead[events[17]]["Overnight-Reason"].startswith(b"JSON that does not parse")
    assert dead[events[18]]["Overnight-Reason"].startswith(b"a key column that is missing")
    assert f"{fresh}/1/4".encode() == dead[events[17]]["Overnight-Source"]
    assert 300 == committed(brokers, fresh)


def test_a_killed_scorer_doubles_at_most_one_batch(doubling: str, brokers: str, fresh: str, tmp_path: Path) -> None:
    filled(brokers, fresh, as_json(customers(ROWS)))
    source, sink = FromKafka(servers=brokers, topic=fresh), ToKafka(topic=f"{fresh}.scores")
    options = OPTIONS.model_copy(update={"idle_seconds": 1.5, "rows_per_batch": 40})
    kills = 1
    for at in range(kills):
        scorer = start(doubling, source, sink, options, tmp_path / "log")
        eventually(lambda: committed(brokers, fresh), lambda seen, at=at: seen > (at + 1) * 200, process=scorer)
        kill(scorer)
    last = start(doubling, source, sink, options, tmp_path / "log")
    assert last.wait(200) == 0, (tmp_path / "log").read_text()[-3000:]
    scored = count_customers([each.value() for each in read(brokers, f"{fresh}.scores")])

    assert set(range(ROWS)) == set(scored)
    assert scored.total() - ROWS <= kills * 40
    assert ROWS == committed(brokers, fresh)


@pytest.mark.machines
def test_a_table_is_exact_over_kills_and_resumes_from_its_own_parts(
    doubling: str, brokers: str, fresh: str, tmp_path: Path
) -> None:
    filled(brokers, fresh, as_json(customers(ROWS)))
    source = FromKafka(servers=brokers, topic=fresh)
    table = ToParts(destination=str(tmp_path / "table"), rows_per_part=150, seconds_per_part=0.3)
    options = OPTIONS.model_copy(update={"idle_seconds": 3.0, "rows_per_batch": 40})
    scorer = start(doubling, source, table, options, tmp_path / "log")
    eventually(lambda: len(list(tmp_path.glob("table/run=*/*.parquet"))), lambda seen: seen >= 6, process=scorer)
    kill(scorer)
    report = stream(doubling, source, table)
    found = open_predictions(str(tmp_path / "table")).collect()

    assert 0 < report.messages < ROWS
    assert Counter(range(ROWS)) == Counter(int(each) for each in found["customer"])
    assert ROWS == found.select("source_partition", "source_number").unique().height


def test_a_topic_of_kafka_into_a_subject_of_nats(
    linear: str, brokers: str, nats: NatsServer, nats_client: NatsClient, fresh: str
) -> None:
    filled(brokers, fresh, as_json(customers(90)))
    sink = ToNats(url=nats.url, subject=f"{fresh}.scores", stream=f"{fresh}-scores")
    report = stream(linear, FromKafka(servers=brokers, topic=fresh), sink)

    assert 90 == report.messages
    assert Counter(range(90)) == count_customers([each.payload for each in nats_client.read(f"{fresh}-scores")])


@pytest.mark.machines
def test_sigterm_drains_a_consumer_of_kafka(sleepy: str, brokers: str, fresh: str, tmp_path: Path) -> None:
    filled(brokers, fresh, as_json(customers(ROWS)))
    source, sink = FromKafka(servers=brokers, topic=fresh), ToKafka(topic=f"{fresh}.scores")
    scorer = start(sleepy, source, sink, OPTIONS.model_copy(update={"rows_per_batch": 40}), tmp_path / "log")
    eventually(lambda: committed(brokers, fresh), lambda seen: seen > 100, process=scorer)
    os.kill(scorer.pid, signal.SIGTERM)
    scorer.wait(200)
    done = committed(brokers, fresh)

    assert 100 < done < ROWS
    assert f"Interrupted by SIGTERM: {done:,} messages" in (tmp_path / "log").read_text()
    assert done == count_customers([each.value() for each in read(brokers, f"{fresh}.scores")]).total()


def test_a_missing_topic_is_named_with_those_that_there_are(linear: str, brokers: str, fresh: str) -> None:
    filled(brokers, fresh, [])

    with pytest.raises(StreamUnfit, match=rf"The topic 'nope{fresh}' must exist at .*, which has .*{fresh}"):
        stream(linear, FromKafka(servers=brokers, topic=f"nope{fresh}"), ToKafka(topic=f"{fresh}.scores"))
    with pytest.raises(StreamUnfit, match=rf"The topic 'nope{fresh}' must exist"):
        stream(linear, FromKafka(servers=brokers, topic=fresh), ToKafka(topic=f"nope{fresh}"))


def test_settings_of_the_client_come_from_a_file_that_the_environment_names(
    linear: str, brokers: str, fresh: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(brokers, fresh, as_json(customers(10)))
    source, sink = FromKafka(servers=brokers, topic=fresh), ToKafka(topic=f"{fresh}.scores")
    settings = tmp_path / "kafka"
    monkeypatch.setenv("OVERNIGHT_KAFKA_CONFIG", str(settings))

    with pytest.raises(BadInput, match="must name a file of NAME=VALUE lines that can be read"):
        stream(linear, source, sink)
    settings.write_text("# ours\nclient.id\n")
    with pytest.raises(BadInput, match="must be NAME=VALUE, got one without ="):
        stream(linear, source, sink)
    settings.write_text("# ours\nsession.timeout.ms = 6000\n")

    assert 10 == stream(linear, source, sink).messages
