"""The server of a gateway: its folder, its socket, and uvicorn with the limits of connections."""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

import uvicorn

from serving.errors import EndpointFailed
from serving.gateway.app import build_app
from serving.gateway.connection import ConnectionLimits, build_protocol
from serving.gateway.gateway import Gateway
from serving.gateway.keys import Keys
from serving.gateway.store import Store

_DRAIN_S_MAX = 60
_IDLE_S_MAX = 75


def run_gateway(folder: Path, host: str, port: int, *, bytes_max: int, connections_max: int) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Args:
        folder: Where routes, digests of keys and the metering log are stored.
        host: The address to listen on.
        port: The port; 0 for any free one.
        bytes_max: Maximum bytes of all requests at once.
        connections_max: Maximum connections of clients; further ones are closed.

    Raises:
        EndpointFailed: Another gateway uses the folder, a file can't be read, or the port is taken.
        OSError: The folder can't be used.
    """
    with Store(folder) as store, _open_socket(host, port) as listening:
        keys = Keys(folder, os.environ)
        gateway = Gateway(store, keys, bytes_max=bytes_max)
        host, port = listening.getsockname()[:2]
        sys.stdout.write(f"The gateway answers at http://{host}:{port}/v2; /docs describes it to the administrator.\n")
        sys.stdout.flush()
        _serve(gateway, listening, ConnectionLimits(connections_max=connections_max))


def _open_socket(host: str, port: int) -> socket.socket:
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        message = (
            f"The gateway must be able to listen on {host}:{port}, got: {error.strerror}. Stop the server that listens "
            "there, or pass --port."
        )
        raise EndpointFailed(message) from None
    return listening


def _serve(gateway: Gateway, listening: socket.socket, limits: ConnectionLimits) -> None:
    config = uvicorn.Config(
        build_app(gateway),
        http=build_protocol(limits),
        access_log=False,
        log_level="warning",
        backlog=2048,
        timeout_keep_alive=_IDLE_S_MAX,
        timeout_graceful_shutdown=_DRAIN_S_MAX,
        server_header=False,
        date_header=False,
        ws="none",
    )
    # The objects of now stay for good. The garbage collector would delay requests by examining them.
    gc.collect()
    gc.freeze()
    # Uvicorn drains, and then raises the signal again for the previous handler.
    signal.signal(signal.SIGTERM, _exit)
    uvicorn.Server(config).run(sockets=[listening])


def _exit(_number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(0)
