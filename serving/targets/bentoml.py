"""BentoML: a service with the routes of the protocol before a model that it batches, to be served or built.

`bentoml serve` runs out of the folder as it is. `bentoml build` there makes a Bento of it, with the model and this
package inside, for `bentoml containerize` and whatever runs containers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from serving.gateway.route import Route
from serving.model.release import MODEL_FOLDER, RELEASE_FILE, Release
from serving.targets import ReleaseFiles
from serving.targets.folder import SERVE_FILE, render_folder, resolve_interpreter
from serving.targets.kubernetes_cluster import Cluster, Manifest, place_versions
from serving.targets.kubernetes_routes import render_gateway_api

SERVICE = "service:Endpoint"
_SOURCE = Path(__file__).with_name("bento_service.py")
_HOST = "127.0.0.1"
_REQUIREMENTS = "infra/local/bentoml.txt"
# What this package needs where a release is loaded; what the model needs, MLflow wrote beside it.
_PACKAGES = (
    *("fastapi>=0.115", "httpx>=0.28", "mlflow>=3.17.2,<4", "numpy>=2", "orjson>=3.10", "pyarrow>=20"),
    *("boto3>=1.40", "pydantic>=2.11", "pyyaml>=6"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BentoMLTarget:
    """The target BentoML; `python` is the interpreter of an environment made from infra/local/bentoml.txt."""

    python: Path

    def render(self, release: Release, model: Path) -> ReleaseFiles:
        """Return service.py and bentofile.yaml, and how a controller serves them."""
        where = ("--host", _HOST, "--port", "{port}", "--working-dir", "{folder}")
        # Longer than its own client keeps a connection: none is closed just as it is used again.
        kept = ("--timeout-keep-alive", "60")
        bentofile = yaml.safe_dump(self.render_bentofile(release, model), sort_keys=False, width=120)
        return render_folder(
            release,
            model,
            {"service.py": _SOURCE.read_bytes(), "bentofile.yaml": bentofile.encode()},
            argv=(resolve_interpreter(self.python, _REQUIREMENTS), "-m", "bentoml", "serve", SERVICE, *where, *kept),
            environment={
                "BENTOML_DO_NOT_TRACK": "True",
                # Its store, its settings and its metrics: never the user's.
                "BENTOML_HOME": "{folder}/.bentoml",
                "PROMETHEUS_MULTIPROC_DIR": "{folder}/.bentoml/metrics",
                "OMP_NUM_THREADS": str(release.engine.threads),
            },
            ready_path=f"/v2/models/{release.endpoint}/ready",
        )

    def render_bentofile(self, release: Release, model: Path) -> dict[str, Any]:
        """Return what `bentoml build` makes of the folder."""
        requirements = f"{MODEL_FOLDER}/requirements.txt"
        python: dict[str, Any] = {"packages": list(_PACKAGES), "lock_packages": False}
        if (model / "requirements.txt").is_file():
            python["requirements_txt"] = requirements
        return {
            "service": SERVICE,
            "name": release.endpoint,
            "labels": {"model": release.pin.name, "version": release.version, "digest": release.pin.digest[:12]},
            "include": ["service.py", RELEASE_FILE, f"{MODEL_FOLDER}/**", "serving/**/*.py"],
            "exclude": [SERVE_FILE, ".bentoml/**", "**/__pycache__/**"],
            "python": python,
            "envs": [{"name": name, "value": value} for name, value in _ENVIRONMENT.items()],
        }

    def render_rollout(
        self,
        endpoint: str,
        route: Route,
        releases: Mapping[str, Release],  # noqa: ARG002 - the Services of containers are those who run them make
        cluster: Cluster,
    ) -> tuple[Manifest, ...]:
        """Return what divides requests among Services NAME-vVERSION, port 80, of the containers that were built.

        Raises BadInput for a route that a cluster's Envoy cannot have.
        """
        return render_gateway_api(endpoint, place_versions(route, endpoint, cluster.namespace), cluster)


_ENVIRONMENT = {"BENTOML_DO_NOT_TRACK": "True", "MLFLOW_DISABLE_TELEMETRY": "true"}
