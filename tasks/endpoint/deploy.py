"""Releases, and the hosts that serve them: one for each kind of target."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import assert_never

from serving.extras import import_extra
from serving.model.batching import BatchingConfig
from serving.model.contract import Contract
from serving.model.registry import ModelPin
from serving.model.release import Release
from serving.targets import Host, Target
from tasks.endpoint import spec as specs
from tasks.endpoint.resolve import LoadedModel
from tasks.endpoint.spec import AnyTarget, EndpointSpec, read_secret, read_variable

_RAY_TOKEN = "RAY_AUTH_TOKEN"  # noqa: S105 - the name of a variable


def make_host(target: AnyTarget, keep_warm_seconds: float | None = None) -> Host:
    """Return the host of a target, which deploys and removes releases. Only the target that is asked for is imported.

    `keep_warm_seconds` is for a target that scales to zero by itself. No server is asked. Raises BadInput where a
    package that the target needs is missing.
    """
    match target:
        case specs.Triton():
            return _make_triton_host(target)
        case specs.RayServe():
            return _make_ray_serve_host(target, keep_warm_seconds)
        case specs.BentoML() | specs.KServe() | specs.Seldon():
            return _make_folder_host(target)
        case _:
            assert_never(target)


def _make_triton_host(target: specs.Triton) -> Host:
    triton = import_extra("serving.targets.triton", "serve")
    host: Host = triton.TritonHost(repository=Path(target.repository), url=target.url, grpc=target.grpc)
    return host


def _make_ray_serve_host(target: specs.RayServe, keep_warm_seconds: float | None) -> Host:
    from serving.targets.ray_serve import RayServe, RayServeHost  # noqa: PLC0415 - an endpoint needs one target of five

    token = read_secret(target.token_secret) if target.token_secret else read_variable(_RAY_TOKEN)
    ray_serve = RayServe(folder=target.folder)
    if keep_warm_seconds is not None:
        ray_serve = replace(ray_serve, keep_warm_seconds=keep_warm_seconds)
    return RayServeHost(
        dashboard_url=target.dashboard,
        serve_url=target.url,
        folder=Path(target.folder),
        target=ray_serve,
        token=token,
    )


def _make_folder_host(target: specs.BentoML | specs.KServe | specs.Seldon) -> Host:
    from serving.targets.folder import FolderHost  # noqa: PLC0415 - the same

    return FolderHost(folder=Path(target.folder), target=_make_folder_target(target))


def _make_folder_target(target: specs.BentoML | specs.KServe | specs.Seldon) -> Target:
    match target:
        case specs.BentoML():
            from serving.targets.bentoml import BentoML  # noqa: PLC0415 - the same

            return BentoML(python=Path(target.python))
        case specs.KServe():
            from serving.targets.kserve import KServe  # noqa: PLC0415 - the same

            return KServe(python=Path(target.python))
        case specs.Seldon():
            from serving.targets.seldon import Seldon  # noqa: PLC0415 - the same

            return Seldon(python=Path(target.python))
        case _:
            assert_never(target)


def make_release(spec: EndpointSpec, loaded: LoadedModel, batching: BatchingConfig) -> Release:
    """Return the release of a model version that a spec asks for."""
    return Release(
        endpoint=spec.name,
        pin=loaded.resolved.pin,
        contract=loaded.contract,
        batching=batching,
        scaling=spec.scaling,
        allow_pickle=spec.allow_pickle,
        rows_max=spec.limits.rows_max,
    )


def make_release_to_remove(endpoint: str, version: str, contract: Contract) -> Release:
    """Return what a host needs of a release to take it down: no model."""
    pin = ModelPin(name=endpoint, version=version, model_id=None, source="", digest="")
    return Release(endpoint=endpoint, pin=pin, contract=contract)
