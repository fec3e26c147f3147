"""What a decision becomes: the deployment, schedule and parameters that put it into effect, as values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from pydantic import Field, ValidationError

from serving.errors import BadInput
from serving.model.batching import BatchingConfig
from serving.model.contract import Frozen
from serving.model.release import Scaling
from tasks.endpoint.spec import EndpointSpec
from tasks.scheduler.decision import Alternative, Decision, Mode
from tasks.scheduler.terms import BatchTerms, Terms
from tasks.scheduler.workload import Events, Machine, Table, Workload
from tasks.spot.purchase import PurchaseOptions

_FRESHNESS_SECONDS_MAX = 3600.0
_KEEP_WARM_SECONDS_MIN = 1.0
_DAY = 86_400

T = TypeVar("T")


class Applied(Frozen):
    """What was put into effect, and what became of that which served before."""

    workload: str = Field(description="The workload's name.")
    mode: Mode
    what: str = Field(description="What serves the workload now, in words.")
    verified: str = Field(description="What was held to be true of it before anything was retired.")
    retired: tuple[str, ...] = Field(default=(), description="What served before and was taken out of service.")
    left: tuple[str, ...] = Field(default=(), description="What is left for a person to do.")

    def markdown(self) -> str:
        """Return it as Markdown."""
        lines = [f"- serves now: {self.what}", f"- verified: {self.verified}"]
        lines += [f"- retired: {each}" for each in self.retired or ("nothing served before",)]
        lines += [f"- **left to do:** {each}" for each in self.left]
        return f"# Workload {self.workload} is served by {self.mode}\n\n" + "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A deployment as it is to be: made like another one of the server, with these fields changed."""

    like: str
    name: str
    description: str
    parameters: Mapping[str, Any]
    tags: tuple[str, ...]
    schedules: Sequence[DeploymentScheduleCreate] = ()
    runs: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How a workload is served now, as the tags of its deployment say."""

    mode: str
    policy: str
    machine: str

    @property
    def words(self) -> str:
        """It in a few words."""
        return f"{self.mode}, {self.policy} on {self.machine}"

    def is_of(self, alternative: Alternative) -> bool:
        """Whether an alternative is served in this way."""
        return (self.mode, self.policy, self.machine) == (alternative.mode, alternative.policy, alternative.machine)


def tag_of(workload: str) -> str:
    """Return the tag that everything which serves a workload has."""
    return f"workload:{workload}"


def tags_of(decision: Decision) -> tuple[str, ...]:
    """Return the tags by which what serves a workload, and how, is found again."""
    chosen = decision.chosen
    told = (f"mode:{chosen.mode}", f"policy:{chosen.policy}", f"machine:{chosen.machine}")
    return (tag_of(decision.workload.name), *told)


def standing_of(tags: Sequence[str]) -> Standing:
    """Return how a deployment with these tags serves its workload."""
    told = dict(tag.split(":", 1) for tag in tags if ":" in tag)
    return Standing(**{name: told.get(name, "unknown") for name in ("mode", "policy", "machine")})


def batch_deployment(decision: Decision, terms: Terms, now: datetime) -> Wanted:
    """Return the deployment of batch runs: nights under a deadline on spot, plain runs on-demand, on its schedule.

    What is needed once has no schedule and one run. Raises BadInput where the terms do not say where rows are read and
    written.
    """
    chosen, workload, batch = decision.chosen, decision.workload, _given(terms.batch, decision, "batch")
    common = {
        "model": workload.model,
        "source": batch.source,
        "destination": batch.destination,
        "options": batch.options.model_copy(update={"workers": max(1, chosen.machines)}).model_dump(mode="json"),
    }
    if chosen.policy == "spot" and isinstance(workload.consumer, Table):
        like = batch.by_deadline
        common |= {"deadline": _deadline(workload.consumer), "buying": _buying(decision, batch).model_dump(mode="json")}
    else:
        like = batch.spot if chosen.policy == "spot" else batch.on_demand
    return Wanted(
        like=like,
        name=workload.name,
        description=_described(decision),
        parameters=common,
        tags=tags_of(decision),
        schedules=() if workload.once else (_schedule(workload, chosen, now),),
        runs=1 if workload.once else 0,
    )


def _deadline(table: Table) -> str:
    return table.due if table.once_by is None else table.once_by.isoformat()


def _buying(decision: Decision, batch: BatchTerms) -> PurchaseOptions:
    chosen, prices = decision.chosen, decision.prices[decision.chosen.machine]
    return PurchaseOptions(
        spot=batch.spot,
        on_demand=batch.on_demand,
        spot_price=prices.spot or prices.on_demand,
        on_demand_price=prices.on_demand,
        rows_per_second=decision.profile.batch_rows_per_second * _speed(decision.workload, chosen.machine),
        changeover_seconds=max(
            decision.profile.start_seconds, PurchaseOptions.model_fields["changeover_seconds"].default
        ),
    )


def _speed(workload: Workload, kind: str) -> float:
    machine: Machine = next(each for each in workload.machines if each.kind == kind)
    return machine.speed or 1.0


def _schedule(workload: Workload, chosen: Alternative, now: datetime) -> DeploymentScheduleCreate:
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
        return _every(timedelta(days=consumer.every_days), first, slug)
    midnight = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return _every(timedelta(seconds=chosen.every_seconds or _DAY), midnight, slug)


def _every(interval: timedelta, anchor: datetime, slug: str) -> DeploymentScheduleCreate:
    schedule = IntervalSchedule.model_validate({"interval": interval, "anchor_date": anchor, "timezone": "UTC"})
    return DeploymentScheduleCreate(schedule=schedule, slug=slug, active=True)


def stream_deployment(decision: Decision, terms: Terms) -> Wanted:
    """Return the deployment of a stream, with a run for each machine. Raises BadInput without both of its ends."""
    workload, chosen, stream = decision.workload, decision.chosen, _given(terms.stream, decision, "stream")
    options = stream.options
    if isinstance(workload.consumer, Events):
        fresh = min(workload.consumer.within_seconds, _FRESHNESS_SECONDS_MAX)
        options = options.model_copy(update={"freshness_seconds": fresh})
    return Wanted(
        like=stream.like,
        name=workload.name,
        description=_described(decision),
        parameters={
            "model": workload.model,
            "source": stream.source.model_dump(mode="json"),
            "sink": stream.sink.model_dump(mode="json"),
            "options": options.model_dump(mode="json"),
        },
        tags=tags_of(decision),
        runs=max(1, chosen.machines),
    )


def endpoint_spec(decision: Decision, terms: Terms) -> EndpointSpec:
    """Return the spec of an endpoint with the batching, the replicas and the keep-warm time that were decided.

    A machine counts as many replicas as the model was measured with side by side. Raises BadInput without terms, and
    where the target can't do it.
    """
    workload, chosen, online = decision.workload, decision.chosen, _given(terms.online, decision, "online")
    replicas = max(1, chosen.machines) * decision.profile.slots
    asleep = chosen.keep_warm_seconds
    if chosen.policy.startswith("keep-warm") and asleep is None:
        message = (
            f"An endpoint must have a fixed time to be kept warm, got {chosen.policy} for {workload.name}: no gateway "
            "goes by that. Serve it by another alternative of the decision."
        )
        raise BadInput(message)
    try:
        return EndpointSpec(
            name=workload.name,
            model=workload.model,
            batching=BatchingConfig(batch_size_max=chosen.batch_size_max, wait_ms_max=chosen.wait_ms_max),
            scaling=Scaling(
                replicas_min=_floor(chosen) * decision.profile.slots,
                replicas_max=replicas,
            ),
            keep_warm=None if asleep is None else max(_KEEP_WARM_SECONDS_MIN, asleep),
            **online.model_dump(exclude={"like"}),
        )
    except ValidationError as error:
        told = "; ".join(each["msg"].removeprefix("Value error, ") for each in error.errors())
        message = f"The endpoint that was chosen for {workload.name} must be one that its target can be, got: {told}"
        raise BadInput(message) from None


def _floor(chosen: Alternative) -> int:
    """Return the machines that an endpoint has while little comes."""
    if chosen.policy == "autoscaled":
        return max(1, chosen.machines_min or 1)
    return max(1, chosen.machines)


def online_deployment(decision: Decision, terms: Terms, spec: EndpointSpec) -> Wanted:
    """Return the deployment that an endpoint is found again by, and that puts another version of its model up."""
    return Wanted(
        like=_given(terms.online, decision, "online").like,
        name=decision.workload.name,
        description=_described(decision),
        parameters={"spec": spec.model_dump(mode="json")},
        tags=tags_of(decision),
    )


def check_terms(decision: Decision, terms: Terms) -> None:
    """Raise BadInput where the terms of the mode that was chosen are missing."""
    match decision.chosen.mode:
        case "batch":
            _given(terms.batch, decision, "batch")
        case "online":
            _given(terms.online, decision, "online")
        case "streaming":
            _given(terms.stream, decision, "stream")


def _given(terms: T | None, decision: Decision, name: str) -> T:
    if terms is None:
        message = (
            f"The terms must have {name!r}, since {decision.chosen.mode} was chosen for {decision.workload.name}, got "
            "none. Say where its rows come from and go to, and call again: what was measured is kept."
        )
        raise BadInput(message)
    return terms


def _described(decision: Decision) -> str:
    chosen = decision.chosen
    return (
        f"Serves the workload {decision.workload.name}, as choose_mode decided: {chosen.mode}, {chosen.policy}. "
        f"{chosen.reason}"
    )
