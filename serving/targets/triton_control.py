"""Model control of a running Triton: load a model, unload it, wait until it answers.

Loads go through Triton's gRPC port. Its HTTP port loads models too, but in the thread that serves the connection, and
every other connection of that thread waits for as long as the load takes: callers of other models would wait seconds.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from urllib.parse import quote

import grpc
import httpx

from serving.errors import EndpointFailed

Verb = Literal["load", "unload"]

_POLL_S = 0.02
# How long an unload waits for the end of a model that takes no requests any more.
_END_S_MAX = 10.0
_REASON_LENGTH_MAX = 1500
_SERVICE = "/inference.GRPCInferenceService/RepositoryModel"
# A proxy of the environment is for the way out, not for servers of our own.
_OPTIONS = (("grpc.enable_http_proxy", 0),)
# The field model_name of both requests (grpc_service.proto): number 2, of text.
_MODEL_NAME = 0x12
# An entry of the field parameters, number 3: {"unload_dependents": true}.
_UNLOAD_DEPENDENTS = b"\x1a\x17\x0a\x11unload_dependents\x12\x02\x08\x01"
_LENGTH_MAX = 127
# What Triton says of a process of a Python model that is gone: when it loads the model, and to each request later.
DEAD_PROCESS = "is not healthy"
# How long a load waits before each further attempt. What stopped a process, as a machine too busy to run it, may last.
RETRY_WAITS_S = (1.0, 5.0, 15.0)
_log = logging.getLogger(__name__)


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
        self._control(model, "load")
        for version in versions:
            self._wait_until(partial(self._is_ready, model, version), f"{model!r} version {version} be ready")

    def unload(self, model: str) -> None:
        """Unload every version of a model, and the steps of a graph; requests under way are answered. Idempotent.

        Returns once it has ended, and ten seconds after it takes no more requests at the latest: Triton never ends a
        model of which a process has died after a request to it.
        """
        self._control(model, "unload")
        self._wait_until(lambda: not self.is_loaded(model), f"{model!r} be unloaded")
        deadline = time.monotonic() + _END_S_MAX
        while self._read_states(model) - {"UNAVAILABLE"}:
            if time.monotonic() > deadline:
                _log.warning(
                    "Triton at %s must have ended %r, but still does after %g s: a process of it has died, or a "
                    "request takes longer. Its memory is free once Triton is started again.",
                    *(self.url, model, _END_S_MAX),
                )
                return
            time.sleep(_POLL_S)

    def is_loaded(self, model: str) -> bool:
        """Whether any version of a model answers."""
        return "READY" in self._read_states(model)

    def read_config(self, model: str) -> dict[str, Any]:
        """Return the config that a model is served with."""
        config: dict[str, Any] = self._request("GET", f"/v2/models/{quote(model)}/config").json()
        return config

    def infer(self, model: str, version: str, content: bytes) -> httpx.Response:
        """Ask a version for predictions, and return the HTTP response whatever its status."""
        return self._request("POST", f"/v2/models/{quote(model)}/versions/{version}/infer", content)

    def _is_ready(self, model: str, version: str) -> bool:
        return self._request("GET", f"/v2/models/{quote(model)}/versions/{version}/ready").is_success

    def _control(self, model: str, verb: Verb) -> None:
        try:
            control_model(self.grpc, verb, model, timeout_s=self.wait_s_max)
        except ControlRefused as refused:
            if not refused.reached:
                raise _make_unreachable_error(self.grpc, str(refused)) from None
            # A traceback follows the reason of a Python model.
            reason = str(refused).split("\n\nAt:\n")[0].strip()[:_REASON_LENGTH_MAX]
            message = f"Triton must {verb} {model!r}, got: {reason}"
            raise EndpointFailed(message) from None

    def _read_states(self, model: str) -> set[str]:
        listed = self._request("POST", "/v2/repository/index", b"{}").json()
        return {each["state"] for each in listed if each["name"] == model and "state" in each}

    def _wait_until(self, reached: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + self.wait_s_max
        while not reached():
            if time.monotonic() > deadline:
                message = f"With Triton at {self.url} must {what} within {self.wait_s_max:g} s; read its log."
                raise EndpointFailed(message)
            time.sleep(_POLL_S)

    def _request(self, method: str, path: str, content: bytes | None = None) -> httpx.Response:
        try:
            # A proxy of the environment is not meant for servers of this machine.
            with httpx.Client(base_url=self.url, timeout=self.wait_s_max, trust_env=False) as client:
                return client.request(method, path, content=content)
        except httpx.HTTPError as error:
            raise _make_unreachable_error(self.url, f"{type(error).__name__}: {error}") from None


def _make_unreachable_error(where: str, got: str) -> EndpointFailed:
    return EndpointFailed(f"Triton must answer at {where}, got {got}. Start it, or read in its log why it ended.")


class ControlRefused(Exception):
    """Triton refuses a load or an unload; or does not answer, where `reached` is false."""

    def __init__(self, reason: str, *, reached: bool) -> None:
        super().__init__(reason)
        self.reached = reached


def control_model(
    address: str, verb: Verb, model: str, *, timeout_s: float, waits_s: Sequence[float] = RETRY_WAITS_S
) -> None:
    """Load a model, or unload it, and return once that is done. Raises ControlRefused.

    A model that is loaded is loaded again from its files, and serves on until the new one is ready. With a graph its
    steps are loaded and unloaded. A load during which a process of the model dies is tried again after each of the
    waits; the steps of a graph that have loaded by then are kept.
    """
    with grpc.insecure_channel(address, options=_OPTIONS) as channel:
        call = channel.unary_unary(_method_path(verb))
        for attempt in itertools.count():
            try:
                call(_encode_request(verb, model), timeout=timeout_s)
            except grpc.RpcError as error:
                time.sleep(_choose_wait(_make_refusal(error), model, attempt, waits_s))
            else:
                return


async def control_model_async(address: str, verb: Verb, model: str) -> None:
    """Do the same as `control_model`, in an event loop. The caller bounds the time."""
    async with grpc.aio.insecure_channel(address, options=_OPTIONS) as channel:
        call = channel.unary_unary(_method_path(verb))
        for attempt in itertools.count():
            try:
                await call(_encode_request(verb, model))
            except grpc.aio.AioRpcError as error:
                await asyncio.sleep(_choose_wait(_make_refusal(error), model, attempt, RETRY_WAITS_S))
            else:
                return


def _choose_wait(refused: ControlRefused, model: str, attempt: int, waits_s: Sequence[float]) -> float:
    """Return the seconds to wait until a model is loaded again, or raise the refusal where it is final.

    A process may die by a signal in Triton's own code, before it has read the model; the next one then starts.
    """
    if DEAD_PROCESS not in str(refused) or attempt == len(waits_s):
        raise refused
    wait_s = waits_s[attempt]
    _log.warning(
        "%s: a process died while it started; loaded again in %g s (%d of %d)",
        *(model, wait_s, attempt + 1, len(waits_s)),
    )
    return wait_s


def _method_path(verb: Verb) -> str:
    return f"{_SERVICE}{verb.capitalize()}"


def _encode_request(verb: Verb, model: str) -> bytes:
    name = model.encode()
    if len(name) > _LENGTH_MAX:
        message = f"A model's name must have at most {_LENGTH_MAX} bytes, got {len(name)}."
        raise ControlRefused(message, reached=True)
    # Triton loads the steps of a graph together with it, and unloads them where it is told to.
    return bytes((_MODEL_NAME, len(name))) + name + (_UNLOAD_DEPENDENTS if verb == "unload" else b"")


def _make_refusal(error: grpc.RpcError) -> ControlRefused:
    reason = str(error.details())
    # Triton, too, calls a model that does not load unavailable.
    reached = error.code() is not grpc.StatusCode.UNAVAILABLE or "failed to connect" not in reason.lower()
    return ControlRefused(reason, reached=reached)
