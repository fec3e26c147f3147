"""Traffic of an endpoint at the gateway: routes as functions of values, and the shift from one route to the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from serving.errors import BadInput, EndpointFailed, RolledBack
from serving.gateway.client import GatewayClient
from serving.gateway.route import (
    CanaryTally,
    Rollout,
    Route,
    ServedVersion,
    Shadow,
    SleepRule,
    Verdict,
    roll_back_canary,
)
from serving.model.contract import Contract
from serving.protocol.tensors import describe_tensors
from serving.targets import Address
from tasks.endpoint import spec as specs
from tasks.endpoint.client import InferClient
from tasks.endpoint.resolve import Sample
from tasks.endpoint.spec import OF_EACH_CALL, EndpointSpec
from tasks.endpoint.targets import AnyTarget, default_target, read_target
from tasks.endpoint.verify import compare_answers

_POLL_SECONDS, _REPORT_SECONDS = 0.2, 10.0
# The gateway decides four times a second, and reports a decision once requests are routed by it.
_DECISION_SECONDS_MAX = 60.0
_IDLE_SECONDS_MAX = 60.0
_ROUNDS = 3
_CHANGE_SECONDS_MAX = 3600.0


def shift_traffic(
    gateway: GatewayClient, spec: EndpointSpec, route: Route, version: str, report: Callable[[str], object]
) -> str:
    """Put a route in force, wait for the end of its canary if it has one, and describe the outcome.

    Args:
        gateway: The gateway, which judges a canary by the rule of the route.
        spec: The endpoint.
        route: The route, with the rule of a canary where it has one.
        version: The version that gets its traffic.
        report: Takes a line every ten seconds that says how far the canary has come.

    Raises:
        RolledBack: with the figures, where the canary failed or had too few requests in time. The other versions have
            all traffic then.
        EndpointFailed: where the canary is removed meanwhile, or the gateway does not decide.
    """
    gateway.put(spec.name, route)
    if not isinstance(spec.rollout, specs.Canary) or route.rollout is None:
        return describe_share(route, version)
    if not spec.rollout.wait:
        return f"{describe_share(route, version)}, as a canary that the gateway decides about"
    deadline = time.monotonic() + spec.rollout.seconds_max + _DECISION_SECONDS_MAX
    next_report = 0.0
    while time.monotonic() < deadline:
        status = gateway.get(spec.name)
        if status is None or status.route.find_version(version) is None:
            message = (
                f"Version {version} of {spec.name} must stay at the gateway while it is a canary, but was removed."
            )
            raise EndpointFailed(message)
        verdict = status.verdict
        if status.route.rollout is None and verdict is not None and verdict.version == version:
            return _describe_verdict(spec.name, verdict)
        if status.trial is not None and time.monotonic() >= next_report:
            age_s = (datetime.now(UTC) - status.trial.began).total_seconds()
            report(describe_canary(route.rollout, status.trial.tally, age_s=age_s))
            next_report = time.monotonic() + _REPORT_SECONDS
        time.sleep(_POLL_SECONDS)
    message = (
        f"The gateway must decide about version {version} of {spec.name} within {spec.rollout.seconds_max:g} s, but "
        "did not. Read its log."
    )
    raise EndpointFailed(message)


def describe_canary(rule: Rollout, tally: CanaryTally, *, age_s: float) -> str:
    """Return in a line how far a canary has come: requests, failures and the seconds that it has left."""
    failed = tally.errors / max(tally.requests, 1)
    left = "" if rule.seconds_max is None else f", {max(rule.seconds_max - age_s, 0):.0f} s left"
    answered = f"{tally.requests} of {rule.requests_min} requests"
    return f"Canary of version {rule.version}: {answered}, {failed:.1%} failed{left}"


def _describe_verdict(endpoint: str, verdict: Verdict) -> str:
    """Return the outcome of a canary that was promoted, and raise RolledBack for any other."""
    if verdict.outcome == "promoted":
        return f"version {verdict.version} has all traffic, after a canary: {verdict.reason}"
    message = (
        f"Version {verdict.version} of {endpoint} must keep the rule of its canary, but {verdict.reason}. Where it had "
        "too few requests, give it a larger share or more seconds."
    )
    raise RolledBack(message)


def check_gateway(gateway_url: str, spec: EndpointSpec, contract: Contract, sample: Sample, key: str | None) -> None:
    """Ask through the gateway, as a caller does, and compare: raises VerifyFailed or EndpointFailed."""
    headers: Mapping[str, str] = {"Authorization": f"Bearer {key}"} if key else {}
    address = Address(url=gateway_url, model=spec.name, version=None)
    with InferClient(address, contract, headers) as client:
        for _ in range(_ROUNDS):
            row = next(sample.split(1))
            compare_answers(contract, row, client(row.inputs), spec.tolerance)


def wait_until_idle(gateway: GatewayClient, endpoint: str, versions: Iterable[str]) -> None:
    """Return once no request is with these versions; raises EndpointFailed where that takes over a minute."""
    if gateway.get(endpoint) is not None:
        for version in versions:
            gateway.wait_until_idle(endpoint, version, timeout_s=_IDLE_SECONDS_MAX)


def validate_rollout(spec: EndpointSpec, current: Route | None, contract: Contract, version: str) -> None:
    """Refuse what can't be rolled out beside the current route. Raises BadInput with what to do instead."""
    rollout = spec.rollout
    if current is None:
        if isinstance(rollout, specs.Shadow):
            message = (
                f"A shadow must have a version beside it that serves, but {spec.name} has none. Roll it out first."
            )
            raise BadInput(message)
        return
    if current.rollout is not None:
        message = (
            f"An endpoint must have one canary at a time, but version {current.rollout.version} of {spec.name} is one. "
            "Wait until it is promoted or rolled back, or retire the endpoint."
        )
        raise BadInput(message)
    serves_alone = list_serving_versions(current) == (version,)
    given, served = _list_tensors(contract), _list_tensors(current.contract)
    if isinstance(rollout, specs.Canary | specs.Shadow) and not serves_alone and given != served:
        message = (
            f"Versions that share traffic must take and give the same tensors, but version {version} of {spec.name} "
            f"has {given}, and what serves {served}. Roll it out all at once, together with its callers, or under "
            "another name."
        )
        raise BadInput(message)
    if isinstance(rollout, specs.Shadow) and serves_alone:
        message = f"A shadow must be another version than the one that serves, got version {version} of {spec.name}."
        raise BadInput(message)


def _list_tensors(contract: Contract) -> Mapping[str, object]:
    inputs, outputs = describe_tensors(contract)
    return {each.name: (each.datatype, each.shape) for each in (*inputs, *outputs)}


def make_route(
    spec: EndpointSpec,
    current: Route | None,
    contract: Contract,
    address: Address,
    version: str,
    sleep: SleepRule | None,
) -> Route:
    """Return the route by which a version that is up and verified gets its traffic, beside what serves."""
    others = [] if current is None else [each for each in current.versions if each.version != version]
    percent, rollout, shadow = 100.0, None, None
    if isinstance(spec.rollout, specs.Canary) and any(each.weight for each in others):
        percent = spec.rollout.percent
        rollout = Rollout(
            version=version,
            requests_min=spec.rollout.requests_min,
            seconds_max=spec.rollout.seconds_max,
            error_rate_max=spec.rollout.error_rate_max,
            p99_ms_max=spec.rollout.p99_ms_max,
        )
    elif isinstance(spec.rollout, specs.Shadow):
        percent = 0.0
        shadow = Shadow(version=version, tolerance=spec.rollout.tolerance, in_flight_max=spec.rollout.in_flight_max)
    return Route(
        versions=(
            *_scale_weights(others, 100.0 - percent),
            ServedVersion.from_address(address, version=version, weight=percent),
        ),
        contract=contract,
        limits=spec.limits,
        keys=spec.access.names,
        rollout=rollout,
        shadow=shadow,
        sleep=sleep,
        spec=dump_spec(spec),
    )


def dump_spec(spec: EndpointSpec) -> dict[str, Any]:
    """Return a spec as the route of its endpoint keeps it."""
    return spec.model_dump(mode="json", exclude={"name", "gateway", "admin_secret", "allow_pickle"})


def complete_spec(spec: EndpointSpec, route: Route | None) -> EndpointSpec:
    """Return a spec with what it leaves out as the endpoint has it; a field that it names is taken whole.

    Keys stay until the spec names others, or says that anyone may call. Raises BadInput where the parts do not fit.
    """
    if route is None:
        return spec
    named = {name: getattr(spec, name) for name in spec.model_fields_set}
    if not spec.access.names and not spec.access.anyone:
        named.pop("access", None)
    # Of an endpoint that an earlier release has put online, the route says this much.
    kept: Mapping[str, object] = route.spec or {"access": {"environment": route.keys}, "limits": route.limits}
    left_out = {name: value for name, value in kept.items() if name in EndpointSpec.model_fields.keys() - OF_EACH_CALL}
    try:
        return EndpointSpec.model_validate({**left_out, **named})
    except ValidationError as error:
        found = "; ".join(each["msg"].removeprefix("Value error, ") for each in error.errors())
        message = (
            f"What a call for {spec.name} leaves out stays as it was, and must fit what it names, got: {found} Give "
            "that field too: null or {} takes its value off."
        )
        raise BadInput(message) from None


def find_target(route: Route | None) -> AnyTarget:
    """Return the target that an endpoint was put online on, the one that a spec has without any where none is known."""
    kept = None if route is None else route.spec.get("target")
    return default_target() if kept is None else read_target(kept)


def describe_callers(keys: Sequence[str]) -> str:
    """Return in a sentence who may call an endpoint with these keys."""
    if not keys:
        return "Anyone who reaches the gateway may call it, without a key."
    return f"Callers need the key {keys[0]}." if len(keys) == 1 else f"Callers need one of the keys {', '.join(keys)}."


def _scale_weights(served: list[ServedVersion], total: float) -> list[ServedVersion]:
    """Return versions whose weights sum to `total`, in the proportions that they have."""
    weights = sum(each.weight for each in served) or 1.0
    return [each.model_copy(update={"weight": each.weight * total / weights}) for each in served]


def find_route_to_restore(route: Route | None, version: str) -> Route | None:
    """Return the route to go back to: this one, without a canary of the same version that a killed run left."""
    if route is None or route.rollout is None or route.rollout.version != version:
        return route
    return remove_versions(roll_back_canary(route), (version,))


def remove_versions(route: Route, versions: tuple[str, ...]) -> Route:
    """Return the route without some of its versions, which must not be all that have weight."""
    kept = tuple(each for each in route.versions if each.version not in versions)
    shadow = None if route.shadow is None or route.shadow.version in versions else route.shadow
    return route.model_copy(update={"versions": kept, "shadow": shadow})


def keep_awake(route: Route) -> Route:
    """Return the route with its models awake for an hour: one that is loaded beside them is unloaded with them."""
    sleep = route.sleep
    if sleep is None:
        return route
    longer = sleep.model_copy(update={"keep_warm_s": max(sleep.keep_warm_s, _CHANGE_SECONDS_MAX)})
    return route.model_copy(update={"sleep": longer})


def list_serving_versions(route: Route | None) -> tuple[str, ...]:
    """Return the versions that get requests which name none."""
    return () if route is None else tuple(each.version for each in route.versions if each.weight)


def list_used_versions(route: Route | None) -> tuple[str, ...]:
    """Return the versions that get requests which name none, or copies of them."""
    if route is None:
        return ()
    shadow = route.shadow.version if route.shadow else None
    return tuple(each.version for each in route.versions if each.weight or each.version == shadow)


def list_idle_versions(route: Route) -> tuple[str, ...]:
    """Return the versions that get no requests at all, not even copies."""
    used = list_used_versions(route)
    return tuple(each.version for each in route.versions if each.version not in used)


def describe_share(route: Route, version: str) -> str:
    """Return in words what a version gets of the traffic."""
    if route.shadow is not None and route.shadow.version == version:
        return f"version {version} gets copies of requests, and its answers go nowhere"
    served = route.find_version(version)
    share = served.weight / sum(each.weight for each in route.versions) if served else 0.0
    return f"version {version} has all traffic" if share == 1 else f"version {version} has {share:.0%} of the traffic"


def choose_keep_warm_seconds(spec: EndpointSpec, cold_start_seconds: float) -> float | None:
    """Return the seconds after the last request until an endpoint is unloaded, None for never.

    For auto: a replica that waits costs what one does that loads, so that waiting as long as a cold start takes costs
    at most twice what the best choice in hindsight does. Where a cold start breaks the budget, it is never unloaded.
    """
    if spec.keep_warm != "auto":
        return spec.keep_warm
    assert spec.budget is not None, "the spec checks it"  # noqa: S101 - our own mistake
    return None if 1000 * cold_start_seconds > spec.budget.latency_ms else max(1.0, cold_start_seconds)
