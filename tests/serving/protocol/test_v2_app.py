"""The app itself, asked without a socket; tests/serving/targets ask it in the servers that run it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx
import numpy as np
import pytest

from serving.errors import DependencyFault, ModelFailed
from serving.model.interface import Arrays, Predictions
from serving.model.pin import ModelPin
from serving.model.release import Release
from serving.protocol.oip import ServerMetadata, decode_response, encode_request
from serving.protocol.v2_app import Overloaded, create_v2_app
from tests.releases import document
from tests.serving.toys import matrix

PIN = ModelPin(name="toy", version="3", model_id=None, source="", digest="0" * 64)
RELEASE = Release(endpoint="toy", pin=PIN, contract=matrix(2), rows_max=3)
SERVER = ServerMetadata(name="test", version="1.0")
INFER = "/v2/models/toy/versions/3/infer"
Ask = Callable[..., httpx.Response]


async def total(inputs: Arrays) -> Predictions:
    return {"score": inputs["x"].sum(axis=1)}


def asker(**options: Any) -> Ask:
    app = create_v2_app(RELEASE, options.pop("predict", total), SERVER, **options)

    async def send(method: str, path: str, **content: Any) -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **content)

    return lambda method, path, **content: asyncio.run(send(method, path, **content))


@pytest.fixture(scope="module")
def ask() -> Ask:
    return asker()


def test_server_and_model_say_what_they_are(ask: Ask) -> None:
    model = ask("GET", "/v2/models/toy").json()

    assert {"name": "test", "version": "1.0", "extensions": ["binary_tensor_data"]} == ask("GET", "/v2").json()
    assert ("toy", ["3"], "test") == (model["name"], model["versions"], model["platform"])
    assert [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}] == model["inputs"]
    assert model == ask("GET", "/v2/models/toy/versions/3").json()


@pytest.mark.parametrize(
    "path", ["/v2/health/live", "/v2/health/ready", "/v2/models/toy/ready", "/v2/models/toy/versions/3/ready"]
)
def test_health_and_readiness_are_200(ask: Ask, path: str) -> None:
    assert 200 == ask("GET", path).status_code


def test_a_model_that_is_not_loaded_is_not_ready_but_the_server_lives() -> None:
    async def never() -> bool:
        return False

    ask = asker(ready=never)

    assert 200 == ask("GET", "/v2/health/live").status_code
    assert [503, 503] == [ask("GET", path).status_code for path in ("/v2/health/ready", "/v2/models/toy/ready")]


@pytest.mark.parametrize("path", ["/v2/models/toy/infer", INFER])
def test_a_request_in_json_is_answered_in_json_with_its_id(ask: Ask, path: str) -> None:
    answer = ask("POST", path, json=document(3, 2)).json()

    assert ("toy", "3", "7") == (answer["model_name"], answer["model_version"], answer["id"])
    assert [{"name": "score", "datatype": "FP32", "shape": [3, 1], "data": [1.0, 1.0, 1.0]}] == answer["outputs"]


def test_a_request_as_binary_data_is_answered_as_binary_data(ask: Ask) -> None:
    x_NF = np.array([[1, np.inf], [2, 3]], dtype=np.float32)
    body = encode_request(RELEASE.contract, {"x": x_NF}, binary=True)
    answer = ask("POST", INFER, content=body.content, headers=body.headers)
    length = int(answer.headers["Inference-Header-Content-Length"])

    outputs = decode_response(answer.content, RELEASE.contract, header_length=length)
    np.testing.assert_array_equal(outputs["score"], [np.inf, 5])


BAD: dict[str, dict[str, Any]] = {
    "no JSON": {"content": b"{"},
    "NaN": {"content": json.dumps(document(1, 2, data=[0.5, float("nan")])).encode()},
    "a list": {"json": [1]},
    "no inputs": {"json": {"inputs": []}},
    "another name": {"json": document(1, 2, name="y")},
    "another datatype": {"json": document(1, 2, datatype="INT8")},
    "another shape": {"json": document(1, 3)},
    "too few values": {"json": document(2, 2, data=[1.0])},
    "text": {"json": document(1, 2, data=["a", "b"])},
    "a header that counts no bytes": {"json": document(1, 2), "headers": {"Inference-Header-Content-Length": "-1"}},
    "a header beyond the body": {"json": document(1, 2), "headers": {"Inference-Header-Content-Length": "9999"}},
}


@pytest.mark.parametrize("request_", BAD.values(), ids=BAD)
def test_a_bad_request_is_400_with_the_reason(ask: Ask, request_: dict[str, Any]) -> None:
    answer = ask("POST", INFER, **request_)

    assert 400 == answer.status_code
    assert ["error"] == list(answer.json())
    assert "must" in answer.json()["error"]


@pytest.mark.parametrize(
    ("path", "status", "told"),
    [
        ("/v2/models/other/infer", 404, "'other'"),
        ("/v2/models/toy/versions/4/infer", 404, "'4'"),
        ("/v1/models/toy:predict", 404, "below /v2"),
        ("/v2/health/live", 405, "Method Not Allowed"),
    ],
)
def test_what_is_not_there_is_named(ask: Ask, path: str, status: int, told: str) -> None:
    answer = ask("POST", path, json=document(1, 2))

    assert status == answer.status_code
    assert told in answer.json()["error"]


def test_bodies_and_rows_have_a_limit() -> None:
    ask = asker(body_bytes_max=2_000)

    async def stream() -> AsyncGenerator[bytes]:
        for _ in range(1_000):
            yield b"0" * 100

    large = ask("POST", INFER, content=stream())
    many = ask("POST", INFER, json=document(4, 2))

    assert (413, 413) == (large.status_code, many.status_code)
    assert "at most 2000 bytes" in large.json()["error"]
    assert "at most 3 rows" in many.json()["error"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ModelFailed("The model must give a row a prediction, got none."), 500),
        (ValueError("no such row"), 500),
        (Overloaded("No room; try again in a second."), 503),
        (DependencyFault("What the model calls must answer, got ConnectionError."), 503),
    ],
)
def test_what_the_model_raises_is_reported(error: Exception, status: int, caplog: pytest.LogCaptureFixture) -> None:
    async def fail(_inputs: Arrays) -> Predictions:
        raise error

    answer = asker(predict=fail)("POST", INFER, json=document(1, 2))

    assert status == answer.status_code
    assert str(error) in answer.json()["error"]


def test_a_prediction_that_json_cannot_express_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(inputs: Arrays) -> Predictions:
        return {"score": np.full(len(inputs["x"]), np.nan, dtype=np.float32)}

    answer = asker(predict=broken)("POST", INFER, json=document(1, 2))

    assert 500 == answer.status_code
    assert "NaN" in answer.json()["error"]


def test_the_openapi_page_describes_requests(ask: Ask) -> None:
    page = ask("GET", "/openapi.json").json()
    body = page["paths"]["/v2/models/{model}/infer"]["post"]["requestBody"]

    assert "inputs" in body["content"]["application/json"]["schema"]["properties"]
