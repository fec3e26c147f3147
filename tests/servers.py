"""Real servers that tests start, or skip where they are missing; their variables and their ports.

What starts a server is imported by the function that does, so that a test reads only the modules of its own servers.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from uv import find_uv_bin

if TYPE_CHECKING:
    from infra.local.prefect_server import PrefectServer
    from infra.local.triton import TritonServer

_tritons: list[TritonServer] = []
_LOG_LINES = 200


def triton_or_skip(folder: Path) -> TritonServer:
    """Start a real Triton below a folder, or skip; what is raised names the command that brings the wheel."""
    from infra.local.triton import triton_server

    try:
        server = triton_server(folder / "repository", folder / "server")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    _tritons.append(server)
    return server


def has_triton_crashed() -> bool:
    """Return whether the Triton that was started last has ended by a fault of its own, or does within some seconds."""
    return bool(_tritons) and _tritons[-1].has_crashed()


def read_triton_log() -> str:
    """Return the last lines that the Triton that was started last, or a model on it, has logged."""
    return "\n".join(_tritons[-1].process.log_text().splitlines()[-_LOG_LINES:]) if _tritons else ""


def python_or_skip(name: str) -> Path:
    """Return the interpreter of what infra/local/NAME.txt pins, installed where it is not there yet, or skip."""
    from infra.local.venv import RegistryUnreachable, make_venv

    try:
        return make_venv(Path(__file__).parents[1] / f"infra/local/{name}.txt", uv=find_uv_bin()) / "bin/python"
    except RegistryUnreachable as failure:
        pytest.skip(f"The packages of infra/local/{name}.txt are not here, and no registry has answered: {failure}")


@contextmanager
def use_prefect(folder: Path, template_folder: Path, *, services: bool = True) -> Generator[PrefectServer]:
    """Run a real Prefect server that this process and its children talk to; it has all log lines before it stops."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_LEVEL, temporary_settings

    from infra.local.prefect_server import prefect_server

    # The worker that sends events stays with the server that was there when it began.
    EventsWorker.drain_all(timeout=10)
    with (
        prefect_server(folder, services=services, template_folder=template_folder) as server,
        set_environment(server.environment),
        temporary_settings({PREFECT_API_URL: server.api_url, PREFECT_LOGGING_LEVEL: "CRITICAL"}),
    ):
        yield server
        APILogWorker.drain_all(timeout=10)


@contextmanager
def set_environment(variables: Mapping[str, str]) -> Generator[None]:
    """Set variables while the block runs."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


@contextmanager
def serve_http(handler: type[BaseHTTPRequestHandler]) -> Generator[int]:
    """Have a handler answer on a free port of loopback, which is yielded, while the block runs; it logs nothing."""
    handler.log_message = lambda *_: None  # type: ignore[method-assign]
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def hold_port() -> socket.socket:
    """Return a socket on a port of loopback that nobody else gets while it is open.

    Connections are refused there. On Linux a server that reuses addresses, as nearly all do, may listen there all the
    same, and again once it has ended.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held
