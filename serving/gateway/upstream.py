"""Upstreams: what the gateway asks for predictions. One Protocol, an adapter for each protocol that servers speak."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from serving.errors import Unanswered
from serving.protocol.oip import HEADER_LENGTH, Body, InferRequest, read_header_length


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A request that the contract takes: what it says, and a body that says the same to every parser."""

    body: Body
    request: InferRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What goes back to the client: a V2 answer, or {"error": ...} with its status; and which version it is of."""

    status: int
    content: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    version: str | None = None

    @property
    def header_length(self) -> int | None:
        """How many bytes of the content are JSON, None where all are. Raises BadRequest where that is no number."""
        return read_header_length(self.headers.get(HEADER_LENGTH))


class Upstream(Protocol):
    """A version of a model on some server."""

    async def infer(self, call: Call) -> Reply:
        """Return the server's answer, also where it is an error. Raises Unanswered where there is none.

        The caller bounds the time: an answer that is cancelled takes its connection with it.
        """
        ...

    async def ready(self) -> bool:
        """Say whether the server would answer a request now."""
        ...


UPSTREAM_ERROR_CHARACTERS = 2000
_SAID_EVERY_S, _PLACES_MAX = 1.0, 1000
_ADDRESS = re.compile(
    r"(?P<url>\b[a-z][a-z0-9+.-]*://[^\s'\"]+)"
    r"|(?P<host>\b[\w-]+(?:\.[\w-]+)*:\d{2,5}\b|\b\d{1,3}(?:\.\d{1,3}){3}\b|\[[0-9a-f]*:[0-9a-f:]+\](?::\d+)?)"
    r"|(?P<path>(?<![\w.<])/(?:[\w.@+-]+/)+[\w.@+-]*)",
    re.IGNORECASE,
)
_log = logging.getLogger(__name__)
_said_at: dict[str, float] = {}


def no_answer(where: str, error: Exception, *, status: int = 503) -> Unanswered:
    """Return the error for a server that does not answer, or with something that is no answer; the log says where."""
    log_upstream(where, f"{type(error).__name__}: {error}")
    message = f"The model server of the endpoint must answer, got {type(error).__name__}. Try again later."
    return Unanswered(message, status=status)


def log_upstream(where: str, found: str) -> None:
    """Log what was wrong with a model server, once a second at most for each: clients are not told where it is."""
    now_s = time.monotonic()
    if now_s - _said_at.get(where, -_SAID_EVERY_S) < _SAID_EVERY_S:
        return
    if len(_said_at) >= _PLACES_MAX:
        _said_at.clear()
    _said_at[where] = now_s
    _log.warning("The model server at %s must answer, got %s", where, found)


def without_addresses(text: str) -> str:
    """Return what a server said with its addresses and paths, which are nothing for clients, left out."""
    return _ADDRESS.sub("(left out)", text)
