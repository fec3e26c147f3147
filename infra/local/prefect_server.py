"""A real Prefect server on sqlite, on a free loopback port.

Measured with Prefect 3.9 on two cores: ready in 8 to 10 s on a new home, of which 4 to 5 s are its 115
database migrations, and in 3 to 4 s from a template (prefect_template.py) or on a home used before. Idle, it
takes 2 % of a core, 1.4 % of it Prefect's own task queue, which asks for work four times a second and has
no setting; all loop intervals together are the other 0.6 %, so they stay as Prefect ships them.
"""

import json
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from infra.local import prefect_template
from infra.local.loopback import HOST, ask
from infra.local.ports import start_on_free_ports
from infra.local.process import Running, ServerCommand, ServerProcess, base_environment

_NOBODY_LISTENS = "http://127.0.0.1:9"
_READY_S_MAX = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefectServer(Running):
    """A running Prefect server; a context manager that stops it.

    `environment` is what a client process needs: merge it over `os.environ` before Prefect is imported.
    """

    process: ServerProcess
    home: Path
    api_url: str
    ui_url: str
    environment: Mapping[str, str]

    def stop(self) -> None:
        """Stop the server and return when it is gone. Idempotent."""
        self.process.stop()


def prefect_server(home: Path, *, services: bool = True, template_folder: Path | None = None) -> PrefectServer:
    """Start a Prefect server whose database and profiles live in `home`, and return once it answers.

    Without `services` nothing schedules, runs automations or records task runs and events; it saves 0.6 % of
    a core and no start time. With `template_folder` the migrated database is kept there, once for each
    version of Prefect, and later servers on new homes start from it. Raises ServerFailed.
    """
    home = home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    template = prefect_template.template_path(template_folder) if template_folder else None
    new_home = not (home / prefect_template.DATABASE).exists()
    if template and new_home:
        prefect_template.restore(template, home)
    process, (port,) = start_on_free_ports(1, lambda ports: _command(home, ports[0], services=services))
    with ExitStack() as undo:
        undo.callback(process.stop)
        if template and new_home:
            prefect_template.save(template, home)
        undo.pop_all()
    return PrefectServer(
        process=process,
        home=home,
        api_url=_api_url(port),
        ui_url=_ui_url(port),
        environment=_client_environment(home, port),
    )


def _command(home: Path, port: int, *, services: bool) -> ServerCommand:
    # The same program that `prefect server start --background` runs, less half a second for the CLI.
    return ServerCommand(
        argv=(
            *(sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"),
            *("--host", HOST, "--port", str(port)),
            # A client that holds a websocket open would otherwise hold the server as well.
            *("--timeout-graceful-shutdown", "3"),
        ),
        environment=_server_environment(home, port, services=services),
        # Prefect reads .env, prefect.toml and pyproject.toml from the working directory: keep it ours.
        folder=home,
        log_path=home / "server.log",
        ready=lambda: _answers_for(home, port),
        ready_s_max=_READY_S_MAX,
    )


def _server_environment(home: Path, port: int, *, services: bool) -> dict[str, str]:
    return {
        **base_environment(),
        **_quiet(home),
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home / prefect_template.DATABASE}",
        # Without it the pages of the UI would call the default port.
        "PREFECT_SERVER_UI_API_URL": _api_url(port),
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_LOGGING_COLORS": "false",
        "PREFECT__SERVER_FINAL": "1",
        # One more outgoing request has no setting: catalogues of blocks and workers from the web. A proxy
        # that refuses makes the server fall back at once to the copy that it ships.
        "HTTPS_PROXY": _NOBODY_LISTENS,
        **({} if services else {"PREFECT__SERVER_WEBSERVER_ONLY": "1"}),
    }


def _client_environment(home: Path, port: int) -> dict[str, str]:
    return {
        **_quiet(home),
        "PREFECT_API_URL": _api_url(port),
        # A client that cannot reach this server must fail, not start a hidden one of its own.
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        # A worker's health endpoint listens on every address by default.
        "PREFECT_WORKER_WEBSERVER_HOST": HOST,
    }


def _quiet(home: Path) -> dict[str, str]:
    """Return the settings that server and clients share: one home, and no word to the outside."""
    return {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # The only switch of the client's own analytics, which importing Prefect starts.
        "DO_NOT_TRACK": "1",
    }


def _answers_for(home: Path, port: int) -> bool:
    """Say whether the server on `port` is the one with this home, not another that won the port."""
    answer = ask("GET", port, "/api/admin/settings")
    return answer.ok and json.dumps(str(home), ensure_ascii=False) in answer.text


def _ui_url(port: int) -> str:
    return f"http://{HOST}:{port}"


def _api_url(port: int) -> str:
    return f"{_ui_url(port)}/api"
