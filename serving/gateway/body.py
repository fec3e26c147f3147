"""Bodies as they stream in: bounded one by one, and all together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect, Request

from serving.errors import BadRequest, Unanswered

_TOO_LARGE, _UNSUPPORTED, _BAD_REQUEST = 413, 415, 400


class Memory:
    """The bytes of all bodies that are held at once."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.held = 0

    def hold(self, size: int) -> None:
        """Count bytes that came in. Raises Unanswered, with 503, where they are too many."""
        if self.held + size > self.bytes_max:
            message = f"All requests together may have {self.bytes_max} bytes at once, got more. Try again later."
            raise Unanswered(message, retry_after_s=1)
        self.held += size


@asynccontextmanager
async def body(request: Request, memory: Memory, *, bytes_max: int) -> AsyncIterator[bytes]:
    """Hold the body of a request.

    Raises BadRequest where it has more bytes than it may (413, before they are read where its header says so), is
    compressed (415) or breaks off (400), and Unanswered where all bodies together have too many.
    """
    _check_headers(request, bytes_max)
    parts: list[bytes] = []
    held = 0
    try:
        async for chunk in request.stream():
            if held + len(chunk) > bytes_max:
                raise _too_large(bytes_max)
            memory.hold(len(chunk))
            held += len(chunk)
            parts.append(chunk)
        content = b"".join(parts)
        parts.clear()
        yield content
    except ClientDisconnect:
        message = "The body must come in whole, and the connection was closed before."
        raise BadRequest(message, status=_BAD_REQUEST) from None
    finally:
        memory.held -= held


def _check_headers(request: Request, bytes_max: int) -> None:
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        message = f"The body must not be compressed, got {request.headers['content-encoding'][:100]!r}."
        raise BadRequest(message, status=_UNSUPPORTED)
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated[:20]) > bytes_max:
        raise _too_large(bytes_max)


def _too_large(bytes_max: int) -> BadRequest:
    message = f"The body must have at most {bytes_max} bytes, got more. Send fewer rows at once."
    return BadRequest(message, status=_TOO_LARGE)
