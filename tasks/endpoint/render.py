"""A release: the pinned model, its contract and its batching under the endpoint's name, as targets render it."""

from __future__ import annotations

from serving.model.batching import BatchingConfig
from serving.model.contract import Contract
from serving.model.registry import ModelPin
from serving.model.release import Release
from tasks.endpoint.resolve import Subject
from tasks.endpoint.spec import EndpointSpec


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
