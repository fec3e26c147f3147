from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from serving.machine import cores
from serving.model import onednn
from serving.model.interface import Engine, Wish
from serving.model.torch_model import TorchModel
from tests.serving.toys import matrix, network

X = np.random.default_rng(4).standard_normal((64, 4), dtype=np.float32)


def scores(engine: Engine) -> np.ndarray:
    model = TorchModel(network(), matrix(4)).using(engine)
    with model.slot():
        return model.predict({"x": X})["score"]


def test_engines_begin_with_torch_as_it_comes_and_hold_what_the_wish_allows() -> None:
    model = TorchModel(network(), matrix(4))
    few, many = model.engines(Wish()), model.engines(Wish(bfloat16_tolerance=0.1, compiled=True))

    assert Engine() == few[0] == many[0]
    assert {"float32"} == {engine.precision for engine in few}
    assert {False} == {engine.compiled for engine in few}
    assert {"float32", "bfloat16"} == {engine.precision for engine in many}
    assert onednn.available() == (Engine(linear="onednn") in few)
    assert Engine(precision="bfloat16", compiled=True) in many


def test_slots_that_are_counted_by_the_caller_have_a_thread_each() -> None:
    assert {1} == {engine.threads for engine in TorchModel(network(), matrix(4)).engines(Wish(slots=1))}


def test_slots_times_threads_are_the_cores() -> None:
    model = TorchModel(network(), matrix(4))

    assert cores() == model.slots
    assert 1 == model.using(Engine(threads=cores())).slots


def test_an_engine_gives_the_same_predictions_within_its_precision() -> None:
    plain = scores(Engine())

    assert np.array_equal(plain, scores(Engine()))
    assert 1e-6 > np.abs(plain - scores(Engine(linear="onednn"))).max()
    half = scores(Engine(precision="bfloat16"))
    assert np.float32 == half.dtype
    assert 0 < np.abs(plain - half).max() < 0.05


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, which torch.compile calls")
def test_a_compiled_model_takes_batches_of_any_size() -> None:
    model = TorchModel(network(), matrix(4)).using(Engine(compiled=True))
    with model.slot():
        got = [model.predict({"x": X[:rows]})["score"] for rows in (64, 7, 1)]

    assert all(1e-5 > np.abs(scores(Engine())[: len(some)] - some).max() for some in got)


def test_a_slot_has_the_threads_of_its_engine_and_gives_them_back() -> None:
    before = torch.get_num_threads()
    with TorchModel(network(), matrix(4)).using(Engine(threads=3)).slot():
        inside = torch.get_num_threads()

    assert (3, before) == (inside, torch.get_num_threads())
    assert not torch.is_inference_mode_enabled()
