"""A client of the Open Inference Protocol: one model of one server, or of the gateway."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from types import TracebackType
from typing import Self
from urllib.parse import quote

import httpx
import numpy as np

from serving.errors import BadRequest, EndpointFailed
from serving.model.contract import Contract
from serving.protocol.oip import HEADER_LENGTH, decode_response, encode_request, read_header_length
from serving.targets import Address
from tasks.endpoint.resolve import Arrays

_TIMEOUT_SECONDS = 60.0
_SHOWN = 400


def infer_path(address: Address) -> str:
    """Return the path to which requests for predictions are sent."""
    version = f"/versions/{quote(address.version, safe='')}" if address.version else ""
    return f"/v2/models/{quote(address.model, safe='')}{version}/infer"


def is_ready(address: Address) -> bool:
    """Whether the server reports the model as ready."""
    url = address.url.rstrip("/") + infer_path(address).removesuffix("/infer") + "/ready"
    try:
        return httpx.get(url, timeout=_TIMEOUT_SECONDS, trust_env=False).status_code == HTTPStatus.OK
    except httpx.HTTPError:
        return False


@dataclass(slots=True)
class InferClient:
    """Asks one model for predictions; a context manager that closes its connections."""

    address: Address
    contract: Contract
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    _http: httpx.Client = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # A proxy of the environment is not meant for servers of our own.
        self._http = httpx.Client(timeout=_TIMEOUT_SECONDS, headers=dict(self.headers), trust_env=False)

    def __call__(self, inputs: Arrays) -> Arrays:
        """Return the outputs for N rows. Raises EndpointFailed with the server's own message."""
        body = encode_request(self.contract, inputs, binary=_needs_binary(inputs))
        url = self.address.url.rstrip("/") + infer_path(self.address)
        try:
            response = self._http.post(url, content=body.content, headers=body.headers)
        except httpx.HTTPError as error:
            message = f"The model server must answer at {url}, got: {error!r}. Look whether it runs, and at its log."
            raise EndpointFailed(message) from error
        if response.status_code != HTTPStatus.OK:
            message = (
                f"The model server must answer {url} with {HTTPStatus.OK}, got {response.status_code}: "
                f"{response.text[:_SHOWN]}"
            )
            raise EndpointFailed(message)
        try:
            length = read_header_length(response.headers.get(HEADER_LENGTH))
            return decode_response(response.content, self.contract, header_length=length)
        except BadRequest as error:
            message = f"The answer of {url} must match the model's contract. {error}"
            raise EndpointFailed(message) from error

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close its connections."""
        self._http.close()


def _needs_binary(inputs: Arrays) -> bool:
    """Whether JSON can't hold a value: bytes that are not text, NaN, or infinity."""
    return any(
        not np.isfinite(value).all() if value.dtype.kind == "f" else isinstance(next(value.flat, None), bytes)
        for value in inputs.values()
    )
