"""Triton: a release as a version in a model repository, and a running server that takes versions while others serve."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from serving.errors import EndpointFailed
from serving.model.release import MODEL_FOLDER, RELEASE_FILE, Release
from serving.protocol.oip import encode_request
from serving.protocol.tensors import describe_tensors
from serving.targets import Address, ReleaseFiles
from serving.targets.triton_control import TritonControl
from serving.targets.triton_repository import (
    CONFIG_FILE,
    parse_instances,
    read_releases,
    render_config,
    replace_file,
    replace_version,
    set_instances,
)

_MODEL_FILE = "model.py"
_MODEL_PY = Path(__file__).with_name("triton_model.py")
# What Triton answers for an instance whose process is gone, from then on.
_DEAD_INSTANCE = "is not healthy"


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonTarget:
    """A release as a model repository that Triton's container takes as it is.

    Below `model`, by default the endpoint's name: config.pbtxt, and for the version model.py, release.json and the
    model's files. Triton's Python must have this package installed.
    """

    model: str | None = None

    def render(self, release: Release, model: Path) -> ReleaseFiles:
        """Return the repository of this release alone; its version is served by its number."""
        name = self.model or release.endpoint
        version = f"{name}/{release.version}"
        return ReleaseFiles(
            files={
                f"{name}/{CONFIG_FILE}": render_config(name, release, [release.version]).encode(),
                f"{version}/{_MODEL_FILE}": _MODEL_PY.read_bytes(),
                f"{version}/{RELEASE_FILE}": release.model_dump_json(indent=1).encode(),
            },
            trees={f"{version}/{MODEL_FOLDER}": model},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonHost:
    """A running Triton with explicit model control, and the repository on this machine that it reads.

    Versions of one endpoint that take the same tensors are versions of one model there; one that takes others is
    a model of its own beside it, as its Address says. A version is written whole before Triton loads it.
    Triton loads all versions of a model again before it lets go of those that serve: no request is lost, and none
    waits for that, since loads go through its gRPC port, at HOST:PORT. Changes to one repository wait for each other,
    from any process. Raises EndpointFailed with Triton's own reason.
    """

    repository: Path
    url: str
    grpc: str
    load_s_max: float = 300.0

    def deploy(self, release: Release, model: Path) -> Address:
        """Put a release up beside the versions that are there, or again where it is there already.

        Returns once it answers. Where Triton does not load it, the repository and what serves are as before.
        """
        with self._lock_repository():
            name = self._choose_model(release)
            folder = self.repository / name
            with replace_version(folder, release.version, TritonTarget(model=name).render(release, model)):
                versions = {*read_releases(folder), release.version}
                self._load_with_config(
                    folder, render_config(name, release, versions, instances=_read_instances(folder))
                )
            for other in self._list_models(release.endpoint):
                if other != folder and release.version in read_releases(other):
                    self._remove_version(other, release.version)
        return Address(url=self.url, model=name, version=release.version)

    def remove(self, release: Release) -> None:
        """Take a version down and forget its files; others serve on. Idempotent."""
        with self._lock_repository():
            for folder in self._list_models(release.endpoint):
                if release.version in read_releases(folder):
                    self._remove_version(folder, release.version)

    def load(self, endpoint: str) -> None:
        """Load every version of an endpoint, as after `unload`, or where Triton was restarted."""
        with self._lock_repository():
            for folder in self._find_models(endpoint):
                self._control.load(folder.name, read_releases(folder))

    def unload(self, endpoint: str) -> None:
        """Free the memory of every version of an endpoint, and keep its files; requests under way are answered."""
        with self._lock_repository():
            for folder in self._find_models(endpoint):
                self._control.unload(folder.name)

    def restart_dead_instances(self, endpoint: str) -> bool:
        """Load an endpoint again where one of its instances has died, which Triton does not restart by itself.

        Asks each version for one row of zeros as often as reaches every instance, and returns whether one was dead.
        """
        dead = [folder for folder in self._find_models(endpoint) if self._has_dead_instance(folder)]
        with self._lock_repository():
            for folder in dead:
                releases = read_releases(folder)
                for version in releases:
                    # Triton keeps the instances that it has, dead ones too, unless the model itself is newer.
                    (folder / version / _MODEL_FILE).touch()
                self._control.load(folder.name, releases)
        return bool(dead)

    def scale(self, endpoint: str, instances: int) -> None:
        """Set how many instances each version of an endpoint runs; those that stay serve on."""
        with self._lock_repository():
            for folder in self._find_models(endpoint):
                before = (folder / CONFIG_FILE).read_text()
                config = set_instances(before, instances)
                if config != before and self._control.is_loaded(folder.name):
                    self._load_with_config(folder, config)
                elif config != before:
                    # The next load reads it.
                    replace_file(folder / CONFIG_FILE, config)

    def count_instances(self, endpoint: str) -> int:
        """Return how many instances each version of an endpoint runs while it is loaded."""
        return max(parse_instances((folder / CONFIG_FILE).read_text()) for folder in self._find_models(endpoint))

    def list_endpoints(self) -> dict[str, tuple[Address, ...]]:
        """Return every endpoint in the repository, and where each of its versions answers while it is loaded."""
        found: dict[str, list[Address]] = {}
        for model, release in self._iterate_releases():
            address = Address(url=self.url, model=model, version=release.version)
            found.setdefault(release.endpoint, []).append(address)
        return {endpoint: tuple(addresses) for endpoint, addresses in found.items()}

    def find_newest_releases(self) -> dict[str, Release]:
        """Return the newest release of every endpoint in the repository."""
        releases = sorted((release for _, release in self._iterate_releases()), key=lambda each: int(each.version))
        return {release.endpoint: release for release in releases}

    def _iterate_releases(self) -> Iterator[tuple[str, Release]]:
        """Yield every release in the repository, with the model that it is a version of."""
        for config in sorted(self.repository.glob(f"*/{CONFIG_FILE}")):
            for release in read_releases(config.parent).values():
                yield config.parent.name, release

    @property
    def _control(self) -> TritonControl:
        return TritonControl(url=self.url, grpc=self.grpc, wait_s_max=self.load_s_max)

    def _choose_model(self, release: Release) -> str:
        """Return the model that a release is a version of: the first whose versions take the same tensors."""
        for folder in self._list_models(release.endpoint):
            others = [other for version, other in read_releases(folder).items() if version != release.version]
            if all(describe_tensors(other.contract) == describe_tensors(release.contract) for other in others):
                return folder.name
        taken = (self.repository / release.endpoint / CONFIG_FILE).exists()
        return f"{release.endpoint}.v{release.version}" if taken else release.endpoint

    def _list_models(self, endpoint: str) -> list[Path]:
        folders = [self.repository / endpoint, *sorted(self.repository.glob(f"{endpoint}.v*"))]
        return [folder for folder in folders if (folder / CONFIG_FILE).exists()]

    def _find_models(self, endpoint: str) -> list[Path]:
        folders = self._list_models(endpoint)
        if not folders:
            message = f"The endpoint must be one of {sorted(self.list_endpoints())}, got {endpoint!r}; deploy it first."
            raise EndpointFailed(message)
        return folders

    def _load_with_config(self, folder: Path, config: str) -> None:
        """Have Triton load a model under another config; put the earlier one back where it does not."""
        path = folder / CONFIG_FILE
        before = path.read_text() if path.exists() else None
        replace_file(path, config)
        try:
            self._control.load(folder.name, read_releases(folder))
        except BaseException:
            if before is None:
                path.unlink()
            else:
                replace_file(path, before)
            raise

    def _remove_version(self, folder: Path, version: str) -> None:
        others = {number: release for number, release in read_releases(folder).items() if number != version}
        if others:
            release = others[max(others, key=int)]
            self._load_with_config(
                folder, render_config(folder.name, release, [*others], instances=_read_instances(folder))
            )
            shutil.rmtree(folder / version)
        else:
            self._control.unload(folder.name)
            (folder / CONFIG_FILE).unlink()
            shutil.rmtree(folder)

    def _has_dead_instance(self, folder: Path) -> bool:
        requests = 2 * parse_instances((folder / CONFIG_FILE).read_text())
        return any(
            _DEAD_INSTANCE in self._control.infer(folder.name, version, _make_probe(release)).text
            for version, release in read_releases(folder).items()
            for _ in range(requests)
        )

    @contextmanager
    def _lock_repository(self) -> Generator[None]:
        """Hold the lock of this repository, which serialises changes in this process and in others."""
        try:
            self.repository.mkdir(parents=True, exist_ok=True)
            with (self.repository / ".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
        except OSError as error:
            message = (
                f"Triton's repository must be a folder to read and write, got: {error}. Free space or give access to "
                f"{self.repository}, then call again."
            )
            raise EndpointFailed(message) from error


def _read_instances(folder: Path) -> int | None:
    path = folder / CONFIG_FILE
    return parse_instances(path.read_text()) if path.exists() else None


def _make_probe(release: Release) -> bytes:
    """Return a request for the prediction of one row of zeros, and of no text."""
    nothing = {"str": "", "binary": b""}
    zeros: dict[str, npt.NDArray[Any]] = {
        value.name: np.full((1, *value.shape), nothing[value.dtype], object)
        if value.dtype in nothing
        else np.zeros((1, *value.shape), value.dtype)
        for value in release.contract.inputs
    }
    return encode_request(release.contract, zeros).content
