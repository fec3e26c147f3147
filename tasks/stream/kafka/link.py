"""What every client of Kafka here shares: its settings, what it says while it waits, and what ends it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer
from confluent_kafka.admin import AdminClient

from serving.errors import BadInput, BrokerDenied, BrokerFault, StreamUnfit
from tasks.stream.ends import Abandoned

CONFIG = "OVERNIGHT_KAFKA_CONFIG"

LOOK_SECONDS = 0.2
_ASK_SECONDS = 5.0
_SAY_SECONDS = 30.0
_BACKOFF_SECONDS_MAX = 15.0
_TOPICS_SHOWN = 20
_DENIED = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError.SASL_AUTHENTICATION_FAILED,
    KafkaError._AUTHENTICATION,  # noqa: SLF001 - the library's name for what it found itself
}


@dataclass(slots=True)
class KafkaVoice:
    """Says once in half a minute what may go on for long, and keeps what ends the stream."""

    servers: str
    say: Callable[[str], None]
    give_up: threading.Event
    _said: dict[str, float] = field(default_factory=dict)
    _denied: str | None = None

    def on_error(self, error: KafkaError) -> None:
        """Take note of what the library says by itself."""
        if error.code() in _DENIED:
            self._denied = error.str()
        else:
            self.once(error.name(), f"Kafka at {self.servers} must answer, got: {error.str()}. Waiting for it.")

    def once(self, what: str, words: str) -> None:
        """Say something, unless it was said in the last half minute."""
        now = time.monotonic()
        if now - self._said.get(what, -_SAY_SECONDS) >= _SAY_SECONDS:
            self._said[what] = now
            self.say(words)

    def look(self) -> None:
        """Raise BrokerDenied where the broker does not let this user in, Abandoned where waiting is given up."""
        if self._denied is not None:
            message = (
                f"Kafka at {self.servers} must allow this user what the stream needs, got: {self._denied}. Mend the "
                f"permissions, or the credentials in the file that {CONFIG} names, then call again: it resumes."
            )
            raise BrokerDenied(message)
        if self.give_up.is_set():
            raise Abandoned

    def faulty(self, error: KafkaError) -> None:
        """Take an error of a message or a request: raise where it is for good, say it where it may pass."""
        self.on_error(error)
        self.look()
        if error.fatal():
            message = f"Kafka at {self.servers} refuses for good: {error.str()}. Call again: it resumes."
            raise BrokerFault(message)


def kafka_settings(servers: str, voice: KafkaVoice) -> dict[str, Any]:
    """Return the client's settings, those of the file that the environment names among them; raises BadInput."""
    path = os.environ.get(CONFIG)
    settings: dict[str, Any] = {}
    if path:
        try:
            lines = Path(path).read_text().splitlines()
        except OSError as error:
            message = f"{CONFIG} must name a file of NAME=VALUE lines that can be read, got {path}: {error.strerror}."
            raise BadInput(message) from error
        pairs = [line.split("=", 1) for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if any(len(pair) < 2 for pair in pairs):  # noqa: PLR2004 - a name and a value
            message = f"Each line of {path} must be NAME=VALUE, got one without =. Mend it."
            raise BadInput(message)
        settings = {name.strip(): value.strip() for name, value in pairs}
    # The library writes to stderr by itself otherwise.
    return {**settings, "bootstrap.servers": servers, "error_cb": voice.on_error, "log_level": 0}


def find_topic(client: Consumer | Producer | AdminClient, topic: str, voice: KafkaVoice) -> Any:
    """Return what the broker says of a topic, waiting for the broker; raises StreamUnfit and names those there are."""
    pause = LOOK_SECONDS
    while True:
        try:
            found = client.list_topics(timeout=_ASK_SECONDS)
            break
        except KafkaException as error:
            voice.faulty(error.args[0])
        for _ in range(round(pause / LOOK_SECONDS)):
            voice.look()
            time.sleep(LOOK_SECONDS)
        pause = min(2 * pause, _BACKOFF_SECONDS_MAX)
    if topic not in found.topics:
        known = ", ".join(sorted(found.topics)[:_TOPICS_SHOWN]) or "none"
        message = (
            f"The topic {topic!r} must exist at {voice.servers}, which has {known}. Name one of them, or make it first."
        )
        raise StreamUnfit(message)
    return found
