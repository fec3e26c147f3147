"""Whose error a model raised: its own over some rows, or that of what it calls and runs on. Functions of values.

An error is a dependency's where it, or an error that it was raised from or while handling, is

- of the operating system: an OSError that has its number, and Python's own kinds of it, as ConnectionError and
  TimeoutError; one without is a library's word for data that it can't read, as Pillow's for an image;
- named as libraries name errors of connections and time-outs: ReadTimeout, EndpointConnectionError,
  ServiceUnavailable, OperationalError (the databases' own, PEP 249) and the like;
- of the base class of a client library: grpc.RpcError, httpx.RequestError, requests' RequestException, urllib3's
  HTTPError, aiohttp's ClientError, botocore's BotoCoreError and ClientError;
- an answer over HTTP that says anything but that the request itself is at fault (400, 413, 415, 422).

What a service says of the request itself (such an answer, grpc's INVALID_ARGUMENT and OUT_OF_RANGE, AWS's
ValidationException) is an error of the rows. A model that means a row, though the operating system raised the error,
says so by `raise ValueError(...) from None`.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any

# Classes by their full names, since none of these libraries need be installed.
_LIBRARY_ERRORS = {
    "aiohttp.client_exceptions.ClientError",
    "botocore.exceptions.BotoCoreError",
    "botocore.exceptions.ClientError",
    "grpc.RpcError",
    "httpcore.NetworkError",
    "httpcore.ProtocolError",
    "httpx.RequestError",
    "requests.exceptions.RequestException",
    "socket.gaierror",
    "urllib.error.URLError",
    "urllib3.exceptions.HTTPError",
}
_NAMES = re.compile(
    r"\w*(Connection|Connect|Disconnected|Timeout|TimedOut|Unavailable)(Closed)?(Error|Exception|Failure|Expired)?"
    r"|OperationalError|InterfaceError|BrokenExecutor"
)
_STATUSES_OF_ROWS = {400, 413, 415, 422}
_STATUS_MIN, _STATUS_MAX = 100, 599
_GRPC_CODES_OF_ROWS = {"INVALID_ARGUMENT", "OUT_OF_RANGE"}
_AWS_CODES_OF_ROWS = {"ValidationError", "ValidationException"}


def is_dependency_fault(error: BaseException) -> bool:
    """Return whether an error is that of what a model calls or runs on, and so says nothing of its rows."""
    return any(_is_fault(each) for each in _chain(error))


def is_own_exit(error: SystemExit | KeyboardInterrupt) -> bool:
    """Return whether a model itself asked for the end of the process; to be called in the thread that caught it.

    A handler of a signal that raises SystemExit and a real Ctrl-C, which Python raises in the main thread alone, are
    not the model's.
    """
    if isinstance(error, KeyboardInterrupt):
        return threading.current_thread() is not threading.main_thread()
    handlers = {_code(signal.getsignal(number)) for number in signal.valid_signals()} - {None}
    return not any(code in handlers for code in _codes(error.__traceback__))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those behind it, as a traceback shows them, and the members of groups."""
    left, seen = [error], set[int]()
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        behind = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
        left += [behind] if behind is not None else []
        left += each.exceptions if isinstance(each, BaseExceptionGroup) else ()


def _is_fault(error: BaseException) -> bool:
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
    if "grpc.RpcError" in names:
        return _grpc_code(error) not in _GRPC_CODES_OF_ROWS
    if "botocore.exceptions.ClientError" in names:
        return _aws_code(error) not in _AWS_CODES_OF_ROWS
    if (status := _http_status(error)) is not None:
        return status not in _STATUSES_OF_ROWS
    named = any(_NAMES.fullmatch(kind.__name__) for kind in type(error).__mro__)
    return _is_of_the_system(error) or named or not _LIBRARY_ERRORS.isdisjoint(names)


def _is_of_the_system(error: BaseException) -> bool:
    kinds = (kind for kind in type(error).__mro__ if kind.__module__ == "builtins" and kind is not OSError)
    return isinstance(error, OSError) and (error.errno is not None or any(issubclass(kind, OSError) for kind in kinds))


def _http_status(error: Any) -> int | None:
    """Return the status of the answer that an error tells of, as HTTP clients keep it, None where it tells of none."""
    response = getattr(error, "response", None)
    found = (getattr(response, "status_code", None), *(getattr(error, at, None) for at in ("status_code", "status")))
    # urllib's own HTTPError, and Google's clients.
    found = (*found, getattr(error, "code", None))
    numbers = (status for status in found if isinstance(status, int) and not isinstance(status, bool))
    return next((int(status) for status in numbers if _STATUS_MIN <= status <= _STATUS_MAX), None)


def _grpc_code(error: Any) -> str | None:
    code = getattr(error, "code", None)
    return getattr(code() if callable(code) else code, "name", None)


def _aws_code(error: Any) -> Any:
    response = getattr(error, "response", None)
    about = response.get("Error") if isinstance(response, dict) else None
    return about.get("Code") if isinstance(about, dict) else None


def _codes(traceback: TracebackType | None) -> Iterator[Any]:
    while traceback is not None:
        yield traceback.tb_frame.f_code
        traceback = traceback.tb_next


def _code(handler: Any) -> Any:
    """Return the code that a handler of signals runs, None where it is not Python's."""
    handler = getattr(handler, "func", handler)
    return getattr(getattr(handler, "__func__", handler), "__code__", None)
