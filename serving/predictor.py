"""A release behind an event loop: what the Python model servers call with the batches that they collect."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from serving.model import Arrays
from serving.release import Release, Runtime, open_release

Outputs = dict[str, npt.NDArray[Any]]
Prediction = Outputs | Exception


class Predictor:
    """A loaded release and the one thread in which it predicts, inside its slot."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="predict", initializer=runtime.__enter__)

    @property
    def release(self) -> Release:
        """What is served."""
        return self._runtime.release

    async def predict_each(self, requests: Sequence[Arrays]) -> list[Prediction]:
        """Return the outputs of each request, or what the model raised on it.

        The rows of all of them go through the model together, in passes of at most the dial's batch size.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, predict_each, self._runtime, requests)

    def close(self) -> None:
        """Leave the slot and end the thread. Idempotent."""
        try:
            self._thread.submit(self._runtime.__exit__)
        except RuntimeError:
            return
        self._thread.shutdown()


def open_predictor(folder: Path) -> Predictor:
    """Load the release that a folder holds. Raises ModelUnfit where the model does not load here."""
    return Predictor(open_release(folder))


def predict_each(runtime: Runtime, requests: Sequence[Arrays]) -> list[Prediction]:
    """Return the outputs of each request, or what the model raised on it; called inside the slot.

    Where the model raises on the rows of several requests together, each goes through it alone: no request is failed
    by the rows of another.
    """
    joined = requests[0] if len(requests) == 1 else _joined(requests)
    try:
        outputs = _predict(runtime, joined)
    except Exception as error:  # noqa: BLE001 - the model is somebody else's code
        if len(requests) == 1:
            return [error]
        return [prediction for request in requests for prediction in predict_each(runtime, [request])]
    edges = [0, *itertools.accumulate(_rows(request) for request in requests)]
    return [{name: values[start:stop] for name, values in outputs.items()} for start, stop in itertools.pairwise(edges)]


def settled(prediction: Prediction) -> Outputs:
    """Return the outputs of a request, or raise what the model raised on it."""
    if isinstance(prediction, Exception):
        raise prediction
    return prediction


def _predict(runtime: Runtime, inputs: Arrays) -> Outputs:
    """Pass the rows through the model, no more of them at once than the dial allows."""
    rows, size = _rows(inputs), runtime.release.dial.batch_size_max
    if rows <= size:
        return runtime.predict(inputs)
    passes = [
        runtime.predict({name: values[start : start + size] for name, values in inputs.items()})
        for start in range(0, rows, size)
    ]
    return {name: np.concatenate([each[name] for each in passes]) for name in passes[0]}


def _joined(requests: Sequence[Arrays]) -> Outputs:
    return {name: np.concatenate([request[name] for request in requests]) for name in requests[0]}


def _rows(inputs: Arrays) -> int:
    return len(next(iter(inputs.values())))
