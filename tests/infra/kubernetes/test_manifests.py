"""What every overlay promises, held against the manifests that it renders to, each as a cluster would read it."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from infra.kubernetes import list_overlays, list_references
from infra.kubernetes.checks import Document
from serving.gateway import supervisor
from tasks.batch.options import BatchOptions
from tests.infra.kubernetes.cluster import (
    FOLDER,
    OVERLAYS,
    Pod,
    count_pod_specs,
    is_selected,
    list_kind,
    list_pods,
    make_network,
    render,
    write_endpoints,
)
from tests.infra.kubernetes.schemas import check_against_schema, check_pod

DOCS = Path(__file__).parents[3] / "docs/kubernetes.md"
URL = re.compile(r"https?://(?P<service>[a-z-]+)\.(?P<namespace>[a-z-]+)\.svc:(?P<port>\d+)")


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def documents(overlay: str, tmp_path_factory: pytest.TempPathFactory) -> list[Document]:
    """The manifests of an overlay, and beside them those of endpoints on KServe, Seldon and Ray Serve."""
    return render(overlay, write_endpoints(tmp_path_factory.mktemp("endpoints")))


@pytest.fixture(scope="module")
def pods(documents: list[Document]) -> list[Pod]:
    found = list_pods(documents)

    assert len(found) == count_pod_specs(documents) + 3, "the pods of every manifest, and the flow runs of three pools"
    return found


def find_pod(pods: list[Pod], name: str) -> Pod:
    (found,) = [pod for pod in pods if pod.component == name]
    return found


def test_the_overlays_are_those_that_are_tested() -> None:
    assert list(OVERLAYS) == list_overlays()


def test_every_manifest_fits_the_schema_of_its_kind_strictly(documents: list[Document]) -> None:
    for document in documents:
        check_against_schema(document)

    kinds = {each["kind"] for each in documents}
    assert {"RayCluster", "RayService", "InferenceService", "Experiment", "Gateway", "SecurityPolicy"} < kinds


def test_every_pod_of_a_flow_run_fits_kubernetes_own_schema(pods: list[Pod]) -> None:
    runs = [pod for pod in pods if pod.name.startswith("flow run")]
    for pod in runs:
        check_pod(dict(pod.spec))

    assert {"overnight.yaml", "overnight-spot.yaml", "overnight-on-demand.yaml"} == {
        pod.name.removeprefix("flow run of ") for pod in runs
    }


def test_no_pod_runs_as_root_gains_privileges_or_writes_to_its_image(pods: list[Pod]) -> None:
    for pod in pods:
        security = pod.spec["securityContext"]
        assert (True, True) == (security["runAsNonRoot"], security["runAsUser"] > 0), pod.name
        assert {"type": "RuntimeDefault"} == security["seccompProfile"], pod.name
        for container in pod.containers:
            assert {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            } == container["securityContext"], pod.name
            assert "/tmp" in [each["mountPath"] for each in container["volumeMounts"]], pod.name  # noqa: S108


def test_every_container_has_requests_and_limits(pods: list[Pod]) -> None:
    for pod in pods:
        for container in pod.containers:
            for side in ("requests", "limits"):
                assert {"cpu", "memory"} <= container["resources"][side].keys(), (pod.name, container["name"])


def test_only_the_worker_of_prefect_may_ask_the_api_of_the_cluster(pods: list[Pod]) -> None:
    asking = {pod.name for pod in pods if pod.spec.get("automountServiceAccountToken") is not False}

    # The heads ask for nodes by accounts that KubeRay makes for them.
    assert {
        "Deployment prefect-worker overnight",
        "RayCluster ray ray-head",
        "RayService scores-1 ray-head",
    } == asking


def test_the_account_of_prefects_worker_may_start_jobs_and_nothing_about_secrets(documents: list[Document]) -> None:
    (role,) = list_kind(documents, "Role")
    rules = {resource: set(rule["verbs"]) for rule in role["rules"] for resource in rule["resources"]}

    assert {"jobs", "pods", "pods/log", "pods/status", "events"} == rules.keys()
    assert [resource for resource, verbs in rules.items() if "create" in verbs] == ["jobs"]
    assert [] == list_kind(documents, "ClusterRole")


def test_pods_have_more_time_to_end_than_what_they_run_takes_to_drain(
    pods: list[Pod], documents: list[Document]
) -> None:
    drains: dict[str, float] = {
        "flow-run": BatchOptions(key_columns=("customer",)).notice_seconds,
        "gateway": supervisor.STOP_S_MAX,
    }
    for pod in pods:
        grace = pod.spec.get("terminationGracePeriodSeconds")
        assert grace is None or grace > drains.get(pod.component, 0), pod.name
    (service,) = list_kind(documents, "RayService")
    applications = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    (workers,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    longest = max(each["graceful_shutdown_timeout_s"] for each in applications[0]["deployments"])

    assert workers["template"]["spec"]["terminationGracePeriodSeconds"] > longest
    assert 3 == sum("flow-run" == pod.component for pod in pods)


def list_spot_keys(pod: Pod) -> tuple[set[str], set[str], set[str]]:
    """The labels by which a pod wants a spot machine, those by which it wants none, and the taints it tolerates."""
    affinity = pod.spec.get("affinity", {}).get("nodeAffinity", {})
    terms = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", [])
    asked = [expression for term in terms for expression in term["matchExpressions"]]
    return (
        {each["key"] for each in asked if each["operator"] == "In"},
        {each["key"] for each in asked if each["operator"] == "NotIn"},
        {each["key"] for each in pod.spec.get("tolerations", ()) if each["effect"] == "NoSchedule"},
    )


CLOUDS = {
    "cloud.google.com/gke-spot",
    "eks.amazonaws.com/capacityType",
    "karpenter.sh/capacity-type",
    "kubernetes.azure.com/scalesetpriority",
}


def test_runs_of_the_spot_pool_and_workers_of_ray_are_on_spot_machines_and_nothing_else_is(
    pods: list[Pod], overlay: str
) -> None:
    gpu = {"nvidia.com/gpu"} if overlay == "gpu-spot" else set()
    spot = {"flow run of overnight-spot.yaml", "RayCluster ray ray-worker", "RayService scores-1 ray-worker"}
    for pod in pods:
        wants, shuns, tolerates = list_spot_keys(pod)
        if pod.name in spot:
            assert (CLOUDS, set()) == (wants, shuns), pod.name
            assert CLOUDS | gpu <= tolerates, pod.name
        else:
            assert (set(), set()) == (wants, tolerates), pod.name
            assert shuns == (CLOUDS if "on-demand" in pod.name else set()), pod.name

    assert spot <= {pod.name for pod in pods}


def test_each_cloud_alone_is_enough_for_a_spot_machine(pods: list[Pod]) -> None:
    (pod,) = [pod for pod in pods if pod.name == "flow run of overnight-spot.yaml"]
    terms = pod.spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]

    assert [1] * len(CLOUDS) == [len(term["matchExpressions"]) for term in terms], "terms are alternatives"


def test_gpus_are_given_where_the_overlay_has_them(pods: list[Pod], overlay: str) -> None:
    given = {
        pod.name
        for pod in pods
        for container in pod.containers
        if container["resources"]["limits"].get("nvidia.com/gpu") == "1"
    }

    assert given == (
        {"flow run of overnight-spot.yaml", "RayCluster ray ray-worker"} if overlay == "gpu-spot" else set()
    )


def test_a_flow_run_is_started_once_by_kubernetes() -> None:
    job = yaml.safe_load((FOLDER / "work-pool.json").read_text())["job_configuration"]["job_manifest"]["spec"]

    assert (0, 1, 1, "Never") == (
        job["backoffLimit"],
        job["parallelism"],
        job["completions"],
        job["template"]["spec"]["restartPolicy"],
    )


def test_prefect_asks_everybody_for_the_string_of_a_secret(pods: list[Pod]) -> None:
    def list_sources(pod: Pod, variable: str) -> list[Any]:
        return [
            each.get("valueFrom", {}).get("secretKeyRef")
            for container in pod.containers
            for each in container.get("env", ())
            if each["name"] == variable
        ]

    secret = {"name": "prefect-auth", "key": "auth-string"}
    worker = find_pod(pods, "prefect-worker")
    assert [secret] == list_sources(find_pod(pods, "prefect-server"), "PREFECT_SERVER_API_AUTH_STRING")
    assert [secret] * 4 == list_sources(worker, "PREFECT_API_AUTH_STRING")
    # The Jobs that the workers start refer to it as well.
    for container in worker.spec["containers"]:
        env = {each["name"]: each.get("value") for each in container["env"]}
        names = [
            env[f"PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET_{part}"] for part in ("NAME", "KEY")
        ]
        assert ["prefect-auth", "auth-string"] == names


def test_settings_of_prefect_and_mlflow_are_ones_that_they_have(pods: list[Pod]) -> None:
    import mlflow.environment_variables
    from mlflow.cli import server
    from prefect.settings import Settings

    def list_settings(model: Any, prefix: str) -> set[str]:
        found = set()
        for name, field in model.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                found |= list_settings(field.annotation, field.annotation.model_config["env_prefix"])
            aliases = getattr(field.validation_alias, "choices", ())
            found |= {f"{prefix}{name}".upper(), *(each.upper() for each in aliases if isinstance(each, str))}
        return found

    mlflows = {each.envvar for each in server.params if isinstance(each.envvar, str)}
    known = list_settings(Settings, "PREFECT_") | mlflows | set(vars(mlflow.environment_variables))
    # Of a package that only the image of the worker has; and one that Prefect reads without a setting.
    elsewhere = ("PREFECT_INTEGRATIONS_KUBERNETES_", "PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR")
    named = {each["name"] for pod in pods for container in pod.containers for each in container.get("env", ())}

    assert set() == {
        name
        for name in named
        if name.startswith(("PREFECT_", "MLFLOW_")) and not name.startswith(elsewhere) and name not in known
    }


@cache
def read_options(*command: str) -> frozenset[str]:
    """The options that a program has, by its help."""
    done = subprocess.run([sys.executable, "-m", *command, "--help"], capture_output=True, text=True, check=True)
    return frozenset(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", done.stdout))


def test_every_command_has_the_options_that_it_is_started_with(pods: list[Pod]) -> None:
    from mlflow.cli import server

    from deployments.command_line import app

    options = {
        "prefect server start": lambda: read_options("prefect", "server", "start"),
        "prefect worker start": lambda: read_options("prefect", "worker", "start"),
        "mlflow server": lambda: {option for each in server.params for option in each.opts},
        "python -m serving.gateway": lambda: read_options("serving.gateway"),
        "overnight kubernetes deploy": lambda: {
            option
            for each in typer.main.get_command(app).commands["kubernetes"].commands["deploy"].params  # type: ignore[attr-defined]
            for option in each.opts
        },
    }
    started = [each["command"] for pod in pods for each in pod.containers if "command" in each]
    for command in started:
        (name,) = [each for each in options if " ".join(command).startswith(each)]
        asked = {each for each in command[len(name.split()) :] if each.startswith("-")}
        # The help of Prefect cuts this one off.
        known = set(options[name]()) | {"--no-create-pool-if-not-found"}
        assert asked <= known, command

    assert 7 == len(started)


def test_every_service_has_pods_that_listen_on_its_ports(documents: list[Document], pods: list[Pod]) -> None:
    services = list_kind(documents, "Service")
    for service in services:
        selected = [
            pod
            for pod in pods
            if pod.namespace == service["metadata"]["namespace"]
            and is_selected(pod.labels, {"matchLabels": service["spec"]["selector"]})
        ]
        assert 1 == len(selected), service["metadata"]["name"]
        ports = {each["name"]: each["containerPort"] for c in selected[0].containers for each in c.get("ports", ())}
        assert {each["targetPort"] for each in service["spec"]["ports"]} <= ports.keys()

    assert {"postgres", "prefect-server", "mlflow", "gateway"} == {each["metadata"]["name"] for each in services}


def test_whatever_is_alone_has_a_budget_of_disruptions(documents: list[Document], pods: list[Pod]) -> None:
    budgets = list_kind(documents, "PodDisruptionBudget")
    selected = [
        pod.name
        for budget in budgets
        for pod in pods
        if is_selected(pod.labels, budget["spec"]["selector"])
        and pod.namespace == budget["metadata"]["namespace"]
        and 1 == budget["spec"]["minAvailable"]
    ]

    assert [
        "Deployment mlflow mlflow",
        "Deployment prefect-server prefect-server",
        "RayCluster ray ray-head",
        "StatefulSet gateway gateway",
        "StatefulSet postgres postgres",
    ] == sorted(selected)


def test_what_pods_refer_to_is_there_or_documented(documents: list[Document]) -> None:
    made = {(each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"]) for each in documents}
    text = DOCS.read_text()
    left = [each for each in list_references(documents) if (each.kind, each.namespace, each.name) not in made]

    assert {"Secret", "PersistentVolumeClaim"} == {each.kind for each in left}
    for each in left:
        name = each.name.replace("scores-", "NAME-")
        lines = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        assert any(all(f"`{key}`" in line for key in each.keys) for line in lines), each


def test_nothing_is_reached_by_default(documents: list[Document], pods: list[Pod]) -> None:
    network = make_network(documents)
    denied = [each for each in network.policies if each["metadata"]["name"] == "default-deny"]
    for each in denied:
        assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} == each["spec"]
    assert {"overnight", "overnight-models"} == {each["metadata"]["namespace"] for each in denied}
    for pod in pods:
        own = [
            policy["metadata"]["name"]
            for direction in ("ingress", "egress")
            for policy in network.list_policies(pod, direction)
            if policy["metadata"]["name"] not in ("default-deny", "names")
        ]
        assert own, f"{pod.name} needs a policy of its own"


def test_pods_reach_what_their_settings_name(documents: list[Document], pods: list[Pod]) -> None:
    network = make_network(documents)
    seen = set()
    for pod in pods:
        for container in pod.containers:
            for variable in container.get("env", ()):
                if found := URL.match(str(variable.get("value", ""))):
                    target = find_pod(pods, found["service"])
                    assert target.namespace == found["namespace"]
                    assert network.allows(pod, target, int(found["port"])), (pod.name, variable["name"])
                    seen.add((pod.component, found["service"]))

    assert {("prefect-worker", "prefect-server"), ("flow-run", "mlflow"), ("flow-run", "gateway")} <= seen
    for name in ("prefect-server", "mlflow"):
        assert network.allows(find_pod(pods, name), find_pod(pods, "postgres"), 5432)


def test_pods_reach_nothing_else(documents: list[Document], pods: list[Pod]) -> None:
    network = make_network(documents)
    names = ("postgres", "prefect-server", "prefect-worker", "mlflow", "gateway")
    by_name = {name: find_pod(pods, name) for name in names}
    by_name["flow-run"] = next(pod for pod in pods if pod.name.startswith("flow run"))
    by_name["ray"] = next(pod for pod in pods if pod.name == "RayCluster ray ray-head")
    ports = (80, 4200, 5000, 5432, 6379, 8000, 8080, 8265, 10001)
    reached = {
        (source, target, port)
        for source, one in by_name.items()
        for target, other in by_name.items()
        for port in ports
        if source != target and network.allows(one, other, port)
    }

    assert {
        ("prefect-server", "postgres", 5432),
        ("mlflow", "postgres", 5432),
        ("prefect-worker", "prefect-server", 4200),
        ("flow-run", "prefect-server", 4200),
        ("flow-run", "mlflow", 5000),
        ("flow-run", "gateway", 8080),
        ("flow-run", "ray", 8000),
        ("flow-run", "ray", 8265),
        ("flow-run", "ray", 10001),
        ("ray", "prefect-server", 4200),
        ("ray", "mlflow", 5000),
        ("gateway", "ray", 8000),
    } == reached


def test_only_what_needs_it_reaches_the_outside_and_the_metadata_of_machines(
    documents: list[Document], pods: list[Pod]
) -> None:
    network = make_network(documents)

    def list_names(address: str, port: int) -> set[str]:
        return {pod.component for pod in pods if network.allows_outside(pod, address, port)}

    assert {"flow-run", "mlflow", "prefect-worker", "ray", "RayService"} == list_names("203.0.113.7", 443)
    assert {"flow-run"} == list_names("169.254.169.254", 80)
    assert set() == list_names("203.0.113.7", 80)
    assert set() == list_names("203.0.113.7", 5432)


def test_model_servers_answer_gateways_alone(documents: list[Document], pods: list[Pod]) -> None:
    network = make_network(documents)
    server = Pod(name="model server", namespace="overnight-models", labels={"app": "scores"}, spec={"containers": []})
    envoy = Pod(name="envoy", namespace="envoy-gateway-system", labels={}, spec={"containers": []})
    stranger = Pod(name="stranger", namespace="default", labels={}, spec={"containers": []})

    assert network.allows(envoy, server, 8080)
    assert network.allows(find_pod(pods, "gateway"), server, 8080)
    assert not network.allows(stranger, server, 8080)
    assert not network.allows(find_pod(pods, "prefect-server"), server, 8080)


def test_a_pod_with_the_label_of_a_caller_reaches_the_gateway(documents: list[Document], pods: list[Pod]) -> None:
    network = make_network(documents)
    gateway = find_pod(pods, "gateway")
    for labels, may in (({"overnight/calls-gateway": "true"}, True), ({}, False)):
        caller = Pod(name="caller", namespace="shop", labels=labels, spec={"containers": []})
        assert may == network.allows(caller, gateway, 8080)


def test_endpoints_are_at_the_gateway_of_the_overlay_which_takes_their_routes(documents: list[Document]) -> None:
    (gateway,) = list_kind(documents, "Gateway")
    names = {each["name"] for each in gateway["spec"]["listeners"]}
    labels = {each["metadata"]["name"]: each["metadata"]["labels"] for each in list_kind(documents, "Namespace")}
    parents = [parent for route in list_kind(documents, "HTTPRoute") for parent in route["spec"]["parentRefs"]]

    assert {("public", "overnight-models", "https")} == {
        (each["name"], each["namespace"], each["sectionName"]) for each in parents
    }
    assert {"https", "grpc"} == names
    for listener in gateway["spec"]["listeners"]:
        assert is_selected(labels["overnight-models"], listener["allowedRoutes"]["namespaces"]["selector"])
    (kind,) = list_kind(documents, "GatewayClass")
    assert kind["metadata"]["name"] == gateway["spec"]["gatewayClassName"]


def test_rollouts_are_as_their_target_wrote_them(documents: list[Document], tmp_path: Path) -> None:
    folder = write_endpoints(tmp_path / "endpoints")
    paths = [folder / name / "kubernetes/rollout.yaml" for name in ("kserve", "seldon")]
    written = [each for path in paths for each in yaml.safe_load_all(path.read_text())]

    assert {"InferenceService", "Model", "Experiment", "HTTPRoute"} < {each["kind"] for each in written}
    assert all(each in documents for each in written)
