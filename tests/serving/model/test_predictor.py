from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from serving.errors import DeviceLost, ModelFailed
from serving.model.batching import BatchingConfig
from serving.model.contract import Contract
from serving.model.forward import Forward
from serving.model.predictor import Prediction, Predictor, open_predictor, settled
from serving.model.registry import ModelPin
from serving.model.release import Release, Runtime
from serving.model.torch_model import TorchModel
from serving.targets import Rendered
from serving.targets.written import write_folder
from tests.releases import release_of, rows
from tests.serving.toys import Picky, matrix

CONTRACT: Contract = matrix(4)
PIN = ModelPin(name="toy", version="1", model_id=None, source="", digest="0" * 64)


def predictor_of(module: torch.nn.Module) -> Predictor:
    model = TorchModel(module, CONTRACT)
    forward = Forward(model=model, contract=CONTRACT, batch_size=64, proven=True)
    release = Release(endpoint="toy", pin=PIN, contract=CONTRACT, batching=BatchingConfig(batch_size_max=64))
    return Predictor(Runtime(release=release, model=model, _forward=forward))


def test_of_requests_passed_together_only_the_one_with_a_bad_row_fails() -> None:
    x_NF = rows(6, 4)
    x_NF[3, 0] = 1
    predictor = predictor_of(Picky())
    first, second, third = asyncio.run(predictor.predict_each([{"x": x_NF[at : at + 2]} for at in (0, 2, 4)]))
    (alone,) = asyncio.run(predictor.predict_each([{"x": x_NF[:2]}]))
    predictor.close()

    np.testing.assert_allclose(settled(first)["score"], settled(alone)["score"], rtol=0, atol=1e-6)
    assert 2 == len(settled(third)["score"])
    with pytest.raises(ModelFailed, match="no row may begin with 1"):
        settled(second)


def test_every_pass_is_made_in_one_thread_inside_the_slot() -> None:
    seen: set[tuple[str, bool, int]] = set()

    class Telling(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.add((threading.current_thread().name, torch.is_inference_mode_enabled(), torch.get_num_threads()))
            return x.sum(dim=1, keepdim=True)

    async def ask() -> list[list[Prediction]]:
        return await asyncio.gather(*(predictor.predict_each([{"x": rows(1, 4)}]) for _ in range(8)))

    predictor = predictor_of(Telling())
    asyncio.run(ask())
    predictor.close()
    predictor.close()

    assert {("predict_0", True, 1)} == seen


def test_a_device_that_is_lost_is_told_from_then_on() -> None:
    class Lost(torch.nn.Module):
        def forward(self, _x: torch.Tensor) -> torch.Tensor:
            message = "CUDA error: an illegal memory access was encountered"
            raise RuntimeError(message)

    predictor = predictor_of(Lost())
    predictor.check()
    with pytest.raises(DeviceLost):
        asyncio.run(predictor.predict_each([{"x": rows(1, 4)}]))
    with pytest.raises(DeviceLost):
        predictor.check()
    predictor.close()


def test_a_folder_that_holds_a_release_predicts_as_its_model(linear: str, tmp_path: Path) -> None:
    put, x_NF = release_of(linear, "linear"), rows(5, 3)
    files = {"release.json": put.release.model_dump_json().encode()}
    write_folder(Rendered(files=files, trees={"model": put.model}), tmp_path / "release")
    predictor = open_predictor(tmp_path / "release")
    (prediction,) = asyncio.run(predictor.predict_each([{"x": x_NF}]))
    predictor.close()

    assert put.release == predictor.release
    np.testing.assert_allclose(settled(prediction)["score"], put.predict(x_NF), rtol=0, atol=1e-6)
