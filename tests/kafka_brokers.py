"""Kafka brokers for tests: those that librdkafka has within itself, with what its C interface alone can ask of them."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import confluent_kafka
from confluent_kafka import Producer

_PRODUCER, _METADATA = 0, 3
# Topics have ids from this version of the request on, as Kafka 2.8 and later answer it.
_METADATA_WITH_IDS = 10


def _library() -> Any:
    (found,) = (Path(confluent_kafka.__file__).parents[1] / "confluent_kafka.libs").glob("librdkafka*")
    library = ctypes.CDLL(os.fspath(found))
    for name in ("rd_kafka_conf_new", "rd_kafka_new", "rd_kafka_mock_cluster_new"):
        getattr(library, name).restype = ctypes.c_void_p
    library.rd_kafka_mock_cluster_bootstraps.restype = ctypes.c_char_p
    return library


class KafkaBrokers:
    """Three brokers that live in this process, and whose topics can be deleted, made again and cut."""

    def __init__(self) -> None:
        self._library = _library()
        conf, error = ctypes.c_void_p(self._library.rd_kafka_conf_new()), ctypes.create_string_buffer(512)
        self._library.rd_kafka_conf_set(conf, b"log_level", b"0", error, 512)
        self._client = ctypes.c_void_p(self._library.rd_kafka_new(_PRODUCER, conf, error, 512))
        self._cluster = ctypes.c_void_p(self._library.rd_kafka_mock_cluster_new(self._client, 3))
        # Without a controller they can't be asked for a topic's id.
        self._library.rd_kafka_mock_set_controller_id(self._cluster, 1)
        self.servers = self._library.rd_kafka_mock_cluster_bootstraps(self._cluster).decode()

    def create(self, topic: str, partitions: int = 4) -> None:
        """Make a topic."""
        assert self._library.rd_kafka_mock_topic_create(self._cluster, topic.encode(), partitions, 1) == 0

    def delete(self, topic: str) -> None:
        """Delete a topic, and with it what groups have committed of it."""
        assert self._library.rd_kafka_mock_topic_delete(self._cluster, topic.encode()) == 0

    def delete_before(self, topic: str, partition: int, offset: int) -> None:
        """Delete the messages before an offset, as retention does."""
        done = self._library.rd_kafka_mock_partition_delete_records(
            self._cluster, topic.encode(), partition, ctypes.c_int64(offset)
        )
        assert done == 0

    def tell_topic_ids(self, *, told: bool) -> None:
        """Answer as brokers do that know no ids of topics, or as those that do."""
        most = _METADATA_WITH_IDS + 3 if told else _METADATA_WITH_IDS - 1
        self._library.rd_kafka_mock_set_apiversion(self._cluster, _METADATA, 0, most)

    def produce(self, topic: str, payloads: list[bytes], partitions: int = 4, first: int = 0) -> None:
        """Produce messages to the partitions in turn, `first` the one to begin with."""
        producer = Producer({"bootstrap.servers": self.servers, "log_level": 0})
        for at, payload in enumerate(payloads):
            producer.produce(topic, payload, partition=first + at % partitions, timestamp=1_700_000_000_000)
        assert producer.flush(30) == 0

    def close(self) -> None:
        """Stop the brokers."""
        self._library.rd_kafka_mock_cluster_destroy(self._cluster)
        self._library.rd_kafka_destroy(self._client)
