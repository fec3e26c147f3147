"""What a person says for a decision to be put into effect: where rows come from and go to, and who may ask.

Terms may be given for every mode: those of the mode that is chosen are used. No secret is among them.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from serving.gateway.route import Limits
from serving.model.contract import Frozen
from tasks.batch.options import BatchOptions
from tasks.endpoint.spec import (
    GATEWAY,
    Access,
    AdminSecret,
    AllAtOnce,
    AllowPickle,
    Canary,
    Gateway,
    InputColumns,
    Policies,
    Target,
    Tolerance,
    default_target,
)
from tasks.stream.options import AnySink, AnySource, StreamOptions

_DEPLOYMENT = r"^[^/]+/[^/]+$"


class BatchTerms(Frozen):
    """How a workload is served by batch runs on a schedule."""

    source: str = Field(
        min_length=1, description="A file, folder, glob or s3:// prefix, which every worker reaches by this very path."
    )
    destination: str = Field(min_length=1, description="A folder or s3:// prefix outside the source.")
    options: BatchOptions = Field(
        default=BatchOptions(), description="Those of batch_inference; workers are set to what was decided."
    )
    on_demand: str = Field(
        default="batch-inference/on-demand",
        pattern=_DEPLOYMENT,
        description="The deployment that runs on machines that stay: on-demand runs are made like it.",
    )
    spot: str = Field(
        default="batch-inference/spot",
        pattern=_DEPLOYMENT,
        description="The deployment that runs on machines that may vanish, which nights on spot send runs of.",
    )
    by_deadline: str = Field(
        default="nightly-inference/by-deadline",
        pattern=_DEPLOYMENT,
        description="The deployment of a night under a deadline: nights on spot are made like it.",
    )
    first_run_seconds: float | None = Field(
        default=None,
        gt=0,
        le=7 * 86_400,
        description="Run it once, now, and go on only where that is complete within so many seconds. Without: model, "
        "source and pools are held against each other, and the schedule makes the first run.",
    )


class OnlineTerms(Frozen):
    """How a workload is served by an endpoint; the rest of its spec is what was decided."""

    gateway: Gateway = GATEWAY
    admin_secret: AdminSecret = None
    target: Target = Field(default_factory=default_target)
    access: Access = Field(default=Access(), description="Who may ask.")
    limits: Limits = Field(default=Limits(), description="What one request may be, and how many at once.")
    rollout: Annotated[AllAtOnce | Canary, Field(discriminator="kind")] = Field(
        default=AllAtOnce(), description="How a new version gets its traffic."
    )
    input_columns: InputColumns = Field(default_factory=dict)
    policies: Policies = Field(default_factory=dict)
    allow_pickle: AllowPickle = False
    tolerance: Tolerance = 1e-5
    like: str = Field(
        default="online-endpoint/online",
        pattern=_DEPLOYMENT,
        description="The deployment that the endpoint's own is made like: by it the endpoint is found again.",
    )


class StreamTerms(Frozen):
    """How a workload is served by a stream."""

    source: AnySource = Field(description="Where events are read.")
    sink: AnySink = Field(description="Where scores go.")
    options: StreamOptions = Field(
        default=StreamOptions(), description="Those of stream_inference; the freshness is set to what was promised."
    )
    like: str = Field(
        default="stream-inference/stream",
        pattern=_DEPLOYMENT,
        description="The deployment that the stream's is made like: its pool, its settings.",
    )
    begin_seconds: float = Field(
        default=300.0,
        gt=0,
        le=86_400,
        description="Seconds within which its runs must have opened both ends and begun to score.",
    )


class Terms(Frozen):
    """What the decision is put into effect with, by mode."""

    batch: BatchTerms | None = Field(default=None, description="For batch: where rows are read and scores written.")
    online: OnlineTerms | None = Field(default=None, description="For online: gateway, model server, who may ask.")
    stream: StreamTerms | None = Field(default=None, description="For streaming: both ends of the stream.")
