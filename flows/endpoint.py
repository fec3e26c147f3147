"""An online endpoint: a registered model on a model server that the team runs, behind one gateway."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from prefect import get_run_logger
from pydantic import Field

from flows.runtime.flow_decorator import adhoc_flow
from flows.runtime.steps import Steps
from serving.gateway.client import GatewayClient
from serving.gateway.route import Route
from serving.targets import Address
from tasks.endpoint.batching import BatchingChoice, resolve_batching, save_settings
from tasks.endpoint.change import Change, find_serving_address, plan_change, remove_endpoint
from tasks.endpoint.client import InferClient, infer_path
from tasks.endpoint.deploy import make_host
from tasks.endpoint.load import Latency, measure_latency
from tasks.endpoint.report import Endpoint, emit_endpoint_changed, emit_endpoint_retired, publish_endpoint
from tasks.endpoint.resolve import LoadedModel, load_endpoint_model
from tasks.endpoint.spec import GATEWAY, AnyTarget, EndpointSpec, Shadow, read_admin_key, read_keys
from tasks.endpoint.traffic import check_gateway, find_route_to_restore, shift_traffic, validate_rollout
from tasks.endpoint.verify import Verification, verify_endpoint


@adhoc_flow("online-endpoint", run_name=lambda parameters: f"endpoint {parameters['spec'].name}")
def online_endpoint(spec: EndpointSpec) -> Endpoint:
    """Serve a registered model online: deploy it beside what serves, compare its answers with the model, shift traffic.

    Args:
        spec: The endpoint in full: model, target, batching, scaling, rollout and access.

    The same call again changes nothing where nothing has changed. On any failure the new release is taken down and
    the earlier version keeps serving; the error says why: LatencyImpossible before anything is deployed, EndpointFailed
    by the server, VerifyFailed by the answers, RolledBack by the traffic.
    """
    logger = get_run_logger()
    timer = Steps()
    # Raises where a package of the target is missing, before anything is measured.
    make_host(spec.target)
    keys = read_keys(spec.access)
    with GatewayClient(spec.gateway, read_admin_key(spec.admin_secret)) as gateway:
        loaded = timer.run("resolve", lambda: load_endpoint_model(spec))
        status = gateway.get(spec.name)
        current_route = find_route_to_restore(status.route if status else None, loaded.version)
        validate_rollout(spec, current_route, loaded.contract, loaded.version)
        choice = timer.run("tune", lambda: resolve_batching(spec, loaded))
        change = plan_change(spec, loaded, choice, gateway, current_route, logger)
        before = (
            None
            if change.find_current_address()
            else _measure_latency(timer, spec, loaded, find_serving_address(current_route))
        )
        with change.undo_on_failure():
            if current_route is None and choice.cost is not None and spec.measure_seconds:
                # With no earlier release to compare with, this one is measured without batching first.
                before = _measure_latency(timer, spec, loaded, timer.run("deploy", change.without_batching().deploy))
            address = timer.run("deploy", change.deploy)
            verification = timer.run("verify", lambda: _verify_release(spec, loaded, choice, address))
            after = _measure_latency(timer, spec, loaded, address) if change.is_deployed else None
            if not save_settings(spec, loaded.resolved.pin, choice):
                logger.warning("The registry must take a tag of %s, and did not.", loaded.resolved.pin.uri)
            rollout = timer.run("traffic", lambda: _shift_traffic(change, spec, loaded, address, keys))
        removed = change.remove_idle_versions(address)
        is_changed = change.is_deployed or bool(removed) or _find_route(gateway, spec) != (status and status.route)
    endpoint = Endpoint(
        name=spec.name,
        url=f"{spec.gateway.rstrip('/')}/v2/models/{spec.name}/infer",
        model=loaded.resolved.pin.uri,
        model_digest=loaded.resolved.pin.digest,
        version=loaded.version,
        target=spec.target.kind,
        server=f"{address.url}{infer_path(address)}",
        rollout=rollout,
        removed=removed,
        chosen=choice,
        budget=spec.budget,
        keep_warm_seconds=change.keep_warm,
        verification=verification,
        before=before,
        after=after,
        seconds=timer.seconds,
    )
    publish_endpoint(endpoint, logger)
    if is_changed:
        emit_endpoint_changed(endpoint)
    logger.info("%s", endpoint.summary)
    return endpoint


@adhoc_flow("retire-endpoint", run_name=lambda parameters: f"retire endpoint {parameters['name']}", uses_registry=False)
def retire_endpoint(
    name: str,
    target: Annotated[AnyTarget, Field(discriminator="kind")],
    gateway: str = GATEWAY,
    admin_secret: str | None = None,
) -> tuple[str, ...]:
    """Take an endpoint out of service, then all its versions off their target; returns which versions.

    Args:
        name: The endpoint's name.
        target: The model server that its versions are on.
        gateway: The URL of the gateway.
        admin_secret: A Prefect Secret block with the gateway's administrator key, as in the spec.

    Requests under way are answered, later ones find no such endpoint. An endpoint that does not exist is no error.
    """
    logger = get_run_logger()
    host = make_host(target)
    with GatewayClient(gateway, read_admin_key(admin_secret)) as client:
        there = client.get(name) is not None
        versions = remove_endpoint(client, host, name)
    if there or versions:
        emit_endpoint_retired(name, versions)
    logger.info("%s is retired: %s.", name, f"took down {', '.join(versions)}" if versions else "there was none")
    return versions


def _find_route(gateway: GatewayClient, spec: EndpointSpec) -> Route | None:
    status = gateway.get(spec.name)
    return status.route if status else None


def _verify_release(spec: EndpointSpec, loaded: LoadedModel, choice: BatchingChoice, address: Address) -> Verification:
    rows_max = min(spec.limits.rows_max, choice.batching.batch_size_max)
    with InferClient(address, loaded.contract) as client:
        return verify_endpoint(client, loaded, rows_max=rows_max, tolerance=spec.tolerance)


def _measure_latency(timer: Steps, spec: EndpointSpec, loaded: LoadedModel, address: Address | None) -> Latency | None:
    budget, seconds = spec.budget, spec.measure_seconds
    if budget is None or not seconds or address is None:
        return None
    contract, sample = loaded.contract, loaded.sample
    return timer.run("measure", lambda: measure_latency(address, contract, sample, rate=budget.rate, seconds=seconds))


def _shift_traffic(
    change: Change, spec: EndpointSpec, loaded: LoadedModel, address: Address, keys: Mapping[str, str]
) -> str:
    for name, key in keys.items():
        change.gateway.put_key(name, key)
    outcome = shift_traffic(change.gateway, spec, change.plan_route(address), loaded.version)
    if not isinstance(spec.rollout, Shadow):
        check_gateway(spec.gateway, spec, loaded.contract, loaded.sample, next(iter(keys.values()), None))
    return outcome
