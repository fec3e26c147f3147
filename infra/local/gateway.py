"""The project's own gateway as a process, on a free loopback port."""

import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from infra.local.process import (
    HOST,
    RunningServer,
    ServerCommand,
    base_environment,
    check_packages,
    start_on_free_ports,
)

_PACKAGES = ("aiohttp", "fastapi", "fastapi_offline", "httptools", "prometheus_client", "uvicorn")
_ADMIN_KEY = "OVERNIGHT_ADMIN_KEY"
_READY_S_MAX = 60.0
# Above STOP_S_MAX of its supervisor: a gateway that is killed earlier loses the requests that it still answers.
GRACE_S = 90.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayServer(RunningServer):
    """A running gateway; a context manager that stops it. `admin_key` is what its client needs."""

    folder: Path
    url: str
    admin_key: str = field(repr=False)


def gateway_server(
    folder: Path,
    environment: Mapping[str, str] | None = None,
    *,
    port: int | None = None,
    certificate: Path | None = None,
    private_key: Path | None = None,
) -> GatewayServer:
    """Start a gateway that keeps its routes in `folder`, and return once it answers.

    Args:
        folder: The gateway's folder.
        environment: What it gets beside the few variables that servers inherit, for OVERNIGHT_API_KEYS and the like.
        port: The port, None for a free one.
        certificate: A file in PEM format, with which the gateway speaks TLS.
        private_key: The private key of the certificate.

    Raises:
        ServerFailed: It does not start.
        FileNotFoundError: A package of the extra `serve` is missing.
    """
    check_packages("The gateway", _PACKAGES, "serve")
    folder = folder.resolve()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    given = dict(environment or {})
    given.setdefault(_ADMIN_KEY, secrets.token_urlsafe(32))
    tls = ("--certificate", str(certificate), "--private-key", str(private_key)) if certificate else ()
    # An earlier gateway's.
    (folder / "gateway.log").unlink(missing_ok=True)
    process, (free,) = start_on_free_ports(1, lambda ports: _make_command(folder, port or ports[0], given, tls))
    url = f"{'https' if certificate else 'http'}://{HOST}:{port or free}"
    return GatewayServer(process=process, folder=folder, url=url, admin_key=given[_ADMIN_KEY])


def _make_command(folder: Path, port: int, given: Mapping[str, str], tls: tuple[str, ...]) -> ServerCommand:
    log_path = folder / "gateway.log"

    def is_ready() -> bool:
        # What answers at the port may be an Envoy that an earlier gateway left, with the control plane of that one.
        return f":{port}/v2;" in log_path.read_text()

    return ServerCommand(
        argv=(sys.executable, "-m", "serving.gateway", "--folder", str(folder), "--port", str(port), *tls),
        environment={**base_environment(), **given},
        folder=folder,
        log_path=log_path,
        ready=is_ready,
        ready_s_max=_READY_S_MAX,
        grace_s=GRACE_S,
    )
