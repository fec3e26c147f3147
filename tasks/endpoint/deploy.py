"""Releases, and the hosts that serve them: one for each kind of target."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

from serving.errors import BadInput
from serving.extras import import_extra
from serving.gateway.route import Route
from serving.model.batching import BatchingConfig
from serving.model.contract import Contract
from serving.model.environment_choice import OwnEnvironment
from serving.model.graph import AnyRelease, Graph, share_batching
from serving.model.pin import ModelPin
from serving.model.registry import Resolved
from serving.model.release import Release
from serving.targets import Address, GraphHost, Host
from serving.targets.kubernetes_cluster import ClusterTarget, dump_manifests
from tasks.endpoint.resolve import LoadedGraph, LoadedModel, load_endpoint_graph
from tasks.endpoint.spec import EndpointSpec, read_secret, read_variable
from tasks.endpoint.targets import AnyTarget, BentoML, External, KServe, RayServe, Seldon, Triton
from tasks.endpoint.traffic import list_used_versions, remove_versions

if TYPE_CHECKING:
    from serving.targets.folder import FolderHost

_RAY_TOKEN = "RAY_AUTH_TOKEN"  # noqa: S105 - the name of a variable


def make_host(target: AnyTarget, keep_warm_seconds: float | None = None) -> Host:
    """Return the host of a target, which deploys and removes releases. Only the target that is asked for is imported.

    `keep_warm_seconds` is for a target that scales to zero by itself. No server is asked. Raises BadInput where a
    package that the target needs is missing.
    """
    return _HOSTS[type(target)](target, keep_warm_seconds)


def _make_triton_host(target: Triton, _keep_warm_seconds: float | None) -> Host:
    triton = import_extra("serving.targets.triton", "serve")
    host: Host = triton.TritonHost(repository=Path(target.repository), url=target.url, grpc=target.grpc)
    return host


def _make_ray_serve_host(target: RayServe, keep_warm_seconds: float | None) -> Host:
    from serving.targets.ray_serve import RayServeHost, RayServeTarget  # noqa: PLC0415 - an endpoint needs one target of several

    token = read_secret(target.token_secret) if target.token_secret else read_variable(_RAY_TOKEN)
    ray_serve = RayServeTarget(folder=target.folder)
    if keep_warm_seconds is not None:
        ray_serve = replace(ray_serve, keep_warm_seconds=keep_warm_seconds)
    return RayServeHost(
        dashboard_url=target.dashboard,
        serve_url=target.url,
        folder=Path(target.folder),
        target=ray_serve,
        token=token,
    )


def _make_external_host(target: External, _keep_warm_seconds: float | None) -> Host:
    from serving.targets.external import ExternalHost  # noqa: PLC0415 - the same

    return ExternalHost(url=target.url, model=target.model, version=target.version)


def _make_folder_host(target: BentoML | KServe | Seldon, _keep_warm_seconds: float | None = None) -> FolderHost:
    from serving.targets.folder import FolderHost  # noqa: PLC0415 - the same

    return FolderHost(folder=Path(target.folder), target=_make_folder_target(target))


# A line for each target: what makes its host, of the target and of the seconds that it is kept warm.
_HOSTS: Mapping[type[AnyTarget], Callable[[Any, float | None], Host]] = {
    Triton: _make_triton_host,
    RayServe: _make_ray_serve_host,
    BentoML: _make_folder_host,
    KServe: _make_folder_host,
    Seldon: _make_folder_host,
    External: _make_external_host,
}


def _make_folder_target(target: BentoML | KServe | Seldon) -> ClusterTarget:
    cluster = target.cluster
    names: dict[str, Any] = {} if cluster is None else {"namespace": cluster.namespace}
    if cluster is not None and cluster.storage_uri is not None:
        names["storage_uri"] = cluster.storage_uri.rstrip("/")
    match target:
        case BentoML():
            from serving.targets.bentoml import BentoMLTarget  # noqa: PLC0415 - the same

            return BentoMLTarget(python=Path(target.python))
        case KServe():
            from serving.targets.kserve import KServeTarget  # noqa: PLC0415 - the same

            return KServeTarget(python=Path(target.python), **names)
        case Seldon():
            from serving.targets.seldon import SeldonTarget  # noqa: PLC0415 - the same

            return SeldonTarget(python=Path(target.python), **names)
        case _:
            assert_never(target)


def deploy_release(
    target: AnyTarget, release: AnyRelease, models: Sequence[Path], keep_warm_seconds: float | None = None
) -> Address:
    """Deploy a release or a graph, whose models' files lie in `models`, and return where it answers.

    Raises EndpointFailed, and BadInput for a graph on a target that has none.
    """
    if isinstance(release, Release):
        (model,) = models
        return make_host(target, keep_warm_seconds).deploy(release, model)
    return make_graph_host(target, keep_warm_seconds).deploy_graph(release, models)


def make_graph_host(target: AnyTarget, keep_warm_seconds: float | None = None) -> GraphHost:
    """Return the host of a target for graphs. Raises BadInput, with what to do, where the target has none."""
    host = make_host(target, keep_warm_seconds)
    if isinstance(host, GraphHost):
        return host
    next_move = (
        "Only a cluster chains its models: write the manifests for it by write_graph_manifests of "
        "tasks.endpoint.deploy, and apply them."
        if isinstance(target, Seldon)
        else "It chains no models: choose one of those targets, or log what the models do together as one model."
    )
    message = f"A graph must be deployed on triton or ray-serve, got {target.kind}. {next_move}"
    raise BadInput(message)


def write_graph_manifests(spec: EndpointSpec, folder: Path) -> Path:
    """Write what a cluster with Seldon Core 2 needs of a spec's graph below a folder, and return where.

    The cluster finds the files below the target's storage_uri. Nothing is deployed. Raises BadInput for another target.
    """
    from serving.targets.folder import write_folder  # noqa: PLC0415 - an endpoint needs one target of several
    from serving.targets.seldon import SeldonTarget  # noqa: PLC0415 - the same

    if not isinstance(spec.target, Seldon) or not spec.graph_steps:
        message = (
            f"The manifests must be those of a graph on seldon, got the target {spec.target.kind} and "
            f"{len(spec.graph_steps)} steps. Deploy others with online_endpoint."
        )
        raise BadInput(message)
    loaded = load_endpoint_graph(spec)
    graph = make_graph(spec, loaded, spec.batching or BatchingConfig())
    written = folder / graph.endpoint / graph.version
    seldon = SeldonTarget(python=Path(spec.target.python))
    write_folder(seldon.render_graph(graph, [step.folder for step in loaded.steps]), written)
    return written


def make_endpoint_release(
    spec: EndpointSpec, loaded: LoadedModel | LoadedGraph, batching: BatchingConfig
) -> AnyRelease:
    """Return the release of a model version, or the graph of several, that a spec asks for."""
    if isinstance(loaded, LoadedModel):
        return make_release(spec, loaded, batching)
    return make_graph(spec, loaded, batching)


def make_release(spec: EndpointSpec, loaded: LoadedModel, batching: BatchingConfig) -> Release:
    """Return the release of a model version that a spec asks for."""
    return _make_release(spec, loaded.resolved, loaded.contract, loaded.environment, batching)


def make_graph(spec: EndpointSpec, loaded: LoadedGraph, batching: BatchingConfig) -> Graph:
    """Return the graph that a spec asks for; a step without batching of its own has its share of the graph's."""
    parts = zip(spec.graph_steps, loaded.steps, loaded.contracts, loaded.environments, strict=True)
    steps = tuple(
        _make_release(
            *(spec, resolved, contract, environment),
            step.batching or share_batching(loaded.combine, batching, position),
        )
        for position, (step, resolved, contract, environment) in enumerate(parts)
    )
    return Graph(endpoint=spec.name, version=loaded.version, combine=loaded.combine, steps=steps)


def _make_release(
    spec: EndpointSpec,
    resolved: Resolved,
    contract: Contract,
    environment: OwnEnvironment | None,
    batching: BatchingConfig,
) -> Release:
    return Release(
        endpoint=spec.name,
        pin=resolved.pin,
        contract=contract,
        batching=batching,
        scaling=spec.scaling,
        allow_pickle=spec.allow_pickle,
        rows_max=spec.limits.rows_max,
        environment=environment,
    )


def make_release_to_remove(endpoint: str, version: str, contract: Contract) -> Release:
    """Return what a host needs of a release to take it down: no model."""
    pin = ModelPin(name=endpoint, version=version, model_id=None, source="", digest="")
    return Release(endpoint=endpoint, pin=pin, contract=contract)


def render_rollout(target: AnyTarget, endpoint: str, route: Route, release: Release | None = None) -> bytes | None:
    """Return the manifests by which the target's cluster has the traffic of a route, None where it names no cluster.

    Args:
        target: The target.
        endpoint: The endpoint's name.
        route: The route; every version that gets requests, or copies of them, is in the target's folder.
        release: A release of the route that is not in the folder yet.

    Raises:
        BadInput: The cluster cannot have that route; the message says why.
    """
    if not isinstance(target, BentoML | KServe | Seldon) or target.cluster is None:
        return None
    host = _make_folder_host(target)
    releases = {each.version: host.read_release(endpoint, each.version) for each in route.versions}
    if release is not None:
        releases[release.version] = release
    found = {version: each for version, each in releases.items() if each is not None}
    elsewhere = tuple(version for version in releases if version not in found)
    if used := [version for version in elsewhere if version in list_used_versions(route)]:
        message = (
            f"Versions that share requests on a cluster must all be in {target.folder}, but version "
            f"{', '.join(used)} of {endpoint} is on another target. Roll the new one out all at once."
        )
        raise BadInput(message)
    known = remove_versions(route, elsewhere)
    return dump_manifests(_make_folder_target(target).render_rollout(endpoint, known, found, target.cluster))


def write_rollout(target: AnyTarget, endpoint: str, route: Route) -> None:
    """Write the manifests of a route beside the releases in the target's folder, where the target names a cluster.

    Raises:
        BadInput: The cluster cannot have that route.
        EndpointFailed: The folder cannot be written.
    """
    manifests = render_rollout(target, endpoint, route)
    if manifests is not None and isinstance(target, BentoML | KServe | Seldon):
        _make_folder_host(target).write_rollout(endpoint, manifests)
