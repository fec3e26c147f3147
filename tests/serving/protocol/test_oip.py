"""Requests and answers of the Open Inference Protocol, held against a contract."""

from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import BadRequest, ModelFailed
from serving.model.contract import Column, Contract, Input, Output
from serving.protocol import oip

CONTRACT = Contract(
    inputs=(
        Input(
            name="x", dtype="float32", shape=(2,), columns=tuple(Column(name=name, dtype="float32") for name in "ab")
        ),
        Input(name="text", dtype="str", columns=(Column(name="text", dtype="str"),)),
    ),
    outputs=(Output(name="score", dtype="float32"), Output(name="label", dtype="str")),
)
X = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2.5]}
TEXT = {"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": ["a"]}
INPUTS = {"x": np.array([[1, 2.5]], np.float32), "text": np.array(["a"], object)}
OUTPUTS = {"score": np.array([0.5], np.float32), "label": np.array(["é"], object)}


def decode(document: Any, header_length: int | None = None, behind: bytes = b"") -> oip.InferRequest:
    head = document if isinstance(document, bytes) else json.dumps(document).encode()
    length = len(head) if behind and header_length is None else header_length
    return oip.decode_request(head + behind, CONTRACT, header_length=length, rows_max=3)


@given(st.booleans())
def test_a_request_is_decoded_to_what_was_encoded(binary: bool) -> None:  # noqa: FBT001 - hypothesis draws it
    body = oip.encode_request(CONTRACT, INPUTS, identity="7", binary=binary)
    request = oip.decode_request(body.content, CONTRACT, header_length=body.header_length, rows_max=1)

    assert "7" == request.id
    assert 1 == request.rows
    assert (
        oip.OutputChoice(name="score", binary=binary),
        oip.OutputChoice(name="label", binary=binary),
    ) == request.outputs
    for name, value in INPUTS.items():
        np.testing.assert_array_equal(value, request.inputs[name])
        assert request.inputs[name].flags.writeable


def test_a_response_is_decoded_to_what_was_encoded_in_the_requested_form() -> None:
    wanted = (oip.OutputChoice(name="label", binary=True), oip.OutputChoice(name="score"))
    body = oip.encode_request(CONTRACT, INPUTS, identity="7", outputs=wanted)
    request = oip.decode_request(body.content, CONTRACT, header_length=None, rows_max=1)
    answer = oip.encode_response(request, OUTPUTS, CONTRACT, model="m", version="3")
    head = json.loads(answer.content[: answer.header_length])

    assert ("m", "3", "7") == (head["model_name"], head["model_version"], head["id"])
    assert [("label", 6, None), ("score", None, [0.5])] == [
        (each["name"], each.get("parameters", {}).get("binary_data_size"), each.get("data")) for each in head["outputs"]
    ]
    assert OUTPUTS == oip.decode_response(answer.content, CONTRACT, header_length=answer.header_length)
    assert str(answer.header_length) == answer.headers[oip.HEADER_LENGTH]


def test_json_and_binary_data_may_be_mixed_in_one_request() -> None:
    binary = {"name": "x", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 8}}
    request = decode({"inputs": [binary, TEXT]}, behind=np.array([1, 2.5], "<f4").tobytes())

    assert INPUTS["x"].tolist() == request.inputs["x"].tolist()


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (b"", "must be JSON"),
        (b"{", "must be JSON"),
        (b"\xff", "must be JSON"),
        (b'{"inputs": [NaN]}', "NaN, which JSON does not have"),
        (b'{"inputs": [-Infinity]}', "Infinity, which JSON does not have"),
        (b"[" * 100_000, "must be JSON"),
        ([], "must be an inference request"),
        ({}, "inputs: Field required"),
        ({"inputs": []}, "got none of the name 'x'"),
        ({"inputs": [X]}, "got none of the name 'text'"),
        ({"inputs": [X, X, TEXT]}, "may occur once"),
        ({"inputs": [{**X, "name": "z"}, TEXT]}, "must be ['x', 'text'], got 'z'"),
        ({"inputs": [{**X, "datatype": "FP64"}, TEXT]}, "datatype of 'x' must be FP32, got 'FP64'"),
        ({"inputs": [{**X, "shape": [1, 3]}, TEXT]}, "shape of 'x' must be [N, 2]"),
        ({"inputs": [{**X, "shape": [2]}, TEXT]}, "shape of 'x' must be [N, 2]"),
        ({"inputs": [{**X, "shape": []}, TEXT]}, "shape of 'x' must be [N, 2]"),
        ({"inputs": [{**X, "shape": [0, 2], "data": []}, TEXT]}, "at least one row"),
        ({"inputs": [{**X, "shape": [-1, 2]}, TEXT]}, "at least one row"),
        ({"inputs": [{**X, "shape": ["1", 2]}, TEXT]}, "inputs.0.shape.0"),
        ({"inputs": [X, {**TEXT, "shape": [1]}]}, "shape of 'text' must be [N, 1]"),
        ({"inputs": [{**X, "shape": [2, 2], "data": [1] * 4}, TEXT]}, "one number of rows, got {'x': 2, 'text': 1}"),
        ({"inputs": [{**X, "data": [1]}, TEXT]}, "must be 2 values"),
        ({"inputs": [{**X, "data": None}, TEXT]}, "must be a list"),
        ({"inputs": [{**X, "shared_memory_region": "r"}, TEXT]}, "inputs.0.shared_memory_region"),
        ({"inputs": [{**X, "parameters": {"shared_memory_region": "r"}, "data": None}, TEXT]}, "shared_memory_region"),
        ({"inputs": [X, TEXT], "outputs": [{"name": "z"}]}, "must be ['score', 'label'], got 'z'"),
        ({"inputs": [X, TEXT], "output": []}, "output: Extra inputs are not permitted"),
        ({"inputs": [X, TEXT], "id": 7}, "id: Input should be a valid string"),
        ({"inputs": [X, TEXT], "id": "7" * 300}, "id: String should have at most 256"),
        ({"inputs": [X, TEXT], "outputs": [{"name": "score", "parameters": {"classification": 2}}]}, "classification"),
        ({"inputs": [X, TEXT], "parameters": {"sequence_id": 7}}, "of a request that is taken is 'binary_data_output'"),
        ({"inputs": [X, TEXT], "parameters": {"binary_data_output": True, "priority": 1}}, "got 'priority'"),
        ({"inputs": [X, TEXT], "parameters": {"binary_data_output": 1}}, "must be true or false, got 1"),
        ({"inputs": [{**X, "parameters": {"binary_data": True}}, TEXT]}, "of 'x' that is taken is 'binary_data_size'"),
        ({"inputs": [X, TEXT], "outputs": [{"name": "score", "parameters": {"binary_data": "yes"}}]}, "got 'yes'"),
    ],
)
def test_a_bad_request_is_refused_by_name(document: Any, said: str) -> None:
    with pytest.raises(BadRequest) as refused:
        decode(document)

    assert 400 == refused.value.status
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("size", "header_length", "behind", "said"),
    [
        (8, None, b"\0" * 7, "binary_data_size of 'x'"),
        (8, None, b"\0" * 9, "got 1 more"),
        (-1, None, b"\0" * 8, "binary_data_size of 'x'"),
        ("8", None, b"\0" * 8, "binary_data_size of 'x'"),
        (True, None, b"\0", "binary_data_size of 'x'"),
        (8, 0, b"\0" * 8, "must be from 1"),
        (8, -1, b"\0" * 8, "must be from 1"),
        (8, 1 << 40, b"\0" * 8, "must be from 1"),
        (8, 5, b"\0" * 8, "must be JSON"),
    ],
)
def test_binary_data_that_does_not_add_up_is_refused(size: Any, header_length: Any, behind: bytes, said: str) -> None:
    x = {"name": "x", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": size}}

    with pytest.raises(BadRequest, match=said):
        decode({"inputs": [x, TEXT]}, header_length, behind)


def test_data_beside_binary_data_is_refused() -> None:
    with pytest.raises(BadRequest, match="got both"):
        decode({"inputs": [{**X, "parameters": {"binary_data_size": 8}}, TEXT]}, behind=b"\0" * 8)


def test_too_many_rows_are_refused_before_a_value_is_read() -> None:
    with pytest.raises(BadRequest, match="at most 3 rows, got 4") as refused:
        decode({"inputs": [{**X, "shape": [4, 2], "data": "never looked at"}, TEXT]})

    assert 413 == refused.value.status


def forward(content: bytes, header_length: int | None = None) -> tuple[oip.InferRequest, oip.Body]:
    return oip.decode_request_to_forward(oip.Body(content=content, header_length=header_length), CONTRACT, rows_max=3)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len({key for key, _ in pairs}) == len(pairs)
    return dict(pairs)


def test_an_unambiguous_body_is_forwarded_unchanged() -> None:
    content = json.dumps({"inputs": [X, TEXT], "outputs": [{"name": "score"}]}, indent=1).encode()

    assert content is forward(content)[1].content


@pytest.mark.parametrize("text", ["a", "a: b", '{"inputs": []}', "\\", 'quote " colon :'])
@pytest.mark.parametrize(
    ("said", "instead"),
    [
        ('"inputs": [', '"inputs": [], "inputs": ['),
        ('"data": [1, 2.5]', '"data": [7, 7], "data": [1, 2.5]'),
        ('"data": [1, 2.5]', '"d\\u0061ta": [7, 7], "data": [1, 2.5]'),
        ('"shape": [1, 2]', '"shape": [9], "shape": [1, 2]'),
        ('"binary_data": true', '"binary_data": false, "binary_data": true'),
        ('"id": "r"', '"id": "another", "id": "r"'),
        ('"id": "r"', '"outputs": [{"name": "label"}], "id": "r"'),
        ("", ""),
    ],
)
def test_a_key_that_occurs_twice_is_forwarded_once_with_the_value_that_was_checked(
    text: str, said: str, instead: str
) -> None:
    document = {
        "id": "r",
        "inputs": [X, {**TEXT, "data": [text]}],
        "outputs": [{"name": "score", "parameters": {"binary_data": True}}],
    }
    plain = json.dumps(document)
    assert said in plain
    asked, body = forward(plain.replace(said, instead, 1).encode())

    assert document == json.loads(body.content, object_pairs_hook=unique)
    assert (document["id"], [text]) == (asked.id, asked.inputs["text"].tolist())
    assert (oip.OutputChoice(name="score", binary=True),) == asked.outputs


def test_binary_data_stays_behind_json_that_is_written_again() -> None:
    x = {"name": "x", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 8}}
    head = json.dumps({"inputs": [x, TEXT]}).replace('"shape": [1, 2]', '"shape": [5, 2], "shape": [1, 2]').encode()
    values = np.array([1, 2.5], "<f4").tobytes()
    asked, body = forward(head + values, len(head))

    assert body.header_length is not None
    assert {"inputs": [x, TEXT]} == json.loads(body.content[: body.header_length], object_pairs_hook=unique)
    assert values == body.content[body.header_length :]
    assert INPUTS["x"].tolist() == asked.inputs["x"].tolist()


def doubled(draw: st.DrawFn, value: Any) -> str:
    """JSON of a value, where keys may stand twice with another value before."""
    if isinstance(value, list):
        return f"[{', '.join(doubled(draw, each) for each in value)}]"
    if not isinstance(value, dict):
        return json.dumps(value)
    pairs = [f"{json.dumps(key)}: {doubled(draw, each)}" for key, each in value.items()]
    before = draw(st.lists(st.sampled_from(sorted(value)), max_size=2)) if value else []
    return (
        "{"
        + ", ".join([f"{json.dumps(key)}: {draw(st.sampled_from(['7', '[]', '{}']))}" for key in before] + pairs)
        + "}"
    )


@given(st.data())
def test_a_server_gets_what_was_checked_whichever_of_two_equal_keys_it_reads(data: st.DataObject) -> None:
    document = {
        "inputs": [X, {**TEXT, "data": [data.draw(st.text(':\\"a', max_size=3))]}],
        "outputs": [{"name": "score"}],
    }
    _, body = forward(data.draw(st.composite(doubled)(document)).encode())

    assert document == json.loads(body.content, object_pairs_hook=unique)


@given(st.binary(max_size=200), st.none() | st.integers(-5, 250))
def test_no_bytes_at_all_end_in_another_error(body: bytes, header_length: int | None) -> None:
    with pytest.raises(BadRequest):
        oip.decode_request(body, CONTRACT, header_length=header_length, rows_max=3)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(X)), inner, max_size=4),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from(["shape", "datatype", "data", "parameters", "name"]), _JSON, min_size=1))
def test_no_json_in_the_place_of_another_ends_in_another_error(changes: dict[str, Any]) -> None:
    try:
        request = decode({"inputs": [{**X, **changes}, TEXT]})
    except BadRequest:
        return

    assert (2,) == request.inputs["x"].shape[1:]


def test_a_prediction_that_json_can_not_hold_is_the_models_failure() -> None:
    request = decode({"inputs": [X, TEXT]})

    with pytest.raises(ModelFailed, match="'score' holds NaN"):
        oip.encode_response(request, {**OUTPUTS, "score": np.array([np.nan])}, CONTRACT, model="m", version=None)


@pytest.mark.parametrize(
    "body",
    [b"<html>", b"{}", b'{"outputs": [{"name": "z", "shape": [1, 1], "datatype": "FP32", "data": [1]}]}'],
)
def test_a_response_that_is_not_of_the_model_is_the_servers_fault(body: bytes) -> None:
    with pytest.raises(BadRequest, match="server must answer") as refused:
        oip.decode_response(body, CONTRACT, header_length=None)

    assert 502 == refused.value.status


def test_an_error_keeps_its_status_between_processes() -> None:
    error = pickle.loads(pickle.dumps(BadRequest("no", status=413)))  # noqa: S301 - its own bytes

    assert ("no", 413) == (str(error), error.status)


def test_metadata_and_errors_are_documents() -> None:
    metadata = oip.make_model_metadata("m", CONTRACT, versions=["1", "2"], platform="overnight")

    assert {"name": "text", "datatype": "BYTES", "shape": (-1, 1)} == metadata.inputs[1].model_dump()
    assert ("1", "2") == metadata.versions
    assert ["binary_tensor_data"] == json.loads(oip.ServerMetadata(name="o", version="1").model_dump_json())[
        "extensions"
    ]
    assert {"error": "no"} == json.loads(oip.encode_error("no"))
