"""A release on BentoML: the Open Inference Protocol before the model, which BentoML batches in a process of its own.

Rendered as service.py beside release.json and the model's files, and run by BentoML alone.
"""

from __future__ import annotations

import asyncio
import gc
import math
import sys
from pathlib import Path
from typing import Any

import bentoml
import numpy as np
from aiohttp import ClientConnectionError
from bentoml.exceptions import ServiceUnavailable

from serving.model.interface import Arrays, Predictions
from serving.model.release import RELEASE_FILE, PredictionError, Release, open_predictor, unwrap_prediction
from serving.protocol.oip import ServerMetadata
from serving.protocol.v2_app import Overloaded, create_v2_app

FOLDER = Path(__file__).parent
RELEASE = Release.model_validate_json((FOLDER / RELEASE_FILE).read_text())
_PAUSES_SECONDS = (0.0, 0.02, 0.1, 0.5)
NO_ACCESS_LOG = {"access": {"enabled": False}}


@bentoml.service(
    name="model",
    workers=RELEASE.scaling.replicas_max,
    traffic={"timeout": 60},
    resources={"cpu": RELEASE.engine.threads},
    # BentoML renews its connections to the model after 100 requests or 5 minutes, and with them breaks off the requests
    # that are under way there.
    runner_connection={"max_requests": sys.maxsize, "max_age": math.inf},
    logging=NO_ACCESS_LOG,
)
class Model:
    """The model, once in each worker."""

    def __init__(self) -> None:
        """Load the release that lies beside this file."""
        self._predictor = open_predictor(FOLDER)
        _freeze_objects()

    # How long it waits for others BentoML learns by itself. Its max_latency_ms is a promise: requests that it will not
    # keep it for are answered 503, so it is as long as a request may take. It has no batches of one.
    @bentoml.api(  # type: ignore[untyped-decorator]  # BentoML is not there where types are checked
        batchable=RELEASE.batching.batch_size_max > 1,
        max_batch_size=max(2, RELEASE.batching.batch_size_max),
        max_latency_ms=60_000,
    )
    async def predict_requests(self, requests: list[Any]) -> list[Any]:
        """Return the outputs of each request, or the error that it has instead: BentoML hides what is raised."""
        # What comes from another process lies in memory that can't be written to.
        owned = [{name: np.require(values, requirements="W") for name, values in each.items()} for each in requests]
        return await self._predictor.predict_requests(owned)


@bentoml.service(name=RELEASE.endpoint, traffic={"timeout": 60, "max_concurrency": 1024}, logging=NO_ACCESS_LOG)
class Endpoint:
    """The model, and the routes before it, which are mounted below."""

    model = bentoml.depends(Model)


async def predict(inputs: Arrays) -> Predictions:
    """Have the model predict the rows of one request."""
    try:
        return unwrap_prediction(await _ask_patiently(inputs))
    except ServiceUnavailable as error:
        message = f"The model must be able to take another request, got {error}. Try again in a second."
        raise Overloaded(message) from error


async def _ask_patiently(inputs: Arrays) -> Predictions | PredictionError:
    """Ask the model, and again where the connection was closed: asked twice, its answer is the same.

    The model's process closes connections that were idle for 5 s, which can't be set in BentoML, and its client goes on
    using them for 15 s: several in a row may be closed just as they are used again.
    """
    for pause in _PAUSES_SECONDS:
        try:
            return await _ask_model(inputs)
        except ClientConnectionError:
            await asyncio.sleep(pause)
    return await _ask_model(inputs)


async def _ask_model(inputs: Arrays) -> Predictions | PredictionError:
    prediction: Predictions | PredictionError
    (prediction,) = await bentoml.get_current_service().model.to_async.predict_requests([dict(inputs)])
    return prediction


async def is_ready() -> bool:
    """Whether the model's process answers."""
    return bool(await bentoml.get_current_service().model.is_ready())


def _freeze_objects() -> None:
    """Keep the objects that exist by now for ever. Collecting among them would delay requests."""
    gc.collect()
    gc.freeze()


SERVICE: Any = Endpoint
SERVICE.mount_asgi_app(
    create_v2_app(RELEASE, predict, ServerMetadata(name="bentoml", version=bentoml.__version__), ready=is_ready)
)
_freeze_objects()
