"""A release: one version of a model as an endpoint serves it, and how a model server runs it.

A release travels as a folder: release.json, and the model's own files below model/. Every server loads it by
`open_release(folder)`, so that one row has one score on every server and in every batch run. Servers with an event
loop use `open_predictor(folder)`.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import AliasChoices, Field

from serving.errors import DependencyFault, DeviceLost, ModelFailed, ModelUnfit
from serving.model.batching import BatchingConfig
from serving.model.contract import Contract, Frozen
from serving.model.encoding import Encoded, Flags
from serving.model.environment_choice import OwnEnvironment, restore_own_environment
from serving.model.forward import Forward
from serving.model.interface import Arrays, Engine, Predictions, Tunable
from serving.model.pin import ModelPin

RELEASE_FILE = "release.json"
MODEL_FOLDER = "model"
# As long as model servers wait for an answer.
_PASS_SECONDS_MAX = 60.0

# Why a request has no predictions: its rows and the model, or what the model calls, which is worth another try.
PredictionError = ModelFailed | DependencyFault


class Scaling(Frozen):
    """How many replicas of a model server an endpoint has."""

    replicas_min: int = Field(default=1, ge=0, le=1024, description="Replicas while idle; 0 unloads the model.")
    replicas_max: int = Field(default=1, ge=1, le=1024, description="Replicas under load, at most.")


class Release(Frozen):
    """A pinned model version under an endpoint's name, with its contract, engine, batching and replicas."""

    endpoint: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", description="The endpoint's name.")
    pin: ModelPin
    contract: Contract
    engine: Engine = Engine()
    batching: BatchingConfig = Field(default=BatchingConfig(), validation_alias=AliasChoices("batching", "dial"))
    scaling: Scaling = Scaling()
    allow_pickle: bool = Field(default=False, description="Load a model that needs unpickling, which runs its code.")
    rows_max: int = Field(default=4096, ge=1, le=1 << 16, description="Rows of one request, at most.")
    environment: OwnEnvironment | None = Field(
        default=None,
        description="The model's own Python environment; null: that of the server.",
        # Servers of an earlier release of Overnight know of none, and refuse what they don't know.
        exclude_if=lambda value: value is None,
    )

    @property
    def version(self) -> str:
        """The model version, a whole number from 1."""
        return self.pin.version


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """A loaded release; a context manager that is entered in the one thread that then predicts.

    Shapes: every input and output is [N, *shape] of the contract. A row is scored as a batch run scores it: a row that
    would be a reject there has no prediction here, for the same reason.
    """

    release: Release
    model: Tunable
    _forward: Forward
    _entered: ExitStack = field(default_factory=ExitStack)

    def predict(self, inputs: Arrays) -> Predictions:
        """Return every output of the contract for N rows.

        Raises:
            ModelFailed: A row has no prediction; the message has the reason.
            DependencyFault: What the model calls or runs on fails.
        """
        return unwrap_prediction(self.predict_requests([inputs])[0])

    def predict_requests(self, requests: Sequence[Arrays]) -> list[Predictions | PredictionError]:
        """Return the predictions of several requests, or the error of each that has none.

        Requests are passed together, in their order, with at most `batch_size_max` rows a pass. Most servers count
        requests where the batching counts rows. A request of more rows passes alone.
        """
        rows = [count_rows(request) for request in requests]
        stops = _find_pass_stops(rows, self.release.batching.batch_size_max)
        return [
            prediction
            for start, stop in itertools.pairwise([0, *stops])
            for prediction in self._predict_together(requests[start:stop])
        ]

    def _predict_together(self, requests: Sequence[Arrays]) -> list[Predictions | PredictionError]:
        edges = [0, *itertools.accumulate(map(count_rows, requests))]
        # A copy, since a row that fails is overwritten by one that does not.
        together = {
            value.name: np.concatenate([request[value.name] for request in requests])
            for value in self.release.contract.inputs
        }
        encoded = self.model.prepare(Encoded(inputs=together, flags=Flags.all_good(edges[-1]), rows=edges[-1]))
        try:
            predictions = self._forward.score(encoded)
        except (ModelFailed, DependencyFault) as error:
            return [error] * len(requests)
        except ModelUnfit as error:
            # It did load once: its process was ended, and another one did not come up. The next request tries again.
            return [DependencyFault(str(error))] * len(requests)
        return [_slice_predictions(predictions, encoded.flags, *between) for between in itertools.pairwise(edges)]

    def __enter__(self) -> Self:
        """Enter the model's slot in this thread, where predict is then called."""
        self._entered.enter_context(self.model.slot())
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the slot."""
        self._entered.close()


def open_release(folder: Path) -> Runtime:
    """Load the release in a folder, in a process of the model's own environment where it has one.

    Raises ModelUnfit where the model does not load here, and EnvironmentUnusable where its own environment is lost and
    can't be made here.
    """
    # MLflow takes a second and a half, and what reads releases alone needs none of it.
    from mlflow.models import Model as MLmodel  # noqa: PLC0415

    from serving.model.loading import load_model  # noqa: PLC0415
    from serving.model.processes import ProcessOptions  # noqa: PLC0415
    from serving.model.registry import Resolved  # noqa: PLC0415

    release = Release.model_validate_json((folder / RELEASE_FILE).read_text())
    # MLflow does not recognise the files through a link.
    files = (folder / MODEL_FOLDER).resolve()
    resolved = Resolved(pin=release.pin, folder=files, mlmodel=MLmodel.load(str(files / "MLmodel")))
    processes = None
    if release.environment is not None:
        # The server has other packages: the model runs in a process beside it, which ends with the server's.
        python = restore_own_environment(release.environment, release.pin, files)
        processes = ProcessOptions(python=python, seconds_max=_PASS_SECONDS_MAX)
    loaded = load_model(resolved, release.contract, allow_pickle=release.allow_pickle, processes=processes)
    model = loaded.with_engine(release.engine)
    # A request of more rows than a batch goes in passes of the model's own size.
    size = max(model.batch_size, release.batching.batch_size_max) if model.batch_unit == "rows" else model.batch_size
    # Proven: a request whose rows all fail is no reason to give the model up.
    # Without retries: a caller who waits is told at once, and may ask again.
    forward = Forward(model=model, contract=release.contract, batch_size=size, proven=True, delays=lambda: iter(()))
    return Runtime(release=release, model=model, _forward=forward)


class Predictor:
    """A loaded release behind an event loop, and the one thread in which it predicts, inside its slot."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="predict", initializer=runtime.__enter__)
        self._lost: DeviceLost | None = None

    @property
    def release(self) -> Release:
        """The release that is served."""
        return self._runtime.release

    async def predict_requests(self, requests: Sequence[Arrays]) -> list[Predictions | PredictionError]:
        """Return the predictions of several requests that are passed together, or the error of each that has none."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, self._runtime.predict_requests, requests)
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
    """Load the release in a folder, for an event loop. Raises ModelUnfit where the model does not load here."""
    return Predictor(open_release(folder))


def unwrap_prediction(prediction: Predictions | PredictionError) -> Predictions:
    """Return the predictions of a request, or raise the error that it has instead."""
    if isinstance(prediction, PredictionError):
        raise prediction
    return prediction


def count_rows(inputs: Arrays) -> int:
    """Return how many rows a request has."""
    return len(next(iter(inputs.values())))


def split_rows(inputs: Arrays, rows_max: int) -> list[Arrays]:
    """Return the rows of a request as several requests of at most `rows_max` rows, in order."""
    starts = range(0, count_rows(inputs), rows_max)
    return [{name: values[start : start + rows_max] for name, values in inputs.items()} for start in starts]


def join_predictions(predictions: Sequence[Predictions]) -> Predictions:
    """Return the predictions of the requests that `split_rows` made as those of one request."""
    return {name: np.concatenate([each[name] for each in predictions]) for name in predictions[0]}


def _find_pass_stops(rows: Sequence[int], rows_max: int) -> list[int]:
    """Return after which requests a pass ends, so that each has at most `rows_max` rows or one request."""
    stops, together = [], 0
    for position, count in enumerate(rows):
        if position and together + count > rows_max:
            stops.append(position)
            together = 0
        together += count
    return [*stops, len(rows)] if rows else []


def _slice_predictions(predictions: Predictions, flags: Flags, start: int, stop: int) -> Predictions | ModelFailed:
    """Return the predictions of rows [start, stop), or the reason why one of them has none."""
    bad_n = flags.code_N[start:stop] != 0
    if not bad_n.any():
        return {name: value[start:stop] for name, value in predictions.items()}
    row = int(bad_n.argmax())
    column, reason = flags.reasons[flags.code_N[start + row] - 1]
    where = f" ({column})" if column else ""
    return ModelFailed(f"Every row must get a prediction, got none for row {row}{where}: {reason.rstrip('.')}.")
