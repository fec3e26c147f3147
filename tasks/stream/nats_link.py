"""One connection to a NATS server, in an event loop of its own thread: it waits for the server, and says so.

The library is asyncio, scoring is threads: `run` hands a coroutine over and waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import nats.errors
import orjson
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.errors import NotFoundError

from serving.errors import BrokerDenied, BrokerFault, StreamUnfit
from tasks.stream.ends import Abandoned

T = TypeVar("T")

_TRY_SECONDS = 3.0
_BACKOFF_SECONDS_MIN, _BACKOFF_SECONDS_MAX = 0.25, 15.0
_ANSWER_SECONDS = 5.0
_LOOK_SECONDS = 0.5
_SAY_SECONDS = 30.0
_DENIED = ("authorization violation", "permissions violation", "authentication")
_OUTBOUND_BYTES = 64 << 20
_TOO_LARGE = 10054


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """A message to publish: whatever is published twice with one `id` is kept once."""

    subject: str
    payload: bytes
    id: str
    headers: Mapping[str, str]


class NatsLink:
    """A connection that stays; `say` is told when the server is gone and back, `give_up` ends every wait.

    Raises BrokerDenied where the server does not let this user in.
    """

    def __init__(self, url: str, say: Callable[[str], None], give_up: threading.Event) -> None:
        self.url = url
        self._say, self._give_up = say, give_up
        self._denied: str | None = None
        self.broken: Exception | None = None
        self._said: dict[str, float] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="nats", daemon=True)
        self._thread.start()
        try:
            self.client: Client = self.run(self._connect())
        except BaseException:
            self._stop()
            raise
        self.js: JetStreamContext = self.client.jetstream(timeout=_ANSWER_SECONDS)
        self._inbox, self._numbers = self.client.new_inbox(), itertools.count()
        self._sent: dict[int, tuple[_Flight, Outgoing]] = {}
        self.run(self._listen())

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the loop's thread and return what it returns."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            while True:
                try:
                    # A wait without an end is deaf to Ctrl-C: Polars' handler has the kernel take such waits up again.
                    return future.result(_LOOK_SECONDS)
                except TimeoutError:
                    if future.done():
                        raise
        except BaseException:
            future.cancel()
            raise

    def check(self) -> None:
        """Raise BrokerDenied where the server has refused something to this user, or what a callback raised."""
        self._raise_if_denied()
        if self.broken is not None:
            raise self.broken

    def close(self) -> None:
        """Send what is written, and close the connection. Idempotent."""
        if self._thread.is_alive():
            self.run(self._close())
            self._stop()

    async def _close(self) -> None:
        if self.client.is_connected:
            try:
                await self.client.flush(timeout=int(_ANSWER_SECONDS))
            except (TimeoutError, nats.errors.Error):
                self.say("flush", f"{self.url} must take the last acknowledgements, but did not: they come again.")
        await self.client.close()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> None:
        await self.client.subscribe(f"{self._inbox}.*", cb=self._answer, pending_msgs_limit=-1, pending_bytes_limit=-1)

    async def _connect(self) -> Client:
        pause = _BACKOFF_SECONDS_MIN
        while True:
            client = Client()
            try:
                await asyncio.wait_for(client.connect(self.url, **self._settings()), _TRY_SECONDS)
            except (TimeoutError, nats.errors.Error, OSError) as error:
                await client.close()
                self._raise_if_denied()
                self.say("absent", f"{self.url} must answer, got: {error or type(error).__name__}. Waiting for it.")
            else:
                return client
            await self.sleep(pause)
            pause = min(2 * pause, _BACKOFF_SECONDS_MAX)

    def _settings(self) -> dict[str, Any]:
        secrets = {
            "user": os.environ.get("NATS_USER"),
            "password": os.environ.get("NATS_PASSWORD"),
            "token": os.environ.get("NATS_TOKEN"),
            "user_credentials": os.environ.get("NATS_CREDS"),
        }
        return {
            "name": "overnight",
            "connect_timeout": _TRY_SECONDS,
            "allow_reconnect": True,
            "max_reconnect_attempts": -1,
            "reconnect_time_wait": _BACKOFF_SECONDS_MIN,
            "pending_size": _OUTBOUND_BYTES,
            "error_cb": self._on_error,
            "disconnected_cb": self._on_gone,
            "reconnected_cb": self._on_back,
            **{name: value for name, value in secrets.items() if value},
        }

    async def _on_error(self, error: Exception) -> None:
        if any(word in str(error).lower() for word in _DENIED):
            self._denied = str(error)
        elif not isinstance(error, nats.errors.Error | OSError | TimeoutError):
            # The library tells of what a callback of ours raises in this way alone.
            self.broken = error

    async def _on_gone(self) -> None:
        if not self.client.is_closed:
            self.say("gone", f"{self.url} is gone: waiting for it; nothing is lost, what is in hand stays in hand.")

    async def _on_back(self) -> None:
        self._said.clear()
        self._say(f"{self.url} is back: going on.")

    def say(self, what: str, words: str) -> None:
        """Say something that may go on for long, once in half a minute."""
        now = time.monotonic()
        if now - self._said.get(what, -_SAY_SECONDS) >= _SAY_SECONDS:
            self._said[what] = now
            self._say(words)

    async def sleep(self, seconds: float) -> None:
        """Wait; raises Abandoned where waiting is given up meanwhile."""
        until = time.monotonic() + seconds
        while True:
            if self._give_up.is_set():
                raise Abandoned
            left = until - time.monotonic()
            if left <= 0:
                return
            await asyncio.sleep(min(left, _LOOK_SECONDS))

    def _raise_if_denied(self) -> None:
        if self._denied is not None:
            message = (
                f"{self.url} must allow this user what the stream needs, got: {self._denied}. Mend the permissions, or "
                "the credentials in NATS_USER and NATS_PASSWORD, NATS_TOKEN or NATS_CREDS, then call again: it resumes."
            )
            raise BrokerDenied(message)

    async def ask(self, what: str, question: Callable[[], Awaitable[T]]) -> T:
        """Ask the server something, again where it does not answer; what it answers with, errors too, comes through."""
        pause = _BACKOFF_SECONDS_MIN
        while True:
            await self.connected()
            try:
                return await question()
            except (nats.errors.TimeoutError, nats.errors.NoRespondersError, nats.errors.ConnectionClosedError):
                self._raise_if_denied()
                self.say(
                    what, f"{self.url} must answer about {what}, but has not in {_ANSWER_SECONDS:g} s; asking again."
                )
            await self.sleep(pause)
            pause = min(2 * pause, _BACKOFF_SECONDS_MAX)

    async def connected(self) -> None:
        """Wait until the server is there; raises BrokerFault where the connection is closed for good."""
        while not self.client.is_connected:
            self._raise_if_denied()
            if self.client.is_closed:
                message = f"{self.url} must keep the connection, but has closed it for good. Call again: it resumes."
                raise BrokerFault(message)
            await self.sleep(0.05)

    async def publish(self, outgoing: Sequence[Outgoing]) -> list[Outgoing]:
        """Publish messages and wait until the server has acknowledged each, however often it goes meanwhile.

        Returns those that it refuses for their size. A stream that is full, or gone for now, is waited for.
        """
        refused: list[Outgoing] = []
        pause = _BACKOFF_SECONDS_MIN
        left = list(outgoing)
        while left:
            left = await self._publish_once(left, refused)
            if left:
                await self.sleep(pause)
                pause = min(2 * pause, _BACKOFF_SECONDS_MAX)
        return refused

    async def _publish_once(self, outgoing: Sequence[Outgoing], refused: list[Outgoing]) -> list[Outgoing]:
        """Publish each once; return those that are to be published again."""
        flight = _Flight(refused=refused)
        numbers = []
        await self.connected()
        for each in outgoing:
            number = next(self._numbers)
            self._sent[number] = flight, each
            numbers.append(number)
            try:
                headers = {"Nats-Msg-Id": each.id, **each.headers}
                reply = f"{self._inbox}.{number}"
                await self.client.publish(each.subject, each.payload, reply=reply, headers=headers)
            except nats.errors.MaxPayloadError:
                flight.settle(self._sent.pop(number)[1], refused)
            except (nats.errors.OutboundBufferLimitError, nats.errors.ConnectionClosedError):
                flight.settle(self._sent.pop(number)[1], flight.again)
        await self._answered(flight, len(outgoing))
        return flight.again + [self._sent.pop(number)[1] for number in numbers if number in self._sent]

    async def _answered(self, flight: _Flight, messages: int) -> None:
        until = time.monotonic() + _ANSWER_SECONDS
        while flight.settled < messages and time.monotonic() < until:
            flight.more.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(flight.more.wait(), _LOOK_SECONDS)
            if flight.settled < messages:
                self._raise_if_denied()
                if self._give_up.is_set():
                    raise Abandoned

    async def _answer(self, msg: Msg) -> None:
        """Take the answer to a publish. The library's own publish_async never tells of one that is an error."""
        number = int(msg.subject.rpartition(".")[2])
        # One that comes after its message was published again is no news.
        flight, each = self._sent.pop(number, (None, None))
        if flight is None or each is None:
            return
        if not msg.headers and b'"error"' not in msg.data:
            flight.settle(each)
            return
        error = orjson.loads(msg.data or b"{}").get("error") or {"description": "no stream takes it"}
        if error.get("err_code") == _TOO_LARGE:
            flight.settle(each, flight.refused)
            return
        words = f"A stream must take the subject {each.subject!r}, got: {error.get('description')}."
        self.say("refused", f"{words} Publishing again until it does.")
        flight.settle(each, flight.again)


@dataclass(slots=True)
class _Flight:
    """Messages that were published together and wait for their answers."""

    refused: list[Outgoing]
    again: list[Outgoing] = field(default_factory=list)
    settled: int = 0
    more: asyncio.Event = field(default_factory=asyncio.Event)

    def settle(self, each: Outgoing, among: list[Outgoing] | None = None) -> None:
        """Take note of an answer."""
        self.settled += 1
        if among is not None:
            among.append(each)
        self.more.set()


def headers_size(headers: Mapping[str, str]) -> int:
    """Return the bytes that headers take of a message's size."""
    return 12 + sum(len(name) + len(value) + 4 for name, value in headers.items())


async def find_stream(link: NatsLink, name: str) -> Any:
    """Return what the server says of a stream; raises StreamUnfit and names those that there are."""
    try:
        return await link.ask(f"stream {name}", lambda: link.js.stream_info(name))
    except NotFoundError:
        streams = await link.ask("its streams", link.js.streams_info)
        known = ", ".join(sorted(repr(stream.config.name) for stream in streams)) or "none"
        message = (
            f"The stream {name!r} must exist at {link.url}, which has {known}. Name one of them, or make it first."
        )
        raise StreamUnfit(message) from None
