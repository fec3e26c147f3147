"""The state of an endpoint: what is kept of it, and what goes on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from serving.gateway.route import Route
from serving.gateway.trial import Trial, Verdict
from serving.model.contract import Frozen

Models = Literal["awake", "asleep", "waking", "unknown"]


class Kept(Frozen):
    """A route with the state of its trial, as its file has it."""

    route: Route
    trial: Trial | None = Field(default=None, description="The trial that goes on.")
    verdict: Verdict | None = Field(default=None, description="How the last trial ended.")


class EndpointState(Kept):
    """A route, its trial, and what goes on."""

    in_flight: dict[str, int] = Field(description="Requests that are with the servers, by version, old ones too.")
    waiting: int = Field(description="Requests that wait for their turn.")
    models: Models = Field(
        description="Whether the models are loaded, where the route lets them sleep; unknown: the gateway has not "
        "loaded them itself."
    )
