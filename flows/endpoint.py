"""An online endpoint: a registered model on a model server that the team runs, behind one gateway."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Annotated

from pydantic import Field

from flows.runtime.flow_decorator import adhoc_flow
from flows.runtime.steps import Steps, find_logger
from serving.errors import EndpointFailed, VerifyFailed
from serving.gateway.client import GatewayClient
from serving.gateway.route import Route
from serving.model.batching import BatchingConfig
from serving.targets import Address
from tasks.common.blocks import keep_own_variables
from tasks.endpoint.batching import BatchingChoice, resolve_batching, save_settings
from tasks.endpoint.budget import BudgetCheck, check_budget, explain_broken_budget
from tasks.endpoint.change import Change, find_serving_address, make_chosen_release, plan_change, remove_endpoint
from tasks.endpoint.client import InferClient, infer_path
from tasks.endpoint.deploy import make_graph_host, make_host, write_rollout
from tasks.endpoint.load import Latency, measure_latency
from tasks.endpoint.report import Endpoint, emit_endpoint_changed, emit_endpoint_retired, publish_endpoint
from tasks.endpoint.resolve import Loaded, LoadedGraph, LoadedModel, load_endpoint
from tasks.endpoint.spec import GATEWAY, Budget, EndpointSpec, Shadow, read_admin_key, read_keys
from tasks.endpoint.targets import AnyTarget
from tasks.endpoint.traffic import (
    check_gateway,
    complete_spec,
    describe_callers,
    find_route_to_restore,
    find_target,
    shift_traffic,
    validate_rollout,
)
from tasks.endpoint.verify import Verification, verify_endpoint


@adhoc_flow("online-endpoint", run_name=lambda parameters: f"endpoint {parameters['spec'].name}")
def online_endpoint(spec: EndpointSpec) -> Endpoint:
    """Serve a registered model online: deploy it beside what serves, compare its answers with the model, shift traffic.

    Args:
        spec: The endpoint: model or graph of models, target, batching, scaling, rollout and access. What it leaves out
            stays as the endpoint has it, API keys included; the model, the rollout and allow_pickle are of each call.

    The same call again changes nothing where nothing has changed. On any failure the new release is taken down and
    the earlier version keeps serving; the error says why: LatencyImpossible before anything is deployed, EndpointFailed
    by the server, VerifyFailed by the answers, BudgetBroken by the load, RolledBack by the traffic.
    """
    logger = find_logger()
    timer = Steps()
    with GatewayClient(spec.gateway, read_admin_key(spec.admin_secret)) as gateway:
        spec = complete_spec(spec, _find_route(gateway, spec))
        # Raises where a package of the target is missing, before anything is measured.
        (make_graph_host if spec.graph_steps else make_host)(spec.target)
        keys = read_keys(spec.access)
        with keep_own_variables(logger):
            loaded = timer.run("resolve", lambda: load_endpoint(spec))
        standing = _find_route(gateway, spec)
        current_route = find_route_to_restore(standing, loaded.version)
        validate_rollout(spec, current_route, loaded.contract, loaded.version)
        choices = resolve_batching(spec, loaded)
        first = timer.run("tune", lambda: next(choices))
        change = plan_change(spec, loaded, first, gateway, current_route, logger)
        before = (
            None
            if change.find_current_address()
            else _measure_latency(timer, spec, loaded, find_serving_address(current_route))
        )
        with change.undo_on_failure():
            if current_route is None and first.cost is not None and first.batching != BatchingConfig():
                # With no earlier release to compare with, this one is measured without batching first.
                before = _measure_latency(timer, spec, loaded, timer.run("deploy", change.without_batching().deploy))
            deployed = _deploy_within_budget(timer, change, loaded, chain([first], choices))
            choice, address = deployed.choice, deployed.address
            pin = loaded.sources[-1].pin
            if not save_settings(spec, pin, choice, loaded.settings_name(spec.name)):
                logger.warning("The registry must take a tag of %s, and did not.", pin.uri)
            rollout = timer.run("traffic", lambda: _shift_traffic(change, spec, loaded, address, keys))
        removed = change.remove_idle_versions(address)
        route = _find_route(gateway, spec)
        if route is not None:
            write_rollout(spec.target, spec.name, route)
        is_changed = change.is_deployed or bool(removed) or route != standing
    endpoint = Endpoint(
        name=spec.name,
        url=f"{spec.gateway.rstrip('/')}/v2/models/{spec.name}/infer",
        model=loaded.description,
        models=() if isinstance(loaded, LoadedModel) else tuple(source.pin.uri for source in loaded.sources),
        model_digest=loaded.digest,
        version=loaded.version,
        target=spec.target.kind,
        server=f"{address.url}{infer_path(address)}",
        rollout=rollout,
        callers=describe_callers(spec.access.names),
        removed=removed,
        chosen=choice,
        budget=spec.budget,
        keep_warm_seconds=change.keep_warm,
        verification=deployed.verification,
        before=before,
        checked=deployed.checked,
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
    target: Annotated[AnyTarget, Field(discriminator="kind")] | None = None,
    gateway: str = GATEWAY,
    admin_secret: str | None = None,
) -> tuple[str, ...]:
    """Take an endpoint out of service, then all its versions off their target; returns which versions.

    Args:
        name: The endpoint's name.
        target: The model server that its versions are on. Without: the one that it was put online on.
        gateway: The URL of the gateway.
        admin_secret: A Prefect Secret block with the gateway's administrator key, as in the spec.

    Requests under way are answered, later ones find no such endpoint. An endpoint that does not exist is no error.
    """
    logger = find_logger()
    # Raises where a package of the target is missing, before the gateway is asked.
    host = None if target is None else make_host(target)
    with GatewayClient(gateway, read_admin_key(admin_secret)) as client:
        state = client.get(name)
        route = None if state is None else state.route
        versions = remove_endpoint(client, host or make_host(find_target(route)), name)
    if state or versions:
        emit_endpoint_retired(name, versions)
    logger.info("%s is retired: %s.", name, f"no longer serves {', '.join(versions)}" if versions else "there was none")
    return versions


def _find_route(gateway: GatewayClient, spec: EndpointSpec) -> Route | None:
    status = gateway.get(spec.name)
    return status.route if status else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Deployed:
    """A release that is up, with the batching that keeps its budget. checked: None where nothing was measured."""

    choice: BatchingChoice
    address: Address
    verification: Verification
    checked: BudgetCheck | None


def _deploy_within_budget(
    timer: Steps, change: Change, loaded: LoadedModel | LoadedGraph, choices: Iterable[BatchingChoice]
) -> _Deployed:
    """Deploy with the first batching that keeps the budget under load. Raises BudgetBroken where none does."""
    spec, budget, tried = change.spec, change.spec.budget, []
    for choice in choices:
        change.release = make_chosen_release(spec, loaded, choice, keep_warm=change.keep_warm)
        address, verification = _deploy_verified(timer, change, loaded, choice)
        checked = None
        if budget is not None and spec.measure_seconds and change.is_deployed:
            checked = timer.run("measure", partial(_check_budget, budget, spec.measure_seconds, loaded, address))
        if checked is None or checked.is_kept:
            return _Deployed(choice=choice, address=address, verification=verification, checked=checked)
        tried.append((choice, checked))
        change.logger.warning("The budget must be kept, got %s with %s.", checked.describe(), choice.describe())
    raise explain_broken_budget(tried, is_explicit=spec.batching is not None)


def _deploy_verified(
    timer: Steps, change: Change, loaded: LoadedModel | LoadedGraph, choice: BatchingChoice
) -> tuple[Address, Verification]:
    """Deploy and verify; a release that was up before but does not answer as it must is deployed once more."""
    address = timer.run("deploy", change.deploy)
    try:
        return address, timer.run("verify", partial(_verify_release, change.spec, loaded, choice, address))
    except EndpointFailed as error:
        if isinstance(error, VerifyFailed) or change.is_deployed or not change.spec.target.deploys:
            raise
        change.logger.warning("Version %s is up, and is deployed again, since it fails: %s", loaded.version, error)
    address = timer.run("deploy", change.deploy_again)
    return address, timer.run("verify", partial(_verify_release, change.spec, loaded, choice, address))


def _check_budget(budget: Budget, seconds: float, loaded: LoadedModel | LoadedGraph, address: Address) -> BudgetCheck:
    return check_budget(address, loaded.contract, loaded.sample, budget, seconds=seconds)


def _verify_release(spec: EndpointSpec, loaded: Loaded, choice: BatchingChoice, address: Address) -> Verification:
    rows_max = min(spec.limits.rows_max, choice.batching.batch_size_max)
    with InferClient(address, loaded.contract) as client:
        return verify_endpoint(client, loaded, rows_max=rows_max, tolerance=spec.tolerance)


def _measure_latency(timer: Steps, spec: EndpointSpec, loaded: Loaded, address: Address | None) -> Latency | None:
    budget, seconds = spec.budget, spec.measure_seconds
    if budget is None or not seconds or address is None:
        return None
    contract, sample = loaded.contract, loaded.sample
    return timer.run("measure", lambda: measure_latency(address, contract, sample, rate=budget.rate, seconds=seconds))


def _shift_traffic(
    change: Change, spec: EndpointSpec, loaded: Loaded, address: Address, keys: Mapping[str, str]
) -> str:
    for name, key in keys.items():
        change.gateway.put_key(name, key)
    route = change.plan_route(address)
    write_rollout(spec.target, spec.name, route)
    outcome = shift_traffic(change.gateway, spec, route, loaded.version, partial(change.logger.info, "%s"))
    if not isinstance(spec.rollout, Shadow):
        check_gateway(spec.gateway, spec, loaded.contract, loaded.sample, next(iter(keys.values()), None))
    return outcome
