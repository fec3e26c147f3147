"""A Ray cluster as a host of releases, through the REST API of its dashboard."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from serving.errors import EndpointFailed
from serving.model.release import Release
from serving.targets import Address
from serving.targets.ray_rest import Application, Applications, ServeApi
from serving.targets.ray_serve import RayServe, application_name, folder_name
from serving.targets.written import remove_folder, write_folder

_POLL_SECONDS = 0.2
_ANSWER_SECONDS_MAX, _READY_SECONDS_MAX = 60.0, 10.0
_TOLD_LENGTH_MAX = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class RayServeHost:
    """A running cluster. Releases are written to `folder`, which its nodes see as the target's folder.

    `serve_url` is where its proxies answer; where Serve does not run yet, the first release starts it there. `token`
    is what a cluster with RAY_AUTH_MODE=token asks for.
    """

    dashboard_url: str
    serve_url: str
    folder: Path
    target: RayServe
    token: str | None = field(default=None, repr=False)
    ready_seconds_max: float = 180.0

    def deploy(self, release: Release, model: Path) -> Address:
        """Put a release up beside those that are there; returns once it answers.

        One that is there under the same name and version is replaced while it serves. Raises EndpointFailed with what
        Ray says, and then what was there before serves on.
        """
        name, folder = application_name(release), self.folder / folder_name(release)
        application = self.target.application(release)
        address = Address(url=f"{self.serve_url}/{name}", model=release.endpoint, version=release.version)
        with self._serve() as serve:
            before = serve.status().get(name, {}).get("deployed_app_config")
            if not folder.exists():
                write_folder(self.target.render(release, model), folder)
            try:
                self._bring_up(serve, application, address)
            except EndpointFailed:
                serve.change(lambda running: _with(running, before) if before else _without(running, name))
                if not before or before["runtime_env"] != application["runtime_env"]:
                    remove_folder(folder)
                raise
        self._sweep(name, keep=folder)
        return address

    def remove(self, release: Release) -> None:
        """Take a release down once its requests are answered; others serve on. Idempotent.

        Raises EndpointFailed where the cluster does not answer, or the release does not go.
        """
        name = application_name(release)
        with self._serve() as serve:
            for status in self._polls(serve):
                if name not in status:
                    self._sweep(name)
                    return
                if status[name]["status"] != "DELETING":
                    serve.change(lambda running: _without(running, name))
        message = f"{name} must be gone within {self.ready_seconds_max:g} s, but Ray still has it. Call again."
        raise EndpointFailed(message)

    def _bring_up(self, serve: ServeApi, application: Application, address: Address) -> None:
        name, told = application["name"], "nothing"
        serve.change(lambda running: _with(running, application))
        for status in self._polls(serve):
            ours = status.get(name, {"status": "gone"})
            told = _told(ours)
            if ours["status"] == "DEPLOY_FAILED":
                message = f"{name} must start on Ray, got {told} Mend what it says, then call again."
                raise EndpointFailed(message)
            if ours["status"] in ("gone", "DELETING"):
                # Another host's list lacked this one.
                serve.change(lambda running: _with(running, application))
            elif ours["status"] == "RUNNING" and _answers(address):
                return
        message = (
            f"{name} must answer within {self.ready_seconds_max:g} s, got {told} Give the cluster room for a replica, "
            "or raise ready_seconds_max."
        )
        raise EndpointFailed(message)

    def _polls(self, serve: ServeApi) -> Iterator[Applications]:
        """Yield what Ray says of the applications, again and again while there is time."""
        deadline = time.monotonic() + self.ready_seconds_max
        while time.monotonic() < deadline:
            yield serve.status()
            time.sleep(_POLL_SECONDS)

    def _sweep(self, name: str, keep: Path | None = None) -> None:
        """Remove the folders of an application, but the one it runs from."""
        for folder in self.folder.glob(f"{name}.*"):
            if folder != keep:
                remove_folder(folder)

    @contextmanager
    def _serve(self) -> Generator[ServeApi]:
        headers = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
        # The token is for the cluster alone, not for a proxy that the environment names.
        with httpx.Client(
            base_url=self.dashboard_url, headers=headers, timeout=_ANSWER_SECONDS_MAX, trust_env=False
        ) as client:
            yield ServeApi(client=client, serve_url=self.serve_url)


def _told(application: Application) -> str:
    """Return what Ray says of an application and its deployments, the end of it where it is long."""
    about = [application, *application.get("deployments", {}).values()]
    messages = [each["message"].strip() for each in about if each.get("message")]
    return f"{application['status']}: {' '.join(messages)[-_TOLD_LENGTH_MAX:]}"


def _answers(address: Address) -> bool:
    """Whether a release is ready to predict, which no proxy says in place of it."""
    try:
        # The token is for the dashboard alone.
        url = f"{address.url}/v2/models/{address.model}/versions/{address.version}/ready"
        answer = httpx.get(url, timeout=_READY_SECONDS_MAX, trust_env=False)
    except httpx.HTTPError:
        return False
    return answer.is_success


def _with(running: Applications, application: Application) -> Applications:
    return running | {application["name"]: application}


def _without(running: Applications, name: str) -> Applications:
    return {other: application for other, application in running.items() if other != name}
