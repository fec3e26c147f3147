"""What befalls a topic of Kafka between two calls and while it is read: made again, widened, cut by retention."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, TopicPartition

from serving.errors import MessagesLost, StreamReplaced, StreamUnfit
from serving.model.pin import ModelPin
from tasks.batch.manifest import open_predictions
from tasks.storage import open_storage
from tasks.stream.opener import ConnectionOpener
from tasks.stream.options import AnySink, FromKafka, StreamOptions, ToKafka, ToParts
from tasks.stream.parts_sink import NUMBER, PARTITION, PartsSink, build_table_plan
from tests.kafka_brokers import KafkaBrokers
from tests.tasks.stream.messages import CONTRACT, KEYS, decoder, emit_messages, emit_next, json_row, score

PIN = ModelPin(name="sum", version="1", model_id=None, source="", digest="0" * 64)


@pytest.fixture(scope="module")
def brokers() -> Generator[KafkaBrokers]:
    made = KafkaBrokers()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Members that have left are missed soon, and so are partitions that are new."""
    file = tmp_path / "settings"
    file.write_text("session.timeout.ms=3000\nheartbeat.interval.ms=200\ntopic.metadata.refresh.interval.ms=300\n")
    monkeypatch.setenv("OVERNIGHT_KAFKA_CONFIG", str(file))


def make(brokers: KafkaBrokers, topic: str, rows: int, partitions: int = 4) -> None:
    """Make a topic with so many rows, and those that scores and dead letters go to."""
    for each in (topic, f"{topic}.dead", f"{topic}.scores"):
        brokers.create(each, partitions)
    append(brokers, topic, range(rows), partitions)


def append(brokers: KafkaBrokers, topic: str, rows: Sequence[int], partitions: int = 4, first: int = 0) -> None:
    brokers.produce(topic, [json_row(row).payload for row in rows], partitions, first)


@contextmanager
def opened(brokers: KafkaBrokers, topic: str, sink: AnySink, warn: Callable[[str], Any] = str, **source: Any) -> Any:
    opener = ConnectionOpener(
        decoder=decoder(),
        model=PIN,
        options=StreamOptions(key_columns=KEYS),
        warn=warn,
        give_up=threading.Event(),
    )
    with opener.open(FromKafka(servers=brokers.servers, topic=topic, **source), sink) as connections:
        yield connections


def table(folder: Path, **fields: Any) -> ToParts:
    return ToParts(destination=str(folder / "table"), **fields)


def ids(folder: Path) -> list[int]:
    return sorted(int(each) for each in open_predictions(str(folder / "table")).collect()["id"])


@pytest.fixture(params=["table", "messages"])
def sink(request: pytest.FixtureRequest, fresh: str, tmp_path: Path) -> AnySink:
    return table(tmp_path) if request.param == "table" else ToKafka(topic=f"{fresh}.scores")


def test_a_topic_that_was_made_again_is_refused_and_fills_another_table(
    brokers: KafkaBrokers, fresh: str, tmp_path: Path
) -> None:
    make(brokers, fresh, 600)
    with opened(brokers, fresh, table(tmp_path)) as connections:
        emit_messages(connections, 600)
    brokers.delete(fresh)
    brokers.create(fresh)
    append(brokers, fresh, range(600, 1_700))

    with (
        pytest.raises(StreamReplaced, match=rf"table 'stream'.*{fresh}.*made again.*another name"),
        opened(brokers, fresh, table(tmp_path)),
    ):
        pass
    assert list(range(600)) == ids(tmp_path)
    with opened(brokers, fresh, table(tmp_path / "other")) as connections:
        emit_messages(connections, 1_100)
    assert list(range(600, 1_700)) == ids(tmp_path / "other")


def test_a_group_does_not_go_on_in_a_topic_that_was_made_again(brokers: KafkaBrokers, fresh: str) -> None:
    make(brokers, fresh, 40)
    scores = ToKafka(topic=f"{fresh}.scores")
    with opened(brokers, fresh, scores) as connections:
        emit_messages(connections, 40)
    (note,) = {each.metadata for each in committed(brokers, fresh)}
    brokers.delete(fresh)
    brokers.create(fresh)
    append(brokers, fresh, range(100))
    # These brokers forget offsets with the topic: a member that has not heard of it commits late.
    commit(brokers, fresh, f"{fresh}-late", note)

    with (
        pytest.raises(StreamReplaced, match=r"group 'T.*-late'.*made again.*another group"),
        opened(brokers, fresh, scores, group=f"{fresh}-late"),
    ):
        pass
    with opened(brokers, fresh, scores, group="another") as connections:
        emit_messages(connections, 100)


def committed(brokers: KafkaBrokers, topic: str) -> list[TopicPartition]:
    member = Consumer({"bootstrap.servers": brokers.servers, "group.id": "overnight", "log_level": 0})
    found = member.committed([TopicPartition(topic, at) for at in range(4)], timeout=30)
    member.close()
    return found


def commit(brokers: KafkaBrokers, topic: str, group: str, note: str = "") -> None:
    member = Consumer({"bootstrap.servers": brokers.servers, "group.id": group, "log_level": 0})
    member.commit(offsets=[TopicPartition(topic, 0, 10, note)], asynchronous=False)
    member.close()


def test_a_topic_that_is_made_again_while_it_is_read_puts_no_row_into_the_table(
    brokers: KafkaBrokers, fresh: str, tmp_path: Path
) -> None:
    make(brokers, fresh, 40)
    with opened(brokers, fresh, table(tmp_path)) as connections:
        emit_messages(connections, 40)
        brokers.delete(fresh)
        brokers.create(fresh)
        append(brokers, fresh, range(1_000, 1_200))

        with pytest.raises(StreamReplaced, match="made again"):
            emit_messages(connections, 200)
    assert list(range(40)) == ids(tmp_path)


def test_a_group_fails_where_its_topic_is_made_again_while_it_is_read(brokers: KafkaBrokers, fresh: str) -> None:
    make(brokers, fresh, 40)
    with opened(brokers, fresh, ToKafka(topic=f"{fresh}.scores")) as connections:
        emit_messages(connections, 40)
        brokers.delete(fresh)
        brokers.create(fresh)

        with pytest.raises(StreamReplaced, match="made again"):
            emit_messages(connections, 1)


def test_a_score_names_the_topic_by_its_id_so_that_no_other_of_its_name_has_the_same(
    brokers: KafkaBrokers, fresh: str
) -> None:
    make(brokers, fresh, 4)
    origins = []
    for group in ("one", "two"):
        with opened(brokers, fresh, ToKafka(topic=f"{fresh}.scores"), group=group) as connections:
            emit_messages(connections, 4)
        reader = Consumer({"bootstrap.servers": brokers.servers, "group.id": "reader", "log_level": 0})
        reader.assign([TopicPartition(f"{fresh}.scores", at, 0) for at in range(4)])
        found = reader.consume(4 * (len(origins) + 1), 30)
        reader.close()
        origins.append({dict(each.headers())["Overnight-Source"] for each in found})
        brokers.delete(fresh)
        brokers.create(fresh)
        append(brokers, fresh, range(4))

    assert [4, 8] == [len(each) for each in origins]


def test_partitions_that_are_added_are_read_from_their_beginning(
    brokers: KafkaBrokers, fresh: str, sink: AnySink
) -> None:
    # These brokers can't widen a topic: made again without ids, it is the same, with more partitions.
    brokers.tell_topic_ids(told=False)
    make(brokers, fresh, 40)
    try:
        with opened(brokers, fresh, sink, topic_id="first") as connections:
            found = emit_messages(connections, 40)
            brokers.delete(fresh)
            brokers.create(fresh, 6)
            append(brokers, fresh, range(40))
            append(brokers, fresh, range(40, 60), partitions=2, first=4)
            found += emit_messages(connections, 20)
        if isinstance(sink, ToParts):
            # What groups have committed went with the topic; a table knows by itself where it goes on.
            with opened(brokers, fresh, sink, topic_id="first") as connections:
                append(brokers, fresh, range(60, 66), partitions=6)
                found += emit_messages(connections, 6)
    finally:
        brokers.tell_topic_ids(told=True)

    assert list(range(66 if isinstance(sink, ToParts) else 60)) == sorted(
        int(decoder().decode([each])[0][0].table["id"][0].as_py()) for each in found
    )


def test_what_retention_took_before_it_was_read_is_an_error_that_counts_it(
    brokers: KafkaBrokers, fresh: str, sink: AnySink
) -> None:
    make(brokers, fresh, 80)
    with opened(brokers, fresh, sink) as connections:
        emit_messages(connections, 80)
    append(brokers, fresh, range(80, 160))
    brokers.delete_before(fresh, 1, 30)
    brokers.delete_before(fresh, 2, 25)

    with (
        pytest.raises(MessagesLost, match=r"15 messages.*partition 1 from 20 to 29.*accept_loss") as raised,
        opened(brokers, fresh, sink) as connections,
    ):
        emit_messages(connections, 80)
    assert "partition 2 from 20 to 24" in str(raised.value)
    warnings: list[str] = []
    with opened(brokers, fresh, sink, warnings.append, accept_loss=True) as connections:
        emit_messages(connections, 65)
    assert any("15 messages" in words for words in warnings)


def test_retention_that_passes_a_reader_while_it_waits_is_an_error_too(
    brokers: KafkaBrokers, fresh: str, sink: AnySink
) -> None:
    make(brokers, fresh, 8)
    with opened(brokers, fresh, sink) as connections:
        emit_messages(connections, 8)
        cut(brokers, fresh)

        # A reader on a busy machine may come in time for some of the 4,000.
        with pytest.raises(MessagesLost, match=r"messages.*partition 0 from \d+ to "):
            emit_messages(connections, 4_001)
    warnings: list[str] = []
    with opened(brokers, fresh, sink, warnings.append, accept_loss=True) as connections:
        emit_next(connections, 1, seconds=1)
        cut(brokers, fresh)
        append(brokers, fresh, range(4), partitions=1)
        emit_messages(connections, 4)
    assert any("Going on behind them" in words for words in warnings)


def cut(brokers: KafkaBrokers, topic: str) -> None:
    """Append to a partition, and delete it before a reader asks, often enough for it to come too late once."""
    for _ in range(40):
        append(brokers, topic, range(100), partitions=1)
        _, high = bounds(brokers, topic, 0)
        brokers.delete_before(topic, 0, high)


def bounds(brokers: KafkaBrokers, topic: str, partition: int) -> tuple[int, int]:
    asker = Consumer({"bootstrap.servers": brokers.servers, "group.id": "asker", "log_level": 0})
    found = asker.get_watermark_offsets(TopicPartition(topic, partition), timeout=30)
    asker.close()
    return found


def test_a_first_reader_begins_with_what_there_is_and_is_missed_nothing_of_it_later(
    brokers: KafkaBrokers, fresh: str, sink: AnySink
) -> None:
    make(brokers, fresh, 80)
    brokers.delete_before(fresh, 0, 5)
    with opened(brokers, fresh, sink):
        pass
    brokers.delete_before(fresh, 0, 9)

    with (
        pytest.raises(MessagesLost, match=r"4 messages.*partition 0 from 5 to 8"),
        opened(brokers, fresh, sink) as connections,
    ):
        emit_messages(connections, 80)


def test_brokers_that_tell_no_id_of_a_topic_need_one_from_the_caller(
    brokers: KafkaBrokers, fresh: str, tmp_path: Path
) -> None:
    make(brokers, fresh, 8)
    sink = table(tmp_path)
    brokers.tell_topic_ids(told=False)
    try:
        with pytest.raises(StreamUnfit, match=r"tell the id of topic.*topic_id"), opened(brokers, fresh, sink):
            pass
        with opened(brokers, fresh, sink, topic_id="first") as connections:
            emit_messages(connections, 8)
        brokers.delete(fresh)
        brokers.create(fresh)
        with (
            pytest.raises(StreamReplaced, match=r"partition 0 .*must reach to 2.*ends at 0"),
            opened(brokers, fresh, sink, topic_id="first") as connections,
        ):
            emit_messages(connections, 1)
    finally:
        brokers.tell_topic_ids(told=True)


def test_an_id_that_the_caller_names_must_be_that_of_the_brokers(brokers: KafkaBrokers, fresh: str) -> None:
    make(brokers, fresh, 8)

    with (
        pytest.raises(StreamReplaced, match=r"must have the id 'another' of topic_id, got '"),
        opened(brokers, fresh, ToKafka(topic=f"{fresh}.scores"), topic_id="another"),
    ):
        pass


def test_a_table_of_an_earlier_version_continues_once_the_caller_has_named_the_topic(
    brokers: KafkaBrokers, fresh: str, tmp_path: Path
) -> None:
    make(brokers, fresh, 8)
    cluster = Consumer({"bootstrap.servers": brokers.servers, "group.id": "x"}).list_topics(timeout=30).cluster_id
    storage = open_storage(str(tmp_path / "table"))
    plan = build_table_plan(table(tmp_path), f"kafka {cluster} {fresh}", model=PIN, contract=CONTRACT, keys=KEYS)
    PartsSink(storage, plan, PIN, decoder().key_types).emit([score([json_row(0)], decoder())])

    with (
        pytest.raises(StreamUnfit, match=r"did not keep the id of the topic.*topic_id='") as raised,
        opened(brokers, fresh, table(tmp_path)),
    ):
        pass
    told = str(raised.value).split("topic_id='")[1].split("'")[0]
    with opened(brokers, fresh, table(tmp_path), topic_id=told) as connections:
        emit_messages(connections, 7)
    with opened(brokers, fresh, table(tmp_path)) as connections:
        append(brokers, fresh, [8])
        emit_messages(connections, 1)
    found = open_predictions(str(tmp_path / "table")).collect()
    assert 9 == found.select(PARTITION, NUMBER).unique().height == found.height
    brokers.delete(fresh)
    brokers.create(fresh)
    with pytest.raises(StreamReplaced), opened(brokers, fresh, table(tmp_path), topic_id=told):
        pass


def test_a_group_of_an_earlier_version_continues_where_it_was(brokers: KafkaBrokers, fresh: str) -> None:
    make(brokers, fresh, 80)
    commit(brokers, fresh, f"{fresh}-old")
    brokers.delete_before(fresh, 3, 5)

    with opened(brokers, fresh, ToKafka(topic=f"{fresh}.scores"), group=f"{fresh}-old") as connections:
        emit_messages(connections, 65)
