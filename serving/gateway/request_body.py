"""The bodies of requests: limits on each of them, and on the memory of all together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus

from starlette.requests import ClientDisconnect, Request

from serving.errors import BadRequest, Unanswered


class BodyMemory:
    """The memory of all bodies that are held at once."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.held = 0

    def hold(self, size: int) -> None:
        """Count received bytes. Raises Unanswered, with 503, where all bodies together have too many."""
        if self.held + size > self.bytes_max:
            message = f"All requests together may have {self.bytes_max} bytes at once, got more. Try again later."
            raise Unanswered(message, retry_after_s=1)
        self.held += size


@asynccontextmanager
async def read_body(request: Request, memory: BodyMemory, *, bytes_max: int) -> AsyncIterator[bytes]:
    """Read the body of a request, and count it as held until the end of the block.

    Raises:
        BadRequest: where the body has too many bytes (413; before it is read where Content-Length says so), is
            compressed (415), or is incomplete (400).
        Unanswered: where all bodies together have too many bytes (503).
    """
    _check_headers(request, bytes_max)
    parts: list[bytes] = []
    held = 0
    try:
        async for part in request.stream():
            if held + len(part) > bytes_max:
                raise _too_large(bytes_max)
            memory.hold(len(part))
            held += len(part)
            parts.append(part)
        content = b"".join(parts)
        parts.clear()
        yield content
    except ClientDisconnect:
        message = "The body must be complete, but the connection was closed before its end."
        raise BadRequest(message, status=HTTPStatus.BAD_REQUEST) from None
    finally:
        memory.held -= held


def _check_headers(request: Request, bytes_max: int) -> None:
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        message = f"The body must not be compressed, got {request.headers['content-encoding'][:100]!r}."
        raise BadRequest(message, status=HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated[:20]) > bytes_max:
        raise _too_large(bytes_max)


def _too_large(bytes_max: int) -> BadRequest:
    message = f"The body must have at most {bytes_max} bytes, got more. Send fewer rows at once."
    return BadRequest(message, status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
