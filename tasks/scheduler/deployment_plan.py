"""The deployments that put a decision into effect: what a person configures for it, and what follows, as values.

Configurations may be given for every mode: that of the chosen mode is used. They hold no secrets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, TypeVar

from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from pydantic import Field, ValidationError

from serving.errors import BadInput
from serving.gateway.route import Limits
from serving.model.contract import Frozen
from serving.model.release import Scaling
from tasks.batch.options import BatchOptions
from tasks.endpoint.spec import (
    GATEWAY,
    Access,
    AdminSecret,
    AllAtOnce,
    AllowPickle,
    Budget,
    Canary,
    EndpointSpec,
    Gateway,
    InputColumns,
    MeasureSeconds,
    Policies,
    Tolerance,
)
from tasks.endpoint.targets import Target, default_target
from tasks.scheduler.decision import Alternative, Decision, Mode
from tasks.scheduler.workload import Events, Requests, Table, Workload
from tasks.spot.purchase import PurchaseOptions
from tasks.stream.options import AnySink, AnySource, StreamOptions

_FRESHNESS_SECONDS_MAX = 3600.0
_KEEP_WARM_SECONDS_MIN = 1.0
# The bounds of an endpoint's budget.
_BUDGET_MS_MAX = 60_000.0
_RATE_MIN, _RATE_MAX = 0.01, 1e6
_DAY = 86_400
_DEPLOYMENT_NAME = r"^[^/]+/[^/]+$"

T = TypeVar("T")


class BatchApplyConfig(Frozen):
    """How a workload is served by batch runs on a schedule."""

    source: str = Field(
        min_length=1, description="A file, folder, glob or s3:// prefix, which every worker reaches by this path."
    )
    destination: str = Field(min_length=1, description="A folder or s3:// prefix outside the source.")
    options: BatchOptions = Field(
        default=BatchOptions(), description="Those of batch_inference; workers are set to what was decided."
    )
    on_demand: str = Field(
        default="batch-inference/on-demand",
        pattern=_DEPLOYMENT_NAME,
        description="The deployment whose work pool has on-demand machines; on-demand runs copy it.",
    )
    spot: str = Field(
        default="batch-inference/spot",
        pattern=_DEPLOYMENT_NAME,
        description="The deployment whose work pool has spot machines; a night on spot starts runs of it.",
    )
    by_deadline: str = Field(
        default="nightly-inference/by-deadline",
        pattern=_DEPLOYMENT_NAME,
        description="The deployment of a night under a deadline; nights on spot copy it.",
    )
    first_run_seconds: float | None = Field(
        default=None,
        gt=0,
        le=7 * 86_400,
        description="Make a run at once, and go on only where it is complete within so many seconds. Without: model, "
        "source and pools are checked, and the schedule makes the first run.",
    )


class OnlineApplyConfig(Frozen):
    """How a workload is served by an endpoint; the rest of its spec is what was decided."""

    gateway: Gateway = GATEWAY
    admin_secret: AdminSecret = None
    target: Target = Field(default_factory=default_target)
    access: Access = Field(default=Access(), description="Who may send requests.")
    limits: Limits = Field(default=Limits(), description="What one request may be, and how many at once.")
    rollout: Annotated[AllAtOnce | Canary, Field(discriminator="kind")] = Field(
        default=AllAtOnce(), description="How a new version gets its traffic."
    )
    input_columns: InputColumns = Field(default_factory=dict)
    policies: Policies = Field(default_factory=dict)
    allow_pickle: AllowPickle = False
    tolerance: Tolerance = 1e-5
    measure_seconds: MeasureSeconds = 2.0
    template: str = Field(
        default="online-endpoint/online",
        pattern=_DEPLOYMENT_NAME,
        description="The deployment that the endpoint's own deployment copies.",
    )


class StreamApplyConfig(Frozen):
    """How a workload is served by a stream."""

    source: AnySource = Field(description="Where events are read.")
    sink: AnySink = Field(description="Where scores go.")
    options: StreamOptions = Field(
        default=StreamOptions(), description="Those of stream_inference; the freshness is set to what was promised."
    )
    template: str = Field(
        default="stream-inference/stream",
        pattern=_DEPLOYMENT_NAME,
        description="The deployment whose pool and settings the stream's deployment copies.",
    )
    start_seconds_max: float = Field(
        default=300.0,
        gt=0,
        le=86_400,
        description="Seconds within which its runs must have opened source and sink, and score.",
    )


class ApplyConfig(Frozen):
    """What a decision is put into effect with, by mode."""

    batch: BatchApplyConfig | None = Field(
        default=None, description="For batch: where rows are read and scores written."
    )
    online: OnlineApplyConfig | None = Field(
        default=None, description="For online: gateway, model server, who may send requests."
    )
    stream: StreamApplyConfig | None = Field(default=None, description="For streaming: source and sink.")


class AppliedDecision(Frozen):
    """What was put into effect, and what became of what served before."""

    workload: str = Field(description="The workload's name.")
    mode: Mode
    summary: str = Field(description="What serves the workload now, in words.")
    verified: str = Field(description="What was checked before anything was retired.")
    retired: tuple[str, ...] = Field(default=(), description="What served before and was taken out of service.")
    to_do: tuple[str, ...] = Field(default=(), description="What is left for a person to do.")

    def markdown(self) -> str:
        """Return it as Markdown."""
        lines = [f"- serves now: {self.summary}", f"- verified: {self.verified}"]
        lines += [f"- retired: {each}" for each in self.retired or ("nothing served before",)]
        lines += [f"- **left to do:** {each}" for each in self.to_do]
        return f"# Workload {self.workload} is served by {self.mode}\n\n" + "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredDeployment:
    """A deployment as it must be: a copy of a template, with these fields changed, of which `runs` begin at once."""

    template: str
    name: str
    description: str
    parameters: Mapping[str, Any]
    tags: tuple[str, ...]
    schedules: Sequence[DeploymentScheduleCreate] = ()
    runs: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CurrentDeployment:
    """How a workload is served now, as the tags of its deployment say."""

    mode: str
    policy: str
    machine: str

    @property
    def summary(self) -> str:
        """Mode, policy and machine in words."""
        return f"{self.mode}, {self.policy} on {self.machine}"

    def matches(self, alternative: Alternative) -> bool:
        """Return whether this serves the workload as the alternative says."""
        return (self.mode, self.policy, self.machine) == (alternative.mode, alternative.policy, alternative.machine)


def workload_tag(workload: str) -> str:
    """Return the tag of every deployment that serves a workload."""
    return f"workload:{workload}"


def deployment_tags(decision: Decision) -> tuple[str, ...]:
    """Return the tags that say which workload a deployment serves, and how."""
    chosen = decision.chosen
    return (
        workload_tag(decision.workload.name),
        f"mode:{chosen.mode}",
        f"policy:{chosen.policy}",
        f"machine:{chosen.machine}",
    )


def read_current_deployment(tags: Sequence[str]) -> CurrentDeployment:
    """Return how a deployment with these tags serves its workload."""
    values = dict(tag.split(":", 1) for tag in tags if ":" in tag)
    return CurrentDeployment(**{name: values.get(name, "unknown") for name in ("mode", "policy", "machine")})


def plan_batch_deployment(decision: Decision, config: ApplyConfig, now: datetime) -> DesiredDeployment:
    """Return the deployment of batch runs with its schedule: nights under a deadline on spot, plain runs on-demand.

    A table that is needed once has one run and no schedule. Raises BadInput without a configuration for batch.
    """
    chosen, workload, batch = decision.chosen, decision.workload, _require_config(config.batch, decision, "batch")
    parameters = {
        "model": workload.model,
        "source": batch.source,
        "destination": batch.destination,
        "options": batch.options.model_copy(update={"workers": max(1, chosen.machines)}).model_dump(mode="json"),
    }
    if chosen.policy == "spot" and isinstance(workload.consumer, Table):
        table = workload.consumer
        template = batch.by_deadline
        parameters |= {
            "deadline": table.due if table.once_by is None else table.once_by.isoformat(),
            "buying": _make_buying(decision, batch).model_dump(mode="json"),
        }
    else:
        template = batch.spot if chosen.policy == "spot" else batch.on_demand
    return DesiredDeployment(
        template=template,
        name=workload.name,
        description=_describe_deployment(decision),
        parameters=parameters,
        tags=deployment_tags(decision),
        schedules=() if workload.is_needed_once else (_make_schedule(workload, chosen, now),),
        runs=1 if workload.is_needed_once else 0,
    )


def _make_buying(decision: Decision, batch: BatchApplyConfig) -> PurchaseOptions:
    prices = decision.prices[decision.chosen.machine]
    machine = next(each for each in decision.workload.machines if each.kind == decision.chosen.machine)
    return PurchaseOptions(
        spot=batch.spot,
        on_demand=batch.on_demand,
        spot_price=prices.spot or prices.on_demand,
        on_demand_price=prices.on_demand,
        rows_per_second=decision.profile.batch_rows_per_second * (machine.speed or 1.0),
        changeover_seconds=max(
            decision.profile.start_seconds, PurchaseOptions.model_fields["changeover_seconds"].default
        ),
    )


def _make_schedule(workload: Workload, chosen: Alternative, now: datetime) -> DeploymentScheduleCreate:
    """Return when batch runs begin: when a table's input is there, or every so many seconds."""
    slug, consumer = f"workload-{workload.name}", workload.consumer
    if isinstance(consumer, Table):
        hour, minute = map(int, consumer.ready.split(":"))
        if consumer.every_days == 1:
            cron = CronSchedule(cron=f"{minute} {hour} * * *", timezone="UTC")
            return DeploymentScheduleCreate(schedule=cron, slug=slug, active=True)
        # Cron can't count days over the end of a month.
        today = now.astimezone(UTC).replace(hour=hour, minute=minute, second=0, microsecond=0)
        first = today if today > now else today + timedelta(days=1)
        return _make_interval_schedule(timedelta(days=consumer.every_days), first, slug)
    midnight = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return _make_interval_schedule(timedelta(seconds=chosen.period_seconds or _DAY), midnight, slug)


def _make_interval_schedule(interval: timedelta, anchor: datetime, slug: str) -> DeploymentScheduleCreate:
    schedule = IntervalSchedule.model_validate({"interval": interval, "anchor_date": anchor, "timezone": "UTC"})
    return DeploymentScheduleCreate(schedule=schedule, slug=slug, active=True)


def plan_stream_deployment(decision: Decision, config: ApplyConfig) -> DesiredDeployment:
    """Return the deployment of a stream, with a run for each machine. Raises BadInput without a configuration."""
    workload, chosen, stream = decision.workload, decision.chosen, _require_config(config.stream, decision, "stream")
    options = stream.options
    if isinstance(workload.consumer, Events):
        fresh = min(workload.consumer.within_seconds, _FRESHNESS_SECONDS_MAX)
        options = options.model_copy(update={"freshness_seconds": fresh})
    return DesiredDeployment(
        template=stream.template,
        name=workload.name,
        description=_describe_deployment(decision),
        parameters={
            "model": workload.model,
            "source": stream.source.model_dump(mode="json"),
            "sink": stream.sink.model_dump(mode="json"),
            "options": options.model_dump(mode="json"),
        },
        tags=deployment_tags(decision),
        runs=max(1, chosen.machines),
    )


def make_endpoint_spec(decision: Decision, config: ApplyConfig) -> EndpointSpec:
    """Return the spec of an endpoint with the batching, the replicas and the keep-warm time that were decided.

    Its budget is the promise of the workload, which the batching of the simulation is held against. A machine counts as
    many replicas as the model was measured with side by side. Raises BadInput without a configuration for online, and
    where the target does not support the spec.
    """
    workload, chosen, online = decision.workload, decision.chosen, _require_config(config.online, decision, "online")
    slots, machines = decision.profile.slots, max(1, chosen.machines)
    machines_min = max(1, chosen.machines_min or 1) if chosen.policy == "autoscaled" else machines
    keep_warm = chosen.keep_warm_seconds
    try:
        return EndpointSpec(
            name=workload.name,
            model=workload.model,
            budget=_make_budget(decision),
            batching=chosen.batching,
            scaling=Scaling(replicas_min=machines_min * slots, replicas_max=machines * slots),
            keep_warm=None if keep_warm is None else max(_KEEP_WARM_SECONDS_MIN, keep_warm),
            **online.model_dump(exclude={"template"}),
        )
    except ValidationError as error:
        reasons = "; ".join(each["msg"].removeprefix("Value error, ") for each in error.errors())
        message = f"The target must support the endpoint that was chosen for {workload.name}, got: {reasons}"
        raise BadInput(message) from None


def _make_budget(decision: Decision) -> Budget | None:
    """Return the latency that was promised, at the rate that the choice carries; None for a table, which has none."""
    match decision.workload.consumer:
        case Requests(latency_ms=latency_ms):
            pass
        case Events(within_seconds=within_seconds):
            latency_ms = min(1000 * within_seconds, _BUDGET_MS_MAX)
        case Table():
            return None
    # By three digits, so that the same traffic, metered again, gives the same spec more often.
    rate = float(f"{decision.chosen.checked_rate or 0.0:.3g}")
    return Budget(latency_ms=latency_ms, rate=min(max(rate, _RATE_MIN), _RATE_MAX))


def plan_online_deployment(decision: Decision, config: ApplyConfig, spec: EndpointSpec) -> DesiredDeployment:
    """Return the deployment that records an endpoint, and that deploys another version of its model."""
    return DesiredDeployment(
        template=_require_config(config.online, decision, "online").template,
        name=decision.workload.name,
        description=_describe_deployment(decision),
        parameters={"spec": spec.model_dump(mode="json")},
        tags=deployment_tags(decision),
    )


def check_apply_config(decision: Decision, config: ApplyConfig) -> None:
    """Raise BadInput where the configuration of the chosen mode is missing."""
    match decision.chosen.mode:
        case "batch":
            _require_config(config.batch, decision, "batch")
        case "online":
            _require_config(config.online, decision, "online")
        case "streaming":
            _require_config(config.stream, decision, "stream")


def _require_config(config: T | None, decision: Decision, name: str) -> T:
    if config is None:
        message = (
            f"The configuration must have {name!r}, since {decision.chosen.mode} was chosen for "
            f"{decision.workload.name}, got none. Say where its rows come from and go to, and call again: what was "
            "measured is kept."
        )
        raise BadInput(message)
    return config


def _describe_deployment(decision: Decision) -> str:
    chosen = decision.chosen
    return (
        f"Serves the workload {decision.workload.name}, as choose_mode decided: {chosen.mode}, {chosen.policy}. "
        f"{chosen.reason}"
    )
