from __future__ import annotations

import numpy as np
import pytest
import torch

from serving.model.cuda import CudaModel
from serving.model.encoding import Encoded, Flags
from serving.model.forward import Forward
from serving.model.interface import Engine
from tests.serving.toys import matrix, network

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and a torch built for it"),
]

X = np.random.default_rng(6).standard_normal((10_000, 4), dtype=np.float32)


def encoded() -> Encoded:
    """Rows as `encode` hands them on: [F, N] in memory."""
    return Encoded(inputs={"x": np.ascontiguousarray(X.T).T}, flags=Flags.all_good(len(X)), rows=len(X))


def scores(module: torch.nn.Module, batch_size: int, engine: Engine | None = None) -> np.ndarray:
    model = CudaModel(module, matrix(4))
    model = model if engine is None else model.with_engine(engine)
    with model.slot():
        return Forward(model, matrix(4), batch_size).score(encoded())["score"]


@pytest.mark.parametrize("batch_size", [1, 999, 4096, 100_000])
def test_predictions_are_those_of_the_cpu_within_rounding(batch_size: int) -> None:
    with torch.inference_mode():
        expected = network()(torch.from_numpy(X))[:, 0].numpy()

    assert 1e-5 > np.abs(expected - scores(network(), batch_size)).max()


def test_the_same_batches_give_the_same_bits() -> None:
    assert np.array_equal(scores(network(), 777), scores(network(), 777))


def test_bfloat16_comes_back_as_float32_and_near() -> None:
    half = scores(network(), 4096, Engine(device="cuda", precision="bfloat16"))

    assert np.float32 == half.dtype
    assert 0 < np.abs(scores(network(), 4096) - half).max() < 0.05


class Greedy(torch.nn.Module):
    """Takes more memory than any card has where a batch has more rows than 1,000."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 1000:
            torch.empty(1 << 50, dtype=torch.uint8, device=x.device)
        return self.inner(x)


def test_a_batch_that_does_not_fit_the_card_is_halved_and_the_size_remembered() -> None:
    model = CudaModel(Greedy(), matrix(4))
    with model.slot():
        forward = Forward(model, matrix(4), 4000)
        found = forward.score(encoded())["score"]

    assert 1000 == forward.safe_batch_size
    assert 1e-5 > np.abs(scores(network(), 1000) - found).max()


def test_a_slot_has_a_device_to_itself() -> None:
    assert torch.cuda.device_count() == CudaModel(network(), matrix(4)).slots
