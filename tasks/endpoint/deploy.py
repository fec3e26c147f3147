"""Put a release on its target, beside what serves there, and take one down."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import assert_never

from serving.model.batching import BatchingConfig
from serving.model.contract import Contract
from serving.model.registry import ModelPin
from serving.model.release import Release
from serving.targets import Host, Target
from tasks.endpoint import spec as specs
from tasks.endpoint.resolve import Subject
from tasks.endpoint.spec import AnyTarget, EndpointSpec, read_secret, read_variable

_RAY_TOKEN = "RAY_AUTH_TOKEN"  # noqa: S105 - the name of a variable


def host_of(target: AnyTarget, keep_warm_seconds: float | None = None) -> Host:
    """Return what takes releases for a target. Only the target that is asked for is imported.

    `keep_warm_seconds` is for a target that scales to zero by itself.
    """
    match target:
        case specs.Triton():
            return _triton(target)
        case specs.RayServe():
            return _ray_serve(target, keep_warm_seconds)
        case specs.BentoML() | specs.KServe() | specs.Seldon():
            return _folder(target)
        case _:
            assert_never(target)


def _triton(target: specs.Triton) -> Host:
    from serving.targets.triton import TritonHost  # noqa: PLC0415 - an endpoint needs one target of five

    return TritonHost(repository=Path(target.repository), url=target.url, grpc=target.grpc)


def _ray_serve(target: specs.RayServe, keep_warm_seconds: float | None) -> Host:
    from serving.targets.ray_serve import RayServe, RayServeHost  # noqa: PLC0415 - the same

    token = read_secret(target.token_secret) if target.token_secret else read_variable(_RAY_TOKEN)
    rendering = RayServe(folder=target.folder)
    if keep_warm_seconds is not None:
        rendering = replace(rendering, keep_warm_seconds=keep_warm_seconds)
    return RayServeHost(
        dashboard_url=target.dashboard,
        serve_url=target.url,
        folder=Path(target.folder),
        target=rendering,
        token=token,
    )


def _folder(target: specs.BentoML | specs.KServe | specs.Seldon) -> Host:
    from serving.targets.folder import FolderHost  # noqa: PLC0415 - the same

    return FolderHost(folder=Path(target.folder), target=_rendering(target))


def _rendering(target: specs.BentoML | specs.KServe | specs.Seldon) -> Target:
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


def make_release(spec: EndpointSpec, subject: Subject, batching: BatchingConfig) -> Release:
    """Return what is served."""
    return Release(
        endpoint=spec.name,
        pin=subject.resolved.pin,
        contract=subject.contract,
        batching=batching,
        scaling=spec.scaling,
        allow_pickle=spec.allow_pickle,
        rows_max=spec.limits.rows_max,
    )


def bare_release(endpoint: str, version: str, contract: Contract) -> Release:
    """Return a release as far as a host needs it to take that version down, without its model."""
    pin = ModelPin(name=endpoint, version=version, model_id=None, source="", digest="")
    return Release(endpoint=endpoint, pin=pin, contract=contract)
