"""What is said of brokers that do not answer, and what ends a stream at once."""

from __future__ import annotations

import threading

import pytest
from confluent_kafka import KafkaError, Producer

from serving.errors import BrokerDenied, BrokerFault
from tasks.stream.connections import StreamAbandoned
from tasks.stream.kafka.client import KafkaErrorHandler, build_settings, find_topic


def errors(warnings: list[str], servers: str = "127.0.0.1:9092") -> KafkaErrorHandler:
    return KafkaErrorHandler(servers, warnings.append, threading.Event())


def test_brokers_that_are_absent_are_waited_for_and_it_is_said_once(held_port: int) -> None:
    warnings: list[str] = []
    waiting = errors(warnings, f"127.0.0.1:{held_port}")
    client = Producer(build_settings(waiting.servers, waiting))
    # The wait ends here for good once it has been told of.
    waiting.warn = lambda words: (warnings.append(words), waiting.give_up.set())[0]

    with pytest.raises(StreamAbandoned):
        find_topic(client, "any", waiting, answer_seconds=0.5)
    assert warnings
    assert all(words.startswith(f"Kafka at 127.0.0.1:{held_port} must answer, got: ") for words in warnings)
    assert all(words.endswith("Waiting for it.") for words in warnings)


@pytest.mark.parametrize("code", [KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.SASL_AUTHENTICATION_FAILED])
def test_a_user_who_is_denied_gets_what_to_correct(code: int) -> None:
    warnings: list[str] = []
    refused = errors(warnings)
    refused.on_error(KafkaError(code))

    with pytest.raises(BrokerDenied, match=r"must allow this user what the stream needs.*OVERNIGHT_KAFKA_CONFIG names"):
        refused.check()
    assert [] == warnings


def test_an_error_that_may_pass_is_said_once_in_a_while_and_one_that_may_not_is_raised() -> None:
    warnings: list[str] = []
    passing = errors(warnings)
    for _ in range(3):
        passing.handle(KafkaError(KafkaError.LEADER_NOT_AVAILABLE))

    assert 1 == len(warnings)
    with pytest.raises(BrokerFault, match=r"refuses for good.*Call again: it resumes\."):
        passing.handle(KafkaError(KafkaError._FATAL, "no more", fatal=True))
