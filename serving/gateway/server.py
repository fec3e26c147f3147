"""The control plane as a process: `python -m serving.gateway.server FOLDER BYTES_MAX`, which the supervisor starts."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
from pathlib import Path

import uvicorn

from serving.errors import BadInput, EndpointFailed
from serving.gateway.app import build_app
from serving.gateway.envoy.bootstrap import BootstrapOptions
from serving.gateway.gateway import Gateway
from serving.gateway.keys import Keys
from serving.gateway.store import Store
from serving.redaction import hide_secrets_in_logs

# An earlier control plane that lost its supervisor is ending.
_LOCK_S_MAX = 10.0
_DRAIN_S_MAX = 60


def run_control_plane(options: BootstrapOptions) -> None:
    """Serve the control plane on its Unix socket until SIGTERM, or until the supervisor is gone.

    Raises:
        EndpointFailed: Another gateway uses the folder, or a file can't be read.
        OSError: The folder can't be used.
    """
    with Store(options.folder, lock_s_max=_LOCK_S_MAX) as store, _listen(options.control_socket) as listening:
        gateway = Gateway(store, Keys(options.folder, os.environ), options)
        config = uvicorn.Config(
            build_app(gateway),
            http="httptools",
            access_log=False,
            log_level="warning",
            # Longer than Envoy keeps a connection idle.
            timeout_keep_alive=75,
            timeout_graceful_shutdown=_DRAIN_S_MAX,
            server_header=False,
            date_header=False,
            ws="none",
        )
        # Objects that exist now live as long as the process. Examining them again would only delay requests.
        gc.collect()
        gc.freeze()
        server = _Server(config)
        # Uvicorn drains, and then raises the signal again for the previous handler.
        signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(0))
        server.run(sockets=[listening])


class _Server(uvicorn.Server):
    """Ends as well when the supervisor closes the other end of standard input."""

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().add_reader(sys.stdin.fileno(), self._read_end)
        await super().serve(sockets)

    def _read_end(self) -> None:
        if not os.read(sys.stdin.fileno(), 1):
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
            self.should_exit = True


def _listen(path: Path) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX)
    path.unlink(missing_ok=True)
    listening.bind(str(path))
    path.chmod(0o600)
    listening.listen(2048)
    return listening


def main() -> None:
    """Run the control plane; exit with 1 and the reason where it cannot start."""
    folder, bytes_max = Path(sys.argv[1]), int(sys.argv[2])
    hide_secrets_in_logs()
    try:
        run_control_plane(BootstrapOptions(folder=folder, bytes_max=bytes_max))
    except (BadInput, EndpointFailed) as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"The gateway must be able to use {folder}, got: {error}. Grant access, or pass another --folder.")


if __name__ == "__main__":
    main()
