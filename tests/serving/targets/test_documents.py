from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from serving.errors import BadRequest, ModelFailed
from serving.model.contract import Contract
from serving.model.pin import ModelPin
from serving.model.release import Release
from serving.targets.documents import dump_tensors, encode_inputs, read_request, write_response
from tests.serving.toys import alone, column, matrix


def release(contract: Contract) -> Release:
    pin = ModelPin(name="scores", version="3", model_id=None, source="nowhere", digest="d")
    return Release(endpoint="scores", pin=pin, contract=contract)


def tensor(**changes: Any) -> dict[str, Any]:
    return {"name": "x", "shape": [2, 2], "datatype": "FP32", "data": [[1.0, 2.0], [3.0, 4.0]]} | changes


NUMBERS, TEXT = release(matrix(2)), release(alone(column("str", "gloss")))


def test_a_parsed_request_is_read_as_its_body_would_be() -> None:
    request = read_request([tensor()], None, NUMBERS)

    np.testing.assert_array_equal([[1, 2], [3, 4]], request.inputs["x"])
    assert ["score"] == [each.name for each in request.outputs]


def test_its_inputs_are_encoded_to_be_joined_with_those_of_others() -> None:
    (plain,) = encode_inputs(read_request([tensor()], None, NUMBERS), NUMBERS)

    assert {"name": "x", "shape": [2, 2], "datatype": "FP32", "data": [1.0, 2.0, 3.0, 4.0]} == plain


def test_text_may_come_as_the_bytes_that_grpc_carries() -> None:
    given = {"name": "gloss", "shape": [2, 1], "datatype": "BYTES", "data": ["café".encode(), "tea"]}
    request = read_request([given], None, TEXT)

    assert ["café", "tea"] == list(request.inputs["gloss"])


@pytest.mark.parametrize(
    ("data", "words"),
    [([b"\xff", b"x"], "UTF-8 text"), ([object(), "x"], "got what JSON has not: object")],
)
def test_what_is_no_text_is_refused(data: list[Any], words: str) -> None:
    given = {"name": "gloss", "shape": [2, 1], "datatype": "BYTES", "data": data}
    with pytest.raises(BadRequest, match=words):
        read_request([given], None, TEXT)


def test_more_rows_than_a_request_may_have_are_refused() -> None:
    with pytest.raises(BadRequest, match="at most 1 rows, got 2") as refused:
        read_request([tensor()], None, NUMBERS.model_copy(update={"rows_max": 1}))

    assert 413 == refused.value.status


def test_an_answer_names_the_model_its_version_and_the_requested_outputs() -> None:
    request = read_request([tensor()], ["score"], NUMBERS)
    answer = write_response(request, {"score": np.array([0.5, 0.25], dtype=np.float32)}, NUMBERS)

    assert {
        "model_name": "scores",
        "model_version": "3",
        "outputs": [{"name": "score", "shape": [2, 1], "datatype": "FP32", "data": [0.5, 0.25]}],
    } == answer


def test_an_answer_that_is_not_finite_is_the_models_failure() -> None:
    request = read_request([tensor()], None, NUMBERS)
    with pytest.raises(ModelFailed, match="NaN or Infinity"):
        write_response(request, {"score": np.array([0.5, np.nan], dtype=np.float32)}, NUMBERS)


def test_a_model_is_described_by_its_tensors() -> None:
    assert (
        [{"name": "gloss", "datatype": "BYTES", "shape": [-1, 1]}],
        [{"name": "score", "datatype": "FP32", "shape": [-1, 1]}],
    ) == dump_tensors(TEXT.contract)
