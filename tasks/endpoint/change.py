"""A release on its way into service beside what stands: put up, then settled, or undone so that what stood stays."""

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
from serving.gateway.route import Route, Sleep
from serving.model.batching import BatchingConfig
from serving.model.release import Release
from serving.targets import Address, Host
from tasks.batch.artifacts import Logger
from tasks.endpoint.client import is_ready
from tasks.endpoint.deploy import host_of
from tasks.endpoint.render import bare_release, make_release
from tasks.endpoint.resolve import Subject
from tasks.endpoint.route import idle, in_use, kept_awake, rolled_out, serving, without
from tasks.endpoint.spec import EndpointSpec, RayServe, Triton
from tasks.endpoint.traffic import keep_warm_seconds, wait_idle
from tasks.endpoint.tuning import Chosen, remembered


@dataclass(slots=True, kw_only=True)
class Change:
    """One release, the host that it goes to, and the route that stood before.

    `earlier` is the same version as it was served before this change, None where that is not known.
    """

    spec: EndpointSpec
    gateway: GatewayClient
    release: Release
    model: Path
    standing: Route | None
    earlier: Release | None
    logger: Logger
    keep_warm: float | None = None
    touched: bool = field(default=False, init=False)

    @property
    def stands(self) -> Address | None:
        """Where this very release answers already; None where it is not up, or was served otherwise."""
        if self.standing is None or self.earlier != self.release:
            return None
        address = address_of(self.standing, self.release.version)
        return address if address and is_ready(address) else None

    def without_batching(self) -> Self:
        """Return the same change with each request passed alone, to be measured before the batching is set."""
        return replace(self, release=self.release.model_copy(update={"batching": BatchingConfig()}))

    def put_up(self) -> Address:
        """Put the release up, unless it stands, and return where it answers. Raises EndpointFailed."""
        if address := self.stands:
            sleep = self.standing.sleep if self.standing else None
            self.keep_warm = sleep.keep_warm_s if sleep and self.spec.keep_warm == "auto" else self.keep_warm
            return address
        self.touched = True
        if self.standing is not None and (awake := kept_awake(self.standing)) != self.standing:
            self.gateway.put(self.spec.name, awake)
        start = time.monotonic()
        address = self._deploy()
        if self.spec.keep_warm == "auto":
            self.keep_warm = keep_warm_seconds(self.spec, time.monotonic() - start)
            if isinstance(self.spec.target, RayServe) and self.keep_warm is not None:
                self.release = scaled_to_zero(self.release)
                return self._deploy()
        return address

    def _deploy(self) -> Address:
        return host_of(self.spec.target, self.keep_warm).deploy(self.release, self.model)

    def route(self, address: Address) -> Route:
        """Return the route by which the release gets its traffic."""
        # Ray scales to zero by itself; Triton is told to by the gateway.
        sleep, target = None, self.spec.target
        if isinstance(target, Triton) and self.keep_warm is not None:
            sleep = Sleep(keep_warm_s=self.keep_warm, grpc=target.grpc)
        return rolled_out(self.spec, self.standing, self.release.contract, address, self.release.version, sleep)

    @contextmanager
    def undone_on_failure(self) -> Generator[None]:
        """Undo the change where the block fails, whatever with; an EndpointFailed then also says what serves on."""
        try:
            yield
        except EndpointFailed as error:
            self._undo()
            self._tell(error)
        except BaseException:
            self._undo()
            raise

    def _tell(self, error: EndpointFailed) -> NoReturn:
        before = serving(self.standing)
        if self.release.version in before:
            words = f"Version {self.release.version} serves on as it did before."
        elif self.release.version in in_use(self.standing):
            words = (
                f"Version {self.release.version} is the shadow that it was, and version {', '.join(before)} serves on."
            )
        elif before:
            words = f"The release is taken down, and version {', '.join(before)} serves on."
        else:
            words = "The release is taken down; nothing served before it."
        message = f"{error} {words}"
        raise type(error)(message) from error

    def _undo(self) -> None:
        """Give what stood before all its traffic again, then take the release down; what fails of that is logged."""
        try:
            self._put_back(self.standing and kept_awake(self.standing))
            if self.release.version not in in_use(self.standing):
                wait_idle(self.gateway, self.spec.name, (self.release.version,))
                host_of(self.spec.target).remove(self.release)
            elif self.touched and self.earlier is not None:
                host_of(self.spec.target, self.keep_warm).deploy(self.earlier, self.model)
            self._put_back(self.standing)
        except EndpointFailed as error:
            self.logger.warning("The change must be undone, got: %s. Look at version %s.", error, self.release.version)

    def _put_back(self, route: Route | None) -> None:
        now = self.gateway.get(self.spec.name)
        if route is None:
            if now is not None:
                self.gateway.delete(self.spec.name)
        elif now is None or now.route != route:
            self.gateway.put(self.spec.name, route)

    def settle(self, address: Address) -> tuple[str, ...]:
        """Take down the versions that have no traffic any more; return which. What can't be taken down is logged."""
        status = self.gateway.get(self.spec.name)
        gone = idle(status.route) if status else ()
        if status is None or not gone:
            return ()
        left = without(status.route, gone)
        self.gateway.put(self.spec.name, kept_awake(left))
        try:
            wait_idle(self.gateway, self.spec.name, gone)
        except EndpointFailed as error:
            # Known again, so that the next call takes them down.
            self._put_back(status.route)
            self.logger.warning("Version %s must have no requests any more, got: %s", ", ".join(gone), error)
            return ()
        removed = tuple(version for version in gone if self._take_down(status.route, version, address))
        self._put_back(left)
        return removed

    def _take_down(self, route: Route, version: str, address: Address) -> bool:
        theirs = address_of(route, version)
        if theirs is None or not _same_host(theirs, address):
            where = theirs.url if theirs else "nowhere"
            self.logger.warning("Version %s is on another target, at %s: take it down there.", version, where)
            return False
        try:
            host_of(self.spec.target).remove(bare_release(self.spec.name, version, route.contract))
        except EndpointFailed as error:
            self.logger.warning("Version %s must be taken down, got: %s. Retire it later.", version, error)
            return False
        return True


def make_change(
    spec: EndpointSpec,
    subject: Subject,
    chosen: Chosen,
    gateway: GatewayClient,
    standing: Route | None,
    logger: Logger,
) -> Change:
    """Return the change that a spec asks for, with nothing done yet.

    Raises BadInput where the version that serves under this number is not known to be of this model.
    """
    release = make_release(spec, subject, chosen.batching)
    keep_warm = None if spec.keep_warm == "auto" else spec.keep_warm
    if isinstance(spec.target, RayServe) and keep_warm is not None:
        release = scaled_to_zero(release)
    before = remembered(spec.name, subject.resolved.tags)
    if before is None and subject.version in serving(standing):
        message = (
            f"The versions of an endpoint must be those of one registered model, but version {subject.version} of "
            f"{spec.name} serves already, and {subject.resolved.pin.uri} does not know of it. Give the endpoint "
            "another name, or retire it first."
        )
        raise BadInput(message)
    earlier = None
    if before is not None:
        earlier = release.model_copy(update={"batching": before.chosen.batching, "scaling": before.scaling})
    return Change(
        spec=spec,
        gateway=gateway,
        release=release,
        model=subject.resolved.folder,
        standing=standing,
        earlier=earlier,
        logger=logger,
        keep_warm=keep_warm,
    )


def scaled_to_zero(release: Release) -> Release:
    """Return the release with no replica while it is idle."""
    return release.model_copy(update={"scaling": release.scaling.model_copy(update={"replicas_min": 0})})


def address_of(route: Route | None, version: str) -> Address | None:
    """Return where a version of a route answers."""
    served = route.served(version) if route else None
    if served is None:
        return None
    return Address(url=served.url, model=served.upstream_model, version=served.upstream_version)


def serving_address(route: Route | None) -> Address | None:
    """Return where the version with the most traffic answers, None where nothing serves."""
    if route is None:
        return None
    return address_of(route, max(route.versions, key=lambda each: each.weight).version)


def retire(gateway: GatewayClient, host: Host, endpoint: str) -> tuple[str, ...]:
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
            host.remove(bare_release(endpoint, version, status.route.contract))
    except BaseException:
        # The next call must know what is left.
        gateway.put(endpoint, status.route)
        raise
    return versions


def _same_host(one: Address, other: Address) -> bool:
    """Whether two servers are of one target: ports differ where each release has a server of its own."""
    return urlsplit(one.url).hostname == urlsplit(other.url).hostname
