"""Ray Serve: one application a release, side by side on one cluster, each behind a route of its own.

A release lies in a folder that every node of the cluster sees at the same path (the cluster's image, a shared volume,
or this machine), and Ray runs it in place. The folder brings this package along, so that a release answers with the
code that it was verified with; what the package needs, and ray[serve], is installed on every node.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import serving
from serving.model.registry import digest_folder
from serving.model.release import MODEL_FOLDER, RELEASE_FILE, Release
from serving.targets import Rendered

MODULE = "application"
DEPLOYMENT = "Endpoint"
_DIGEST_LENGTH = 12
_PACKAGE = Path(serving.__file__).parent
_SOURCE = Path(__file__).with_name("ray_application.py")
_GPUS = {"cpu": 0, "cuda": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class RayServe:
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

    def render(self, release: Release, model: Path) -> Rendered:
        """Return the application, its config for Ray's REST API and `serve deploy`, and the RayService."""
        application = self.application(release)
        serve_config = {
            "proxy_location": "EveryNode",
            "http_options": {"host": "127.0.0.1", "port": 8000},
            "applications": [application],
        }
        files = {
            f"{MODULE}.py": _SOURCE.read_bytes(),
            RELEASE_FILE: release.model_dump_json(indent=2).encode(),
            "serve.yaml": _yaml(serve_config),
            "rayservice.yaml": _yaml(self._ray_service(release, application)),
        }
        return Rendered(files=files, trees={MODEL_FOLDER: model, _PACKAGE.name: _PACKAGE})

    def application(self, release: Release) -> dict[str, Any]:
        """Return the application as an entry of a Serve config."""
        return {
            "name": application_name(release),
            "route_prefix": f"/{application_name(release)}",
            "import_path": f"{MODULE}:application",
            "args": release.batching.model_dump(mode="json"),
            "runtime_env": {"working_dir": f"local://{self.folder.rstrip('/')}/{folder_name(release)}"},
            "deployments": [self._deployment(release)],
        }

    def _deployment(self, release: Release) -> dict[str, Any]:
        size = release.batching.batch_size_max
        return {
            "name": DEPLOYMENT,
            **self._replicas(release),
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

    def _replicas(self, release: Release) -> dict[str, Any]:
        least, most = release.scaling.replicas_min, release.scaling.replicas_max
        if least == most:
            return {"num_replicas": most}
        autoscaling = {
            "min_replicas": least,
            # One is started in any case: a model that does not load must fail now, not with the first request.
            "initial_replicas": max(1, least),
            "max_replicas": most,
            "target_ongoing_requests": max(2, release.batching.batch_size_max),
            "look_back_period_s": 15,
            "upscale_delay_s": 5,
            "downscale_delay_s": 60,
            "downscale_to_zero_delay_s": self.keep_warm_seconds,
        }
        return {"autoscaling_config": autoscaling}

    def _ray_service(self, release: Release, application: dict[str, Any]) -> dict[str, Any]:
        serve_config = {
            # Inside of a pod; who reaches it is for the cluster's network policies.
            "http_options": {"host": "0.0.0.0", "port": 8000},  # noqa: S104 - the same
            "applications": [application],
        }
        # Every replica may land on a worker of its own.
        worker = {
            "groupName": "replicas",
            "replicas": max(1, release.scaling.replicas_min),
            "minReplicas": release.scaling.replicas_min,
            "maxReplicas": release.scaling.replicas_max,
            "rayStartParams": {},
            "template": self._pod("ray-worker", release),
        }
        head = {"rayStartParams": {"num-cpus": "0"}, "template": self._pod("ray-head", release)}
        return {
            "apiVersion": "ray.io/v1",
            "kind": "RayService",
            "metadata": {"name": application_name(release), "labels": {"overnight/endpoint": release.endpoint}},
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

    def _pod(self, name: str, release: Release) -> dict[str, Any]:
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


def application_name(release: Release) -> str:
    """Return the name of a release's application, which is its route too."""
    return f"{release.endpoint}-{release.version}"


def folder_name(release: Release) -> str:
    """Return the name of a release's folder: it changes with whatever is changed about the release.

    Replicas of one application read one folder for as long as it runs, so that no folder's contents may change.
    """
    content = f"{release.model_dump_json()}\0{digest_folder(_PACKAGE)}".encode()
    return f"{application_name(release)}.{hashlib.sha256(content).hexdigest()[:_DIGEST_LENGTH]}"


def _yaml(value: dict[str, Any]) -> bytes:
    return str(yaml.safe_dump(value, sort_keys=False, width=120)).encode()
