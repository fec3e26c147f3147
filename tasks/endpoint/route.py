"""Where an endpoint's traffic goes once a version comes or goes, as functions of values: routes of the gateway."""

from __future__ import annotations

from collections.abc import Mapping

from serving.errors import BadInput
from serving.gateway.route import Rollout, Route, Served, Shadow, Sleep, rolled_back
from serving.model.contract import Contract
from serving.protocol.tensors import tensors
from serving.targets import Address
from tasks.endpoint import spec as specs
from tasks.endpoint.spec import EndpointSpec

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
    inputs, outputs = tensors(contract)
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
