"""Triton: a release as a version in a model repository, and a running server that takes versions while others serve."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from serving.errors import EndpointFailed
from serving.model.graph import AnyRelease, Graph
from serving.model.release import MODEL_FOLDER, RELEASE_FILE, Release
from serving.protocol.oip import encode_request
from serving.protocol.tensors import describe_tensors
from serving.targets import Address, ReleaseFiles
from serving.targets.triton_control import DEAD_PROCESS, TritonControl
from serving.targets.triton_repository import (
    CONFIG_FILE,
    MEAN,
    MEAN_VERSION,
    is_ensemble,
    is_served_as,
    name_graph,
    parse_instances,
    read_releases,
    render_config,
    render_graph_configs,
    replace_file,
    replace_version,
    set_instances,
)

_MODEL_FILE = "model.py"
_MODEL_PY = Path(__file__).with_name("triton_model.py")
_MEAN_PY = Path(__file__).with_name("triton_mean.py")
_DOTS_OF_A_PART = 2


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

    def render_graph(self, graph: Graph, models: Sequence[Path]) -> ReleaseFiles:
        """Return the repository of a graph alone: each step as `render` has it, and the ensemble that chains them."""
        name = name_graph(graph.endpoint, graph.version)
        steps = [
            TritonTarget(model=f"{name}.{number}").render(step, model)
            for number, (step, model) in enumerate(zip(graph.steps, models, strict=True), start=1)
        ]
        files = {path: content for step in steps for path, content in step.files.items()}
        if graph.combine == "mean":
            files[f"{name}.{MEAN}/{MEAN_VERSION}/{_MODEL_FILE}"] = _MEAN_PY.read_bytes()
        configs = render_graph_configs(graph)
        return ReleaseFiles(
            files={
                **files,
                **{f"{each}/{CONFIG_FILE}": config.encode() for each, config in configs.items()},
                f"{name}/{graph.version}/{RELEASE_FILE}": graph.model_dump_json(indent=1).encode(),
            },
            trees={path: tree for step in steps for path, tree in step.trees.items()},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonHost:
    """A running Triton with explicit model control, and the repository on this machine that it reads.

    Versions of one endpoint that take the same tensors are versions of one model there; one that takes others is
    a model of its own beside it, as its Address says. A version is written whole before Triton loads it.
    Triton loads all versions of a model again before it lets go of those that serve: no request is lost, and none
    waits for that, since loads go through its gRPC port, at HOST:PORT. Changes to one repository wait for each other,
    from any process. Raises EndpointFailed with Triton's own reason.

    A graph is a model of its own, an ensemble, and so is each of its steps, which no other graph uses. Triton loads and
    unloads the steps with the ensemble.
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
                self._load_with_configs(
                    folder, {folder: render_config(name, release, versions, instances=_read_instances(folder))}
                )
            for other in self._list_folders(release.endpoint):
                if other != folder and release.version in read_releases(other):
                    self._remove_version(other, release.version)
        return Address(url=self.url, model=name, version=release.version, grpc=self.grpc)

    def deploy_graph(self, graph: Graph, models: Sequence[Path]) -> Address:
        """Put a graph up beside what is there, or again where it is there already; `models` has the files of each step.

        Returns once it answers. Where Triton does not load it, the repository and what serves are as before.
        """
        name = name_graph(graph.endpoint, graph.version)
        folder, rendered = self.repository / name, TritonTarget().render_graph(graph, models)
        with self._lock_repository():
            instances = self._count_graph_instances(folder)
            configs = render_graph_configs(graph, instances=instances)
            try:
                with ExitStack() as replaced:
                    for part, version in _list_versions(graph):
                        replaced.enter_context(replace_version(self.repository / part, version, rendered))
                    self._load_with_configs(folder, {self.repository / part: text for part, text in configs.items()})
            except EndpointFailed:
                if instances is not None:
                    # Some of its steps may have been loaded already as they were to be.
                    with suppress(EndpointFailed):
                        self._control.load(name)
                raise
        return Address(url=self.url, model=name, version=graph.version, grpc=self.grpc)

    def remove(self, release: Release) -> None:
        """Take a version down and forget its files; others serve on. Idempotent."""
        with self._lock_repository():
            for folder in self._list_folders(release.endpoint):
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

    def restart_dead_instances(self, endpoint: str, known: Collection[str] = ()) -> bool:
        """Load an endpoint again where one of its instances has died, which Triton does not restart by itself.

        `known` are models of which the caller knows that they have dead instances. Without any, each version is asked
        for one row of zeros as often as reaches every instance. Returns whether one was dead.
        """
        dead = [
            folder
            for folder in self._find_models(endpoint)
            if (not {part.name for part in self._list_parts(folder)}.isdisjoint(known))
            or (not known and self._has_dead_instance(folder))
        ]
        with self._lock_repository():
            for folder in dead:
                # Triton keeps the instances that it has, dead ones too, unless the model itself is newer.
                for part in self._list_parts(folder):
                    for file in part.glob(f"*/{_MODEL_FILE}"):
                        file.touch()
                self._control.load(folder.name, read_releases(folder))
        return bool(dead)

    def scale(self, endpoint: str, instances: int) -> None:
        """Set how many instances each version of an endpoint, or step of a graph, runs; those that stay serve on."""
        with self._lock_repository():
            for folder in self._find_models(endpoint):
                before = {part: (part / CONFIG_FILE).read_text() for part in self._list_scaled_parts(folder)}
                configs = {part: set_instances(config, instances) for part, config in before.items()}
                if configs == before:
                    continue
                if self._control.is_loaded(folder.name):
                    self._load_with_configs(folder, configs)
                else:
                    # The next load reads them.
                    for part, config in configs.items():
                        replace_file(part / CONFIG_FILE, config)

    def count_instances(self, endpoint: str) -> int:
        """Return how many instances each version of an endpoint, or each step of a graph, runs while it is loaded."""
        parts = [part for folder in self._find_models(endpoint) for part in self._list_scaled_parts(folder)]
        return max(parse_instances((part / CONFIG_FILE).read_text()) for part in parts)

    def list_models(self, endpoint: str) -> set[str]:
        """Return the models of an endpoint that have instances: its versions, and the parts of its graphs."""
        parts = [part for folder in self._list_folders(endpoint) for part in self._list_parts(folder)]
        return {part.name for part in parts if not _is_graph(part)}

    def list_scaled_models(self, endpoint: str) -> set[str]:
        """Return the models whose instances pass an endpoint's requests: its versions, or the steps of its graphs."""
        return {part.name for folder in self._list_folders(endpoint) for part in self._list_scaled_parts(folder)}

    def list_endpoints(self) -> dict[str, tuple[Address, ...]]:
        """Return every endpoint in the repository, and where each of its versions answers while it is loaded."""
        found: dict[str, list[Address]] = {}
        for model, release in self._iterate_releases():
            address = Address(url=self.url, model=model, version=release.version, grpc=self.grpc)
            found.setdefault(release.endpoint, []).append(address)
        return {endpoint: tuple(addresses) for endpoint, addresses in found.items()}

    def find_newest_releases(self) -> dict[str, AnyRelease]:
        """Return the release of every endpoint in the repository that has the highest version."""
        releases = sorted((release for _, release in self._iterate_releases()), key=lambda each: int(each.version))
        return {release.endpoint: release for release in releases}

    def _iterate_releases(self) -> Iterator[tuple[str, AnyRelease]]:
        """Yield every release and graph in the repository, with the model that it is a version of."""
        for config in sorted(self.repository.glob(f"*/{CONFIG_FILE}")):
            if not _is_part_of_graph(config.parent):
                for release in read_releases(config.parent).values():
                    yield config.parent.name, release

    @property
    def _control(self) -> TritonControl:
        return TritonControl(url=self.url, grpc=self.grpc, wait_s_max=self.load_s_max)

    def _choose_model(self, release: Release) -> str:
        """Return the model that a release is a version of: the first whose versions take the same tensors."""
        for folder in self._list_folders(release.endpoint):
            if _is_graph(folder):
                continue
            others = [other for version, other in read_releases(folder).items() if version != release.version]
            if all(describe_tensors(other.contract) == describe_tensors(release.contract) for other in others):
                return folder.name
        taken = (self.repository / release.endpoint / CONFIG_FILE).exists()
        return f"{release.endpoint}.v{release.version}" if taken else release.endpoint

    def _list_folders(self, endpoint: str) -> list[Path]:
        folders = [self.repository / endpoint, *sorted(self.repository.glob(f"{endpoint}.v*"))]
        return [folder for folder in folders if (folder / CONFIG_FILE).exists() and not _is_part_of_graph(folder)]

    def _list_parts(self, folder: Path) -> list[Path]:
        """Return the models that a model consists of: itself, or a graph's steps, its mean, and the graph, last."""
        return [*sorted(self.repository.glob(f"{folder.name}.*")), folder] if _is_graph(folder) else [folder]

    def _list_scaled_parts(self, folder: Path) -> list[Path]:
        """Return those of the parts whose instances are scaled: they load a model of the user's."""
        return [part for part in self._list_parts(folder) if part.suffix != f".{MEAN}" and not _is_graph(part)]

    def _count_graph_instances(self, folder: Path) -> int | None:
        """Return how many instances each step of a graph runs, None where it is not there."""
        if not (folder / CONFIG_FILE).exists():
            return None
        return max(parse_instances((part / CONFIG_FILE).read_text()) for part in self._list_scaled_parts(folder))

    def _find_models(self, endpoint: str) -> list[Path]:
        folders = self._list_folders(endpoint)
        if not folders:
            message = f"The endpoint must be one of {sorted(self.list_endpoints())}, got {endpoint!r}; deploy it first."
            raise EndpointFailed(message)
        return folders

    def _load_with_configs(self, folder: Path, configs: Mapping[Path, str]) -> None:
        """Have Triton load a model under other configs, its own or its parts'; put the earlier ones back where not."""
        before = {part: path.read_text() for part in configs if (path := part / CONFIG_FILE).exists()}
        for part, config in configs.items():
            replace_file(part / CONFIG_FILE, config)
        try:
            self._control.load(folder.name, read_releases(folder))
            if _is_graph(folder):
                self._check_served(configs)
        except BaseException:
            for part in configs:
                if part in before:
                    replace_file(part / CONFIG_FILE, before[part])
                else:
                    (part / CONFIG_FILE).unlink()
            self._unload_new(configs.keys() - before.keys())
            raise

    def _check_served(self, configs: Mapping[Path, str]) -> None:
        """Check that the steps of a graph are served as their configs say.

        Where a step does not load again, Triton keeps the one of before, and takes the load of the graph for a success.
        """
        for part, config in configs.items():
            if not is_served_as(self._control.read_config(part.name), config):
                message = (
                    f"Triton must load {part.name!r} again under its new config, but serves on under the one of "
                    "before. Read in its log why."
                )
                raise EndpointFailed(message)

    def _unload_new(self, parts: Iterable[Path]) -> None:
        """Unload models of a graph that did not load as a whole, the graph first."""
        for part in sorted(parts, key=lambda part: len(part.name)):
            with suppress(EndpointFailed):
                self._control.unload(part.name)

    def _remove_version(self, folder: Path, version: str) -> None:
        if _is_graph(folder):
            self._remove_graph(folder)
            return
        others = {number: release for number, release in read_releases(folder).items() if number != version}
        if others:
            release = others[max(others, key=int)]
            assert isinstance(release, Release), "no graph is a version of a model"  # noqa: S101 - our own mistake
            self._load_with_configs(
                folder, {folder: render_config(folder.name, release, [*others], instances=_read_instances(folder))}
            )
            shutil.rmtree(folder / version)
        else:
            self._control.unload(folder.name)
            (folder / CONFIG_FILE).unlink()
            shutil.rmtree(folder)

    def _remove_graph(self, folder: Path) -> None:
        """Take a graph down, then its steps, and forget their files."""
        *steps, _ = self._list_parts(folder)
        for part in (folder, *steps):
            self._control.unload(part.name)
        # The graph goes last: a call after one that was killed finds what is left by it.
        for part in (*steps, folder):
            (part / CONFIG_FILE).unlink(missing_ok=True)
            shutil.rmtree(part)

    def _has_dead_instance(self, folder: Path) -> bool:
        configs = [(part / CONFIG_FILE).read_text() for part in self._list_parts(folder)]
        requests = 2 * max(map(parse_instances, configs))
        return any(
            DEAD_PROCESS in self._control.infer(folder.name, version, _make_probe(release)).text
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


def _is_graph(folder: Path) -> bool:
    path = folder / CONFIG_FILE
    return path.exists() and is_ensemble(path.read_text())


def _is_part_of_graph(folder: Path) -> bool:
    """Whether a model is a step or the mean of a graph: names of endpoints have no dots."""
    return folder.name.count(".") == _DOTS_OF_A_PART


def _list_versions(graph: Graph) -> list[tuple[str, str]]:
    """Return the models of a graph in a repository, each with the one version that it has there, the graph last."""
    name = name_graph(graph.endpoint, graph.version)
    steps = [(f"{name}.{number}", step.version) for number, step in enumerate(graph.steps, start=1)]
    mean = [(f"{name}.{MEAN}", MEAN_VERSION)] if graph.combine == "mean" else []
    return [*steps, *mean, (name, graph.version)]


def _read_instances(folder: Path) -> int | None:
    path = folder / CONFIG_FILE
    return parse_instances(path.read_text()) if path.exists() else None


def _make_probe(release: AnyRelease) -> bytes:
    """Return a request for the prediction of one row of zeros, and of no text."""
    nothing = {"str": "", "binary": b""}
    zeros: dict[str, npt.NDArray[Any]] = {
        value.name: np.full((1, *value.shape), nothing[value.dtype], object)
        if value.dtype in nothing
        else np.zeros((1, *value.shape), value.dtype)
        for value in release.contract.inputs
    }
    return encode_request(release.contract, zeros).content
