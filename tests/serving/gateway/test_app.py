"""What a client of the Open Inference Protocol sees, through a real gateway and a real server."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.local.gateway import GatewayServer, gateway_server
from serving.gateway.client import GatewayClient
from serving.gateway.route import Limits
from serving.protocol.oip import OutputChoice, decode_response, encode_request
from tests.serving.gateway.conftest import Put
from tests.serving.gateway.support import ROW, EndpointClient, V2Server, error, route
from tests.serving.gateway.v2_child import CONTRACT

INPUTS = {"x": np.array([[1, 2, 3], [4, 5, 6]], np.float32), "n": np.array([1, 2])}


@pytest.fixture
def endpoint(put: Put, v2: V2Server) -> EndpointClient:
    return put(route(v2.url, ("1", 100), ("2", 0), limits=Limits(rows_max=4, bytes_max=4096)))


def test_the_server_states_its_name_and_that_it_is_ready(gateway: GatewayServer) -> None:
    answers = [httpx.get(f"{gateway.url}/v2{path}").json() for path in ("", "/health/live", "/health/ready")]

    assert {"name": "overnight-gateway", "version": "0.1.0", "extensions": ["binary_tensor_data"]} == answers[0]
    assert [{"live": True}, {"ready": True}] == answers[1:]


def test_a_model_states_its_inputs_outputs_and_versions(endpoint: EndpointClient) -> None:
    model, version = endpoint.get().json(), endpoint.get("/versions/2").json()

    assert ["1", "2"] == model["versions"]
    assert ["2"] == version["versions"]
    assert [
        {"name": "x", "datatype": "FP32", "shape": [-1, 3]},
        {"name": "n", "datatype": "INT64", "shape": [-1, 1]},
    ] == model["inputs"]
    assert [{"name": "score", "datatype": "FP32", "shape": [-1, 1]}] == version["outputs"]
    assert {"name": endpoint.name, "ready": True} == endpoint.get("/ready").json()
    assert {"name": endpoint.name, "ready": True} == endpoint.get("/versions/2/ready").json()


def test_a_request_is_answered_by_the_version_it_names_else_by_weight(endpoint: EndpointClient) -> None:
    answers = [endpoint.infer(), endpoint.infer(version="1"), endpoint.infer(version="2")]

    assert [10, 10, 16] == [answer.json()["outputs"][0]["data"][0] for answer in answers]
    assert ["1", "1", "2"] == [answer.headers["Overnight-Version"] for answer in answers]


def test_the_answer_has_the_id_of_the_request(endpoint: EndpointClient) -> None:
    assert "a-42" == endpoint.infer({**ROW, "id": "a-42"}).json()["id"]


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_binary_data_is_forwarded_unchanged(endpoint: EndpointClient, *, binary_in: bool, binary_out: bool) -> None:
    body = encode_request(CONTRACT, INPUTS, binary=binary_in, outputs=(OutputChoice(name="score", binary=binary_out),))
    answer = endpoint.infer(body.content, headers=body.headers)
    length = answer.headers.get("Inference-Header-Content-Length")
    outputs = decode_response(answer.content, CONTRACT, header_length=None if length is None else int(length))

    assert binary_out == (length is not None)
    assert [7, 17] == outputs["score"].tolist()


def change_x(**edits: Any) -> dict[str, Any]:
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
        ({"inputs": [*ROW["inputs"], ROW["inputs"][0]]}, 400, "may occur once"),
        (change_x(name="y"), 400, "got 'y'"),
        (change_x(datatype="FP64"), 400, "datatype of 'x' must be FP32, got 'FP64'"),
        (change_x(shape=[1, 4], data=[1, 2, 3, 4]), 400, "shape of 'x' must be [N, 3]"),
        (change_x(shape=[3]), 400, "shape of 'x' must be [N, 3]"),
        (change_x(shape=[0, 3], data=[]), 400, "at least one row"),
        (change_x(shape=[-1, 3]), 400, "at least one row"),
        (change_x(data=[1, 2]), 400, "must be 3 values"),
        (change_x(data=[1, 2, "three"]), 400, "must be numbers"),
        (change_x(data=[1, 2, None]), 400, "got null"),
        (change_x(data=[1, 2, 1e39]), 400, "must fit FP32"),
        (json.dumps(change_x(data=[1, 2, float("nan")])).encode(), 400, "NaN"),
        (json.dumps(change_x(data=[1, 2, float("inf")])).encode(), 400, "Infinity"),
        (change_x(shape=[2, 3], data=[1] * 6), 400, "one number of rows"),
        (change_x(shape=[5, 3], data=[1] * 15), 413, "at most 4 rows"),
        ({**ROW, "id": "x" * 5000}, 413, "at most 4096 bytes"),
        ({**ROW, "outputs": [{"name": "none"}]}, 400, "outputs must be"),
    ],
)
def test_a_request_that_breaks_the_contract_is_refused(
    endpoint: EndpointClient, body: Any, status: int, words: str
) -> None:
    found, message = error(endpoint.infer(body))

    assert words in message
    assert status == found


def test_more_data_than_the_shape_says_is_refused_before_a_server_gets_it(put: Put, v2: V2Server) -> None:
    endpoint, before = put(route(v2.url)), v2.seen("1")
    found, message = error(endpoint.infer(change_x(data=[1] * 500_000)))

    assert 400 == found
    assert "must be the values of the shape, which says 1 rows" in message
    assert before == v2.seen("1")


def test_more_data_than_any_shape_allows_is_refused_wherever_the_shape_stands(put: Put, v2: V2Server) -> None:
    endpoint, before = put(route(v2.url, limits=Limits(rows_max=4))), v2.seen("1")
    x = ROW["inputs"][0]
    shape_last = {"name": "x", "datatype": "FP32", "data": [1] * 100_000, "shape": x["shape"]}
    found, message = error(endpoint.infer({"inputs": [shape_last, ROW["inputs"][1]]}))

    assert 413 == found
    assert "at most 4 rows" in message
    assert before == v2.seen("1")


@pytest.mark.parametrize(
    ("edits", "named"),
    [
        ({"parameters": {"sequence_id": 1, "sequence_start": True}}, "sequence_id"),
        ({"parameters": {"priority": 1}}, "priority"),
        ({"parameters": {"timeout": 1}}, "timeout"),
        ({"outputs": [{"name": "score", "parameters": {"shared_memory_region": "r"}}]}, "shared_memory_region"),
        ({"outputs": [{"name": "score", "parameters": {"classification": 2}}]}, "classification"),
        (change_x(parameters={"shared_memory_region": "r", "shared_memory_byte_size": 12}), "shared_memory_region"),
        (change_x(parameters={"content_type": "pd"}), "content_type"),
    ],
)
def test_a_parameter_that_changes_the_servers_behaviour_is_refused_by_name(
    endpoint: EndpointClient, v2: V2Server, edits: dict[str, Any], named: str
) -> None:
    before = v2.seen("1")
    found, message = error(endpoint.infer({**ROW, **edits}))

    assert 400 == found
    assert f"got {named!r}" in message
    assert before == v2.seen("1")


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
def test_invalid_headers_are_refused(
    endpoint: EndpointClient, headers: dict[str, str], status: int, words: str
) -> None:
    found, message = error(endpoint.infer(headers=headers))

    assert status == found
    assert words in message


def test_a_body_without_a_length_is_refused_once_it_is_too_large(endpoint: EndpointClient) -> None:
    def endless() -> Any:
        for _ in range(1000):
            yield b"x" * 1000

    found, message = error(endpoint.http.post(f"{endpoint.url}/infer", content=endless()))

    assert 413 == found
    assert "at most 4096 bytes" in message


def test_an_unknown_model_or_version_is_named_in_the_error(endpoint: EndpointClient, gateway: GatewayServer) -> None:
    strange = f"{gateway.url}/v2/models/strange"

    assert (404, f"The version of {endpoint.name!r} must be one of ['1', '2'], got '9'.") == error(
        endpoint.infer(version="9")
    )
    assert 404 == error(endpoint.get("/versions/9"))[0]
    assert 404 == error(endpoint.get("/versions/9/ready"))[0]
    assert (404, "The model must be an endpoint of this gateway, got 'strange'.") == error(
        httpx.post(f"{strange}/infer", json=ROW)
    )
    assert (404, "The model must be an endpoint of this gateway, got 'strange'.") == error(httpx.get(strange))


def test_an_unknown_path_or_method_is_an_error_in_the_same_format(
    endpoint: EndpointClient, gateway: GatewayServer
) -> None:
    assert 405 == error(endpoint.get("/infer"))[0]
    assert (404, "Not Found. The page at /docs lists the paths and methods.") == error(
        httpx.get(f"{gateway.url}/v1/models")
    )
    assert 404 == error(httpx.post(f"{gateway.url}/v2/models/{endpoint.name}/versions/1/2/infer"))[0]


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
_bodies = st.binary(max_size=200) | st.builds(lambda value: json.dumps(value).encode(), _json | _request)
_lengths = st.none() | st.integers(-1, 300).map(str) | st.text("0123456789 +_", min_size=1, max_size=5)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=_bodies, length=_lengths, tail=st.binary(max_size=40))
def test_no_body_breaks_the_gateway(endpoint: EndpointClient, body: bytes, length: str | None, tail: bytes) -> None:
    headers = {} if length is None else {"Inference-Header-Content-Length": length.strip() or "0"}
    answer = endpoint.infer(body + tail, headers=headers)

    assert answer.status_code == 200 or 400 <= answer.status_code < 500
    assert answer.status_code == 200 or error(answer)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(x=st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3), n=st.integers(-1000, 1000))
def test_every_row_that_satisfies_the_contract_gets_its_score(endpoint: EndpointClient, x: list[float], n: int) -> None:
    inputs = {"x": np.array([x], np.float32), "n": np.array([n])}
    answers = []
    for binary in (True, False):
        body = encode_request(CONTRACT, inputs, binary=binary)
        answer = endpoint.infer(body.content, headers=body.headers)
        length = answer.headers.get("Inference-Header-Content-Length")
        answers.append(decode_response(answer.content, CONTRACT, header_length=int(length) if length else None))

    assert (inputs["x"].sum(axis=1) + n).astype(np.float32) == answers[0]["score"]
    assert answers[0]["score"] == answers[1]["score"]


def test_a_client_that_disconnects_during_a_request_affects_no_other(
    endpoint: EndpointClient, gateway: GatewayServer
) -> None:
    host, port = gateway.url.removeprefix("http://").split(":")
    head = f"POST /v2/models/{endpoint.name}/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n".encode()
    for sent in (head[:20], head, head + b"{" * 500):
        with socket.create_connection((host, int(port))) as client:
            client.sendall(sent)
            # With this option, closing sends a reset.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    assert 10 == endpoint.score()


CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory, v2: V2Server) -> Generator[GatewayServer]:
    """A gateway of its own, because schemathesis puts and deletes anything."""
    with (
        gateway_server(tmp_path_factory.mktemp("fuzzed")) as server,
        GatewayClient(server.url, server.admin_key) as admin,
    ):
        admin.put("toy", route(v2.url))
        yield server


def schemathesis(server: GatewayServer, folder: Path, config: str, *options: str) -> None:
    (folder / "schemathesis.toml").write_text(config)
    command = (
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(folder / "schemathesis.toml")),
        *("run", f"{server.url}/openapi.json", "--checks", CHECKS),
        *("--generation-deterministic", "--no-color", *options),
        *("-H", f"Authorization: Bearer {server.admin_key}"),
    )
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)

    assert 0 == done.returncode, done.stdout[-6000:] + done.stderr[-2000:]


def test_every_request_to_the_gateway_gets_an_answer_that_the_openapi_page_describes(
    fuzzed: GatewayServer, tmp_path: Path
) -> None:
    options = ("--exclude-path-regex", "^/v2/models", "--phases", "fuzzing", "--max-examples", "25")
    schemathesis(fuzzed, tmp_path, "", *options)


def test_every_request_to_an_endpoint_gets_an_answer_that_the_openapi_page_describes(
    fuzzed: GatewayServer, tmp_path: Path
) -> None:
    config = '[parameters]\n"path.name" = "toy"\n"path.version" = "1"\n'
    options = ("--include-path-regex", "^/v2/models", "--phases", "fuzzing", "--max-examples", "40")
    schemathesis(fuzzed, tmp_path, config, *options)

    assert 200 == httpx.get(f"{fuzzed.url}/v2/models/toy/ready").status_code


def test_the_openapi_page_describes_every_body(fuzzed: GatewayServer) -> None:
    page = httpx.get(f"{fuzzed.url}/openapi.json", headers={"Authorization": f"Bearer {fuzzed.admin_key}"}).json()
    schemas = page["components"]["schemas"]
    bodies = [
        operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        for path in page["paths"].values()
        for operation in path.values()
        if "requestBody" in operation
    ]

    assert ["KeyDigest", "RequestDocument", "RequestDocument", "Route"] == sorted(bodies)
    assert "$defs" not in json.dumps(schemas)
    assert not [name for name in schemas if not _find_references(schemas[name]) <= schemas.keys()]


def _find_references(schema: object) -> set[str]:
    text = json.dumps(schema)
    return {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
