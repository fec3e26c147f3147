from __future__ import annotations

import asyncio
import itertools
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.model import Arrays
from serving.predictor import Outputs, Predictor, open_predictor, predict_each, settled
from serving.registry import ModelPin
from serving.release import Dial, Release, Runtime
from serving.targets import Rendered
from serving.targets.written import write_folder
from serving.torch_model import TorchModel
from tests.releases import release_of, rows
from tests.serving.toys import Picky, matrix, network

PIN = ModelPin(name="toy", version="1", model_id=None, source="", digest="0" * 64)


def runtime_of(module: Any, batch_size_max: int) -> Runtime:
    contract = matrix(4)
    release = Release(endpoint="toy", pin=PIN, contract=contract, dial=Dial(batch_size_max=batch_size_max))
    return Runtime(release=release, model=TorchModel(module, contract), _entered=ExitStack())


def requests_of(x_NF: np.ndarray, sizes: list[int]) -> list[Arrays]:
    edges = np.cumsum([0, *sizes])
    return [{"x": x_NF[start:stop]} for start, stop in itertools.pairwise(edges)]


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8), batch_size_max=st.integers(1, 12))
def test_each_request_gets_the_scores_of_its_own_rows(sizes: list[int], batch_size_max: int) -> None:
    x_NF = rows(sum(sizes), 4)
    with runtime_of(network(), batch_size_max) as runtime:
        expected = runtime.model.predict({"x": x_NF})["score"]
        predictions = [settled(each)["score"] for each in predict_each(runtime, requests_of(x_NF, sizes))]

    assert sizes == [len(each) for each in predictions]
    np.testing.assert_allclose(np.concatenate(predictions), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("sizes", "passes"), [([1, 1, 1], [3]), ([3, 2], [4, 1]), ([9], [4, 4, 1])])
def test_no_pass_has_more_rows_than_the_dial_allows(sizes: list[int], passes: list[int]) -> None:
    module = Picky()
    with runtime_of(module, 4) as runtime:
        predict_each(runtime, requests_of(rows(sum(sizes), 4), sizes))

    assert passes == module.rows_seen


def test_a_row_that_the_model_fails_on_fails_its_own_request_alone() -> None:
    x_NF = rows(6, 4)
    x_NF[3, 0] = 1
    with runtime_of(Picky(), 64) as runtime:
        first, second, third = predict_each(runtime, requests_of(x_NF, [2, 2, 2]))
        expected = runtime.model.predict({"x": x_NF[:2]})["score"]

    np.testing.assert_array_equal(settled(first)["score"], expected)
    assert (2,) == settled(third)["score"].shape
    with pytest.raises(ValueError, match="no row may begin with 1"):
        settled(second)


def test_every_pass_is_made_in_one_thread_inside_the_slot() -> None:
    import torch

    seen: set[tuple[str, bool, int]] = set()

    class Telling(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            name = threading.current_thread().name
            seen.add((name, torch.is_inference_mode_enabled(), torch.get_num_threads()))
            return x.sum(dim=1, keepdim=True)

    async def ask(predictor: Predictor) -> list[Outputs]:
        answers = await asyncio.gather(*(predictor.predict_each([{"x": rows(1, 4)}]) for _ in range(8)))
        return [settled(each) for (each,) in answers]

    predictor = Predictor(runtime_of(Telling(), 4))
    asyncio.run(ask(predictor))
    predictor.close()
    predictor.close()

    assert {("predict_0", True, 1)} == seen


def test_a_folder_that_holds_a_release_predicts_as_its_model(linear: str, tmp_path: Path) -> None:
    put, x_NF = release_of(linear, "linear"), rows(5, 3)
    files = {"release.json": put.release.model_dump_json().encode()}
    write_folder(Rendered(files=files, trees={"model": put.model}), tmp_path / "release")
    predictor = open_predictor(tmp_path / "release")
    (prediction,) = asyncio.run(predictor.predict_each([{"x": x_NF}]))
    predictor.close()

    assert put.release == predictor.release
    np.testing.assert_allclose(settled(prediction)["score"], put.predict(x_NF), rtol=0, atol=1e-6)
