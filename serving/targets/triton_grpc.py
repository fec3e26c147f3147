"""Have Triton load and unload models, through its gRPC door.

Its HTTP door does so too, but in the thread that serves the connection, and keeps every other connection of that thread
waiting for as long as the load takes: callers of models that serve would wait seconds.
"""

from __future__ import annotations

from typing import Literal

import grpc

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
