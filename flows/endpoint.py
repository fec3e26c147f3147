"""An online endpoint: a registered model on a model server that the team runs, behind one gateway."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from prefect import get_run_logger
from pydantic import Field

from flows.runtime.flow_decorator import adhoc_flow
from flows.runtime.task_timing import Stages
from serving.gateway.client import GatewayClient
from serving.targets import Address
from tasks.endpoint.access import read_admin_key, read_keys
from tasks.endpoint.change import Change, make_change, retire, serving_address
from tasks.endpoint.client import InferClient, infer_path
from tasks.endpoint.deploy import host_of
from tasks.endpoint.load import Latency, measure_latency
from tasks.endpoint.report import Endpoint, publish_endpoint
from tasks.endpoint.resolve import Subject, resolve
from tasks.endpoint.route import before_change, check_change
from tasks.endpoint.spec import GATEWAY, AnyTarget, EndpointSpec, Shadow
from tasks.endpoint.traffic import check_door, shift
from tasks.endpoint.tuning import Chosen, remember, resolve_batching
from tasks.endpoint.verify import Verification, verify


@adhoc_flow("online-endpoint")
def online_endpoint(spec: EndpointSpec) -> Endpoint:
    """Serve a registered model online: put up beside what serves, held against the model, then given its traffic.

    Args:
        spec: The endpoint in full: model, target, batching, scaling, rollout and access.

    The same call again changes nothing where nothing has changed. On any failure the new release is taken down and
    the earlier version keeps serving; the error says why: LatencyImpossible before anything is put up, EndpointFailed
    by the server, VerifyFailed by the answers, RolledBack by the traffic.
    """
    logger = get_run_logger()
    stages = Stages()
    keys = read_keys(spec.access)
    with GatewayClient(spec.gateway, read_admin_key(spec.admin_secret)) as gateway:
        subject = stages.run("resolve", lambda: resolve(spec))
        status = gateway.get(spec.name)
        standing = before_change(status.route if status else None, subject.version)
        check_change(spec, standing, subject.contract, subject.version)
        chosen = stages.run("tune", lambda: resolve_batching(spec, subject))
        change = make_change(spec, subject, chosen, gateway, standing, logger)
        before = None if change.stands else _measure(stages, spec, subject, serving_address(standing))
        with change.undone_on_failure():
            if standing is None and chosen.cost is not None and spec.measure_seconds:
                # With nothing to compare with, the release itself shows what the batching is worth.
                before = _measure(stages, spec, subject, stages.run("deploy", change.without_batching().put_up))
            address = stages.run("deploy", change.put_up)
            verification = stages.run("verify", lambda: _verify(spec, subject, chosen, address))
            after = _measure(stages, spec, subject, address) if change.touched else None
            if not remember(spec, subject.resolved.pin, chosen):
                logger.warning("The registry must take a tag of %s, and did not.", subject.resolved.pin.uri)
            rollout = stages.run("traffic", lambda: _shift(change, spec, subject, address, keys))
        removed = change.settle(address)
    endpoint = Endpoint(
        name=spec.name,
        url=f"{spec.gateway.rstrip('/')}/v2/models/{spec.name}/infer",
        model=subject.resolved.pin.uri,
        model_digest=subject.resolved.pin.digest,
        version=subject.version,
        target=spec.target.kind,
        server=f"{address.url}{infer_path(address)}",
        rollout=rollout,
        removed=removed,
        chosen=chosen,
        budget=spec.budget,
        keep_warm_seconds=change.keep_warm,
        verification=verification,
        before=before,
        after=after,
        seconds=stages.seconds,
    )
    publish_endpoint(endpoint, logger)
    logger.info("%s", endpoint.summary)
    return endpoint


@adhoc_flow("retire-endpoint")
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
        gateway: The door that callers come through.
        admin_secret: A Prefect Secret block with the gateway's administrator key, as in the spec.

    Requests on their way are answered, later ones find no such endpoint. An endpoint that is gone already is no error.
    """
    logger = get_run_logger()
    with GatewayClient(gateway, read_admin_key(admin_secret)) as client:
        versions = retire(client, host_of(target), name)
    logger.info(
        "%s is retired: %s.", name, f"versions {', '.join(versions)} are taken down" if versions else "it was gone"
    )
    return versions


def _verify(spec: EndpointSpec, subject: Subject, chosen: Chosen, address: Address) -> Verification:
    size = min(spec.limits.rows_max, chosen.batching.batch_size_max)
    with InferClient(address, subject.contract) as ask:
        return verify(ask, subject, size=size, tolerance=spec.tolerance)


def _measure(stages: Stages, spec: EndpointSpec, subject: Subject, address: Address | None) -> Latency | None:
    budget, seconds = spec.budget, spec.measure_seconds
    if budget is None or not seconds or address is None:
        return None
    contract, sample = subject.contract, subject.sample
    return stages.run("measure", lambda: measure_latency(address, contract, sample, rate=budget.rate, seconds=seconds))


def _shift(change: Change, spec: EndpointSpec, subject: Subject, address: Address, keys: Mapping[str, str]) -> str:
    for name, key in keys.items():
        change.gateway.put_key(name, key)
    words = shift(change.gateway, spec, change.route(address), subject.version)
    if not isinstance(spec.rollout, Shadow):
        check_door(spec.gateway, spec, subject.contract, subject.sample, next(iter(keys.values()), None))
    return words
