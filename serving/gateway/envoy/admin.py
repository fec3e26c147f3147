"""The administration interface of a running Envoy, on its Unix socket: statistics, draining, reopened logs."""

from __future__ import annotations

import socket
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import quote

_TIMEOUT_S = 5.0


class EnvoyGone(Exception):
    """Envoy does not answer: it is not running, or is being started."""


class EnvoyAdmin:
    """A client of Envoy's administration interface. Every method raises EnvoyGone where Envoy does not answer."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read_statistics(self, pattern: str) -> dict[str, int]:
        """Return the counters and gauges whose names match a regular expression."""
        text = self._send("GET", f"/stats?filter={quote(pattern, safe='')}")
        pairs = (line.rpartition(": ") for line in text.splitlines())
        return {name: int(value) for name, _, value in pairs if value.isdecimal()}

    def is_ready(self) -> bool:
        """Return whether Envoy accepts requests; False where it does not answer."""
        try:
            return self._send("GET", "/ready").strip() == "LIVE"
        except EnvoyGone:
            return False

    def reopen_logs(self) -> None:
        """Have Envoy open its log files by their names again, after they were renamed."""
        self._send("POST", "/reopen_logs")

    def drain_listeners(self) -> None:
        """Have Envoy accept no more connections, and close each that is open with its next answer."""
        # The listeners close first: a client whose connection is closed must not find one, and be lost in its queue.
        self._send("POST", "/drain_listeners")
        # An Envoy that calls itself unhealthy closes a connection once it has answered a request there.
        self._send("POST", "/healthcheck/fail")

    def _send(self, method: str, path: str) -> str:
        connection = _UnixConnection(self._path)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            return response.read().decode()
        except (OSError, HTTPException) as error:
            raise EnvoyGone(str(error)) from None
        finally:
            connection.close()


class _UnixConnection(HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("envoy", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))
