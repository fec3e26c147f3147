"""Run the gateway: `python -m serving.gateway --folder F --port P`. On SIGTERM it ends after its last request.

The administrator's key comes from OVERNIGHT_ADMIN_KEY; without it F/admin.key is created, readable only by its owner.
API keys come from OVERNIGHT_API_KEYS (NAME:KEY pairs separated by spaces) and from the administrator.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence
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
from serving.redaction import hide_secrets_in_logs

_BYTES_MAX = 1 << 30
_DRAIN_S_MAX = 60
_IDLE_S_MAX = 75
_CONNECTIONS_MAX = 4096


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C; exit with 1 and the reason where the gateway cannot start."""
    parser = argparse.ArgumentParser(prog="python -m serving.gateway", description=__doc__)
    parser.add_argument(
        "--folder", type=Path, required=True, help="where routes, digests of keys and the metering log are stored"
    )
    parser.add_argument("--port", type=int, default=8080, help="0: a free port")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on; only this machine by default")
    parser.add_argument("--bytes-max", type=int, default=_BYTES_MAX, help="maximum bytes of all requests at once")
    parser.add_argument(
        "--connections-max",
        type=int,
        default=_default_connections_max(),
        help="maximum connections of clients; further ones are closed",
    )
    options = parser.parse_args(arguments)
    hide_secrets_in_logs()
    try:
        with Store(options.folder) as store, _open_socket(options.host, options.port) as listening:
            keys = Keys(options.folder, os.environ)
            gateway = Gateway(store, keys, bytes_max=options.bytes_max)
            host, port = listening.getsockname()[:2]
            sys.stdout.write(
                f"The gateway answers at http://{host}:{port}/v2; /docs describes it to the administrator.\n"
            )
            sys.stdout.flush()
            _serve(gateway, listening, ConnectionLimits(connections_max=options.connections_max))
    except EndpointFailed as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(
            f"The gateway must be able to use {options.folder}, got: {error}. Grant access, or pass another --folder."
        )


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


def _default_connections_max() -> int:
    """Return the maximum number of client connections, each of which may need a second one to a model server."""
    files_max, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _CONNECTIONS_MAX if files_max == resource.RLIM_INFINITY else min(_CONNECTIONS_MAX, files_max // 2)


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


if __name__ == "__main__":
    main()
