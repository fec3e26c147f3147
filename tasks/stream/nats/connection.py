"""One connection to a NATS server, which waits for the server while it is gone, and warns about it.

The client library is asyncio, and scoring runs in threads. So the connection has an event loop in a thread of its own,
and `run` executes a coroutine there.
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
from tasks.stream.connections import StreamAbandoned

T = TypeVar("T")

ANSWER_SECONDS = 5.0
POLL_SECONDS = 0.5
_DENIED_POLL_SECONDS = 0.05
BACKOFF_SECONDS_MIN, BACKOFF_SECONDS_MAX = 0.25, 15.0
_WARN_SECONDS = 30.0
# Not among them: "authentication timeout", which a slow server says, and which may pass.
_DENIED_WORDS = ("authorization violation", "permissions violation", "authentication expired", "authentication revoked")
_OUTBOUND_BYTES = 64 << 20


class NatsConnection:
    """A connection that stays open until it is closed.

    Args:
        url: Address of the server.
        warn: Called with a warning when the server is gone, and when it is back.
        give_up: Ends every wait when it is set.
        connect_seconds: How long one attempt to connect may take.

    Attributes:
        outages: For how many seconds the server was gone, each time.
        callback_error: What a callback raised, if any did.

    Raises:
        BrokerDenied: The server refuses this user.
    """

    def __init__(
        self, url: str, warn: Callable[[str], None], give_up: threading.Event, *, connect_seconds: float = 3.0
    ) -> None:
        self.url = url
        self._connect_seconds = connect_seconds
        self._warn, self._give_up = warn, give_up
        self._denied: str | None = None
        self.callback_error: Exception | None = None
        self.outages: list[float] = []
        self._disconnected_at = 0.0
        self._was_connected = self._is_away = False
        self._warned: dict[str, float] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="nats", daemon=True)
        self._thread.start()
        try:
            self.client: Client = self.run(self._connect())
        except BaseException:
            self._stop_loop()
            raise
        self._was_connected = True
        self.js: JetStreamContext = self.client.jetstream(timeout=ANSWER_SECONDS)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the loop's thread and return its result."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            while True:
                try:
                    # Ctrl-C does not end a wait without a time-out: Polars' signal handler restarts system calls.
                    return future.result(POLL_SECONDS)
                except TimeoutError:
                    if future.done():
                        raise
        except BaseException:
            future.cancel()
            raise

    @property
    def is_given_up(self) -> bool:
        """Whether every wait must end."""
        return self._give_up.is_set()

    def check(self) -> None:
        """Raise BrokerDenied where the server has refused something to this user, or the error of a callback."""
        self._raise_if_denied()
        if self.callback_error is not None:
            raise self.callback_error

    def close(self) -> None:
        """Send what is buffered, and close the connection. Idempotent."""
        if self._thread.is_alive():
            self.run(self._close())
            self._stop_loop()

    def warn_once(self, topic: str, message: str) -> None:
        """Warn, unless there was a warning about this topic in the last 30 s."""
        now = time.monotonic()
        if now - self._warned.get(topic, -_WARN_SECONDS) >= _WARN_SECONDS:
            self._warned[topic] = now
            self._warn(message)

    async def request(self, subject: str, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask the server until it answers, and return the answer.

        Args:
            subject: What is asked about, for warnings.
            ask: Makes one attempt. Errors that the server answers with are raised.
        """
        pause = BACKOFF_SECONDS_MIN
        while True:
            await self.wait_until_connected()
            try:
                return await ask()
            except (nats.errors.TimeoutError, nats.errors.ConnectionClosedError):
                self.check()
                self.warn_once(
                    subject,
                    f"{self.url} must answer about {subject}, but has not in {ANSWER_SECONDS:g} s; asking again.",
                )
            except (nats.errors.NoRespondersError, ServiceUnavailableError):
                self.warn_once(
                    subject,
                    f"{self.url} must have JetStream (nats-server -js), but nothing answers for it; asking again.",
                )
            await self.sleep(pause)
            pause = min(2 * pause, BACKOFF_SECONDS_MAX)

    async def wait_until_connected(self) -> None:
        """Wait for the server; raises BrokerFault where the client has closed the connection for good.

        The library is connected again some time before it says so, and `outages` has the outage.
        """
        while not self.client.is_connected or self._is_away:
            self._raise_if_denied()
            if self.client.is_closed:
                message = f"{self.url} must keep the connection, but has closed it for good. Call again: it resumes."
                raise BrokerFault(message)
            await self.sleep(0.05)

    async def sleep(self, seconds: float) -> None:
        """Wait; raises StreamAbandoned where waits are given up."""
        until = time.monotonic() + seconds
        while True:
            if self.is_given_up:
                raise StreamAbandoned
            left = until - time.monotonic()
            if left <= 0:
                return
            await asyncio.sleep(min(left, POLL_SECONDS))

    async def _connect(self) -> Client:
        pause = BACKOFF_SECONDS_MIN
        while True:
            client = Client()
            try:
                await self._try_to_connect(client)
            except (TimeoutError, nats.errors.Error, OSError) as error:
                await client.close()
                self._raise_if_denied()
                self.warn_once("absent", f"{self.url} must answer, got: {str(error) or 'no answer'}. Waiting for it.")
            else:
                return client
            await self.sleep(pause)
            pause = min(2 * pause, BACKOFF_SECONDS_MAX)

    async def _try_to_connect(self, client: Client) -> None:
        """Make one attempt, which ends as soon as the server refuses this user: the library itself never gives up.

        Raises TimeoutError where it takes too long.
        """
        attempt = asyncio.ensure_future(client.connect(self.url, **self._build_settings()))
        until = time.monotonic() + self._connect_seconds
        try:
            while not attempt.done() and self._denied is None and time.monotonic() < until:
                await asyncio.wait({attempt}, timeout=_DENIED_POLL_SECONDS)
        finally:
            while not attempt.done():
                # Until Python 3.12 a time-out within the library may lose a cancellation.
                attempt.cancel()
                await asyncio.wait({attempt}, timeout=_DENIED_POLL_SECONDS)
        if attempt.cancelled():
            raise TimeoutError
        attempt.result()

    def _build_settings(self) -> dict[str, Any]:
        secrets = {
            "user": os.environ.get("NATS_USER"),
            "password": os.environ.get("NATS_PASSWORD"),
            "token": os.environ.get("NATS_TOKEN"),
            "user_credentials": os.environ.get("NATS_CREDS"),
        }
        return {
            "name": "overnight",
            "connect_timeout": self._connect_seconds,
            "allow_reconnect": True,
            "max_reconnect_attempts": -1,
            "reconnect_time_wait": BACKOFF_SECONDS_MIN,
            "pending_size": _OUTBOUND_BYTES,
            "error_cb": self._on_error,
            "disconnected_cb": self._on_disconnect,
            "reconnected_cb": self._on_reconnect,
            **{name: value for name, value in secrets.items() if value},
        }

    async def _on_error(self, error: Exception) -> None:
        if any(word in str(error).lower() for word in _DENIED_WORDS):
            self._denied = str(error)
        elif not isinstance(error, nats.errors.Error | OSError | TimeoutError):
            # The library reports an error of our callbacks only here.
            self.callback_error = error

    async def _on_disconnect(self) -> None:
        self._disconnected_at, self._is_away = time.monotonic(), self._was_connected
        # The library also calls this for a server that was never connected.
        if self._was_connected and not self.client.is_closed:
            self.warn_once("gone", f"{self.url} is gone: waiting for it. Unacknowledged messages are kept.")

    async def _on_reconnect(self) -> None:
        self.outages.append(time.monotonic() - self._disconnected_at)
        self._is_away = False
        self._warned.clear()
        self._warn(f"{self.url} is back: going on.")

    def _raise_if_denied(self) -> None:
        if self._denied is not None:
            message = (
                f"{self.url} must allow this user what the stream needs, got: {self._denied}. Correct the permissions, "
                "or the credentials in NATS_USER and NATS_PASSWORD, NATS_TOKEN or NATS_CREDS, then call again: it "
                "resumes."
            )
            raise BrokerDenied(message)

    async def _close(self) -> None:
        if self.client.is_connected:
            try:
                await self.client.flush(timeout=int(ANSWER_SECONDS))
            except (TimeoutError, nats.errors.Error):
                self.warn_once(
                    "flush", f"{self.url} must take the last acknowledgements, but did not: those messages come again."
                )
        await self.client.close()
        # A callback that waits for an answer takes the closed connection for an error, and would go on.
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def find_stream(connection: NatsConnection, name: str) -> Any:
    """Return the server's description of a stream; raises StreamUnfit, which names the streams that there are."""
    try:
        return await connection.request(f"stream {name}", lambda: connection.js.stream_info(name))
    except NotFoundError:
        streams = await connection.request("its streams", connection.js.streams_info)
        known = ", ".join(sorted(repr(stream.config.name) for stream in streams)) or "none"
        message = (
            f"The stream {name!r} must exist at {connection.url}, which has {known}. Name one of them, or make it "
            "first."
        )
        raise StreamUnfit(message) from None
