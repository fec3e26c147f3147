"""What Ray Serve and KubeRay are given, held against Ray's own schema and one of the fields that KubeRay needs."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError

from serving.model.batching import BatchingConfig
from serving.model.pin import ModelPin
from serving.model.release import Release, Scaling
from serving.targets.ray_serve import RayServeHost, RayServeTarget, make_folder_name
from tests.releases import Put, release_of
from tests.servers import serve_http
from tests.serving.toys import matrix

TARGET = RayServeTarget(folder="/releases", image="registry.example/overnight:1", keep_warm_seconds=40)


def closed(properties: dict[str, Any], *optional: str) -> dict[str, Any]:
    """An object of these properties and no other."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}
COUNT = {"type": "integer", "minimum": 0}
PARAMETERS = {"type": "object", "additionalProperties": {"type": "string"}}
QUANTITIES = closed({"cpu": {"type": "string"}, "memory": {"type": "string"}, "nvidia.com/gpu": {"type": "string"}})
QUANTITIES["required"] = ["cpu", "memory"]
MOUNT = closed({"name": NAME, "mountPath": {"type": "string", "pattern": "^/"}, "readOnly": {"type": "boolean"}})
CLAIM = closed({"claimName": NAME, "readOnly": {"type": "boolean"}})
CONTAINER = closed(
    {
        "name": NAME,
        "image": {"type": "string", "minLength": 1},
        "resources": closed({"requests": QUANTITIES, "limits": QUANTITIES}),
        "volumeMounts": {"type": "array", "items": MOUNT},
    }
)
VOLUME = closed({"name": NAME, "persistentVolumeClaim": CLAIM})
POD = closed(
    {
        "containers": {"type": "array", "items": CONTAINER, "minItems": 1},
        "volumes": {"type": "array", "items": VOLUME},
    }
)
TEMPLATE = closed({"spec": POD})
WORKERS = closed(
    {
        "groupName": NAME,
        "replicas": COUNT,
        "minReplicas": COUNT,
        "maxReplicas": COUNT,
        "rayStartParams": PARAMETERS,
        "template": TEMPLATE,
    }
)
CLUSTER = closed(
    {
        "rayVersion": {"type": "string"},
        "enableInTreeAutoscaling": {"type": "boolean"},
        "headGroupSpec": closed({"rayStartParams": PARAMETERS, "template": TEMPLATE}),
        "workerGroupSpecs": {"type": "array", "items": WORKERS},
    }
)
RAY_SERVICE = Draft202012Validator(
    closed(
        {
            "apiVersion": {"const": "ray.io/v1"},
            "kind": {"const": "RayService"},
            "metadata": closed({"name": NAME, "labels": PARAMETERS}),
            "spec": closed({"serveConfigV2": {"type": "string"}, "rayClusterConfig": CLUSTER}),
        }
    )
)


@pytest.fixture(scope="module")
def put(linear: str) -> Put:
    return release_of(linear, "churn", batching=BatchingConfig(batch_size_max=32, wait_ms_max=2.5))


def rendered(put: Put, **changes: Any) -> dict[str, str]:
    files = TARGET.render(put.release.model_copy(update=changes), put.model).files
    return {name: content.decode() for name, content in files.items()}


def import_ray() -> Any:
    return pytest.importorskip("ray", reason="Ray is an extra: pip install 'overnight[ray]'")


def check_serve_config(config: dict[str, Any]) -> Any:
    """Hold a config against Ray's own schemas, those too that Ray itself looks at only when it deploys.

    Ray passes over fields that it does not know, so that a typo would do nothing: here each must be known.
    """
    import_ray()
    with warnings.catch_warnings():
        # Ray's, about its own code, when it is imported.
        warnings.simplefilter("ignore", DeprecationWarning)
        from ray.serve.config import AutoscalingConfig
        from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

    schema = ServeDeploySchema.model_validate(config)
    levels: list[tuple[Any, dict[str, Any]]] = [(ServeDeploySchema, config)]
    for application in config["applications"]:
        levels.append((ServeApplicationSchema, application))
        levels += [(DeploymentSchema, deployment) for deployment in application["deployments"]]
        levels += [
            (AutoscalingConfig, deployment["autoscaling_config"])
            for deployment in application["deployments"]
            if "autoscaling_config" in deployment
        ]
    for model, given in levels:
        model.model_validate(given)
        strange = given.keys() - model.model_fields.keys()
        assert not strange, f"{model.__name__} has no {sorted(strange)}"
    return schema


SCALINGS = [Scaling(), Scaling(replicas_max=3), Scaling(replicas_min=0, replicas_max=1)]


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_the_serve_config_is_what_rays_own_schema_takes(put: Put, scaling: Scaling) -> None:
    config = yaml.safe_load(rendered(put, scaling=scaling)["serve.yaml"])

    check_serve_config(config)
    assert "127.0.0.1" == config["http_options"]["host"]


@pytest.mark.parametrize("typo", ["max_ongoing_request", "autoscale_config"])
def test_a_typo_in_the_serve_config_is_caught(put: Put, typo: str) -> None:
    config = yaml.safe_load(rendered(put)["serve.yaml"])
    config["applications"][0]["deployments"][0][typo] = {}

    with pytest.raises(AssertionError, match=typo):
        check_serve_config(config)


def test_a_wrong_value_in_the_serve_config_is_caught(put: Put) -> None:
    from pydantic import ValidationError as Invalid

    config = yaml.safe_load(rendered(put)["serve.yaml"])
    config["applications"][0]["deployments"][0]["max_ongoing_requests"] = 0

    with pytest.raises(Invalid, match="max_ongoing_requests"):
        check_serve_config(config)


def test_the_batching_and_the_scaling_are_in_the_servers_own_settings(put: Put) -> None:
    scaling = Scaling(replicas_min=0, replicas_max=2)
    (application,) = yaml.safe_load(rendered(put, scaling=scaling)["serve.yaml"])["applications"]
    (deployment,) = application["deployments"]
    autoscaling = deployment["autoscaling_config"]

    assert {"batch_size_max": 32, "wait_ms_max": 2.5} == application["args"]
    assert (0, 1, 2) == tuple(autoscaling[name] for name in ("min_replicas", "initial_replicas", "max_replicas"))
    assert 40 == autoscaling["downscale_to_zero_delay_s"]
    assert 64 == deployment["max_ongoing_requests"]
    assert 1 == deployment["ray_actor_options"]["num_cpus"]


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_the_ray_service_is_what_kuberay_takes(put: Put, scaling: Scaling) -> None:
    manifest = yaml.safe_load(rendered(put, scaling=scaling)["rayservice.yaml"])
    RAY_SERVICE.validate(manifest)
    spec = manifest["spec"]
    config = yaml.safe_load(spec["serveConfigV2"])
    check_serve_config(config)
    (pod,) = spec["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    (mount,) = pod["volumeMounts"]

    assert "registry.example/overnight:1" == pod["image"]
    assert import_ray().__version__ == spec["rayClusterConfig"]["rayVersion"]
    assert f"local://{mount['mountPath']}/{make_folder_name(release(put, scaling))}" == working_dir(config)


def release(put: Put, scaling: Scaling) -> Release:
    return put.release.model_copy(update={"scaling": scaling})


def working_dir(config: dict[str, Any]) -> str:
    return str(config["applications"][0]["runtime_env"]["working_dir"])


@pytest.mark.parametrize(
    ("path", "typo"),
    [(("spec",), "serveConfigV3"), (("spec", "rayClusterConfig"), "rayversion"), ((), "metadatas")],
)
def test_a_typo_in_the_ray_service_is_caught(put: Put, path: tuple[str, ...], typo: str) -> None:
    manifest = yaml.safe_load(rendered(put)["rayservice.yaml"])
    place = manifest
    for name in path:
        place = place[name]
    place[typo] = "x"

    with pytest.raises(ValidationError, match=typo):
        RAY_SERVICE.validate(manifest)


def test_an_accelerator_is_asked_for_where_the_engine_is_one(put: Put) -> None:
    engine = put.release.engine.model_copy(update={"device": "cuda"})
    files = rendered(put, engine=engine)
    (application,) = yaml.safe_load(files["serve.yaml"])["applications"]
    manifest = yaml.safe_load(files["rayservice.yaml"])
    RAY_SERVICE.validate(manifest)
    worker = manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]

    assert 1 == application["deployments"][0]["ray_actor_options"]["num_gpus"]
    assert "1" == worker["resources"]["limits"]["nvidia.com/gpu"]


def test_another_batching_lies_in_another_folder_and_the_same_release_in_the_same(put: Put) -> None:
    other = put.release.model_copy(update={"batching": BatchingConfig(batch_size_max=64)})

    assert make_folder_name(put.release) == make_folder_name(put.release.model_copy())
    assert make_folder_name(put.release) != make_folder_name(other)


def test_the_folder_holds_the_application_the_release_and_the_models_files(put: Put) -> None:
    files = TARGET.render(put.release, put.model)

    assert put.model == files.trees["model"]
    assert "serving/protocol/v2_app.py" in files.files
    assert put.release == Release.model_validate_json(files.files["release.json"])
    assert "application" in {
        node.name for node in ast.walk(ast.parse(files.files["application.py"])) if isinstance(node, ast.FunctionDef)
    }


def test_an_endpoints_name_is_held_before_anything_is_rendered(put: Put) -> None:
    with pytest.raises(ValueError, match="endpoint"):
        Release(endpoint="../churn", pin=put.release.pin, contract=put.release.contract)


class Idle(BaseHTTPRequestHandler):
    """Runs no application."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"applications": {}}')


@pytest.fixture
def dashboard() -> Generator[str]:
    with serve_http(Idle) as port:
        yield f"http://127.0.0.1:{port}"


def test_a_proxy_of_the_environment_never_sees_the_token(
    dashboard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    target = RayServeTarget(folder=str(tmp_path))
    host = RayServeHost(dashboard_url=dashboard, serve_url=dashboard, folder=tmp_path, target=target, token="0" * 64)
    pin = ModelPin(name="toy", version="1", model_id=None, source="", digest="")

    host.remove(Release(endpoint="toy", pin=pin, contract=matrix(2)))
