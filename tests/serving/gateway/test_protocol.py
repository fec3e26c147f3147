"""What a client of the Open Inference Protocol sees, good and bad, through a real gateway and a real server."""

from __future__ import annotations

import json
import struct
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.local.gateway import GatewayServer
from serving.gateway.route import Limits
from serving.protocol.oip import Wanted, decode_response, encode_request
from tests.serving.gateway.conftest import Put
from tests.serving.gateway.support import ROW, Door, V2Server, error, route
from tests.serving.gateway.v2_child import CONTRACT

INPUTS = {"x": np.array([[1, 2, 3], [4, 5, 6]], np.float32), "n": np.array([1, 2])}


@pytest.fixture
def door(put: Put, v2: V2Server) -> Door:
    return put(route(v2.url, ("1", 100), ("2", 0), limits=Limits(rows_max=4, bytes_max=4096)))


def test_the_server_says_who_it_is_and_that_it_is_ready(gateway: GatewayServer) -> None:
    answers = [httpx.get(f"{gateway.url}/v2{path}").json() for path in ("", "/health/live", "/health/ready")]

    assert {"name": "overnight-gateway", "version": "0.1.0", "extensions": ["binary_tensor_data"]} == answers[0]
    assert [{"live": True}, {"ready": True}] == answers[1:]


def test_a_model_says_what_it_takes_and_gives(door: Door) -> None:
    model, version = door.get().json(), door.get("/versions/2").json()

    assert ["1", "2"] == model["versions"]
    assert ["2"] == version["versions"]
    assert [
        {"name": "x", "datatype": "FP32", "shape": [-1, 3]},
        {"name": "n", "datatype": "INT64", "shape": [-1, 1]},
    ] == model["inputs"]
    assert [{"name": "score", "datatype": "FP32", "shape": [-1, 1]}] == version["outputs"]
    assert {"name": door.name, "ready": True} == door.get("/ready").json()
    assert {"name": door.name, "ready": True} == door.get("/versions/2/ready").json()


def test_a_request_is_answered_by_the_version_it_names_else_by_weight(door: Door) -> None:
    answers = [door.infer(), door.infer(version="1"), door.infer(version="2")]

    assert [10, 10, 16] == [answer.json()["outputs"][0]["data"][0] for answer in answers]
    assert ["1", "1", "2"] == [answer.headers["Overnight-Version"] for answer in answers]


def test_the_id_of_a_request_comes_back(door: Door) -> None:
    assert "a-42" == door.infer({**ROW, "id": "a-42"}).json()["id"]


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_binary_data_goes_through_as_it_is(door: Door, *, binary_in: bool, binary_out: bool) -> None:
    body = encode_request(CONTRACT, INPUTS, binary=binary_in, outputs=(Wanted(name="score", binary=binary_out),))
    answer = door.infer(body.content, headers=body.headers)
    length = answer.headers.get("Inference-Header-Content-Length")
    outputs = decode_response(answer.content, CONTRACT, header_length=None if length is None else int(length))

    assert binary_out == (length is not None)
    assert [7, 17] == outputs["score"].tolist()


def changed(**edits: Any) -> dict[str, Any]:
    """The row with the input x changed."""
    return {"inputs": [{**ROW["inputs"][0], **edits}, ROW["inputs"][1]]}


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "must be JSON"),
        (b"", 400, "must be JSON"),
        (b"\xff\xfe", 400, "must be JSON"),
        (b"[" * 3000, 400, "must be JSON"),
        (b"[]", 400, "must be an inference request"),
        ({"inputs": "x"}, 400, "must be an inference request"),
        ({**ROW, "strange": 1}, 400, "strange"),
        ({"inputs": ROW["inputs"][:1]}, 400, "none of the name 'n'"),
        ({"inputs": [*ROW["inputs"], ROW["inputs"][0]]}, 400, "may stand once"),
        (changed(name="y"), 400, "got 'y'"),
        (changed(datatype="FP64"), 400, "datatype of 'x' must be FP32, got 'FP64'"),
        (changed(shape=[1, 4], data=[1, 2, 3, 4]), 400, "shape of 'x' must be [N, 3]"),
        (changed(shape=[3]), 400, "shape of 'x' must be [N, 3]"),
        (changed(shape=[0, 3], data=[]), 400, "at least one row"),
        (changed(shape=[-1, 3]), 400, "at least one row"),
        (changed(data=[1, 2]), 400, "must be 3 values"),
        (changed(data=[1, 2, "three"]), 400, "must be numbers"),
        (changed(data=[1, 2, None]), 400, "got null"),
        (changed(data=[1, 2, 1e39]), 400, "must fit FP32"),
        (json.dumps(changed(data=[1, 2, float("nan")])).encode(), 400, "NaN"),
        (json.dumps(changed(data=[1, 2, float("inf")])).encode(), 400, "Infinity"),
        (changed(shape=[2, 3], data=[1] * 6), 400, "one number of rows"),
        (changed(shape=[5, 3], data=[1] * 15), 413, "at most 4 rows"),
        ({**ROW, "id": "x" * 5000}, 413, "at most 4096 bytes"),
        ({**ROW, "outputs": [{"name": "none"}]}, 400, "outputs must be"),
    ],
)
def test_what_the_contract_does_not_take_is_refused_before_a_server_sees_it(
    door: Door, v2: V2Server, body: Any, status: int, words: str
) -> None:
    before = v2.seen("1")
    got, told = error(door.infer(body))

    assert status == got
    assert words in told
    assert before == v2.seen("1")


@pytest.mark.parametrize(
    ("edits", "named"),
    [
        ({"parameters": {"sequence_id": 1, "sequence_start": True}}, "sequence_id"),
        ({"parameters": {"priority": 1}}, "priority"),
        ({"parameters": {"timeout": 1}}, "timeout"),
        ({"outputs": [{"name": "score", "parameters": {"shared_memory_region": "r"}}]}, "shared_memory_region"),
        ({"outputs": [{"name": "score", "parameters": {"classification": 2}}]}, "classification"),
        (changed(parameters={"shared_memory_region": "r", "shared_memory_byte_size": 12}), "shared_memory_region"),
        (changed(parameters={"content_type": "pd"}), "content_type"),
    ],
)
def test_a_parameter_that_changes_what_a_server_does_is_refused_by_name(
    door: Door, v2: V2Server, edits: dict[str, Any], named: str
) -> None:
    before = v2.seen("1")
    got, told = error(door.infer({**ROW, **edits}))

    assert 400 == got
    assert f"got {named!r}" in told
    assert before == v2.seen("1")


def test_a_server_gets_what_was_checked_even_where_a_key_stands_twice(door: Door, v2: V2Server) -> None:
    plain = json.dumps(ROW)
    answer = door.infer(plain.replace('"data": [1.0', '"data": [9.0, 9.0, 9.0], "data": [1.0').encode())

    assert 200 == answer.status_code
    assert ROW == json.loads(httpx.get(f"{v2.url}/last").content, object_pairs_hook=_unique)
    door.infer(plain.encode())
    assert plain.encode() == httpx.get(f"{v2.url}/last").content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len({key for key, _ in pairs}) == len(pairs)
    return dict(pairs)


@pytest.mark.parametrize(
    ("headers", "status", "words"),
    [
        ({"Inference-Header-Content-Length": "many"}, 400, "must be a number of bytes"),
        ({"Inference-Header-Content-Length": "-1"}, 400, "must be a number of bytes"),
        ({"Inference-Header-Content-Length": "9" * 30}, 400, "must be a number of bytes"),
        ({"Inference-Header-Content-Length": "99999"}, 400, "must be from 1 to the"),
        ({"Inference-Header-Content-Length": "3"}, 400, "must be JSON"),
        ({"Content-Encoding": "gzip"}, 415, "must not be compressed"),
    ],
)
def test_headers_that_do_not_fit_are_refused(door: Door, headers: dict[str, str], status: int, words: str) -> None:
    got, told = error(door.infer(headers=headers))

    assert status == got
    assert words in told


def test_a_body_without_a_length_is_refused_once_it_is_too_long(door: Door) -> None:
    def endless() -> Any:
        for _ in range(1000):
            yield b"x" * 1000

    got, told = error(door.http.post(f"{door.url}/infer", content=endless()))

    assert 413 == got
    assert "at most 4096 bytes" in told


def test_an_unknown_model_or_version_is_named(door: Door, gateway: GatewayServer) -> None:
    strange = f"{gateway.url}/v2/models/strange"

    assert (404, f"The version of {door.name!r} must be one of ['1', '2'], got '9'.") == error(door.infer(version="9"))
    assert 404 == error(door.get("/versions/9"))[0]
    assert 404 == error(door.get("/versions/9/ready"))[0]
    assert (404, "The model must be an endpoint that is served here, got 'strange'.") == error(
        httpx.post(f"{strange}/infer", json=ROW)
    )
    assert (404, "The model must be an endpoint that is served here, got 'strange'.") == error(httpx.get(strange))


def test_a_path_or_a_method_that_is_none_is_an_error_as_all_others(door: Door, gateway: GatewayServer) -> None:
    assert 405 == error(door.get("/infer"))[0]
    assert (404, "Not Found. The page at /docs says what there is.") == error(httpx.get(f"{gateway.url}/v1/models"))
    assert 404 == error(httpx.post(f"{gateway.url}/v2/models/{door.name}/versions/1/2/infer"))[0]


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
_tensor = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["x", "n", "y"]),
        "datatype": st.sampled_from(["FP32", "INT64", "BYTES", "", "FP32\0"]),
        "shape": st.lists(st.integers(-2, 1 << 70), max_size=3) | st.sampled_from([[1, 3], [1, 1], [2, 3]]),
    },
    optional={
        "data": _json | st.lists(st.floats(width=32), min_size=3, max_size=3),
        "parameters": st.dictionaries(st.just("binary_data_size"), _json, max_size=1),
    },
)
_request = st.fixed_dictionaries(
    {"inputs": st.lists(_tensor, max_size=3)}, optional={"id": _json, "outputs": _json, "parameters": _json}
)
_bodies = st.binary(max_size=200) | st.builds(lambda each: json.dumps(each).encode(), _json | _request)
_lengths = st.none() | st.integers(-1, 300).map(str) | st.text("0123456789 +_", min_size=1, max_size=5)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=_bodies, length=_lengths, tail=st.binary(max_size=40))
def test_no_body_whatsoever_breaks_the_gateway(door: Door, body: bytes, length: str | None, tail: bytes) -> None:
    headers = {} if length is None else {"Inference-Header-Content-Length": length.strip() or "0"}
    answer = door.infer(body + tail, headers=headers)

    assert answer.status_code == 200 or 400 <= answer.status_code < 500
    assert answer.status_code == 200 or error(answer)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(x=st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3), n=st.integers(-1000, 1000))
def test_any_row_of_the_contract_gets_its_score(door: Door, x: list[float], n: int) -> None:
    inputs = {"x": np.array([x], np.float32), "n": np.array([n])}
    answers = []
    for binary in (True, False):
        body = encode_request(CONTRACT, inputs, binary=binary)
        answer = door.infer(body.content, headers=body.headers)
        length = answer.headers.get("Inference-Header-Content-Length")
        answers.append(decode_response(answer.content, CONTRACT, header_length=int(length) if length else None))

    assert (inputs["x"].sum(axis=1) + n).astype(np.float32) == answers[0]["score"]
    assert answers[0]["score"] == answers[1]["score"]


def test_a_client_that_hangs_up_in_the_middle_harms_nobody(door: Door, gateway: GatewayServer) -> None:
    import socket

    host, port = gateway.url.removeprefix("http://").split(":")
    head = f"POST /v2/models/{door.name}/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n".encode()
    for sent in (head[:20], head, head + b"{" * 500):
        with socket.create_connection((host, int(port))) as client:
            client.sendall(sent)
            # Reset, not closed: the harsher of the two.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    assert 10 == door.score()
