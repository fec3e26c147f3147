"""Values that the tests of endpoints share: contracts, routes, specs and samples made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np

from serving.gateway.route import Route, ServedVersion
from serving.model.contract import Contract
from tasks.endpoint.resolve import LoadedModel, Sample
from tasks.endpoint.spec import EndpointSpec
from tests.serving.toys import matrix

X = np.random.default_rng(1).standard_normal((8, 4)).astype(np.float32)


def served(version: str, weight: float = 0.0) -> ServedVersion:
    return ServedVersion(version=version, url="http://127.0.0.1:1", upstream_model="churn", weight=weight)


def route(*versions: ServedVersion, contract: Contract | None = None, **changes: Any) -> Route:
    return Route(versions=versions, contract=contract or matrix(4), **changes)


def spec(**changes: Any) -> EndpointSpec:
    return EndpointSpec.model_validate({"name": "churn", "model": "models:/churn/2", **changes})


def sample(score_N: np.ndarray | None = None) -> Sample:
    answer = X.sum(axis=1) if score_N is None else score_N
    return Sample(inputs={"x": X}, outputs={"score": answer.astype(np.float32)}, rows=len(X))


def loaded(**changes: Any) -> LoadedModel:
    given = {"resolved": None, "contract": matrix(4), "model": None, "example": None, "random": sample()}
    return LoadedModel(**{**given, **changes})
