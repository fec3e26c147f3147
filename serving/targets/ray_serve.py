"""Ray Serve: one application a release or a graph, side by side on one cluster, each behind a route of its own.

A release lies in a folder that every node of the cluster sees at the same path (the cluster's image, a shared volume,
or this machine), and Ray runs it in place. The folder has the modules of this package that the release needs, so that
it answers with the code that it was verified with. What these need, and ray[serve], is installed on every node.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import yaml

from serving.errors import EndpointFailed
from serving.model.graph import AnyRelease, Graph
from serving.model.release import MODEL_FOLDER, RELEASE_FILE, Release
from serving.targets import Address, ReleaseFiles
from serving.targets.folder import read_imported_modules, remove_folder, write_folder

MODULE = "application"
DEPLOYMENT, COMPOSITION = "Endpoint", "Composition"
_DIGEST_LENGTH = 12
_SOURCE = Path(__file__).with_name("ray_application.py")
_GPUS = {"cpu": 0, "cuda": 1}
_PATH = "/api/serve/applications/"
_NEXT: dict[int, str] = {
    HTTPStatus.UNAUTHORIZED: "Pass the cluster's token.",
    HTTPStatus.FORBIDDEN: "Pass the cluster's token.",
    HTTPStatus.NOT_IMPLEMENTED: "Install ray[serve] on the cluster's nodes.",
}

Application = dict[str, Any]
Applications = dict[str, Application]


@dataclass(frozen=True, slots=True, kw_only=True)
class RayServeTarget:
    """A release as Ray Serve takes it: an application, its Serve config, and a RayService for KubeRay.

    `folder` is where the nodes find releases, `image` what the nodes of a RayService run. An application that may
    scale to zero does so after `keep_warm_seconds` without a request. Beyond `queue_max` requests that wait, Ray
    answers 429.
    """

    folder: str
    image: str = "overnight-ray"
    ray_version: str = "2.60.0"
    keep_warm_seconds: float = 300.0
    queue_max: int = 1024

    def render(self, release: Release, model: Path) -> ReleaseFiles:
        """Return the application, its config for Ray's REST API and `serve deploy`, and the RayService."""
        return ReleaseFiles(files=self._render_files(release), trees={MODEL_FOLDER: model})

    def render_graph(self, graph: Graph, models: Sequence[Path]) -> ReleaseFiles:
        """Return the same of a graph, whose application has a deployment for each step and one that calls them."""
        steps = [*zip(graph.steps, models, strict=True)]
        releases = {
            f"{number}/{RELEASE_FILE}": release.model_dump_json(indent=2).encode()
            for number, (release, _) in enumerate(steps, start=1)
        }
        return ReleaseFiles(
            files={**self._render_files(graph), **releases},
            trees={f"{number}/{MODEL_FOLDER}": model for number, (_, model) in enumerate(steps, start=1)},
        )

    def _render_files(self, release: AnyRelease) -> dict[str, bytes]:
        application = self.render_application(release)
        serve_config = {
            "proxy_location": "EveryNode",
            "http_options": {"host": "127.0.0.1", "port": 8000},
            "applications": [application],
        }
        return {
            **_read_code(),
            RELEASE_FILE: release.model_dump_json(indent=2).encode(),
            "serve.yaml": _yaml(serve_config),
            "rayservice.yaml": _yaml(self._render_ray_service(release, application)),
        }

    def render_application(self, release: AnyRelease) -> dict[str, Any]:
        """Return the application as an entry of a Serve config."""
        return {
            "name": make_application_name(release),
            "route_prefix": f"/{make_application_name(release)}",
            "import_path": f"{MODULE}:application",
            "args": release.batching.model_dump(mode="json"),
            "runtime_env": {"working_dir": f"local://{self.folder.rstrip('/')}/{make_folder_name(release)}"},
            "deployments": self._render_deployments(release),
        }

    def _render_deployments(self, release: AnyRelease) -> list[dict[str, Any]]:
        if isinstance(release, Release):
            return [self._render_deployment(DEPLOYMENT, release)]
        steps = [self._render_deployment(f"Step{number}", step) for number, step in enumerate(release.steps, start=1)]
        composition = self._render_deployment(COMPOSITION, release.steps[0])
        # It has no model, and waits for those that have one. Each request waits there from its first step to its last.
        composition["ray_actor_options"] = {"num_cpus": 0, "num_gpus": 0}
        composition["max_ongoing_requests"] = sum(step["max_ongoing_requests"] for step in steps)
        return [*steps, composition]

    def _render_deployment(self, name: str, release: Release) -> dict[str, Any]:
        size = release.batching.batch_size_max
        return {
            "name": name,
            **self._render_replicas(release),
            # One batch in the model, another that fills.
            "max_ongoing_requests": max(8, 2 * size),
            "max_queued_requests": self.queue_max,
            "backpressure_config": {"status_code": 429, "retry_after_s": 1},
            # As many intra-op threads a replica as CPUs: Ray sets OMP_NUM_THREADS by them.
            "ray_actor_options": {"num_cpus": release.engine.threads, "num_gpus": _GPUS[release.engine.device]},
            # A new version of a release is up before the old one goes.
            "max_surge_percent": 100,
            "graceful_shutdown_timeout_s": 20,
            "health_check_period_s": 5,
            "health_check_timeout_s": 30,
            "logging_config": {"enable_access_log": False},
        }

    def _render_replicas(self, release: Release) -> dict[str, Any]:
        replicas_min, replicas_max = release.scaling.replicas_min, release.scaling.replicas_max
        if replicas_min == replicas_max:
            return {"num_replicas": replicas_max}
        autoscaling = {
            "min_replicas": replicas_min,
            # One is started in any case, so that a model that does not load fails now, not with the first request.
            "initial_replicas": max(1, replicas_min),
            "max_replicas": replicas_max,
            "target_ongoing_requests": max(2, release.batching.batch_size_max),
            "look_back_period_s": 15,
            "upscale_delay_s": 5,
            "downscale_delay_s": 60,
            "downscale_to_zero_delay_s": self.keep_warm_seconds,
        }
        return {"autoscaling_config": autoscaling}

    def _render_ray_service(self, release: AnyRelease, application: dict[str, Any]) -> dict[str, Any]:
        serve_config = {
            # Inside of a pod; who reaches it is for the cluster's network policies.
            "http_options": {"host": "0.0.0.0", "port": 8000},  # noqa: S104 - the same
            "applications": [application],
        }
        steps = (release,) if isinstance(release, Release) else release.steps
        # Every replica may land on a worker of its own.
        worker = {
            "groupName": "replicas",
            "replicas": len(steps) * max(1, release.scaling.replicas_min),
            "minReplicas": len(steps) * release.scaling.replicas_min,
            "maxReplicas": len(steps) * release.scaling.replicas_max,
            "rayStartParams": {},
            "template": self._render_pod("ray-worker", max(steps, key=_count_resources)),
        }
        head = {"rayStartParams": {"num-cpus": "0"}, "template": self._render_pod("ray-head", steps[0])}
        return {
            "apiVersion": "ray.io/v1",
            "kind": "RayService",
            "metadata": {"name": make_application_name(release), "labels": {"overnight/endpoint": release.endpoint}},
            "spec": {
                "serveConfigV2": _yaml(serve_config).decode(),
                "rayClusterConfig": {
                    "rayVersion": self.ray_version,
                    "enableInTreeAutoscaling": release.scaling.replicas_min < release.scaling.replicas_max,
                    "headGroupSpec": head,
                    "workerGroupSpecs": [worker],
                },
            },
        }

    def _render_pod(self, name: str, release: Release) -> dict[str, Any]:
        cpus = release.engine.threads if name == "ray-worker" else 1
        resources: dict[str, Any] = {"cpu": str(cpus), "memory": "4Gi"}
        if name == "ray-worker" and (gpus := _GPUS[release.engine.device]):
            resources["nvidia.com/gpu"] = str(gpus)
        container = {
            "name": name,
            "image": self.image,
            "resources": {"requests": resources, "limits": resources},
            "volumeMounts": [{"name": "releases", "mountPath": self.folder, "readOnly": True}],
        }
        releases = {"name": "releases", "persistentVolumeClaim": {"claimName": "overnight-releases", "readOnly": True}}
        return {"spec": {"containers": [container], "volumes": [releases]}}


def _count_resources(release: Release) -> tuple[int, int]:
    return _GPUS[release.engine.device], release.engine.threads


def make_application_name(release: AnyRelease) -> str:
    """Return the name of a release's application, which is its route too."""
    return f"{release.endpoint}-{release.version}"


def make_folder_name(release: AnyRelease) -> str:
    """Return the name of a release's folder: it changes with whatever is changed about the release.

    Replicas of one application read one folder for as long as it runs, so that no folder's contents may change.
    """
    digest = hashlib.sha256(release.model_dump_json().encode())
    for path, content in _read_code().items():
        digest.update(f"\0{path}\0".encode() + content)
    return f"{make_application_name(release)}.{digest.hexdigest()[:_DIGEST_LENGTH]}"


def _read_code() -> dict[str, bytes]:
    """Return the application and the modules of this package that it imports."""
    program = _SOURCE.read_bytes()
    return {f"{MODULE}.py": program, **read_imported_modules((program,))}


def _yaml(value: dict[str, Any]) -> bytes:
    return str(yaml.safe_dump(value, sort_keys=False, width=120)).encode()


_POLL_SECONDS = 0.2
_ANSWER_SECONDS_MAX, _READY_SECONDS_MAX = 60.0, 10.0
_REASON_LENGTH_MAX = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class RayServeHost:
    """A running cluster. Releases are written to `folder`, which its nodes see as the target's folder.

    `serve_url` is where its proxies answer; where Serve does not run yet, the first release starts it there. `token`
    is what a cluster with RAY_AUTH_MODE=token asks for.
    """

    dashboard_url: str
    serve_url: str
    folder: Path
    target: RayServeTarget
    token: str | None = field(default=None, repr=False)
    ready_seconds_max: float = 180.0

    def deploy(self, release: Release, model: Path) -> Address:
        """Put a release up beside those that are there; returns once it answers.

        One that is there under the same name and version is replaced while it serves. Raises EndpointFailed with what
        Ray says, and then what was there before serves on.
        """
        return self._deploy(release, lambda: self.target.render(release, model))

    def deploy_graph(self, graph: Graph, models: Sequence[Path]) -> Address:
        """Put a graph up, as `deploy` does a release; `models` has the files of each step."""
        return self._deploy(graph, lambda: self.target.render_graph(graph, models))

    def _deploy(self, release: AnyRelease, render: Callable[[], ReleaseFiles]) -> Address:
        name, folder = make_application_name(release), self.folder / make_folder_name(release)
        application = self.target.render_application(release)
        address = Address(url=f"{self.serve_url}/{name}", model=release.endpoint, version=release.version)
        with self._open_api() as api:
            before = api.read_status().get(name, {}).get("deployed_app_config")
            if not folder.exists():
                write_folder(render(), folder)
            try:
                self._start(api, application, address)
            except EndpointFailed:
                if before:
                    api.add_application(before)
                else:
                    api.remove_application(name)
                if not before or before["runtime_env"] != application["runtime_env"]:
                    remove_folder(folder)
                raise
        self._remove_folders(name, keep=folder)
        return address

    def remove(self, release: Release) -> None:
        """Take a release down once its requests are answered; others serve on. Idempotent.

        Raises EndpointFailed where the cluster does not answer, or the release does not go.
        """
        name = make_application_name(release)
        with self._open_api() as api:
            for status in self._poll_status(api):
                if name not in status:
                    self._remove_folders(name)
                    return
                if status[name]["status"] != "DELETING":
                    api.remove_application(name)
        message = f"{name} must be gone within {self.ready_seconds_max:g} s, but Ray still has it. Call again."
        raise EndpointFailed(message)

    def _start(self, api: ServeApi, application: Application, address: Address) -> None:
        name, description = application["name"], "nothing"
        api.add_application(application)
        for status in self._poll_status(api):
            ours = status.get(name, {"status": "gone"})
            description = _describe_status(ours)
            if ours["status"] == "DEPLOY_FAILED":
                message = f"{name} must start on Ray, got {description} Repair what it names, then call again."
                raise EndpointFailed(message)
            if ours["status"] in ("gone", "DELETING"):
                # Another host put a list without this one.
                api.add_application(application)
            elif ours["status"] == "RUNNING" and _is_ready(address):
                return
        message = (
            f"{name} must answer within {self.ready_seconds_max:g} s, got {description} Add nodes for a "
            "replica, or raise ready_seconds_max."
        )
        raise EndpointFailed(message)

    def _poll_status(self, api: ServeApi) -> Iterator[Applications]:
        """Yield the status of the applications until the time is up."""
        deadline = time.monotonic() + self.ready_seconds_max
        while time.monotonic() < deadline:
            yield api.read_status()
            time.sleep(_POLL_SECONDS)

    def _remove_folders(self, name: str, keep: Path | None = None) -> None:
        """Remove the folders of an application, except the one that it runs from."""
        for folder in self.folder.glob(f"{name}.*"):
            if folder != keep:
                remove_folder(folder)

    @contextmanager
    def _open_api(self) -> Generator[ServeApi]:
        headers = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
        # The token is for the cluster alone, not for a proxy that the environment names.
        with httpx.Client(
            base_url=self.dashboard_url, headers=headers, timeout=_ANSWER_SECONDS_MAX, trust_env=False
        ) as client:
            yield ServeApi(client=client, serve_url=self.serve_url)


def _describe_status(application: Application) -> str:
    """Return the status and messages of an application and its deployments, the end of them where they are long."""
    about = [application, *application.get("deployments", {}).values()]
    messages = [each["message"].strip() for each in about if each.get("message")]
    return f"{application['status']}: {' '.join(messages)[-_REASON_LENGTH_MAX:]}"


def _is_ready(address: Address) -> bool:
    """Whether a release is ready to predict. A proxy of Ray does not answer this in place of it."""
    try:
        # The token is for the dashboard alone.
        url = f"{address.url}/v2/models/{address.model}/versions/{address.version}/ready"
        answer = httpx.get(url, timeout=_READY_SECONDS_MAX, trust_env=False)
    except httpx.HTTPError:
        return False
    return answer.is_success


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeApi:
    """The REST API of Serve on one cluster; `serve_url` is where its proxies are to answer."""

    client: httpx.Client
    serve_url: str

    def read_status(self) -> Applications:
        """Return the status of each application, by name. Raises EndpointFailed where Ray does not answer."""
        applications: Applications = self._request("GET").json().get("applications", {})
        return applications

    def add_application(self, application: Application) -> None:
        """Have the cluster run one more application. Raises EndpointFailed where it refuses."""
        self._edit(lambda running: running | {application["name"]: application})

    def remove_application(self, name: str) -> None:
        """Have the cluster end an application. Raises EndpointFailed where it refuses."""
        self._edit(lambda running: {other: each for other, each in running.items() if other != name})

    def _edit(self, edit: Callable[[Applications], Applications]) -> None:
        """Put another list of applications.

        Ray takes the whole list at once, and ends what is not on it. Of two hosts that change it at the same time
        one may undo the other's change, so that each polls until its own is in force.
        """
        now = self._request("GET").json()
        running = {
            name: details["deployed_app_config"]
            for name, details in now.get("applications", {}).items()
            # An application that a driver started by serve.run has no config here, and is not ended by a PUT.
            if details.get("deployed_app_config") and details["status"] != "DELETING"
        }
        config = {**self._make_options(now), "applications": list(edit(running).values())}
        self._request("PUT", config)

    def _make_options(self, now: dict[str, Any]) -> dict[str, Any]:
        """Return the options of Serve: the current ones where it runs, else those that start it."""
        kept = ("proxy_location", "http_options", "grpc_options", "target_capacity")
        if now.get("http_options"):
            return {name: now[name] for name in kept if now.get(name) is not None}
        where = urlsplit(self.serve_url)
        return {"http_options": {"host": where.hostname, "port": where.port or 80}}

    def _request(self, method: str, config: dict[str, Any] | None = None) -> httpx.Response:
        base = self.client.base_url
        try:
            answer = self.client.request(method, _PATH, json=config)
        except httpx.HTTPError as error:
            message = f"Ray's dashboard must answer at {base}, got {type(error).__name__}: {error}. Start the cluster."
            raise EndpointFailed(message) from error
        if answer.is_success:
            return answer
        next_move = _NEXT.get(answer.status_code, "Repair what it names, then call again.")
        reason = answer.text[:_REASON_LENGTH_MAX]
        message = (
            f"Ray's dashboard at {base} must take the applications, got {answer.status_code}: {reason} {next_move}"
        )
        raise EndpointFailed(message)
