"""Upstreams: what the gateway asks for predictions. One Protocol, an adapter for each protocol that servers speak."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from serving.errors import Unanswered
from serving.oip import HEADER_LENGTH, Body, InferRequest, read_header_length


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


def no_answer(where: str, error: Exception, *, status: int = 503) -> Unanswered:
    """Return the error for a server that does not answer, or with something that is no answer."""
    message = f"The model server at {where} must answer, got {type(error).__name__}: {error}. Try again later."
    return Unanswered(message, status=status)
