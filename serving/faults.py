"""Which errors of a model are faults of its dependencies, and which are about the rows. Functions of values.

An error is a dependency fault where it, or an error that it was raised from or while handling, is

- of the operating system: an OSError with an error number, or one of Python's subclasses such as ConnectionError and
  TimeoutError. An OSError without a number is how libraries such as Pillow report data that they can't read;
- named as libraries name errors of connections and time-outs: ReadTimeout, EndpointConnectionError,
  ServiceUnavailable, OperationalError (the databases' own, PEP 249) and the like;
- of the base class of a client library: grpc.RpcError, httpx.RequestError, requests' RequestException, urllib3's
  HTTPError, aiohttp's ClientError, botocore's BotoCoreError and ClientError;
- an HTTP answer whose status says anything but that the request itself is at fault (400, 413, 415, 422).

Where a service blames the request (such a status, grpc's INVALID_ARGUMENT and OUT_OF_RANGE, AWS's ValidationException)
the error is about the rows. A model that means a row, though the operating system raised the error, says so by
`raise ValueError(...) from None`.
"""

from __future__ import annotations

import builtins
import re
import signal
import threading
import traceback
from collections.abc import Iterator
from typing import Any, Literal

FaultKind = Literal["row", "dependency", "memory", "device", "exit"]

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
_ERROR_NAMES = re.compile(
    r"\w*(Connection|Connect|Disconnected|Timeout|TimedOut|Unavailable)(Closed)?(Error|Exception|Failure|Expired)?"
    r"|OperationalError|InterfaceError|BrokenExecutor"
)
_ROW_STATUSES = {400, 413, 415, 422}
_STATUS_MIN, _STATUS_MAX = 100, 599
_ROW_GRPC_CODES = {"INVALID_ARGUMENT", "OUT_OF_RANGE"}
_ROW_AWS_CODES = {"ValidationError", "ValidationException"}
_TEXT_LENGTH_MAX = 200
# The environment of a model may have Python 3.10, which has no groups.
_GROUPS: Any = getattr(builtins, "BaseExceptionGroup", ())
# Cases without an OutOfMemoryError: torch's CPU allocator, allocations outside its CUDA cache, and cuBLAS.
_MEMORY_WORDS = ("can't allocate memory", "out of memory", "cublas_status_alloc_failed")
_DEVICE_WORDS = ("cuda error", "hip error", "device-side assert", "cublas_status", "cudnn_status")


# How a failure begins that says how the model's process ended, and one that says how long a pass took.
PROCESS_ENDED, TOOK_LONGER = "the model's process ", "the model took longer than "


class ProcessFailure(Exception):
    """What a model raised in a process of its own, or how that process ended; `kind` says what it is about."""

    def __init__(self, text: str, kind: FaultKind) -> None:
        super().__init__(text)
        self.kind: FaultKind = kind


def classify_error(error: BaseException) -> FaultKind:
    """Return what an error of a model is about."""
    if isinstance(error, ProcessFailure):
        return error.kind
    if not isinstance(error, Exception):
        return "exit"
    if is_out_of_memory(error):
        return "memory"
    if is_device_lost(error):
        return "device"
    return "dependency" if is_dependency_fault(error) else "row"


def describe_error(error: BaseException) -> str:
    """Describe an exception in words that are the same in every attempt, without memory addresses."""
    if isinstance(error, ProcessFailure):
        return str(error)
    text = re.sub(r"0[xX][0-9a-fA-F]+", "0x...", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text}"[:_TEXT_LENGTH_MAX]


def describe_failure(error: BaseException) -> ProcessFailure:
    """Return what a model raised in its process as what its parent raises."""
    text, kind = describe_error(error), classify_error(error)
    if isinstance(error, SystemExit | KeyboardInterrupt):
        text = f"it must return, got {text}"
    return ProcessFailure(f"ModelExit: {text}" if kind == "exit" else text, kind)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a pass ended for lack of memory."""
    if isinstance(error, ProcessFailure):
        return error.kind == "memory"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _MEMORY_WORDS)


def is_device_lost(error: BaseException) -> bool:
    """Return whether a torch error means that the device failed, not the rows."""
    if isinstance(error, ProcessFailure):
        return error.kind == "device"
    if is_out_of_memory(error) or not isinstance(error, RuntimeError):
        return False
    return type(error).__name__ == "AcceleratorError" or any(word in str(error).lower() for word in _DEVICE_WORDS)


def is_dependency_fault(error: BaseException) -> bool:
    """Return whether an error comes from what a model calls or runs on, and so says nothing about its rows."""
    if isinstance(error, ProcessFailure):
        return error.kind == "dependency"
    return any(_is_fault(each) for each in _iter_causes(error))


def is_own_exit(error: SystemExit | KeyboardInterrupt) -> bool:
    """Return whether a model itself asked for the end of the process; to be called in the thread that caught it.

    Not the model's are a signal handler that raises SystemExit, and a real Ctrl-C, which Python raises in the main
    thread only.
    """
    if isinstance(error, KeyboardInterrupt):
        return threading.current_thread() is not threading.main_thread()
    handlers = {_find_handler_code(signal.getsignal(number)) for number in signal.valid_signals()} - {None}
    codes = (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__))
    return not any(code in handlers for code in codes)


def _iter_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, its causes as a traceback shows them, and the members of groups."""
    left, seen = [error], set[int]()
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        behind = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
        left += [behind] if behind is not None else []
        left += each.exceptions if isinstance(each, _GROUPS) else ()


def _is_fault(error: BaseException) -> bool:
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
    if "grpc.RpcError" in names:
        return _grpc_code(error) not in _ROW_GRPC_CODES
    if "botocore.exceptions.ClientError" in names:
        return _aws_code(error) not in _ROW_AWS_CODES
    if (status := _http_status(error)) is not None:
        return status not in _ROW_STATUSES
    named = any(_ERROR_NAMES.fullmatch(kind.__name__) for kind in type(error).__mro__)
    return _is_system_error(error) or named or not _LIBRARY_ERRORS.isdisjoint(names)


def _is_system_error(error: BaseException) -> bool:
    kinds = (kind for kind in type(error).__mro__ if kind.__module__ == "builtins" and kind is not OSError)
    return isinstance(error, OSError) and (error.errno is not None or any(issubclass(kind, OSError) for kind in kinds))


def _http_status(error: Any) -> int | None:
    """Return the HTTP status that an error carries in an attribute that HTTP clients use, None without one."""
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


def _find_handler_code(handler: Any) -> Any:
    """Return the code object of a signal handler, None where it is not a Python function."""
    handler = getattr(handler, "func", handler)
    return getattr(getattr(handler, "__func__", handler), "__code__", None)
