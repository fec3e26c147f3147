"""A release: the pinned model, its contract and its dial under the endpoint's name; and what was served of it before."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field, ValidationError

from serving.contract import Contract, Frozen
from serving.registry import ModelPin, Resolved, save_tag
from serving.release import Dial, Release, Scaling
from tasks.endpoint.spec import EndpointSpec


def make_release(spec: EndpointSpec, resolved: Resolved, contract: Contract, dial: Dial, scaling: Scaling) -> Release:
    """Return what is served."""
    return Release(
        endpoint=spec.name,
        pin=resolved.pin,
        contract=contract,
        dial=dial,
        scaling=scaling,
        allow_pickle=spec.allow_pickle,
        rows_max=spec.limits.rows_max,
    )


class Setting(Frozen):
    """With what a version was last served, kept as a tag of it: to go back to, where another setting fails."""

    dial: Dial = Field(description="The dial that was verified.")
    scaling: Scaling = Field(description="The replicas.")


def remember(release: Release) -> bool:
    """Keep with the model version how it is served; False where the registry does not take it."""
    setting = Setting(dial=release.dial, scaling=release.scaling)
    return save_tag(release.pin, tag_of(release.endpoint), setting.model_dump_json())


def remembered(release: Release, tags: Mapping[str, str]) -> Release | None:
    """Return the release as it was last served under this endpoint, None where that is not known."""
    try:
        setting = Setting.model_validate_json(tags.get(tag_of(release.endpoint), ""))
    except ValidationError:
        return None
    return release.model_copy(update={"dial": setting.dial, "scaling": setting.scaling})


def tag_of(endpoint: str) -> str:
    """Return the name of the tag by which a model version keeps how an endpoint serves it."""
    return f"overnight.endpoint.{endpoint}"


def bare_release(endpoint: str, version: str, contract: Contract) -> Release:
    """Return a release as far as a host needs it to take that version down, without its model."""
    pin = ModelPin(name=endpoint, version=version, model_id=None, source="", digest="")
    return Release(endpoint=endpoint, pin=pin, contract=contract)
