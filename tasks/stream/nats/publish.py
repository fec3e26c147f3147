"""Publishing to NATS JetStream: by id, and again until the server has acknowledged each message: it keeps each once."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import nats.errors
import orjson
from nats.aio.msg import Msg

from tasks.stream.ends import Abandoned
from tasks.stream.nats.link import ANSWER_SECONDS, BACKOFF_SECONDS_MAX, BACKOFF_SECONDS_MIN, LOOK_SECONDS, NatsLink

_TOO_LARGE = 10054


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """A message to publish: whatever is published twice with one `id` is kept once."""

    subject: str
    payload: bytes
    id: str
    headers: Mapping[str, str]

    @property
    def all_headers(self) -> dict[str, str]:
        """The headers as they go out, with the id among them."""
        return {"Nats-Msg-Id": self.id, **self.headers}


class Publisher:
    """Publishes over one connection, except ids that are `known` to be in the stream when it is asked before a try."""

    def __init__(self, link: NatsLink, known: Callable[[], set[str]] = set) -> None:
        self._link, self._known = link, known
        self._inbox, self._numbers = link.client.new_inbox(), itertools.count()
        self._sent: dict[int, tuple[_Flight, Outgoing]] = {}
        link.run(self._listen())

    async def _listen(self) -> None:
        await self._link.client.subscribe(
            f"{self._inbox}.*", cb=self._answer, pending_msgs_limit=-1, pending_bytes_limit=-1
        )

    def publish(self, outgoing: Sequence[Outgoing]) -> list[Outgoing]:
        """Publish messages and wait until the server has acknowledged each, however often it goes meanwhile.

        Returns those that it refuses for their size. A stream that is full, or gone for now, is waited for.
        """
        refused: list[Outgoing] = []
        pause = BACKOFF_SECONDS_MIN
        left = list(outgoing)
        while left:
            # Whether the server was away for long is known once it is back.
            self._link.run(self._link.connected())
            if known := self._known():
                left = [each for each in left if each.id not in known]
            left = self._link.run(self._publish_once(left, refused))
            if left:
                self._link.run(self._link.sleep(pause))
                pause = min(2 * pause, BACKOFF_SECONDS_MAX)
        return refused

    async def _publish_once(self, outgoing: Sequence[Outgoing], refused: list[Outgoing]) -> list[Outgoing]:
        """Publish each once; return those that are to be published again."""
        if not outgoing:
            return []
        client, flight = self._link.client, _Flight(messages=len(outgoing), refused=refused)
        numbers = []
        for each in outgoing:
            headers = each.all_headers
            # The library looks at the payload alone, and the server hangs up on what is too large with its headers.
            if len(each.payload) + headers_size(headers) > client.max_payload:
                flight.settle(each, refused)
                continue
            number = next(self._numbers)
            self._sent[number] = flight, each
            numbers.append(number)
            try:
                await client.publish(each.subject, each.payload, reply=f"{self._inbox}.{number}", headers=headers)
            except (nats.errors.OutboundBufferLimitError, nats.errors.ConnectionClosedError):
                flight.settle(self._sent.pop(number)[1], flight.again)
        await self._answered(flight)
        return flight.again + [self._sent.pop(number)[1] for number in numbers if number in self._sent]

    async def _answered(self, flight: _Flight) -> None:
        until = time.monotonic() + ANSWER_SECONDS
        while not flight.over.is_set() and time.monotonic() < until:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(flight.over.wait(), LOOK_SECONDS)
            self._link.check()
            if self._link.given_up:
                raise Abandoned

    async def _answer(self, msg: Msg) -> None:
        """Take the answer to a publish. The library's own publish_async never tells of one that is an error."""
        number = int(msg.subject.rpartition(".")[2])
        # One that comes after its message was published again is no news.
        flight, each = self._sent.pop(number, (None, None))
        if flight is None or each is None:
            return
        error = {"description": "no stream takes it"} if msg.headers else orjson.loads(msg.data).get("error")
        if not error:
            flight.settle(each)
            return
        if error.get("err_code") == _TOO_LARGE:
            flight.settle(each, flight.refused)
            return
        words = f"A stream must take the subject {each.subject!r}, got: {error.get('description')}."
        self._link.say("refused", f"{words} Publishing again until it does.")
        flight.settle(each, flight.again)


@dataclass(slots=True)
class _Flight:
    """Messages that were published together and wait for their answers."""

    messages: int
    refused: list[Outgoing]
    again: list[Outgoing] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def settle(self, each: Outgoing, among: list[Outgoing] | None = None) -> None:
        """Take note of an answer."""
        self.messages -= 1
        if among is not None:
            among.append(each)
        if not self.messages:
            self.over.set()


def headers_size(headers: Mapping[str, str]) -> int:
    """Return the bytes that headers take of a message's size."""
    return 12 + sum(len(name) + len(value.encode()) + 4 for name, value in headers.items())
