"""A release behind an event loop: what the Python model servers call with the batches that they collect."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from serving.errors import DeviceLost
from serving.model.release import Arrays, Failure, Predictions, Release, Runtime, count_rows, open_release

Outputs = Predictions
Prediction = Outputs | Failure


class Predictor:
    """A loaded release and the one thread in which it predicts, inside its slot."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="predict", initializer=runtime.__enter__)
        self._lost: DeviceLost | None = None

    @property
    def release(self) -> Release:
        """What is served."""
        return self._runtime.release

    async def predict_each(self, requests: Sequence[Arrays]) -> list[Prediction]:
        """Return the answer to each of several requests, passed together: one that fails leaves the others theirs."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._runtime.predict_each, requests)
        except DeviceLost as error:
            self._lost = error
            raise

    def check(self) -> None:
        """Raise DeviceLost where the device is gone: this process must end, and its server starts another one."""
        if self._lost is not None:
            raise self._lost

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


def split_rows(inputs: Arrays, rows_max: int) -> list[Arrays]:
    """Return the rows of a request as several of at most `rows_max` rows, in their order."""
    starts = range(0, count_rows(inputs), rows_max)
    return [{name: values[start : start + rows_max] for name, values in inputs.items()} for start in starts]


def join_predictions(predictions: Sequence[Predictions]) -> Predictions:
    """Return the outputs of what `split_rows` has split as those of one request."""
    return {name: np.concatenate([each[name] for each in predictions]) for name in predictions[0]}


def settled(prediction: Prediction) -> Outputs:
    """Return the outputs of a request, or raise the reason why it has none."""
    if isinstance(prediction, Failure):
        raise prediction
    return prediction
