"""Azurite, Microsoft's own emulator of Azure Blob Storage, as a real server on a free loopback port."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path

from infra.local.process import HOST, RunningServer, ServerCommand, base_environment, send_request, start_on_free_ports

ACCOUNT = "overnight"
_VERSION = "2021-08-06"


@dataclass(frozen=True, slots=True, kw_only=True)
class AzuriteServer(RunningServer):
    """A running Azurite; a context manager that stops it. `environment` is what obstore needs to act as its owner."""

    port: int
    key: str = field(repr=False)

    @property
    def endpoint(self) -> str:
        """The address of the account."""
        return f"http://{HOST}:{self.port}/{ACCOUNT}"

    @property
    def environment(self) -> Mapping[str, str]:
        """The account, its key and the endpoint."""
        return {
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": self.key,
            "AZURE_STORAGE_ENDPOINT": self.endpoint,
        }

    def create_container(self, name: str) -> None:
        """Create a container."""
        _send_signed("PUT", self.port, f"/{name}", "restype:container", "?restype=container", self.key)


def azurite_server(folder: Path) -> AzuriteServer:
    """Start Azurite with its files below a folder. Raises FileNotFoundError where the program is missing."""
    program = shutil.which("azurite-blob")
    if program is None:
        message = "The `azurite-blob` program must be on PATH, found none; run `npm install -g azurite`."
        raise FileNotFoundError(message)
    key = base64.b64encode(secrets.token_bytes(64)).decode()
    folder.mkdir(parents=True, exist_ok=True)

    def command(ports: tuple[int, ...]) -> ServerCommand:
        (port,) = ports
        return ServerCommand(
            argv=(
                *(program, "--blobHost", HOST, "--blobPort", str(port), "--location", str(folder / "data")),
                *("--silent", "--skipApiVersionCheck", "--disableTelemetry"),
            ),
            environment={**base_environment(), "AZURITE_ACCOUNTS": f"{ACCOUNT}:{key}"},
            folder=folder,
            log_path=folder / "azurite.log",
            ready=lambda: _send_signed("GET", port, "/", "comp:list", "?comp=list", key),
        )

    process, ports = start_on_free_ports(1, lambda ports: command(tuple(ports)))
    return AzuriteServer(process=process, port=ports[0], key=key)


def _send_signed(method: str, port: int, path: str, resource: str, query: str, key: str) -> bool:
    """Send a request that is signed as the documentation of Shared Key says; return whether it was taken."""
    date = formatdate(usegmt=True)
    headers = f"x-ms-date:{date}\nx-ms-version:{_VERSION}\n"
    signed = f"{method}\n\n\n\n\n\n\n\n\n\n\n\n{headers}/{ACCOUNT}/{ACCOUNT}{path}\n{resource}"
    digest = hmac.new(base64.b64decode(key), signed.encode(), hashlib.sha256).digest()
    told = {
        "x-ms-date": date,
        "x-ms-version": _VERSION,
        "Authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}",
    }
    return send_request(method, port, f"/{ACCOUNT}{path}{query}", told).ok
