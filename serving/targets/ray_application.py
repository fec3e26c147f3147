"""A release or a graph on Ray Serve: the Open Inference Protocol over batches of requests.

Rendered beside release.json and the model's files, or those of each step of a graph, and run by Ray alone.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from serving.model.batching import BatchingConfig
from serving.model.graph import AnyRelease, Graph, average_outputs, pass_on, read_release
from serving.model.interface import Arrays, Predictions
from serving.model.release import PredictionError, open_predictor, unwrap_prediction
from serving.protocol.oip import ServerMetadata
from serving.protocol.v2_app import Predict, create_v2_app


class _Replica:
    """The model, loaded once, and its batches of requests."""

    def __init__(self, folder: str, batching: BatchingConfig) -> None:
        """Load the release that the folder holds."""
        self._predictor = open_predictor(Path(folder))
        batches: Any = self._predict_each
        batches.set_max_batch_size(batching.batch_size_max)
        batches.set_batch_wait_timeout_s(batching.wait_ms_max / 1000)

    def check_health(self) -> None:
        """Have Ray start another replica where this one's device is gone."""
        self._predictor.check()

    @serve.batch
    async def _predict_each(self, requests: Sequence[Arrays]) -> list[Predictions | PredictionError]:
        return await self._predictor.predict_requests(requests)


# A model that did not load twice will not load at all.
@serve.deployment(max_constructor_retry_count=2)
@serve.ingress()
class Endpoint(_Replica):
    """One replica of a release, and the routes before it."""

    def __serve_build_asgi_app__(self) -> FastAPI:
        return _create_app(self._predictor.release, self._predict)

    async def _predict(self, inputs: Arrays) -> Predictions:
        return unwrap_prediction(await self._predict_each(inputs))


@serve.deployment(max_constructor_retry_count=2)
class Step(_Replica):
    """One replica of a step of a graph."""

    async def predict(self, inputs: Arrays) -> Predictions | PredictionError:
        """Return the outputs for the rows of one request, or the error that it has instead."""
        # What comes from another process lies in memory that can't be written to.
        owned = {name: values if values.flags.writeable else values.copy() for name, values in inputs.items()}
        return await self._predict_each(owned)


@serve.deployment
@serve.ingress()
class Composition:
    """The routes of a graph, before the deployments of its steps."""

    def __init__(self, folder: str, *steps: DeploymentHandle[Any]) -> None:
        """Read the graph that the folder holds; each step answers by its handle."""
        graph = read_release(Path(folder))
        assert isinstance(graph, Graph), "the application asked"  # noqa: S101 - our own mistake
        self._graph, self._steps = graph, steps

    def __serve_build_asgi_app__(self) -> FastAPI:
        return _create_app(self._graph, self._predict)

    async def _predict(self, inputs: Arrays) -> Predictions:
        if self._graph.combine == "mean":
            answers = await asyncio.gather(*(_ask(step, inputs) for step in self._steps))
            return average_outputs(answers, self._graph.contract)
        first, *others = self._steps
        outputs = await _ask(first, inputs)
        for step, release in zip(others, self._graph.steps[1:], strict=True):
            outputs = await _ask(step, pass_on(outputs, release.contract))
        return outputs


async def _ask(step: DeploymentHandle[Any], inputs: Arrays) -> Predictions:
    return unwrap_prediction(await step.predict.remote(inputs))


def _create_app(release: AnyRelease, predict: Predict) -> FastAPI:
    # The objects that exist by now are kept for ever. Collecting among them would delay requests.
    gc.collect()
    gc.freeze()
    return create_v2_app(release, predict, ServerMetadata(name="ray_serve", version=ray.__version__))


def application(args: dict[str, Any]) -> Application:
    """Return the application that a Serve config names; `args` there are the batching of a release."""
    folder = Path(__file__).parent
    release = read_release(folder)
    deployment: Any = Endpoint
    if isinstance(release, Graph):
        return _compose(folder, release)
    bound: Application = deployment.bind(str(folder), BatchingConfig.model_validate(args))
    return bound


def _compose(folder: Path, graph: Graph) -> Application:
    """Return the composition of the deployments of a graph's steps, which the folder holds by their numbers."""
    # For a type checker the decorated classes are classes still.
    step: Any = Step
    composition: Any = Composition
    steps = [
        step.options(name=f"Step{number}").bind(str(folder / str(number)), release.batching)
        for number, release in enumerate(graph.steps, start=1)
    ]
    bound: Application = composition.bind(str(folder), *steps)
    return bound
