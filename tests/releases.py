"""What tests put on model servers: releases of registered models, requests to them, and what must come back."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt

from serving.model.batching import BatchingConfig
from serving.model.loading import load_model
from serving.model.registry import resolve_model
from serving.model.release import Release, Scaling
from serving.protocol.oip import decode_response, encode_request
from serving.targets import Address

TOLERANCE = 1e-6
# As long as a server may take to start first, on a machine that others use too.
_TIMEOUT = 240.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Put:
    """A release and the folder of its model's files, as a host takes them."""

    release: Release
    model: Path

    def predict(self, x_NF: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the scores that the model itself gives."""
        release = self.release
        model = load_model(resolve_model(release.pin.uri), release.contract, allow_pickle=release.allow_pickle)
        with ExitStack() as stack:
            stack.enter_context(model.slot())
            return model.predict({"x": x_NF})["score"]


def release_of(
    uri: str, endpoint: str, *, batching: BatchingConfig | None = None, scaling: Scaling | None = None
) -> Put:
    """Return a release of a registered model under an endpoint's name."""
    resolved = resolve_model(uri)
    release = Release(
        endpoint=endpoint,
        pin=resolved.pin,
        contract=resolved.contract({}, {}),
        batching=batching or BatchingConfig(),
        scaling=scaling or Scaling(),
    )
    return Put(release=release, model=resolved.folder)


def rows(count: int, features: int, *, seed: int = 0) -> npt.NDArray[np.float32]:
    """Return random rows."""
    return np.random.default_rng(seed).standard_normal((count, features), dtype=np.float32)


def model_url(address: Address) -> str:
    """Return the URL of a release's model, which /ready and /infer come behind."""
    version = "" if address.version is None else f"/versions/{address.version}"
    return f"{address.url}/v2/models/{address.model}{version}"


def infer(address: Address, put: Put, x_NF: npt.NDArray[np.float32], *, binary: bool = False) -> npt.NDArray[Any]:
    """Return the scores that an endpoint gives."""
    body = encode_request(put.release.contract, {"x": x_NF}, binary=binary)
    answer = httpx.post(f"{model_url(address)}/infer", content=body.content, headers=body.headers, timeout=_TIMEOUT)
    assert answer.status_code == 200, answer.text
    length = answer.headers.get("Inference-Header-Content-Length")
    header_length = None if length is None else int(length)
    return decode_response(answer.content, put.release.contract, header_length=header_length)["score"]


def document(rows: int, features: int, **changes: Any) -> dict[str, Any]:
    """Return the JSON of a request over an input x, with some fields of that input changed."""
    x = {"name": "x", "shape": [rows, features], "datatype": "FP32", "data": [0.5] * (rows * features)}
    return {"id": "7", "inputs": [{**x, **changes}]}
