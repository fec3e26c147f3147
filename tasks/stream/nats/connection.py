"""One connection to a NATS server, in an event loop of its own thread: it waits for the server, and says so.

The library is asyncio, scoring is threads: `run` hands a coroutine over and waits for it.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import nats.errors
from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.errors import NotFoundError, ServiceUnavailableError

from serving.errors import BrokerDenied, BrokerFault, StreamUnfit
from tasks.stream.connections import Abandoned

T = TypeVar("T")

ANSWER_SECONDS = 5.0
LOOK_SECONDS = 0.5
BACKOFF_SECONDS_MIN, BACKOFF_SECONDS_MAX = 0.25, 15.0
_TRY_SECONDS = 3.0
_SAY_SECONDS = 30.0
# A server that is slow says "authentication timeout", which may pass.
_DENIED = ("authorization violation", "permissions violation", "authentication expired", "authentication revoked")
_OUTBOUND_BYTES = 64 << 20


class NatsLink:
    """A connection that stays; `say` is told when the server is gone and back, `give_up` ends every wait.

    `outages` holds for how many seconds the server was away, each time.

    Raises BrokerDenied where the server does not let this user in.
    """

    def __init__(self, url: str, say: Callable[[str], None], give_up: threading.Event) -> None:
        self.url = url
        self._say, self._give_up = say, give_up
        self._denied: str | None = None
        self.broken: Exception | None = None
        self.outages: list[float] = []
        self._gone_at = 0.0
        self._was_there = False
        self._said: dict[str, float] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="nats", daemon=True)
        self._thread.start()
        try:
            self.client: Client = self.run(self._connect())
        except BaseException:
            self._stop()
            raise
        self._was_there = True
        self.js: JetStreamContext = self.client.jetstream(timeout=ANSWER_SECONDS)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the loop's thread and return what it returns."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            while True:
                try:
                    # A wait without an end is deaf to Ctrl-C: Polars' handler has the kernel take such waits up again.
                    return future.result(LOOK_SECONDS)
                except TimeoutError:
                    if future.done():
                        raise
        except BaseException:
            future.cancel()
            raise

    @property
    def given_up(self) -> bool:
        """Whether every wait is to end."""
        return self._give_up.is_set()

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
                await self.client.flush(timeout=int(ANSWER_SECONDS))
            except (TimeoutError, nats.errors.Error):
                self.say("flush", f"{self.url} must take the last acknowledgements, but did not: they come again.")
        await self.client.close()
        # A callback that asked the server something takes the end of the connection for an error, and goes on.
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _connect(self) -> Client:
        pause = BACKOFF_SECONDS_MIN
        while True:
            client = Client()
            try:
                await asyncio.wait_for(client.connect(self.url, **self._settings()), _TRY_SECONDS)
            except (TimeoutError, nats.errors.Error, OSError) as error:
                await client.close()
                self._raise_if_denied()
                self.say("absent", f"{self.url} must answer, got: {str(error) or 'no answer'}. Waiting for it.")
            else:
                return client
            await self.sleep(pause)
            pause = min(2 * pause, BACKOFF_SECONDS_MAX)

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
            "reconnect_time_wait": BACKOFF_SECONDS_MIN,
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
        self._gone_at = time.monotonic()
        # The library says so of a server that never was there too.
        if self._was_there and not self.client.is_closed:
            self.say("gone", f"{self.url} is gone: waiting for it; nothing is lost, what is in hand stays in hand.")

    async def _on_back(self) -> None:
        self.outages.append(time.monotonic() - self._gone_at)
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
            if self.given_up:
                raise Abandoned
            left = until - time.monotonic()
            if left <= 0:
                return
            await asyncio.sleep(min(left, LOOK_SECONDS))

    def _raise_if_denied(self) -> None:
        if self._denied is not None:
            message = (
                f"{self.url} must allow this user what the stream needs, got: {self._denied}. Mend the permissions, or "
                "the credentials in NATS_USER and NATS_PASSWORD, NATS_TOKEN or NATS_CREDS, then call again: it resumes."
            )
            raise BrokerDenied(message)

    async def ask(self, what: str, question: Callable[[], Awaitable[T]]) -> T:
        """Ask the server something, again where it does not answer; what it answers with, errors too, comes through."""
        pause = BACKOFF_SECONDS_MIN
        while True:
            await self.connected()
            try:
                return await question()
            except (nats.errors.TimeoutError, nats.errors.ConnectionClosedError):
                self.check()
                self.say(
                    what, f"{self.url} must answer about {what}, but has not in {ANSWER_SECONDS:g} s; asking again."
                )
            except (nats.errors.NoRespondersError, ServiceUnavailableError):
                self.say(
                    what, f"{self.url} must have JetStream (nats-server -js), but nothing answers for it; asking again."
                )
            await self.sleep(pause)
            pause = min(2 * pause, BACKOFF_SECONDS_MAX)

    async def connected(self) -> None:
        """Wait until the server is there; raises BrokerFault where the connection is closed for good."""
        while not self.client.is_connected:
            self._raise_if_denied()
            if self.client.is_closed:
                message = f"{self.url} must keep the connection, but has closed it for good. Call again: it resumes."
                raise BrokerFault(message)
            await self.sleep(0.05)


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
