"""Triton: a release as a version in a model repository, and a running server that takes versions while others serve."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from serving.errors import EndpointFailed
from serving.release import MODEL_FOLDER, RELEASE_FILE, Release
from serving.targets import Address, Rendered
from serving.targets.triton_config import instances_of, with_instances, write_config
from serving.tensors import tensors
from serving.triton_control import ControlRefused, Verb, control

CONFIG_FILE = "config.pbtxt"
_MODEL_PY = Path(__file__).with_name("triton_model.py")
_POLL_S = 0.02
_REASON_LENGTH_MAX = 1500


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonTarget:
    """A release as a model repository that Triton's container takes as it is.

    Below `model`, by default the endpoint's name: config.pbtxt, and for the version model.py, release.json and the
    model's files. Triton's Python must have this package installed.
    """

    model: str | None = None

    def render(self, release: Release, model: Path) -> Rendered:
        """Return the repository of this release alone; its version is served by its number."""
        name = self.model or release.endpoint
        version = f"{name}/{release.version}"
        return Rendered(
            files={
                f"{name}/{CONFIG_FILE}": write_config(name, release, [release.version]).encode(),
                f"{version}/model.py": _MODEL_PY.read_bytes(),
                f"{version}/{RELEASE_FILE}": release.model_dump_json(indent=1).encode(),
            },
            trees={f"{version}/{MODEL_FOLDER}": model},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonHost:
    """A running Triton with explicit model control, and the repository on this machine that it reads.

    Versions of one endpoint that take the same tensors are versions of one model there; one that takes others stands
    beside it as a model of its own, and its Address says so. A version is written whole before Triton is told of it.
    Triton loads all versions of a model again before it lets go of those that serve: no request is lost, nor any kept
    waiting, since it is told through its gRPC door, at HOST:PORT. Changes to one repository wait for each other, from any
    process. Raises EndpointFailed with Triton's own reason.
    """

    repository: Path
    url: str
    grpc: str
    load_s_max: float = 300.0

    def deploy(self, release: Release, model: Path) -> Address:
        """Put a release up beside the versions that are there, or again where it is there already.

        Returns once it answers. Where Triton does not load it, the repository and what serves are as before.
        """
        with self._alone():
            name = self._model_for(release)
            folder = self.repository / name
            with _replaced(folder, release.version, TritonTarget(model=name).render(release, model)):
                others = [version for version in _releases(folder) if version != release.version]
                instances = _instances(folder)
                config = write_config(name, release, [*others, release.version], instances=instances)
                self._apply(folder, config)
                self._wait_until_ready(name, release.version)
            for other in self._models(release.endpoint):
                if other != folder and release.version in _releases(other):
                    self._drop(other, release.version)
        return Address(url=self.url, model=name, version=release.version)

    def remove(self, release: Release) -> None:
        """Take a version down and forget its files; others serve on. Idempotent."""
        with self._alone():
            for folder in self._models(release.endpoint):
                if release.version in _releases(folder):
                    self._drop(folder, release.version)

    def load(self, endpoint: str) -> None:
        """Load every version of an endpoint again, as after `unload` or where Triton was started anew."""
        with self._alone():
            for folder in self._known(endpoint):
                self._control(folder.name, "load")
                for version in _releases(folder):
                    self._wait_until_ready(folder.name, version)

    def unload(self, endpoint: str) -> None:
        """Free the memory of every version of an endpoint, and keep its files; requests under way are answered."""
        with self._alone():
            for folder in self._known(endpoint):
                self._control(folder.name, "unload")
                self._wait_until_gone(folder.name)

    def scale(self, endpoint: str, instances: int) -> None:
        """Have each version of an endpoint run that many instances; those that stay serve on."""
        with self._alone():
            for folder in self._known(endpoint):
                config = (folder / CONFIG_FILE).read_text()
                if instances_of(config) != instances:
                    self._apply(folder, with_instances(config, instances))

    def instances(self, endpoint: str) -> int:
        """Return how many instances each version of an endpoint runs while it is loaded."""
        return max(instances_of((folder / CONFIG_FILE).read_text()) for folder in self._known(endpoint))

    def endpoints(self) -> dict[str, tuple[Address, ...]]:
        """Return every endpoint in the repository, and where each of its versions answers while it is loaded."""
        found: dict[str, list[Address]] = {}
        for folder in sorted(self.repository.glob(f"*/{CONFIG_FILE}")):
            for version, release in _releases(folder.parent).items():
                address = Address(url=self.url, model=folder.parent.name, version=version)
                found.setdefault(release.endpoint, []).append(address)
        return {endpoint: tuple(addresses) for endpoint, addresses in found.items()}

    def _model_for(self, release: Release) -> str:
        """Return the model that a release is a version of: the first whose versions take the same tensors."""
        for folder in self._models(release.endpoint):
            others = [other for version, other in _releases(folder).items() if version != release.version]
            if all(tensors(other.contract) == tensors(release.contract) for other in others):
                return folder.name
        taken = (self.repository / release.endpoint / CONFIG_FILE).exists()
        return f"{release.endpoint}.v{release.version}" if taken else release.endpoint

    def _models(self, endpoint: str) -> list[Path]:
        folders = [self.repository / endpoint, *sorted(self.repository.glob(f"{endpoint}.v*"))]
        return [folder for folder in folders if (folder / CONFIG_FILE).exists()]

    def _known(self, endpoint: str) -> list[Path]:
        folders = self._models(endpoint)
        if not folders:
            message = f"The endpoint must be one of {sorted(self.endpoints())}, got {endpoint!r}; deploy it first."
            raise EndpointFailed(message)
        return folders

    def _apply(self, folder: Path, config: str) -> None:
        """Have Triton load a model under another config; put the earlier one back where it does not."""
        path = folder / CONFIG_FILE
        before = path.read_text() if path.exists() else None
        _write(path, config)
        try:
            self._control(folder.name, "load")
        except BaseException:
            if before is None:
                path.unlink()
            else:
                _write(path, before)
            raise

    def _drop(self, folder: Path, version: str) -> None:
        others = {number: release for number, release in _releases(folder).items() if number != version}
        if others:
            release = others[max(others, key=int)]
            self._apply(folder, write_config(folder.name, release, [*others], instances=_instances(folder)))
            shutil.rmtree(folder / version)
        else:
            self._control(folder.name, "unload")
            self._wait_until_gone(folder.name)
            (folder / CONFIG_FILE).unlink()
            shutil.rmtree(folder)

    def _control(self, model: str, verb: Verb) -> None:
        try:
            control(self.grpc, verb, model, timeout_s=self.load_s_max)
        except ControlRefused as refused:
            if not refused.reached:
                raise _no_answer(self.grpc, refused) from None
            message = f"Triton must {verb} {model!r}, got: {_reason(refused)}"
            raise EndpointFailed(message) from None

    def _wait_until_ready(self, model: str, version: str) -> None:
        path = f"/v2/models/{quote(model)}/versions/{version}/ready"
        self._wait(lambda: self._ask("GET", path).status_code == HTTPStatus.OK, f"{model!r} version {version} be ready")

    def _wait_until_gone(self, model: str) -> None:
        self._wait(lambda: not self._states(model) - {"UNAVAILABLE"}, f"{model!r} be unloaded")

    def _states(self, model: str) -> set[str]:
        listed = self._ask("POST", "/v2/repository/index", {}).json()
        return {each["state"] for each in listed if each["name"] == model and "state" in each}

    def _wait(self, reached: Any, what: str) -> None:
        deadline = time.monotonic() + self.load_s_max
        while not reached():
            if time.monotonic() > deadline:
                message = f"With Triton at {self.url} must {what} within {self.load_s_max:g} s; read its log."
                raise EndpointFailed(message)
            time.sleep(_POLL_S)

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> httpx.Response:
        try:
            # A proxy of the environment has no business with a server of this machine.
            with httpx.Client(base_url=self.url, timeout=self.load_s_max, trust_env=False) as client:
                return client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise _no_answer(self.url, error) from None

    @contextmanager
    def _alone(self) -> Generator[None]:
        """Wait for other changes to this repository, in this process and in others."""
        self.repository.mkdir(parents=True, exist_ok=True)
        with (self.repository / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


@contextmanager
def _replaced(folder: Path, version: str, rendered: Rendered) -> Generator[None]:
    """Put the files of a version in their place, whole; on an error what was there before comes back."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*"):
        shutil.rmtree(leftover, ignore_errors=True)
    # Triton passes over folders that are no numbers.
    staging = Path(tempfile.mkdtemp(prefix=".incoming-", dir=folder))
    place, before, new = folder / version, staging / "before", staging / "new"
    try:
        _copy(rendered, f"{folder.name}/{version}/", new)
        if place.exists():
            place.rename(before)
        new.rename(place)
        yield
    except BaseException:
        if place.exists() and not new.exists():
            shutil.rmtree(place)
        if before.exists():
            before.rename(place)
        raise
    finally:
        shutil.rmtree(staging)
        if not (folder / CONFIG_FILE).exists():
            shutil.rmtree(folder)


def _copy(rendered: Rendered, prefix: str, to: Path) -> None:
    for path, content in rendered.files.items():
        if path.startswith(prefix):
            file = to / path.removeprefix(prefix)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    for path, tree in rendered.trees.items():
        shutil.copytree(tree, to / path.removeprefix(prefix), copy_function=shutil.copyfile)


def _releases(folder: Path) -> dict[str, Release]:
    """Return the releases in a model's folder by their version, in order."""
    files = sorted(folder.glob(f"[0-9]*/{RELEASE_FILE}"), key=lambda file: int(file.parent.name))
    return {file.parent.name: Release.model_validate_json(file.read_text()) for file in files}


def _instances(folder: Path) -> int | None:
    path = folder / CONFIG_FILE
    return instances_of(path.read_text()) if path.exists() else None


def _write(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", delete=False) as file:
        file.write(text)
    Path(file.name).replace(path)


def _no_answer(where: str, error: Exception) -> EndpointFailed:
    message = (
        f"Triton must answer at {where}, got {type(error).__name__}: {error}. Start it, or read in its log why it "
        "ended."
    )
    return EndpointFailed(message)


def _reason(refused: ControlRefused) -> str:
    # A traceback follows the reason of a Python model.
    return str(refused).split("\n\nAt:\n")[0].strip()[:_REASON_LENGTH_MAX]
