"""Whose error it was: what models raise when they call others, by the real errors of the libraries they call with."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Generator
from email.message import Message
from http.server import BaseHTTPRequestHandler
from typing import Any

import boto3
import grpc
import httpx
import pytest
import requests
import urllib3
from botocore.config import Config
from botocore.exceptions import ClientError, EndpointConnectionError

from serving.faults import is_dependency_fault, is_own_exit
from tests.servers import serve_http


class Answering(BaseHTTPRequestHandler):
    """Answers with the status that the path names."""

    def do_GET(self) -> None:
        self.send_response(int(self.path[1:]))
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture(scope="module")
def server() -> Generator[str]:
    with serve_http(Answering) as port:
        yield f"http://127.0.0.1:{port}"


def caught(call: Callable[[], object]) -> BaseException:
    with pytest.raises(Exception) as found:  # noqa: PT011 - each library raises its own
        call()
    return found.value


def fail(error: BaseException) -> None:
    raise error


def raised_from(outer: Exception, inner: Exception) -> BaseException:
    def call() -> None:
        try:
            fail(inner)
        except Exception as error:
            raise outer from error

    return caught(call)


def raised_while_handling(outer: Exception, inner: Exception, *, hidden: bool = False) -> BaseException:
    def call() -> None:
        try:
            fail(inner)
        except Exception:  # noqa: BLE001 - whatever it is
            if hidden:
                raise outer from None
            raise outer  # noqa: B904 - as careless code does

    return caught(call)


def get_requests(url: str) -> None:
    with requests.Session() as session, session.get(url, timeout=5) as answer:
        answer.raise_for_status()


def get_httpx(url: str) -> None:
    with httpx.Client(trust_env=False) as client:
        client.get(url).raise_for_status()


def get_urllib(url: str) -> None:
    try:
        urllib.request.urlopen(url, timeout=5).close()  # noqa: S310 - the server above
    except urllib.error.HTTPError as error:
        error.close()
        raise


CLIENTS: list[Callable[[str], None]] = [get_requests, get_httpx, get_urllib]


@pytest.mark.parametrize("get", CLIENTS)
def test_a_connection_that_is_refused_is_no_error_of_a_row(get: Callable[[str], None], held_port: int) -> None:
    assert is_dependency_fault(caught(lambda: get(f"http://127.0.0.1:{held_port}/")))


@pytest.mark.parametrize("get", CLIENTS)
@pytest.mark.parametrize("status", [401, 403, 404, 408, 429, 500, 502, 503, 504])
def test_a_service_that_can_not_answer_is_no_error_of_a_row(
    get: Callable[[str], None], status: int, server: str
) -> None:
    assert is_dependency_fault(caught(lambda: get(f"{server}/{status}")))


@pytest.mark.parametrize("get", CLIENTS)
@pytest.mark.parametrize("status", [400, 413, 415, 422])
def test_a_service_that_refuses_what_it_was_sent_tells_of_the_row(
    get: Callable[[str], None], status: int, server: str
) -> None:
    assert not is_dependency_fault(caught(lambda: get(f"{server}/{status}")))


def test_the_errors_of_urllib3_botocore_and_grpc_are_known_though_they_are_no_os_errors(held_port: int) -> None:
    s3 = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{held_port}",
        region_name="eu-central-1",
        aws_access_key_id="a",
        aws_secret_access_key="b",  # noqa: S106 - nobody's
        config=Config(retries={"max_attempts": 0}, connect_timeout=5),
    )
    with grpc.insecure_channel(f"127.0.0.1:{held_port}") as channel:
        refused = [
            caught(lambda: urllib3.PoolManager(retries=False).request("GET", f"http://127.0.0.1:{held_port}/")),
            caught(s3.list_buckets),
            caught(lambda: channel.unary_unary("/a/b")(b"", timeout=5)),
        ]

    assert isinstance(refused[1], EndpointConnectionError)
    assert not any(isinstance(error, OSError) for error in refused)
    assert [True] * 3 == [is_dependency_fault(error) for error in refused]


class Rpc(grpc.RpcError):
    """What grpc raises, with a code."""

    def __init__(self, code: grpc.StatusCode) -> None:
        self._code = code

    def code(self) -> grpc.StatusCode:
        return self._code


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_of_grpcs_codes_two_tell_of_the_row(code: grpc.StatusCode) -> None:
    of_rows = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE}

    assert (code not in of_rows) == is_dependency_fault(Rpc(code))


@pytest.mark.parametrize(
    ("code", "expected"),
    [("ThrottlingException", True), ("ExpiredTokenException", True), ("ValidationException", False)],
)
def test_aws_answers_400_to_much_that_is_no_error_of_a_row(code: str, expected: bool) -> None:  # noqa: FBT001 - a column
    answer: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": 400}}

    assert expected == is_dependency_fault(ClientError(answer, "InvokeEndpoint"))


class ServiceUnavailable(Exception):
    """As some client has it."""


class UnidentifiedImageError(OSError):
    """As Pillow has it."""


class RedisTimeoutError(Exception):
    """The same."""


FAULTS = [
    *(ConnectionResetError(), TimeoutError(), BrokenPipeError(), FileNotFoundError(2, "gone"), PermissionError()),
    *(OSError(28, "No space left on device"), InterruptedError(), socket.gaierror(), concurrent.futures.TimeoutError()),
    *(sqlite3.OperationalError("database is locked"), subprocess.TimeoutExpired("a", 1), ServiceUnavailable()),
    *(RedisTimeoutError(), concurrent.futures.BrokenExecutor(), urllib.error.URLError("refused")),
    *(urllib.error.HTTPError("http://a", 503, "", Message(), None), httpx.ReadTimeout("slow")),
    *(requests.exceptions.ChunkedEncodingError(), ExceptionGroup("two", [ValueError(), ConnectionError()])),
    *(
        raised_from(RuntimeError("no features"), ConnectionError()),
        raised_while_handling(KeyError("a"), TimeoutError()),
    ),
]
ROWS = [
    *(ValueError("a"), KeyError("a"), TypeError(), ZeroDivisionError(), AssertionError(), RuntimeError(), Exception()),
    *(ArithmeticError(), UnicodeDecodeError("utf-8", b"", 0, 1, "a"), sqlite3.IntegrityError(), StopIteration()),
    *(raised_from(ValueError("a"), KeyError("b")), ExceptionGroup("two", [ValueError(), KeyError()])),
    raised_while_handling(ValueError("no such picture"), FileNotFoundError(), hidden=True),
    *(OSError("image file is truncated (4 bytes not processed)"), UnidentifiedImageError("cannot identify image file")),
]


@pytest.mark.parametrize("error", FAULTS, ids=repr)
def test_an_error_of_connections_time_outs_or_the_system_is_no_error_of_a_row(error: BaseException) -> None:
    assert is_dependency_fault(error)


@pytest.mark.parametrize("error", ROWS, ids=repr)
def test_any_other_error_is_that_of_a_row(error: BaseException) -> None:
    assert not is_dependency_fault(error)


def test_an_error_that_is_its_own_cause_is_handled() -> None:
    first, second = ValueError("a"), KeyError("b")
    first.__context__, second.__context__ = second, first

    assert not is_dependency_fault(first)


def test_a_model_that_exits_is_told_from_a_handler_of_a_signal_that_does() -> None:
    found: list[bool] = []
    try:
        sys.exit("enough")
    except SystemExit as error:
        found.append(is_own_exit(error))
    before = signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
    except SystemExit as error:
        found.append(is_own_exit(error))
    finally:
        signal.signal(signal.SIGUSR1, before)

    assert [True, False] == found


def test_a_ctrl_c_comes_in_the_main_thread_alone() -> None:
    found: list[bool] = []

    def interrupted() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            try:
                fail(KeyboardInterrupt())
            except KeyboardInterrupt as error:
                found.append(is_own_exit(error))

    interrupted()
    thread = threading.Thread(target=interrupted)
    thread.start()
    thread.join()

    assert [False, True] == found
