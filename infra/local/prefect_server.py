"""A real Prefect server on sqlite, on a free loopback port, and process workers of it.

Measured with Prefect 3.9 on two cores: the server is ready in 8 to 10 s on a new home, of which 4 to 5 s are its 115
database migrations, and in 3 to 4 s from a template or on a home used before. Idle it takes 2 % of a core, 1.4 % of it
Prefect's own task queue, which polls four times a second and has no setting; all loop intervals together are the other
0.6 %, so they keep Prefect's defaults. A worker polls 4 s after its start.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import sys
import tempfile
from base64 import b64encode
from collections.abc import Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from infra.local.process import (
    HOST,
    RunningServer,
    ServerCommand,
    ServerProcess,
    base_environment,
    send_request,
    start_on_free_ports,
)
from infra.worker import GRACE_S, kill_process_tree

DATABASE_FILE = "prefect.db"
_CLOSED_PORT = "http://127.0.0.1:9"
_READY_S_MAX = 120.0
_WORKER_GRACE_MARGIN_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefectServer(RunningServer):
    """A running Prefect server; a context manager that stops it.

    `environment` is what a client process needs: merge it over `os.environ` before Prefect is imported.
    """

    home: Path
    api_url: str
    ui_url: str
    environment: Mapping[str, str] = field(repr=False)


def prefect_server(
    home: Path, *, services: bool = True, template_folder: Path | None = None, auth: str | None = None
) -> PrefectServer:
    """Start a Prefect server whose database and profiles live in `home`, and return once it answers.

    With `auth`, as USER:PASSWORD, it answers no other user of this machine; clients find it in `environment`. Without
    `services` nothing schedules, runs automations or records task runs and events; that saves 0.6 % of a core and no
    start time. With `template_folder` the migrated database is kept there, once for each version of Prefect, and later
    servers on new homes start from it. Raises ServerFailed.
    """
    home = home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    template = template_path(template_folder) if template_folder else None
    new_home = not (home / DATABASE_FILE).exists()
    if template and new_home:
        restore_template(template, home)
    process, (port,) = start_on_free_ports(
        1, lambda ports: _make_server_command(home, ports[0], services=services, auth=auth)
    )
    with ExitStack() as undo:
        undo.callback(process.stop)
        if template and new_home:
            save_template(template, home)
        undo.pop_all()
    return PrefectServer(
        process=process,
        home=home,
        api_url=_api_url(port),
        ui_url=_ui_url(port),
        environment={**_client_environment(home, port), **({"PREFECT_API_AUTH_STRING": auth} if auth else {})},
    )


def _make_server_command(home: Path, port: int, *, services: bool, auth: str | None) -> ServerCommand:
    # What `prefect server start --background` runs, without half a second for the command line.
    return ServerCommand(
        argv=(
            *(sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"),
            *("--host", HOST, "--port", str(port)),
            # A client that holds a websocket open would otherwise hold the server as well.
            *("--timeout-graceful-shutdown", "3"),
        ),
        environment={
            **_server_environment(home, port, services=services),
            **({"PREFECT_SERVER_API_AUTH_STRING": auth} if auth else {}),
        },
        # Prefect reads .env, prefect.toml and pyproject.toml from the working directory: keep it ours.
        folder=home,
        log_path=home / "server.log",
        ready=lambda: _is_server_of(home, port, auth),
        ready_s_max=_READY_S_MAX,
    )


def _server_environment(home: Path, port: int, *, services: bool) -> dict[str, str]:
    return {
        **base_environment(),
        **_shared_environment(home),
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home / DATABASE_FILE}",
        # Without it the pages of the UI would call the default port.
        "PREFECT_SERVER_UI_API_URL": _api_url(port),
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_LOGGING_COLORS": "false",
        "PREFECT__SERVER_FINAL": "1",
        # One more outgoing request has no setting: catalogues of blocks and workers from the web. A proxy
        # that refuses makes the server fall back at once to the copy that it ships.
        "HTTPS_PROXY": _CLOSED_PORT,
        **({} if services else {"PREFECT__SERVER_WEBSERVER_ONLY": "1"}),
    }


def _client_environment(home: Path, port: int) -> dict[str, str]:
    return {
        **_shared_environment(home),
        "PREFECT_API_URL": _api_url(port),
        # A client that cannot reach this server must fail, not start a hidden one of its own.
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        # A worker's health endpoint listens on every address by default.
        "PREFECT_WORKER_WEBSERVER_HOST": HOST,
    }


def _shared_environment(home: Path) -> dict[str, str]:
    """Return the settings that server and clients share: one home, and no telemetry."""
    return {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # The only switch of the client's own analytics, which importing Prefect starts.
        "DO_NOT_TRACK": "1",
    }


def _is_server_of(home: Path, port: int, auth: str | None) -> bool:
    """Return whether the server on `port` is the one with this home, not another that took the port."""
    headers = {"Authorization": f"Basic {b64encode(auth.encode()).decode()}"} if auth else {}
    answer = send_request("GET", port, "/api/admin/settings", headers)
    return answer.ok and json.dumps(str(home), ensure_ascii=False) in answer.text


def _ui_url(port: int) -> str:
    return f"http://{HOST}:{port}"


def _api_url(port: int) -> str:
    return f"{_ui_url(port)}/api"


def template_path(folder: Path) -> Path:
    """Return the template of the installed version of Prefect; another version has other migrations."""
    return folder / f"prefect-{version('prefect')}.db"


def restore_template(template: Path, home: Path) -> None:
    """Give a new `home` a copy of the template, if there is one."""
    if template.exists():
        shutil.copyfile(template, home / DATABASE_FILE)


def save_template(template: Path, home: Path) -> None:
    """Make the database of a server that just became ready the template, unless there is one already.

    Atomic, so several processes may do this at once.
    """
    if template.exists():
        return
    template.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=template.parent) as scratch:
        copy = Path(scratch) / DATABASE_FILE
        # SQLite's own backup is consistent while the server uses the database.
        with closing(sqlite3.connect(home / DATABASE_FILE)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
        copy.replace(template)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefectWorker(RunningServer):
    """A running worker; a context manager that stops it once its flow runs have drained."""

    def kill(self) -> None:
        """End it and every run that it has started with SIGKILL, all at once, as when a machine vanishes."""
        with suppress(ProcessLookupError):
            kill_process_tree(self.process.pid)
        self.process.stop()


def prefect_worker(
    server: PrefectServer, pool: str, folder: Path, *, environment: Mapping[str, str] | None = None, limit: int = 1
) -> PrefectWorker:
    """Start a worker for a pool of `server`, and return once it polls for work; its log is in `folder`.

    `environment` is added to that of its flow runs. Raises ServerFailed, also where there is no such pool.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    log_path = folder / "worker.log"
    before = _file_size(log_path)
    command = ServerCommand(
        argv=(sys.executable, "-m", "infra.worker", "--pool", pool, "--name", folder.name, "--limit", str(limit)),
        environment={
            **base_environment(),
            **server.environment,
            # It polls every two seconds instead of ten.
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "PREFECT_LOGGING_COLORS": "false",
            "PYTHONUNBUFFERED": "1",
            **(environment or {}),
        },
        folder=folder,
        log_path=log_path,
        ready=lambda: (
            _file_size(log_path) > before and "started!" in log_path.read_bytes()[before:].decode(errors="replace")
        ),
        ready_s_max=_READY_S_MAX,
        grace_s=GRACE_S + _WORKER_GRACE_MARGIN_S,
    )
    return PrefectWorker(process=ServerProcess(command))


def _file_size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
