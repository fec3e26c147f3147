"""A release: one version of a model as an endpoint serves it, and what a model server runs of it.

A release travels as a folder: release.json, and the model's own files below model/. Whatever server loads it,
it predicts through `open_release(folder)`, so that one row has one score on every server and in every batch run.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
from mlflow.models import Model as MLmodel
from pydantic import AliasChoices, Field

from serving.errors import DependencyFault, ModelFailed
from serving.model.batching import BatchingConfig
from serving.model.contract import Contract, Frozen
from serving.model.interface import Engine, Tunable
from serving.model.loading import load_model
from serving.model.registry import ModelPin, Resolved

if TYPE_CHECKING:
    from serving.model.encoding import Flags
    from serving.model.forward import Forward


RELEASE_FILE = "release.json"
MODEL_FOLDER = "model"


class Scaling(Frozen):
    """How many replicas of a model server an endpoint has."""

    replicas_min: int = Field(default=1, ge=0, le=1024, description="Replicas while idle; 0 unloads the model.")
    replicas_max: int = Field(default=1, ge=1, le=1024, description="Replicas under load, at most.")


class Release(Frozen):
    """What is served: a pinned model version under an endpoint's name, its contract, engine, batching and replicas."""

    endpoint: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", description="The endpoint's name.")
    pin: ModelPin
    contract: Contract
    engine: Engine = Engine()
    batching: BatchingConfig = Field(default=BatchingConfig(), validation_alias=AliasChoices("batching", "dial"))
    scaling: Scaling = Scaling()
    allow_pickle: bool = Field(default=False, description="Load a model that needs unpickling, which runs its code.")
    rows_max: int = Field(default=4096, ge=1, le=1 << 16, description="Rows of one request, at most.")

    @property
    def version(self) -> str:
        """The model version that this is, a whole number from 1."""
        return self.pin.version


Arrays = Mapping[str, npt.NDArray[Any]]
Predictions = dict[str, npt.NDArray[Any]]
# Why a request has no predictions: by its rows and the model, or by what the model calls, which is worth another try.
Failure = ModelFailed | DependencyFault


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """A loaded release; a context manager that is entered in the one thread that then predicts.

    Shapes: every input and output is [N, *shape] of the contract. A row is scored as a batch run scores it: what is a
    reject there has no prediction here, for the same reason.
    """

    release: Release
    model: Tunable
    _forward: Forward
    _entered: ExitStack = field(default_factory=ExitStack)

    def predict(self, inputs: Arrays) -> Predictions:
        """Return every output of the contract for N rows.

        Raises ModelFailed with the reason where a row has none, DependencyFault where what the model calls fails.
        """
        (answer,) = self.predict_each([inputs])
        if isinstance(answer, Failure):
            raise answer
        return answer

    def predict_each(self, requests: Sequence[Arrays]) -> list[Predictions | Failure]:
        """Return the answer to each of several requests: one that fails leaves the others theirs.

        They are passed together, in their order, with at most `batch_size_max` rows a pass. Most servers count
        requests where the batching counts rows. One request of more rows passes alone.
        """
        rows = [count_rows(request) for request in requests]
        stops = _pass_stops(rows, self.release.batching.batch_size_max)
        return [
            answer
            for start, stop in itertools.pairwise([0, *stops])
            for answer in self._predict_together(requests[start:stop])
        ]

    def _predict_together(self, requests: Sequence[Arrays]) -> list[Predictions | Failure]:
        from serving.model.encoding import Encoded, Flags  # noqa: PLC0415 - keeps this module's import light

        edges = [0, *itertools.accumulate(map(count_rows, requests))]
        # In memory of its own, since a row that fails is overwritten by one that does not.
        together = {
            value.name: np.concatenate([request[value.name] for request in requests])
            for value in self.release.contract.inputs
        }
        encoded = self.model.prepare(Encoded(inputs=together, flags=Flags.none(edges[-1]), rows=edges[-1]))
        try:
            predictions = self._forward.score(encoded)
        except (ModelFailed, DependencyFault) as error:
            return [error] * len(requests)
        return [_answer(predictions, encoded.flags, start, stop) for start, stop in itertools.pairwise(edges)]

    def __enter__(self) -> Self:
        """Enter the model's slot in this thread, where predict is then called."""
        self._entered.enter_context(self.model.slot())
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the slot."""
        self._entered.close()


def open_release(folder: Path) -> Runtime:
    """Load the release that a folder holds. Raises ModelUnfit where the model does not load here."""
    from serving.model.forward import Forward  # noqa: PLC0415 - keeps this module's import light

    release = Release.model_validate_json((folder / RELEASE_FILE).read_text())
    # Where it is linked, MLflow takes the files for others than those of its folder.
    files = (folder / MODEL_FOLDER).resolve()
    resolved = Resolved(pin=release.pin, folder=files, mlmodel=MLmodel.load(str(files / "MLmodel")))
    model = load_model(resolved, release.contract, allow_pickle=release.allow_pickle).using(release.engine)
    # A request of more rows than the batching's batch goes in passes of the model's own size.
    size = max(model.batch_size, release.batching.batch_size_max) if model.batch_unit == "rows" else model.batch_size
    # Proven, since rows that all fail are the caller's matter here, and no reason to give the model up.
    # Without pauses: a caller who waits is told at once, and asks again.
    forward = Forward(model=model, contract=release.contract, batch_size=size, proven=True, pauses=lambda: iter(()))
    return Runtime(release=release, model=model, _forward=forward)


def count_rows(inputs: Arrays) -> int:
    """Return how many rows a request has."""
    return len(next(iter(inputs.values())))


def _pass_stops(rows: Sequence[int], rows_max: int) -> list[int]:
    """Return where each pass over requests of these rows ends: as late as `rows_max` rows and one request allow."""
    stops, together = [], 0
    for at, count in enumerate(rows):
        if at and together + count > rows_max:
            stops.append(at)
            together = 0
        together += count
    return [*stops, len(rows)] if rows else []


def _answer(predictions: Predictions, flags: Flags, start: int, stop: int) -> Predictions | ModelFailed:
    """Return the predictions of rows [start, stop), or why one of them has none."""
    bad_n = flags.code_N[start:stop] != 0
    if not bad_n.any():
        return {name: value[start:stop] for name, value in predictions.items()}
    row = int(bad_n.argmax())
    column, reason = flags.reasons[flags.code_N[start + row] - 1]
    where = f" ({column})" if column else ""
    return ModelFailed(f"Every row must get a prediction, got none for row {row}{where}: {reason.rstrip('.')}.")
