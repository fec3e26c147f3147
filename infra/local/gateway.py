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
    send_request,
    start_on_free_ports,
)

_PACKAGES = ("aiohttp", "fastapi", "fastapi_offline", "httptools", "prometheus_client", "uvicorn")
_ADMIN_KEY = "OVERNIGHT_ADMIN_KEY"
_READY_S_MAX = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayServer(RunningServer):
    """A running gateway; a context manager that stops it. `admin_key` is what its client needs."""

    folder: Path
    url: str
    admin_key: str = field(repr=False)


def gateway_server(folder: Path, environment: Mapping[str, str] | None = None) -> GatewayServer:
    """Start a gateway that keeps its routes in `folder`, and return once it answers.

    Raises ServerFailed, and FileNotFoundError where a package of the extra `serve` is missing.

    `environment` goes to it beside the few variables that servers inherit, for OVERNIGHT_API_KEYS and the like.
    """
    check_packages("The gateway", _PACKAGES, "serve")
    folder = folder.resolve()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    given = dict(environment or {})
    given.setdefault(_ADMIN_KEY, secrets.token_urlsafe(32))
    process, (port,) = start_on_free_ports(1, lambda ports: _make_command(folder, ports[0], given))
    return GatewayServer(process=process, folder=folder, url=f"http://{HOST}:{port}", admin_key=given[_ADMIN_KEY])


def _make_command(folder: Path, port: int, given: Mapping[str, str]) -> ServerCommand:
    return ServerCommand(
        argv=(sys.executable, "-m", "serving.gateway", "--folder", str(folder), "--port", str(port)),
        environment={**base_environment(), **given},
        folder=folder,
        log_path=folder / "gateway.log",
        ready=lambda: (
            send_request("GET", port, "/admin/endpoints", {"Authorization": f"Bearer {given[_ADMIN_KEY]}"}).ok
        ),
        ready_s_max=_READY_S_MAX,
    )
