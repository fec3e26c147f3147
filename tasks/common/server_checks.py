"""Whether the servers that a call needs answer: asked side by side, before anything else, and within ten seconds.

MLflow's client tries for minutes, and an object store's too. A check asks once, over a connection of its own, and any
answer will do: what the answer says is for the call itself to find out. No check lists anything. MLflow and Prefect
take a second each to import, so that each is imported by the check that needs it.
"""

from __future__ import annotations

import base64
import errno
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit, urlunsplit

import httpx

from serving.errors import DestinationUnusable, OvernightError, ServerUnreachable, StorageDenied, StorageFault
from serving.machine import pause_garbage_collection
from tasks.common.names import BLOCK
from tasks.storage import LocalStorage, open_storage
from tasks.storage.s3 import s3_endpoint

_SECONDS_MAX, _ANSWER_SECONDS = 9.0, 7.0
_DATABASE_PORTS = {"postgresql": 5432, "postgres": 5432, "mysql": 3306, "mssql": 1433}
# The catalog says where such a table is.
_ICEBERG = "iceberg:"
# Why a folder takes no file, and what to do about it.
_FOLDER_PROBLEMS = {
    errno.EACCES: ("does not let this user write", "Give this user the right to write there, or choose another path"),
    errno.EPERM: ("does not let this user write", "Give this user the right to write there, or choose another path"),
    errno.EROFS: ("is on a read-only file system", "Mount it for writing, or choose another path"),
    errno.ENOSPC: ("has no space left", "Free some, or choose another path"),
}
_SQLITE = re.compile(r"sqlite(?:\+\w+)?:///(?P<path>[^?]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerCheck:
    """One question to a server.

    `ask` raises OvernightError, or OSError where the server does not answer. `server` names it in messages, and
    `advice` says what to do.
    """

    server: str
    advice: str
    ask: Callable[[], object]

    def explain(self, got: object) -> ServerUnreachable:
        """Return the error about a server that does not answer."""
        return ServerUnreachable(f"{self.server} must answer, got: {str(got).rstrip('. ')}. {self.advice}")


def check_servers(
    checks: Sequence[ServerCheck], *, seconds_max: float = _SECONDS_MAX, clock: Callable[[], float] = time.monotonic
) -> None:
    """Ask all servers at once and return when all have answered.

    Raises the error of the one that fails, within `seconds_max`; where several do, one error that names each.
    """
    found: list[OvernightError | None] = [None] * len(checks)
    threads = [
        # One that never ends must not keep the program from ending.
        threading.Thread(target=_ask, args=(check, found, at), name="check-server", daemon=True)
        for at, check in enumerate(checks)
    ]
    for thread in threads:
        thread.start()
    until = clock() + seconds_max
    for at, (thread, check) in enumerate(zip(threads, checks, strict=True)):
        thread.join(max(until - clock(), 0.0))
        if thread.is_alive():
            found[at] = check.explain(f"no answer within {seconds_max:g} s")
    errors = list({str(error): error for error in found if error is not None}.values())
    if len(errors) > 1:
        listed = "\n".join(f"  - {error}" for error in errors)
        message = f"Every server that the call needs must answer, got {len(errors)} that do not:\n{listed}"
        raise ServerUnreachable(message)
    if errors:
        raise errors[0]


def _ask(check: ServerCheck, found: list[OvernightError | None], at: int) -> None:
    try:
        check.ask()
    except OvernightError as error:
        found[at] = error
    except OSError as error:
        found[at] = check.explain(error)


def list_checks(parameters: Mapping[str, Any], *, uses_registry: bool) -> list[ServerCheck]:
    """Return the checks of a flow's parameters: of the registry, and of the stores that its addresses lie in."""
    addresses = [_list_texts(parameters.get(name)) for name in ("destination", "source")]
    # What a block names is known once it is loaded.
    has_block = str(parameters.get("model", "")).startswith(BLOCK)
    checks = _list_registry_checks() if uses_registry and not has_block else []
    for at, places in enumerate(addresses):
        checks += [check for place in places for check in _list_storage_checks(place, writes=at == 0)]
    # Many addresses lie in one store.
    return list({check.server: check for check in reversed(checks)}.values())[::-1]


def _list_texts(value: object) -> list[str]:
    values = value if isinstance(value, list | tuple) else [value]
    texts = [os.fspath(each) for each in values if isinstance(each, str | os.PathLike)]
    return [text for text in texts if not text.startswith((BLOCK, _ICEBERG))]


def list_prefect_checks() -> list[ServerCheck]:
    """Return the check of the Prefect server, none where PREFECT_API_URL names no server."""
    from prefect.client.base import ServerType, determine_server_type  # noqa: PLC0415 - see above
    from prefect.settings import PREFECT_API_URL  # noqa: PLC0415 - see above

    from tasks.common.prefect_server import is_server_named  # noqa: PLC0415 - it imports Prefect

    if not is_server_named():
        return []
    url = str(PREFECT_API_URL.value())
    check = ServerCheck(
        server=f"The Prefect server at {url}",
        advice="Start it (prefect server start), or correct PREFECT_API_URL: `prefect config view` says where it is "
        "set. Without it a call needs no server.",
        ask=lambda: _ask_prefect(url, is_cloud=determine_server_type() is ServerType.CLOUD),
    )
    return [check]


def _ask_prefect(url: str, *, is_cloud: bool) -> None:
    from prefect.settings import PREFECT_API_AUTH_STRING  # noqa: PLC0415 - Prefect is imported by now

    auth = PREFECT_API_AUTH_STRING.value()
    # Certificates are not checked here, so that no secret may be sent to a server behind TLS.
    plain = auth is not None and url.startswith("http://")
    headers: dict[str, str] = {}
    if plain:
        secret = auth.get_secret_value() if hasattr(auth, "get_secret_value") else str(auth)
        headers = {"Authorization": f"Basic {base64.b64encode(secret.encode()).decode()}"}
    status = ask_http(f"{url.rstrip('/')}/admin/version", headers)
    if is_cloud or status == HTTPStatus.OK:
        return
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        if plain or not url.startswith("https://"):
            message = (
                f"The Prefect server at {url} must take this client's password, but refused it ({status}). Set "
                "PREFECT_API_AUTH_STRING to what the server has as PREFECT_SERVER_API_AUTH_STRING."
            )
            raise ServerUnreachable(message)
    elif status == HTTPStatus.NOT_FOUND:
        message = (
            f"PREFECT_API_URL must be the address of a Prefect server's API, which ends in /api, but {url} has no such "
            "thing (404). Correct it."
        )
        raise ServerUnreachable(message)


def _list_registry_checks() -> list[ServerCheck]:
    with pause_garbage_collection():
        import mlflow  # noqa: PLC0415 - see above

    settings = {mlflow.get_tracking_uri(): "MLFLOW_TRACKING_URI", mlflow.get_registry_uri(): "MLFLOW_REGISTRY_URI"}
    settings[mlflow.get_tracking_uri()] = "MLFLOW_TRACKING_URI"
    checks = [
        ServerCheck(
            server=f"The MLflow registry at {uri}",
            advice=f"Start it, or set {setting} to the registry that has the model.",
            ask=lambda uri=uri, setting=setting: _ask_registry(uri, setting),  # type: ignore[misc]  # bound now
        )
        for uri, setting in settings.items()
    ]
    if endpoint := os.environ.get("MLFLOW_S3_ENDPOINT_URL"):
        advice = "It has MLflow's artifacts: start it, or correct MLFLOW_S3_ENDPOINT_URL."
        checks.append(ServerCheck(server=f"The store at {endpoint}", advice=advice, ask=lambda: _ask_url(endpoint)))
    return checks


def _ask_registry(uri: str, setting: str) -> None:
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        ask_http(f"{_strip_secrets(parts).rstrip('/')}/health")
    elif (port := _DATABASE_PORTS.get(parts.scheme.partition("+")[0])) and parts.hostname:
        socket.create_connection((parts.hostname, parts.port or port), _ANSWER_SECONDS).close()
    elif (found := _SQLITE.fullmatch(uri)) and not Path(found["path"]).exists() and found["path"] != ":memory:":
        message = (
            f"The MLflow registry at {uri} must exist, but there is no such file: MLflow would make an empty one. Set "
            f"{setting} to the registry that has the model, such as http://127.0.0.1:5000 or sqlite:////path/mlflow.db."
        )
        raise ServerUnreachable(message)


def _strip_secrets(parts: SplitResult) -> str:
    """Return an address without user, password and query: a check sends no secret."""
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _list_storage_checks(address: str, *, writes: bool) -> list[ServerCheck]:
    if address.startswith("s3://"):
        endpoint = s3_endpoint()
        if endpoint is not None:
            advice = "It is set by AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL: start it, or correct that."
            return [ServerCheck(server=f"The store at {endpoint}", advice=advice, ask=lambda: _ask_url(endpoint))]
    bucket = "/".join(address.split("/")[:3])
    remote = "://" in address and not address.startswith("file:")
    advice = "Check its address, and the network and the credentials of this machine."
    return [
        ServerCheck(
            server=f"The store of {bucket if remote else address}",
            advice=advice,
            ask=lambda: _ask_storage(address, writes=writes),
        )
    ]


def _ask_url(url: str) -> None:
    ask_http(_strip_secrets(urlsplit(url)))


def _ask_storage(address: str, *, writes: bool) -> None:
    """Ask a store for one object, whether there is one or not; a local folder for whether it may be written to."""
    storage = open_storage(re.split(r"[*?\[]", address)[0] if not writes else address)
    if isinstance(storage, LocalStorage):
        exists = storage.root.exists()
        if writes and (problem := _find_folder_problem(address, storage.root, exists=exists)):
            raise problem
        return
    try:
        storage.exists("_overnight/create-only.json")
    except StorageDenied:
        # A user may be allowed to read or list, and not to ask for an object that is not there.
        return
    except StorageFault as error:
        raise OSError(str(error)) from error


def _find_folder_problem(address: str, folder: Path, *, exists: bool) -> OvernightError | None:
    """Return why a folder can't be made or written to, None where it can. A file without a name is opened and closed.

    Args:
        address: The folder as the caller named it.
        folder: Its path.
        exists: Whether it is there.
    """
    nearest = folder if exists else next((above for above in folder.parents if above.exists()), Path("/"))
    if not nearest.is_dir():
        return DestinationUnusable(
            f"The destination {address} must be a folder, or one that can be made, but {nearest} is a file. Choose "
            "another path."
        )
    try:
        # Rights alone do not say it: root has all of them, and a file system may be read-only or hold no files.
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        why, advice = _FOLDER_PROBLEMS.get(
            error.errno or 0, (f"takes no new files ({os.strerror(error.errno or errno.EIO)})", "Choose another path")
        )
        must = "be accessible for writing" if exists else "be there already, or one that can be made"
        message = f"The destination {address} must {must}, but {nearest} {why}. {advice}."
        return StorageDenied(message)
    return None


def ask_http(url: str, headers: Mapping[str, str] | None = None) -> int:
    """Return the status of a server's answer, whatever it is. Raises OSError where there is none."""
    # Certificates are the affair of the client that is used later; nothing secret is sent to a server with one.
    with httpx.Client(verify=False, timeout=_ANSWER_SECONDS) as client:  # noqa: S501 - as said above
        try:
            with client.stream("GET", url, headers=dict(headers or {})) as answer:
                return answer.status_code
        except httpx.TimeoutException:
            message = f"no answer within {_ANSWER_SECONDS:g} s"
            raise TimeoutError(message) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise OSError(str(error) or type(error).__name__) from None
