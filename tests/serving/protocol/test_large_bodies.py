"""Bodies made to be dear: whatever their shape, the event loop that takes them is soon free again.

A large one is parsed by another thread, and only where it has no more values than are parsed soon: that thread holds
Python's lock meanwhile. How long each shape holds up the loop is what `make bench-pauses` measures.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from serving.gateway.app import build_app
from serving.gateway.envoy.bootstrap import BootstrapOptions
from serving.gateway.gateway import Gateway
from serving.gateway.keys import Keys
from serving.gateway.route import Limits, Route, ServedVersion
from serving.gateway.store import Store
from serving.model.contract import Column, Contract, Input, Output
from serving.model.interface import Arrays, Predictions
from serving.model.pin import ModelPin
from serving.model.release import Release
from serving.protocol.oip import HEADER_LENGTH, ServerMetadata
from serving.protocol.v2_app import create_v2_app

CHUNK = 1 << 16
CONTRACT = Contract(
    inputs=(
        Input(name="x", dtype="float32", columns=(Column(name="x", dtype="float32"),)),
        Input(name="text", dtype="str", columns=(Column(name="text", dtype="str"),)),
    ),
    outputs=(Output(name="score", dtype="float32"),),
)
ROWS_MAX = 1 << 20
App = Callable[..., Awaitable[None]]
Answered = tuple[int, bytes]
# Runs what an application answers to a request.
Run = Callable[[Awaitable[Answered]], Awaitable[Answered]]


def filled(size: int, before: bytes, unit: bytes, after: bytes) -> bytes:
    """As many units as fit, with a comma between each two."""
    count = max(1, (size - len(before) - len(after) + 1) // (len(unit) + 1))
    return before + b",".join([unit] * count) + after


def stretched(size: int, before: bytes, unit: bytes, after: bytes) -> bytes:
    """As many units as fit, one behind the other."""
    return before + unit * ((size - len(before) - len(after)) // len(unit)) + after


def request(x: bytes, text: bytes, rows: int) -> bytes:
    head = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[%d,1],"data":%s},' % (rows, x)
    return head + b'{"name":"text","datatype":"BYTES","shape":[%d,1],"data":%s}]}' % (rows, text)


def rows_of(size: int, x: bytes, text: bytes) -> bytes:
    rows = (size - 200) // (len(x) + len(text) + 2)
    return request(
        filled(rows * (len(x) + 1) + 1, b"[", x, b"]"), filled(rows * (len(text) + 1) + 1, b"[", text, b"]"), rows
    )


def one_row(size: int, unit: bytes) -> bytes:
    return request(b"[1]", stretched(size - 200, b'["', unit, b'"]'), 1)


def among(before: bytes, unit: bytes, after: bytes = b"]}") -> Callable[[int], bytes]:
    return lambda size: filled(size, before, unit, after)


def keys(size: int, before: bytes, after: bytes) -> bytes:
    return before + b",".join(b'"%x":1' % number for number in range(size // 11)) + after


IN_X = b'{"inputs":[{"name":"x","datatype":"FP32",'
SHAPES: dict[str, Callable[[int], bytes]] = {
    "ones as inputs": among(b'{"inputs":[', b"1"),
    "ones as outputs": among(b'{"inputs":[],"outputs":[', b"1"),
    "ones as a shape": among(IN_X + b'"shape":[', b"1", b"]}]}"),
    "texts as a shape": among(IN_X + b'"shape":[', b'"a"', b"]}]}"),
    "ones as data": among(IN_X + b'"shape":[1,1],"data":[', b"1", b"]}]}"),
    "ones as parameters": among(IN_X + b'"shape":[1,1],"parameters":[', b"1", b"]}]}"),
    "many parameters": lambda size: keys(size, IN_X + b'"shape":[1,1],"parameters":{', b"}}]}"),
    "many keys": lambda size: keys(size, b'{"inputs":[],', b"}"),
    "many keys of an input": lambda size: keys(size, b'{"inputs":[{', b"}]}"),
    "one key again and again": among(b'{"inputs":[],', b'"inputs":[]', b"}"),
    "a long key": lambda size: stretched(size, b'{"', b"a", b'":1}'),
    "empty lists": among(b'{"inputs":[', b"[]"),
    "empty objects": among(b'{"inputs":[', b"{}"),
    "many small inputs": among(b'{"inputs":[', b'{"name":"x","datatype":"FP32","shape":[1,1],"data":[1]}'),
    "many small outputs": among(b'{"inputs":[],"outputs":[', b'{"name":"score"}'),
    "brackets": lambda size: b"[" * size,
    "lists as deep as may be": among(b'{"inputs":[', b"[" * 900 + b"]" * 900),
    "objects as deep as may be": among(b'{"inputs":[', b'{"a":' * 300 + b"1" + b"}" * 300),
    "lists of lists as data": among(IN_X + b'"shape":[1,1],"data":[', b"[[]]", b"]}]}"),
    "blanks": lambda size: stretched(size, b'{"inputs":[', b" ", b"]}"),
    "one long number": lambda size: stretched(size, b'{"inputs":[0.', b"1", b"]}"),
    "one long integer": lambda size: stretched(size, b'{"inputs":[', b"1", b"]}"),
    "long numbers": among(IN_X + b'"shape":[1,1],"data":[', b"0." + b"1" * 300, b"]}]}"),
    "numbers that are hard to read": among(IN_X + b'"shape":[1,1],"data":[', b"2.2250738585072011e-308", b"]}]}"),
    "a long id": lambda size: stretched(size, b'{"inputs":[],"id":"', b"a", b'"}'),
    "a long name": lambda size: stretched(size, b'{"inputs":[{"name":"', b"a", b'"}]}'),
    "no JSON": lambda size: stretched(size, b'{"inputs":[', b"1,", b"?"),
    "no UTF-8": lambda size: stretched(size, b'{"inputs":["', b"\xff", b'"]}'),
    "quotes": lambda size: b'"' * size,
    "rows of ones": lambda size: rows_of(size, b"1", b'""'),
    "rows of long numbers": lambda size: rows_of(size, b"0.12345678901234567", b'"abcdefgh"'),
    "rows in lists": lambda size: rows_of(size, b"[1]", b'["a"]'),
    "rows with one of another type": lambda size: rows_of(size, b"1", b'"a"').replace(b"1]", b"true]"),
    "a text": lambda size: one_row(size, b"a"),
    "a text of commas": lambda size: one_row(size, b","),
    "a text of JSON": lambda size: one_row(size, b'{\\"a\\":[1,2]},'),
    "a text of backslashes and commas": lambda size: one_row(size, b"\\\\,"),
    "an escaped text": lambda size: one_row(size, b"\\u00e9"),
    "a text of commas among rows": lambda size: rows_of(size // 2, b"1", b'"a"').replace(
        b'"a"', b'"' + b",[{:" * (size // 8) + b'"', 1
    ),
}

TEXTS_IN_BYTES = b'{"inputs":[{"name":"text","datatype":"BYTES","shape":[%d,1],"parameters":{"binary_data_size":%s}}]}'
BINARY: dict[str, Callable[[int], tuple[bytes, str]]] = {
    "empty texts": lambda size: with_values(TEXTS_IN_BYTES % (size // 4, b"%d" % size), b"\0" * size),
    "texts of wild lengths": lambda size: with_values(TEXTS_IN_BYTES % (size // 4, b"%d" % size), b"\xff" * size),
    "one text": lambda size: with_values(
        TEXTS_IN_BYTES % (1, b"%d" % size), (size - 4).to_bytes(4, "little") + b"a" * size
    ),
    "a wild size": lambda size: with_values(TEXTS_IN_BYTES % (1, b"9" * 18), b"\0" * size),
    "a wild shape": lambda size: with_values(TEXTS_IN_BYTES % (10**18, b"%d" % size), b"\0" * size),
    "a size of ones": lambda size: with_values(filled(size, b"[", b"1", b"]"), b""),
    "a size that is a text": lambda size: with_values(TEXTS_IN_BYTES % (1, b'"' + b"9" * size + b'"'), b""),
    "a wild header": lambda size: (filled(size, b'{"inputs":[', b"1", b"]}"), "9" * 18),
    "a header that is no number": lambda size: (filled(size, b'{"inputs":[', b"1", b"]}"), "9" * 4000),
    "a header of one byte": lambda size: (filled(size, b'{"inputs":[', b"1", b"]}"), "1"),
}


def with_values(head: bytes, values: bytes) -> tuple[bytes, str]:
    return head + values, str(len(head))


async def asked(app: App, path: str, body: bytes, header_length: str | None) -> tuple[int, bytes]:
    """Ask an application as a server does that reads from a socket."""
    chunks = [body[at : at + CHUNK] for at in range(0, len(body), CHUNK)]
    # As Envoy marks a request that it has checked.
    headers = [(b"content-length", str(len(body)).encode()), (b"overnight-endpoint", b"toy")]
    if header_length is not None:
        headers.append((HEADER_LENGTH.lower().encode(), header_length.encode()))
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0)
        chunk = chunks.pop(0) if chunks else b""
        return {"type": "http.request", "body": chunk, "more_body": bool(chunks)}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": headers,
        "http_version": "1.1",
        "scheme": "http",
        "root_path": "",
        "client": ("test", 1),
        "server": ("test", 2),
        "state": {},
        "app": app,
    }
    await app(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


async def just_run(work: Awaitable[Answered]) -> Answered:
    return await work


def ask_gateway(folder: Path, body: bytes, header_length: str | None, run: Run = just_run) -> Answered:
    # Nothing listens at port 9, so that a request which is taken ends there.
    served = (ServedVersion(version="1", url="http://127.0.0.1:9", upstream_model="toy", weight=1),)
    route = Route(versions=served, contract=CONTRACT, limits=Limits(rows_max=ROWS_MAX))

    async def ask() -> Answered:
        with Store(folder) as store:
            gateway = Gateway(store, Keys(folder, {}), BootstrapOptions(folder=folder))
            app = build_app(gateway)
            async with app.router.lifespan_context(app):
                await gateway.put("toy", route)
                return await run(asked(app, "/v2/models/toy/infer", body, header_length))

    return asyncio.run(ask())


def ask_v2_app(_folder: Path, body: bytes, header_length: str | None, run: Run = just_run) -> Answered:
    pin = ModelPin(name="toy", version="1", model_id=None, source="", digest="0" * 64)
    release = Release(endpoint="toy", pin=pin, contract=CONTRACT, rows_max=1 << 16)

    async def predict(inputs: Arrays) -> Predictions:
        return {"score": np.zeros(len(inputs["x"]), np.float32)[:1]}

    app = create_v2_app(release, predict, ServerMetadata(name="test", version="1"))

    async def ask() -> Answered:
        return await run(asked(app, "/v2/models/toy/infer", body, header_length))

    return asyncio.run(ask())


APPS = {"gateway": ask_gateway, "v2_app": ask_v2_app}
SIZES = {"64 KiB": 1 << 16, "8 MiB": 8 << 20}


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bytes]]:
    """Every JSON that is parsed, and whether the thread of the event loop does it."""
    found: list[tuple[bool, bytes]] = []
    loads = orjson.loads

    def record(json: Any) -> Any:
        found.append((threading.current_thread() is threading.main_thread(), bytes(json)))
        return loads(json)

    monkeypatch.setattr(orjson, "loads", record)
    return found


def assert_soon_parsed(parsed: list[tuple[bool, bytes]]) -> None:
    assert [] == [len(json) for is_in_loop, json in parsed if is_in_loop and len(json) >= 1 << 16]
    for _, json in parsed:
        bare = re.sub(rb'"[^"\\]*(?:\\.[^"\\]*)*"', b"", json)
        # Values, lists, objects and keys: some more in JSON that is too small to hold anything up.
        counts = [bare.count(mark) for mark in (b",", b"[", b"{", b":")]
        assert len(json) < 1 << 16 or all(
            count <= most for count, most in zip(counts, (1 << 19, 1 << 17, 1 << 14, 1 << 16), strict=True)
        )


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("app", APPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_json_holds_the_event_loop(
    tmp_path: Path, parsed: list[tuple[bool, bytes]], app: str, shape: str, size: int
) -> None:
    body = SHAPES[shape](size)
    status, answer = APPS[app](tmp_path, body, None)

    assert size // 2 < len(body) <= size
    assert_soon_parsed(parsed)
    assert status in (200, 400, 413, 503)
    assert len(answer) < 1 << 13 or status == 200


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("app", APPS)
@pytest.mark.parametrize("shape", BINARY)
def test_no_binary_data_holds_the_event_loop(
    tmp_path: Path, parsed: list[tuple[bool, bytes]], app: str, shape: str, size: int
) -> None:
    body, header_length = BINARY[shape](size - 300)
    status, answer = APPS[app](tmp_path, body, header_length)

    assert_soon_parsed(parsed)
    assert status in (200, 400, 413, 503)
    assert len(answer) < 1 << 13


def test_a_large_valid_request_is_forwarded_to_the_server(tmp_path: Path) -> None:
    many = rows_of(8 << 20, b"0.12345678901234567", b'"abcdefghijklmnop"')
    text = one_row(8 << 20, b'{\\"a\\":[1,2]},')
    answers = [ask_gateway(tmp_path, body, None) for body in (many, text)]

    assert [503, 503] == [status for status, _ in answers]
    assert all(b"The model server" in answer for _, answer in answers)
