"""Run the gateway: `python -m serving.gateway --folder F --port P`. On SIGTERM it ends after its last request.

The administrator's key comes from OVERNIGHT_ADMIN_KEY; without it F/admin.key is created, readable only by its owner.
API keys come from OVERNIGHT_API_KEYS (NAME:KEY pairs separated by spaces) and from the administrator.
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

from serving.errors import BadInput, EndpointFailed
from serving.extras import import_extra
from serving.gateway.envoy.bootstrap import BootstrapOptions
from serving.gateway.supervisor import run_gateway
from serving.machine import count_cores
from serving.redaction import hide_secrets_in_logs

_BYTES_MAX = 1 << 30
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
    # The model servers need the other half of the cores.
    parser.add_argument("--threads", type=int, default=max(1, count_cores() // 2), help="threads of Envoy")
    parser.add_argument("--certificate", type=Path, help="a file in PEM format: the gateway speaks TLS")
    parser.add_argument("--private-key", type=Path, help="its private key, a file in PEM format")
    given = parser.parse_args(arguments)
    if (given.certificate is None) != (given.private_key is None):
        parser.error("--certificate and --private-key must be given together, got one of them.")
    hide_secrets_in_logs()
    options = BootstrapOptions(
        folder=given.folder.resolve(),
        host=given.host,
        port=given.port,
        bytes_max=given.bytes_max,
        connections_max=given.connections_max,
        certificate=given.certificate and given.certificate.resolve(),
        private_key=given.private_key and given.private_key.resolve(),
    )
    try:
        import_extra("serving.gateway.server", "serve")
        run_gateway(options, threads=given.threads)
    except (BadInput, EndpointFailed) as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(
            f"The gateway must be able to use {given.folder}, got: {error}. Grant access, or pass another --folder."
        )


def _default_connections_max() -> int:
    """Return the maximum number of client connections, each of which may need a second one to a model server."""
    files_max, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _CONNECTIONS_MAX if files_max == resource.RLIM_INFINITY else min(_CONNECTIONS_MAX, files_max // 2)


if __name__ == "__main__":
    main()
