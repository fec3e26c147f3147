"""What tests, benchmarks and the demo do with a NATS server: make streams, fill them, and read them back."""

import asyncio
import threading
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import nats
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, StreamConfig, StreamInfo

T = TypeVar("T")

_PUBLISHES = 1000
_BYTES_AT_ONCE = 16 << 20
_FETCH = 500
_WAIT_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A message as a stream keeps it; `time` is when it was taken, in seconds since 1970."""

    number: int
    subject: str
    payload: bytes
    headers: Mapping[str, str]
    time: float


class NatsClient:
    """A client whose calls wait for their answer; a context manager that closes it."""

    def __init__(self, url: str, environment: Mapping[str, str] | None = None) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="nats-client", daemon=True)
        self._thread.start()
        told = environment or {}
        secrets = {"user": told.get("NATS_USER"), "password": told.get("NATS_PASSWORD")}
        self._client: Client = self._run(
            nats.connect(
                url,
                max_reconnect_attempts=-1,
                reconnect_time_wait=0.2,
                error_cb=_hush,
                **{name: value for name, value in secrets.items() if value},
            )
        )
        self.js = self._client.jetstream(timeout=_WAIT_SECONDS)

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connection."""
        self._run(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run what the library's own `js` has in this client's loop."""
        return self._run(coroutine)

    def make(self, name: str, *subjects: str, **settings: Any) -> StreamInfo:
        """Make a stream."""
        return self._run(self.js.add_stream(StreamConfig(name=name, subjects=list(subjects), **settings)))

    def info(self, name: str) -> StreamInfo:
        """Return what the server says of a stream."""
        return self._run(self.js.stream_info(name))

    def publish(
        self, subject: str, payloads: Iterable[bytes], headers: Sequence[Mapping[str, str]] | None = None
    ) -> None:
        """Publish messages in order and wait until all of them are stored; one that is not answered for goes again.

        With an id among its headers a message is then still stored once.
        """
        self._run(self._publish(subject, payloads, headers))

    async def _publish(
        self, subject: str, payloads: Iterable[bytes], headers: Sequence[Mapping[str, str]] | None
    ) -> None:
        held: list[tuple[bytes, dict[str, str] | None]] = []
        size = 0
        for at, payload in enumerate(payloads):
            held.append((payload, dict(headers[at]) if headers else None))
            size += len(payload)
            if len(held) >= _PUBLISHES or size >= _BYTES_AT_ONCE:
                await self._publish_all(subject, held)
                held, size = [], 0
        await self._publish_all(subject, held)

    async def _publish_all(self, subject: str, left: list[tuple[bytes, dict[str, str] | None]]) -> None:
        while left:
            sent = []
            for payload, headers in left:
                with suppress(nats.errors.OutboundBufferLimitError):
                    sent.append((payload, headers, await self.js.publish_async(subject, payload, headers=headers)))
            futures = [future for _, _, future in sent]
            await asyncio.wait(futures, timeout=_WAIT_SECONDS)
            again = [
                (payload, headers)
                for payload, headers, future in sent
                if not future.done() or future.cancelled() or future.exception() is not None
            ]
            left = again + left[len(sent) :]

    def read(self, name: str, *, headers_only: bool = False) -> list[Stored]:
        """Return everything that a stream holds, in order."""
        return self._run(self._read(name, headers_only=headers_only))

    async def _read(self, name: str, *, headers_only: bool) -> list[Stored]:
        left = (await self.js.stream_info(name)).state.messages
        config = ConsumerConfig(
            ack_policy=AckPolicy.NONE, deliver_policy=DeliverPolicy.ALL, headers_only=headers_only or None
        )
        consumer = await self.js.pull_subscribe(">", stream=name, config=config) if left else None
        found: list[Stored] = []
        while consumer is not None and len(found) < left:
            found += map(_stored, await consumer.fetch(min(_FETCH, left - len(found)), timeout=_WAIT_SECONDS))
        return found


def _stored(msg: Msg) -> Stored:
    return Stored(
        number=msg.metadata.sequence.stream,
        subject=msg.subject,
        payload=msg.data,
        headers=msg.headers or {},
        time=msg.metadata.timestamp.timestamp(),
    )


async def _hush(_error: Exception) -> None:
    """The library writes what it recovers from to stderr otherwise."""
