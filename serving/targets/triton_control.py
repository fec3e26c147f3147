"""What Triton is told, and waited for: to load a model, to unload it, to answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote

import grpc
import httpx

from serving.errors import EndpointFailed

_POLL_S = 0.02
_REASON_LENGTH_MAX = 1500


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonControl:
    """A running Triton with explicit model control. Raises EndpointFailed with its own reason."""

    url: str
    grpc: str
    wait_s_max: float

    def load(self, model: str, versions: Iterable[str] = ()) -> None:
        """Load a model as its config says now, and return once these versions answer.

        Versions that serve are loaded once more, and replaced when all have loaded; where one does not, they stay.
        """
        self._repository(model, "load")
        for version in versions:
            path = f"/v2/models/{quote(model)}/versions/{version}/ready"
            self._wait(lambda path=path: self._ask("GET", path).is_success, f"{model!r} version {version} be ready")  # type: ignore[misc]

    def unload(self, model: str) -> None:
        """Unload every version of a model; requests under way are answered. Idempotent."""
        self._repository(model, "unload")
        self._wait(lambda: not self._states(model) - {"UNAVAILABLE"}, f"{model!r} be unloaded")

    def loaded(self, model: str) -> bool:
        """Say whether any version of a model answers."""
        return "READY" in self._states(model)

    def infer(self, model: str, version: str, content: bytes) -> httpx.Response:
        """Ask a version, and return the answer as it comes."""
        return self._ask("POST", f"/v2/models/{quote(model)}/versions/{version}/infer", content)

    def _repository(self, model: str, verb: Verb) -> None:
        try:
            control(self.grpc, verb, model, timeout_s=self.wait_s_max)
        except ControlRefused as refused:
            if not refused.reached:
                raise _no_answer(self.grpc, str(refused)) from None
            message = f"Triton must {verb} {model!r}, got: {_reason(refused)}"
            raise EndpointFailed(message) from None

    def _states(self, model: str) -> set[str]:
        listed = self._ask("POST", "/v2/repository/index", b"{}").json()
        return {each["state"] for each in listed if each["name"] == model and "state" in each}

    def _wait(self, reached: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + self.wait_s_max
        while not reached():
            if time.monotonic() > deadline:
                message = f"With Triton at {self.url} must {what} within {self.wait_s_max:g} s; read its log."
                raise EndpointFailed(message)
            time.sleep(_POLL_S)

    def _ask(self, method: str, path: str, content: bytes | None = None) -> httpx.Response:
        try:
            # A proxy of the environment has no business with a server of this machine.
            with httpx.Client(base_url=self.url, timeout=self.wait_s_max, trust_env=False) as client:
                return client.request(method, path, content=content)
        except httpx.HTTPError as error:
            raise _no_answer(self.url, f"{type(error).__name__}: {error}") from None


def _no_answer(where: str, got: str) -> EndpointFailed:
    return EndpointFailed(f"Triton must answer at {where}, got {got}. Start it, or read in its log why it ended.")


def _reason(refused: ControlRefused) -> str:
    # A traceback follows the reason of a Python model.
    return str(refused).split("\n\nAt:\n")[0].strip()[:_REASON_LENGTH_MAX]


Verb = Literal["load", "unload"]

_SERVICE = "/inference.GRPCInferenceService/RepositoryModel"
# A proxy of the environment is for the way out, not for servers of our own.
_OPTIONS = (("grpc.enable_http_proxy", 0),)
# The field model_name of both requests (grpc_service.proto): number 2, of text.
_MODEL_NAME = 0x12
_LENGTH_MAX = 127


class ControlRefused(Exception):
    """Triton does not do as it is told; or there is none, where `reached` is false."""

    def __init__(self, reason: str, *, reached: bool) -> None:
        super().__init__(reason)
        self.reached = reached


def control(address: str, verb: Verb, model: str, *, timeout_s: float) -> None:
    """Load a model, or unload it, and return once that is done. Raises ControlRefused.

    A model that is loaded is loaded again from its files, and serves on until the new one is ready.
    """
    with grpc.insecure_channel(address, options=_OPTIONS) as channel:
        try:
            channel.unary_unary(_path(verb))(_message(model), timeout=timeout_s)
        except grpc.RpcError as error:
            raise _refused(error) from None


async def control_async(address: str, verb: Verb, model: str) -> None:
    """Do the same in an event loop; the caller bounds the time."""
    async with grpc.aio.insecure_channel(address, options=_OPTIONS) as channel:
        try:
            await channel.unary_unary(_path(verb))(_message(model))
        except grpc.aio.AioRpcError as error:
            raise _refused(error) from None


def _path(verb: Verb) -> str:
    return f"{_SERVICE}{verb.capitalize()}"


def _message(model: str) -> bytes:
    name = model.encode()
    if len(name) > _LENGTH_MAX:
        message = f"A model's name must have at most {_LENGTH_MAX} bytes, got {len(name)}."
        raise ControlRefused(message, reached=True)
    return bytes((_MODEL_NAME, len(name))) + name


def _refused(error: grpc.RpcError) -> ControlRefused:
    reason = str(error.details())
    # Triton, too, calls a model that does not load unavailable.
    reached = error.code() is not grpc.StatusCode.UNAVAILABLE or "failed to connect" not in reason.lower()
    return ControlRefused(reason, reached=reached)
