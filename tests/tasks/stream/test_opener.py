"""Names of the output, and topics, are held against each other before anything is read."""

from __future__ import annotations

import pytest

from serving.errors import BadInput, StreamUnfit
from tasks.stream.kafka.sink import check_topics
from tasks.stream.opener import check_column_names
from tasks.stream.options import FromKafka, ToKafka
from tests.tasks.stream.messages import CONTRACT


@pytest.mark.parametrize(
    ("keys", "parts", "twice"),
    [
        (("score",), False, "score"),
        (("id", "id"), False, "id"),
        (("reject_reason",), False, "reject_reason"),
        (("source_number",), True, "source_number"),
    ],
)
def test_two_columns_of_one_name_are_refused(keys: tuple[str, ...], parts: bool, twice: str) -> None:  # noqa: FBT001
    with pytest.raises(BadInput, match=f"must have different names, got \\['{twice}'\\] twice"):
        check_column_names(CONTRACT, keys, parts=parts)


@pytest.mark.parametrize(
    ("source", "sink", "what"),
    [
        (FromKafka(topic="orders", dead_letters="orders"), ToKafka(topic="scores"), "dead letters"),
        (FromKafka(topic="orders"), ToKafka(topic="orders"), "scores"),
        (FromKafka(topic="orders"), ToKafka(topic="orders", servers="127.0.0.1:9092"), "scores"),
    ],
)
def test_nothing_is_written_into_the_topic_that_is_read(source: FromKafka, sink: ToKafka, what: str) -> None:
    with pytest.raises(StreamUnfit, match=f"The {what} must not go into the topic that is read, got 'orders'"):
        check_topics(source, sink)


def test_a_topic_of_other_brokers_may_have_the_name_of_the_one_that_is_read() -> None:
    check_topics(FromKafka(topic="orders"), ToKafka(topic="orders", servers="127.0.0.2:9092"))


def test_names_of_a_table_are_free_where_there_is_none() -> None:
    check_column_names(CONTRACT, ("source_number",), parts=False)
