"""A real MLflow server on sqlite, on a free loopback port; it keeps the files of models and hands them out."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from infra.local.process import HOST, RunningServer, ServerCommand, base_environment, send_request, start_on_free_ports

_READY_S_MAX = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MlflowServer(RunningServer):
    """A running MLflow server; a context manager that stops it.

    `environment` is what a client process needs. What is in the folder survives a stop.
    """

    url: str
    environment: Mapping[str, str]


def mlflow_server(folder: Path, environment: Mapping[str, str] | None = None) -> MlflowServer:
    """Start an MLflow server that keeps its database and files in `folder`, and return once it answers.

    `environment` goes to it beside the few variables that servers inherit. Raises ServerFailed.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    process, (port,) = start_on_free_ports(1, lambda ports: _make_command(folder, ports[0], environment or {}))
    url = f"http://{HOST}:{port}"
    return MlflowServer(process=process, url=url, environment={"MLFLOW_TRACKING_URI": url})


def _make_command(folder: Path, port: int, given: Mapping[str, str]) -> ServerCommand:
    return ServerCommand(
        argv=(
            *(sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"),
            *("--artifacts-destination", str(folder / "artifacts")),
        ),
        environment={
            **base_environment(),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
            # Its runner of jobs, which nothing here sends, would be more processes.
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            **given,
        },
        folder=folder,
        log_path=folder / "server.log",
        ready=lambda: send_request("GET", port, "/health").text == "OK",
        ready_s_max=_READY_S_MAX,
    )
