"""A release: one version of a model as an endpoint serves it, and what a model server runs of it.

A release travels as a folder: release.json, and the model's own files below model/. Whatever server loads it,
it predicts through `open_release(folder)`, so that one row has one score on every server and in every batch run.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy.typing as npt
from mlflow.models import Model as MLmodel
from pydantic import Field

from serving.contract import Contract, Frozen
from serving.engine import Engine
from serving.model import Model, load_model
from serving.registry import ModelPin, Resolved

RELEASE_FILE = "release.json"
MODEL_FOLDER = "model"


class Dial(Frozen):
    """Throughput against latency: a server collects requests into one forward pass within these bounds."""

    batch_size_max: int = Field(default=1, ge=1, le=1 << 16, description="Rows of one forward pass, at most.")
    wait_ms_max: float = Field(
        default=0.0, ge=0, le=60_000, description="Milliseconds that a request waits for others, at most."
    )


class Scaling(Frozen):
    """How many replicas of a model server an endpoint has."""

    replicas_min: int = Field(default=1, ge=0, le=1024, description="Replicas while idle; 0 unloads the model.")
    replicas_max: int = Field(default=1, ge=1, le=1024, description="Replicas under load, at most.")


class Release(Frozen):
    """What is served: a pinned model version under an endpoint's name, its contract, engine, dial and replicas."""

    endpoint: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", description="The endpoint's name.")
    pin: ModelPin
    contract: Contract
    engine: Engine = Engine()
    dial: Dial = Dial()
    scaling: Scaling = Scaling()
    allow_pickle: bool = False

    @property
    def version(self) -> str:
        """The model version that this is, a whole number from 1."""
        return self.pin.version


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """A loaded release; `predict` may be called from any one thread at a time.

    Shapes: every input and output is [N, *shape] of the contract.
    """

    release: Release
    model: Model
    _entered: ExitStack

    def predict(self, inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Return every output of the contract for N rows, prepared and passed as a batch run does."""
        from serving.encode import Encoded, Flags  # noqa: PLC0415 - keeps this module's import light

        rows = len(next(iter(inputs.values())))
        encoded = self.model.prepare(Encoded(inputs=dict(inputs), flags=Flags.none(rows), rows=rows))
        return self.model.predict(encoded.inputs)

    def __enter__(self) -> Self:
        """Enter the model's slot in this thread, where predict is then called."""
        self._entered.enter_context(self.model.slot())
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the slot."""
        self._entered.close()


def open_release(folder: Path) -> Runtime:
    """Load the release that a folder holds. Raises ModelUnfit where the model does not load here."""
    release = Release.model_validate_json((folder / RELEASE_FILE).read_text())
    files = folder / MODEL_FOLDER
    resolved = Resolved(pin=release.pin, folder=files, mlmodel=MLmodel.load(str(files / "MLmodel")))
    model = load_model(resolved, release.contract, allow_pickle=release.allow_pickle)
    return Runtime(release=release, model=model.using(release.engine), _entered=ExitStack())
