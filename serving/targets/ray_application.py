"""A release on Ray Serve: the Open Inference Protocol over batches of requests.

Rendered beside release.json and the model's files, and run by Ray alone.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from serving.model.batching import BatchingConfig
from serving.model.interface import Arrays, Predictions
from serving.model.release import PredictionError, open_predictor, unwrap_prediction
from serving.protocol.oip import ServerMetadata
from serving.protocol.v2_app import create_v2_app


# A model that did not load twice will not load at all.
@serve.deployment(max_constructor_retry_count=2)
@serve.ingress()
class Endpoint:
    """One replica: the model, loaded once, and the routes before it."""

    def __init__(self, folder: str, batching: BatchingConfig) -> None:
        """Load the release that the folder holds."""
        self._predictor = open_predictor(Path(folder))
        batches: Any = self._predict_each
        batches.set_max_batch_size(batching.batch_size_max)
        batches.set_batch_wait_timeout_s(batching.wait_ms_max / 1000)

    def __serve_build_asgi_app__(self) -> FastAPI:
        # The objects that exist by now are kept for ever. Collecting among them would delay requests.
        gc.collect()
        gc.freeze()
        server = ServerMetadata(name="ray_serve", version=ray.__version__)
        return create_v2_app(self._predictor.release, self._predict, server)

    def check_health(self) -> None:
        """Have Ray start another replica where this one's device is gone."""
        self._predictor.check()

    async def _predict(self, inputs: Arrays) -> Predictions:
        return unwrap_prediction(await self._predict_each(inputs))

    @serve.batch
    async def _predict_each(self, requests: Sequence[Arrays]) -> list[Predictions | PredictionError]:
        return await self._predictor.predict_requests(requests)


def application(args: dict[str, Any]) -> Application:
    """Return the application that a Serve config names; `args` there are the batching."""
    deployment: Any = Endpoint
    bound: Application = deployment.bind(str(Path(__file__).parent), BatchingConfig.model_validate(args))
    return bound
