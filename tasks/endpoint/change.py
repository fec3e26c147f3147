"""The change from the current release of an endpoint to another: deployed, given its traffic, or undone."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn, Self
from urllib.parse import urlsplit

from serving.errors import BadInput, EndpointFailed
from serving.gateway.client import GatewayClient
from serving.gateway.route import Route, SleepRule
from serving.model.batching import BatchingConfig
from serving.model.graph import AnyRelease, Graph
from serving.model.release import Release
from serving.targets import Address, Host
from tasks.common.artifacts import Logger
from tasks.endpoint.batching import BatchingChoice, ServedSettings, read_settings
from tasks.endpoint.client import is_ready
from tasks.endpoint.deploy import (
    deploy_release,
    make_endpoint_release,
    make_host,
    make_release_to_remove,
    render_rollout,
    write_rollout,
)
from tasks.endpoint.resolve import LoadedGraph, LoadedModel
from tasks.endpoint.spec import EndpointSpec
from tasks.endpoint.targets import RayServe, Triton
from tasks.endpoint.traffic import (
    choose_keep_warm_seconds,
    dump_spec,
    keep_awake,
    list_idle_versions,
    list_serving_versions,
    list_used_versions,
    make_route,
    remove_versions,
    wait_until_idle,
)


@dataclass(slots=True, kw_only=True)
class Change:
    """One release or graph, the host that it goes to, and the route that was there before.

    `models` has the folder of the model's files, of a graph one for each step.
    `previous_release` is the same version as it was served before this change, None where that is not known.
    `is_deployed` says whether this change has deployed anything.
    """

    spec: EndpointSpec
    gateway: GatewayClient
    release: AnyRelease
    models: tuple[Path, ...]
    current_route: Route | None
    previous_release: AnyRelease | None
    logger: Logger
    keep_warm: float | None = None
    is_deployed: bool = field(default=False, init=False)

    def find_current_address(self) -> Address | None:
        """Return where this very release answers already; None where it is not up, or was served otherwise."""
        if self.is_deployed or self.current_route is None or self.previous_release != self.release:
            return None
        if self.current_route.sleep is not None:
            status = self.gateway.get(self.spec.name)
            if status is None or status.models != "awake":
                # It may be on its way out of the server.
                return None
        address = find_address(self.current_route, self.release.version)
        return address if address and is_ready(address) else None

    def without_batching(self) -> Self:
        """Return the same change with each request passed alone, to be measured before the batching is set."""
        return replace(self, release=remove_batching(self.release))

    def deploy(self) -> Address:
        """Deploy the release, unless it is up already, and return where it answers. Raises EndpointFailed."""
        if self.current_route is not None and (awake := keep_awake(self.current_route)) != self.current_route:
            # First: a model that is found up could else be unloaded before it has its new route.
            self.gateway.put(self.spec.name, awake)
        if address := self.find_current_address():
            sleep = self.current_route.sleep if self.current_route else None
            self.keep_warm = sleep.keep_warm_s if sleep and self.spec.keep_warm == "auto" else self.keep_warm
            return address
        self.is_deployed = True
        start = time.monotonic()
        address = self._deploy_release()
        if self.spec.keep_warm == "auto":
            self.keep_warm = choose_keep_warm_seconds(self.spec, time.monotonic() - start)
            if isinstance(self.spec.target, RayServe) and self.keep_warm is not None:
                self.release = scale_to_zero(self.release)
                return self._deploy_release()
        return address

    def deploy_again(self) -> Address:
        """Deploy the release although it is up, as where a process of it has died. Raises EndpointFailed."""
        self.is_deployed = True
        return self.deploy()

    def _deploy_release(self) -> Address:
        return deploy_release(self.spec.target, self.release, self.models, self.keep_warm)

    def plan_route(self, address: Address) -> Route:
        """Return the route by which the release gets its traffic."""
        # Ray scales to zero by itself; the gateway unloads models of Triton.
        sleep, target = None, self.spec.target
        if isinstance(target, Triton) and self.keep_warm is not None:
            sleep = SleepRule(keep_warm_s=self.keep_warm, grpc=target.grpc)
        return make_route(self.spec, self.current_route, self.release.contract, address, self.release.version, sleep)

    @contextmanager
    def undo_on_failure(self) -> Generator[None]:
        """Undo the change where the block raises; the message of an EndpointFailed then also says what serves on."""
        try:
            yield
        except EndpointFailed as error:
            self._raise_with_outcome(error, self._undo())
        except BaseException:
            self._undo()
            raise

    def _raise_with_outcome(self, error: EndpointFailed, route: Route | None) -> NoReturn:
        serving = list_serving_versions(route)
        outcome = "The release is taken down" if self.spec.target.deploys else "The release gets no traffic"
        if self.release.version in serving:
            words = f"Version {self.release.version} serves on."
        elif self.release.version in list_used_versions(route):
            words = f"Version {self.release.version} stays a shadow, and version {', '.join(serving)} serves on."
        elif serving:
            words = f"{outcome}, and version {', '.join(serving)} serves on."
        else:
            words = f"{outcome}; nothing serves now."
        message = f"{error} {words}"
        raise type(error)(message) from error

    def _undo(self) -> Route | None:
        """Restore the route of before, take the release down, and return the route that is in force then.

        A route that another call has put or removed meanwhile stays as it is, with its versions. What fails is logged.
        """
        route = self.current_route
        try:
            status = self.gateway.get(self.spec.name)
            found = status.route if status else None
            if self._knows_route(found):
                self._restore_route()
            else:
                self.logger.warning("Another call has changed the route of %s, which stays.", self.spec.name)
                route = found
                if found is None or found.find_version(self.release.version) is None:
                    self._remove_release()
        except (EndpointFailed, BadInput) as error:
            self.logger.warning("The change must be undone, got: %s. Look at version %s.", error, self.release.version)
        return route

    def _restore_route(self) -> None:
        self._set_route(self.current_route and keep_awake(self.current_route))
        if self.release.version not in list_used_versions(self.current_route):
            self._remove_release()
        elif self.is_deployed and self.previous_release is not None:
            deploy_release(self.spec.target, self.previous_release, self.models, self.keep_warm)
        self._set_route(self.current_route)
        if self.current_route is not None:
            write_rollout(self.spec.target, self.spec.name, self.current_route)

    def _knows_route(self, route: Route | None) -> bool:
        """Whether a route is that of before or of this change, as far as the gateway has carried it on."""
        if route is None:
            return self.current_route is None
        before = () if self.current_route is None else (self.current_route.spec,)
        return route.spec in (*before, dump_spec(self.spec))

    def _remove_release(self) -> None:
        wait_until_idle(self.gateway, self.spec.name, (self.release.version,))
        release = make_release_to_remove(self.spec.name, self.release.version, self.release.contract)
        make_host(self.spec.target).remove(release)

    def _set_route(self, route: Route | None) -> None:
        now = self.gateway.get(self.spec.name)
        if route is None:
            if now is not None:
                self.gateway.delete(self.spec.name)
        elif now is None or now.route != route:
            self.gateway.put(self.spec.name, route)

    def remove_idle_versions(self, address: Address) -> tuple[str, ...]:
        """Take away the versions that have no traffic any more, and return them. A failure is logged."""
        status = self.gateway.get(self.spec.name)
        idle = list_idle_versions(status.route) if status else ()
        if status is None or not idle:
            return ()
        route = remove_versions(status.route, idle)
        self.gateway.put(self.spec.name, keep_awake(route))
        try:
            wait_until_idle(self.gateway, self.spec.name, idle)
        except EndpointFailed as error:
            # In the route again, so that the next call takes them down.
            self._set_route(status.route)
            self.logger.warning("Version %s must have no requests any more, got: %s", ", ".join(idle), error)
            return ()
        removed = tuple(version for version in idle if self._remove_version(status.route, version, address))
        self._set_route(route)
        return removed

    def _remove_version(self, route: Route, version: str, address: Address) -> bool:
        other = find_address(route, version)
        if not self.spec.target.deploys:
            self.logger.info("Version %s gets no traffic any more, and stays at %s.", version, other and other.url)
            return True
        # Ports of one target differ where each release has a server of its own.
        if other is None or urlsplit(other.url).hostname != urlsplit(address.url).hostname:
            where = other.url if other else "nowhere"
            self.logger.warning("Version %s is on another target, at %s: take it down there.", version, where)
            return False
        try:
            make_host(self.spec.target).remove(make_release_to_remove(self.spec.name, version, route.contract))
        except EndpointFailed as error:
            self.logger.warning("Version %s must be taken down, got: %s. Retire it later.", version, error)
            return False
        return True


def plan_change(
    spec: EndpointSpec,
    loaded: LoadedModel | LoadedGraph,
    choice: BatchingChoice,
    gateway: GatewayClient,
    current_route: Route | None,
    logger: Logger,
) -> Change:
    """Return the change that a spec asks for. Nothing is deployed yet.

    Raises BadInput where the version that serves under this number is not known to be of this model, or where the
    target names a cluster that cannot have the rollout.
    """
    keep_warm = None if spec.keep_warm == "auto" else spec.keep_warm
    release = make_chosen_release(spec, loaded, choice, keep_warm=keep_warm)
    before = read_settings(loaded.settings_name(spec.name), loaded.sources[-1].tags)
    is_served = loaded.version in list_serving_versions(current_route)
    if before is None and is_served and isinstance(loaded, LoadedModel):
        message = (
            f"The versions of an endpoint must be those of one registered model, but version {loaded.version} of "
            f"{spec.name} serves already, and {loaded.resolved.pin.uri} does not know of it. Give the endpoint "
            "another name, or retire it first."
        )
        raise BadInput(message)
    change = Change(
        spec=spec,
        gateway=gateway,
        release=release,
        models=tuple(source.folder for source in loaded.sources),
        current_route=current_route,
        previous_release=None if before is None else make_previous_release(spec, loaded, before, current_route),
        logger=logger,
        keep_warm=keep_warm,
    )
    nowhere = Address(url="http://localhost", model=spec.name, version=None)
    if isinstance(release, Release):  # no target with a cluster takes a graph
        render_rollout(spec.target, spec.name, change.plan_route(nowhere), release)
    return change


def make_previous_release(
    spec: EndpointSpec, loaded: LoadedModel | LoadedGraph, before: ServedSettings, route: Route | None
) -> AnyRelease:
    """Return the release as it was served before, by the settings of then and the params of its route."""
    spec = spec.model_copy(update={"scaling": before.chosen.choose_scaling(before.scaling)})
    release = make_endpoint_release(spec, loaded, before.chosen.batching)
    if isinstance(release, Graph) or route is None:
        return release
    contract = release.contract.model_copy(update={"params": route.contract.params})
    return release.model_copy(update={"contract": contract})


def remove_batching(release: AnyRelease) -> AnyRelease:
    """Return the release with each request passed alone."""
    if isinstance(release, Graph):
        return release.without_batching()
    return release.model_copy(update={"batching": BatchingConfig()})


def make_chosen_release(
    spec: EndpointSpec, loaded: LoadedModel | LoadedGraph, choice: BatchingChoice, *, keep_warm: float | None
) -> AnyRelease:
    """Return the release with a batching and the replicas for it; on Ray Serve one that sleeps has none while idle."""
    scaled = spec.model_copy(update={"scaling": choice.choose_scaling(spec.scaling)})
    release = make_endpoint_release(scaled, loaded, choice.batching)
    return scale_to_zero(release) if isinstance(spec.target, RayServe) and keep_warm is not None else release


def scale_to_zero(release: AnyRelease) -> AnyRelease:
    """Return the release with no replica while it is idle."""
    scaling = release.scaling.model_copy(update={"replicas_min": 0})
    if isinstance(release, Graph):
        return release.with_scaling(scaling)
    return release.model_copy(update={"scaling": scaling})


def find_address(route: Route, version: str) -> Address | None:
    """Return where a version of a route answers, None where the route has no such version."""
    served = route.find_version(version)
    if served is None:
        return None
    return Address(url=served.url, model=served.upstream_model, version=served.upstream_version, grpc=served.grpc)


def find_serving_address(route: Route | None) -> Address | None:
    """Return where the version with the most traffic answers, None where nothing serves."""
    if route is None:
        return None
    return find_address(route, max(route.versions, key=lambda each: each.weight).version)


def remove_endpoint(gateway: GatewayClient, host: Host, endpoint: str) -> tuple[str, ...]:
    """Take an endpoint out of the gateway, then every version of it off its host; return which. Idempotent.

    Where a version can't be taken off, the endpoint is in the gateway again. Raises EndpointFailed.
    """
    status = gateway.get(endpoint)
    if status is None:
        return ()
    gateway.delete(endpoint)
    versions = tuple(each.version for each in status.route.versions)
    try:
        for version in versions:
            host.remove(make_release_to_remove(endpoint, version, status.route.contract))
    except BaseException:
        # The next call must find the versions that are left.
        gateway.put(endpoint, status.route)
        raise
    return versions
