"""Shift an endpoint's traffic at the gateway: all at once, by a trial that the gateway judges, or as copies."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from serving.errors import EndpointFailed, RolledBack
from serving.gateway.client import GatewayClient
from serving.gateway.route import Route, rolled_back
from serving.model.contract import Contract
from serving.targets import Address
from tasks.endpoint import spec as specs
from tasks.endpoint.client import InferClient
from tasks.endpoint.route import in_words
from tasks.endpoint.samples import Sample
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
