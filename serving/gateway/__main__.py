"""Run the gateway: `python -m serving.gateway --folder F --port P`. It ends on SIGTERM, when its requests are through.

The administrator's key comes from OVERNIGHT_ADMIN_KEY, else F/admin.key is made, readable by its owner alone; API keys
from OVERNIGHT_API_KEYS (NAME:KEY pairs between spaces) and from the administrator.
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
from serving.gateway.app import application
from serving.gateway.connection import ConnectionLimits, bounded_protocol
from serving.gateway.gateway import Gateway
from serving.gateway.keys import Keys
from serving.gateway.store import Store
from serving.redaction import hide_secrets_in_logs

_BYTES_MAX = 1 << 30
_DRAIN_S_MAX = 60
_IDLE_S_MAX = 75
_CONNECTIONS_MAX = 4096


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C; exit with 1 and the reason where that can't begin."""
    parser = argparse.ArgumentParser(prog="python -m serving.gateway", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where routes, digests of keys and the log are kept")
    parser.add_argument("--port", type=int, default=8080, help="0: one that is free")
    parser.add_argument("--host", default="127.0.0.1", help="another address opens the gateway to other machines")
    parser.add_argument("--bytes-max", type=int, default=_BYTES_MAX, help="bytes of all requests held at once")
    parser.add_argument(
        "--connections-max",
        type=int,
        default=_connections_max(),
        help="connections of clients at once; more are closed as they come",
    )
    options = parser.parse_args(arguments)
    hide_secrets_in_logs()
    try:
        with Store(options.folder) as store, _listen(options.host, options.port) as listening:
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
        sys.exit(f"The gateway must have {options.folder}, got: {error}. Give it access, or pass another --folder.")


def _listen(host: str, port: int) -> socket.socket:
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        got = error.strerror
        message = f"The gateway must have {host}:{port} to itself, got: {got}. Stop what listens there, or pass --port."
        raise EndpointFailed(message) from None
    return listening


def _connections_max() -> int:
    """Return how many connections of clients there may be, where each may need a second one to a server."""
    files_max, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _CONNECTIONS_MAX if files_max == resource.RLIM_INFINITY else min(_CONNECTIONS_MAX, files_max // 2)


def _serve(gateway: Gateway, listening: socket.socket, limits: ConnectionLimits) -> None:
    config = uvicorn.Config(
        application(gateway),
        http=bounded_protocol(limits),
        access_log=False,
        log_level="warning",
        backlog=2048,
        timeout_keep_alive=_IDLE_S_MAX,
        timeout_graceful_shutdown=_DRAIN_S_MAX,
        server_header=False,
        date_header=False,
        ws="none",
    )
    # What is there by now stays. Looking through it again and again would hold up requests.
    gc.collect()
    gc.freeze()
    # Uvicorn drains, and then raises the signal again for whoever handled it before.
    signal.signal(signal.SIGTERM, _exit)
    uvicorn.Server(config).run(sockets=[listening])


def _exit(_number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(0)


if __name__ == "__main__":
    main()
