"""Shift an endpoint's traffic at the gateway: all at once, by a trial that the gateway judges, or as copies."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from serving.errors import BadInput, EndpointFailed, RolledBack
from serving.gateway.client import GatewayClient
from serving.gateway.route import Rollout, Route, Served, Shadow, Sleep, rolled_back
from serving.model.contract import Contract
from serving.protocol.tensors import describe_tensors
from serving.targets import Address
from tasks.endpoint import spec as specs
from tasks.endpoint.client import InferClient
from tasks.endpoint.resolve import Sample
from tasks.endpoint.spec import EndpointSpec
from tasks.endpoint.verify import compare

_POLL_SECONDS = 0.2
_IDLE_SECONDS_MAX = 60.0
_ROUNDS = 3


def shift(gateway: GatewayClient, spec: EndpointSpec, route: Route, version: str) -> str:
    """Put a route in force, wait for the end of its trial if it has one, and say what became of it.

    Raises RolledBack with the figures where the version failed its trial, or was not asked enough in time: the other
    versions have all traffic then.
    """
    gateway.put(spec.name, route)
    if route.rollout is None:
        return in_words(route, version)
    assert isinstance(spec.rollout, specs.Canary), "only a canary has a trial"  # noqa: S101 - our own mistake
    deadline = time.monotonic() + spec.rollout.seconds_max
    while time.monotonic() < deadline:
        status = gateway.get(spec.name)
        if status is None or status.route.served(version) is None:
            message = (
                f"Version {version} of {spec.name} must stay at the gateway during its trial, but is gone from it."
            )
            raise EndpointFailed(message)
        verdict = status.verdict
        if status.route.rollout is None and verdict is not None and verdict.version == version:
            if verdict.outcome == "promoted":
                return f"version {version} has all traffic, after a trial: {verdict.reason}"
            message = f"Version {version} of {spec.name} must keep the rule of its trial, but {verdict.reason}."
            raise RolledBack(message)
        time.sleep(_POLL_SECONDS)
    raise _too_few(gateway, spec, version)


def _too_few(gateway: GatewayClient, spec: EndpointSpec, version: str) -> RolledBack:
    """Take the trial back, and return the error that says so."""
    status = gateway.get(spec.name)
    seen = 0
    if status is not None and status.route.rollout is not None and status.route.rollout.version == version:
        seen = status.trial.tally.requests if status.trial else 0
        gateway.put(spec.name, rolled_back(status.route))
    rollout = spec.rollout
    assert isinstance(rollout, specs.Canary), "only a canary has a trial"  # noqa: S101 - our own mistake
    return RolledBack(
        f"Version {version} of {spec.name} must answer {rollout.requests_min} requests in {rollout.seconds_max:g} s to "
        f"get all traffic, but got {seen}. Give it a larger share or more time, or wait for more traffic."
    )


def check_door(gateway_url: str, spec: EndpointSpec, contract: Contract, sample: Sample, key: str | None) -> None:
    """Ask through the gateway, as a caller does, and compare: raises VerifyFailed or EndpointFailed."""
    headers: Mapping[str, str] = {"Authorization": f"Bearer {key}"} if key else {}
    address = Address(url=gateway_url, model=spec.name, version=None)
    with InferClient(address, contract, headers) as ask:
        for _ in range(_ROUNDS):
            piece = next(sample.pieces(1))
            compare(contract, piece, ask(piece.inputs), spec.tolerance)


def wait_idle(gateway: GatewayClient, endpoint: str, versions: Iterable[str]) -> None:
    """Return once no request is with these versions; raises EndpointFailed where that takes over a minute."""
    if gateway.get(endpoint) is not None:
        for version in versions:
            gateway.wait_until_idle(endpoint, version, timeout_s=_IDLE_SECONDS_MAX)


def keep_warm_seconds(spec: EndpointSpec, cold_start_seconds: float) -> float | None:
    """Return the seconds after the last request until an endpoint is unloaded, None for never.

    For auto: a replica that waits costs what one does that loads, so that waiting as long as a cold start takes is at
    most twice as dear as the best choice in hindsight. Where a cold start breaks the budget, one always stays.
    """
    if spec.keep_warm != "auto":
        return spec.keep_warm
    assert spec.budget is not None, "the spec checks it"  # noqa: S101 - our own mistake
    return None if 1000 * cold_start_seconds > spec.budget.latency_ms else max(1.0, cold_start_seconds)


_WHOLE = 100.0
_CHANGE_SECONDS_MAX = 3600.0


def serving(route: Route | None) -> tuple[str, ...]:
    """Return the versions that get requests which name none."""
    return () if route is None else tuple(each.version for each in route.versions if each.weight)


def in_use(route: Route | None) -> tuple[str, ...]:
    """Return the versions that get requests which name none, or copies of them."""
    return () if route is None else tuple(each.version for each in route.versions if each.version not in idle(route))


def kept_awake(route: Route) -> Route:
    """Return the route with its models awake for an hour: what is loaded beside them would be unloaded with them."""
    sleep = route.sleep
    if sleep is None:
        return route
    longer = sleep.model_copy(update={"keep_warm_s": max(sleep.keep_warm_s, _CHANGE_SECONDS_MAX)})
    return route.model_copy(update={"sleep": longer})


def before_change(route: Route | None, version: str) -> Route | None:
    """Return what to go back to: the route as it is, but without a trial of this very version that a dead run left."""
    if route is None or route.rollout is None or route.rollout.version != version:
        return route
    return without(rolled_back(route), (version,))


def check_change(spec: EndpointSpec, standing: Route | None, contract: Contract, version: str) -> None:
    """Refuse what can't be rolled out beside what stands. Raises BadInput with what to do instead."""
    if standing is None:
        if isinstance(spec.rollout, specs.Shadow):
            message = (
                f"A shadow must have a version beside it that serves, but {spec.name} has none. Roll it out first."
            )
            raise BadInput(message)
        return
    if standing.rollout is not None:
        message = (
            f"An endpoint must have one trial at a time, but version {standing.rollout.version} of {spec.name} is on "
            "trial. Wait until it is promoted or rolled back, or retire the endpoint."
        )
        raise BadInput(message)
    beside = isinstance(spec.rollout, specs.Canary | specs.Shadow) and serving(standing) != (version,)
    if beside and _tensors(standing.contract) != _tensors(contract):
        message = (
            f"Versions that share traffic must take and give the same tensors, but version {version} of {spec.name} "
            f"takes {_tensors(contract)}, and what serves {_tensors(standing.contract)}. Roll it out all at once, "
            "together with its callers, or under another name."
        )
        raise BadInput(message)
    if isinstance(spec.rollout, specs.Shadow) and serving(standing) == (version,):
        message = f"A shadow must be another version than the one that serves, got version {version} of {spec.name}."
        raise BadInput(message)


def _tensors(contract: Contract) -> Mapping[str, object]:
    inputs, outputs = describe_tensors(contract)
    return {each.name: (each.datatype, each.shape) for each in (*inputs, *outputs)}


def rolled_out(
    spec: EndpointSpec,
    standing: Route | None,
    contract: Contract,
    address: Address,
    version: str,
    sleep: Sleep | None,
) -> Route:
    """Return the route by which a version that is up and verified gets its traffic, beside what serves."""
    others = [] if standing is None else [each for each in standing.versions if each.version != version]
    share, rollout, shadow = _WHOLE, None, None
    if isinstance(spec.rollout, specs.Canary) and any(each.weight for each in others):
        share = spec.rollout.percent
        rollout = Rollout(
            version=version,
            requests_min=spec.rollout.requests_min,
            error_rate_max=spec.rollout.error_rate_max,
            p99_ms_max=spec.rollout.p99_ms_max,
        )
    elif isinstance(spec.rollout, specs.Shadow):
        share = 0.0
        shadow = Shadow(version=version, tolerance=spec.rollout.tolerance, in_flight_max=spec.rollout.in_flight_max)
    return Route(
        versions=(*_scaled(others, _WHOLE - share), Served.at(address, version=version, weight=share)),
        contract=contract,
        limits=spec.limits,
        keys=(*spec.access.environment, *spec.access.secrets),
        rollout=rollout,
        shadow=shadow,
        sleep=sleep,
    )


def _scaled(served: list[Served], whole: float) -> list[Served]:
    """Return versions whose weights come to `whole`, in the proportions that they have."""
    weights = sum(each.weight for each in served) or 1.0
    return [each.model_copy(update={"weight": each.weight * whole / weights}) for each in served]


def without(route: Route, gone: tuple[str, ...]) -> Route:
    """Return the route without some of its versions, which must not be all that have weight."""
    kept = tuple(each for each in route.versions if each.version not in gone)
    shadow = None if route.shadow is None or route.shadow.version in gone else route.shadow
    return route.model_copy(update={"versions": kept, "shadow": shadow})


def idle(route: Route) -> tuple[str, ...]:
    """Return the versions that get no requests at all, not even copies."""
    used = {route.shadow.version} if route.shadow else set()
    return tuple(each.version for each in route.versions if not each.weight and each.version not in used)


def in_words(route: Route, version: str) -> str:
    """Say what a version gets of the traffic."""
    served = route.served(version)
    whole = sum(each.weight for each in route.versions)
    if route.shadow is not None and route.shadow.version == version:
        return f"version {version} gets copies of requests, and answers nobody"
    share = served.weight / whole if served else 0.0
    return f"version {version} has all traffic" if share == 1 else f"version {version} has {share:.0%} of the traffic"
