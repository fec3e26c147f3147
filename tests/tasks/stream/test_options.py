"""What a person may name as the ends of a stream."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from tasks.stream.options import AnySink, AnySource, FromKafka, FromNats, StreamOptions, ToKafka, ToNats, ToParts


@pytest.mark.parametrize("kind", [FromNats, FromKafka, ToNats, ToKafka, ToParts, StreamOptions])
def test_every_field_is_described(kind: type[BaseModel]) -> None:
    assert [] == [name for name, field in kind.model_fields.items() if not field.description]


def test_sources_and_sinks_are_parsed_by_their_kind() -> None:
    source: Any = TypeAdapter(AnySource).validate_python({"kind": "kafka", "topic": "events"})
    sink: Any = TypeAdapter(AnySink).validate_python({"kind": "parts", "destination": "s3://lake/scores"})

    assert FromKafka(topic="events") == source
    assert ToParts(destination="s3://lake/scores") == sink


def test_a_password_in_an_address_is_refused_with_where_to_set_it() -> None:
    with pytest.raises(ValidationError, match=r"must not hold a user or a password.*NATS_USER and NATS_PASSWORD"):
        FromNats(url="nats://me:secret@127.0.0.1:4222", stream="events")


@pytest.mark.parametrize("kind", [FromNats, FromKafka, ToNats, ToKafka, ToParts])
def test_no_value_is_told_of_a_refused_address_whose_fields_are_misspelled(kind: type[BaseModel]) -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted") as refused:
        kind(urls="nats://me:secret@127.0.0.1:4222", tokens="secret")

    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"stream": "a.b"},
        {"stream": ""},
        {"stream": "events", "consumer": "a b"},
        {"stream": "events", "url": "http://127.0.0.1"},
        {"stream": "events", "max_deliver": 2},
        {"stream": "events", "unknown": 1},
    ],
)
def test_names_and_numbers_that_can_t_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        FromNats(**wrong)


def test_the_longest_redelivery_is_the_ack_wait_of_all_deliveries() -> None:
    assert 60.0 == FromNats(stream="events", ack_wait_seconds=20, max_deliver=3).redelivery_seconds_max


def test_dead_letters_have_a_subject_or_topic_of_their_own() -> None:
    assert "overnight.dead.events.overnight" == FromNats(stream="events").dead_letter_subject
    assert "mine" == FromNats(stream="events", dead_letters="mine").dead_letter_subject
    assert "events.dead" == FromKafka(topic="events").dead_letter_topic
