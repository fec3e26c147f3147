"""A model that others serve by the Open Inference Protocol: it is asked, and never deployed nor taken down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ConfigDict, ValidationError

from serving.errors import EndpointFailed, list_shortly
from serving.model.release import Release
from serving.protocol.tensors import TensorMetadata, describe_tensors
from serving.targets import Address

_TIMEOUT_SECONDS = 60.0
_PROBLEMS_SHOWN = 4


class _Tensor(BaseModel):
    # Servers add fields of their own.
    model_config = ConfigDict(extra="ignore")

    name: str
    datatype: str


class _Metadata(BaseModel):
    model_config = ConfigDict(extra="ignore")

    inputs: tuple[_Tensor, ...]
    outputs: tuple[_Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExternalHost:
    """A Host of one model that is up already.

    Args:
        url: The base URL of its server.
        model: The model's name there; None: the endpoint's.
        version: The model's version there; None: the one that the server answers by.
    """

    url: str
    model: str | None = None
    version: str | None = None

    def deploy(self, release: Release, model: Path) -> Address:  # noqa: ARG002 - the files stay here
        """Return where the model answers. Raises EndpointFailed where it is not up, or has other tensors."""
        address = Address(url=self.url, model=self.model or release.endpoint, version=self.version)
        found = self._read_metadata(address)
        inputs, outputs = describe_tensors(release.contract)
        problems = _compare("input", inputs, found.inputs) + _compare("output", outputs, found.outputs)
        if problems:
            message = (
                f"The model at {self._locate(address)} must have the tensors of {release.pin.uri}, got\n"
                f"{list_shortly(problems, _PROBLEMS_SHOWN)}\nGive the registered model that the server runs, or the "
                "target's own `model` and `version`."
            )
            raise EndpointFailed(message)
        return address

    def remove(self, release: Release) -> None:
        """Leave the model to those who run its server."""

    def _locate(self, address: Address) -> str:
        version = f"/versions/{quote(address.version, safe='')}" if address.version else ""
        return f"{self.url.rstrip('/')}/v2/models/{quote(address.model, safe='')}{version}"

    def _read_metadata(self, address: Address) -> _Metadata:
        where = self._locate(address)
        try:
            ready = httpx.get(f"{where}/ready", timeout=_TIMEOUT_SECONDS, trust_env=False)
            answer = httpx.get(where, timeout=_TIMEOUT_SECONDS, trust_env=False)
        except httpx.HTTPError as error:
            message = (
                f"A model must answer at {where}, got: {error!r}. Ask those who run its server, or correct the url."
            )
            raise EndpointFailed(message) from error
        if (code := max(ready.status_code, answer.status_code)) != HTTPStatus.OK:
            message = (
                f"The model at {where} must be ready, got status {code}. Ask those who run its server, or give the "
                "target's own `model` and `version`."
            )
            raise EndpointFailed(message)
        try:
            return _Metadata.model_validate_json(answer.content)
        except ValidationError as error:
            message = (
                f"{where} must answer with a model's metadata as the Open Inference Protocol has it, got: "
                f"{answer.text[:200]!r}. Correct the url."
            )
            raise EndpointFailed(message) from error


def _compare(kind: str, wanted: Sequence[TensorMetadata], found: Sequence[_Tensor]) -> list[str]:
    """Return what differs in names and types. Shapes are stated in many ways, and the answers are verified anyway."""
    ours, theirs = ({each.name: each.datatype for each in tensors} for tensors in (wanted, found))
    return [
        f"{kind} {name!r}: {theirs.get(name, 'none')} there, {ours.get(name, 'none')} here"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]
