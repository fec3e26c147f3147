"""What the runs of a destination cost, by the records that their calls leave beside the plan.

A call says that it begins, and leaves a record when it ends by itself, as a night does; one that is killed leaves none.
Where a price is not known, nothing is made up: the cost is null, with a note that says why.
"""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from pydantic import Field

from serving.errors import BadInput
from serving.model.contract import Frozen
from tasks.batch.dataset import map_parallel
from tasks.batch.manifest import Manifest, read_manifests
from tasks.batch.plan import FORMAT_VERSION, ROOT, Plan
from tasks.batch.run_records import read_record
from tasks.storage import Storage

PRICE_VARIABLE = "OVERNIGHT_DOLLARS_PER_HOUR"
ON_DEMAND_VARIABLE = "OVERNIGHT_ON_DEMAND_DOLLARS_PER_HOUR"
_RECORD = re.compile(rf"{ROOT}/([^/]+)/costs/(begun|call|night)-[^/]+\.json")


class MachinePrice(Frozen):
    """What an hour of a call's machine costs, as far as its environment says."""

    dollars_per_hour: float | None = Field(default=None, gt=0, description="What is paid for it.")
    on_demand_dollars_per_hour: float | None = Field(
        default=None, gt=0, description="What it would cost as an on-demand machine."
    )


def read_machine_price(environment: Mapping[str, str] = os.environ) -> MachinePrice:
    """Return the price that the environment states for this machine. Raises BadInput where it is no price.

    Without a price of its own, an on-demand machine is taken to be meant by that of on-demand ones.
    """
    found: dict[str, float | None] = {}
    for name in (PRICE_VARIABLE, ON_DEMAND_VARIABLE):
        text = environment.get(name, "").strip()
        try:
            found[name] = float(text) if text else None
        except ValueError:
            found[name] = -1.0
        if not (found[name] is None or 0 < float(found[name] or 0) < float("inf")):
            message = f"{name} must be the price of an hour in dollars, such as 0.0696, got {text!r}. Correct it."
            raise BadInput(message)
    on_demand = found[ON_DEMAND_VARIABLE]
    return MachinePrice(dollars_per_hour=found[PRICE_VARIABLE] or on_demand, on_demand_dollars_per_hour=on_demand)


class CallCost(Frozen):
    """One call that scored: how long its machine worked for it, and the price of that machine."""

    format_version: int = FORMAT_VERSION
    flow_run_id: str
    began_at: datetime
    seconds: float = Field(ge=0)
    state: str = Field(description="How the call ended: complete, interrupted, paused or failed.")
    on_ray: bool = Field(default=False, description="Whether machines of a Ray cluster scored, which are not counted.")
    price: MachinePrice = MachinePrice()

    @property
    def ended_at(self) -> datetime:
        """When it ended."""
        return self.began_at + timedelta(seconds=self.seconds)


class NightCost(Frozen):
    """What the machines of a night cost, in the currency of the prices that it was given."""

    format_version: int = FORMAT_VERSION
    flow_run_id: str
    machines: int = Field(ge=1, description="Machines at a time, at most.")
    machine_seconds: float = Field(ge=0)
    cost: float = Field(ge=0)
    cost_on_demand: float = Field(ge=0, description="Price of the same work on on-demand machines alone.")
    on_demand_price: float = Field(gt=0, description="Price of an hour of one on-demand machine.")


def save_call_begin(storage: Storage, plan: Plan, flow_run_id: str, began_at: datetime) -> None:
    """Keep beside the plan that a call has begun; until it has its record, it counts as one that was killed."""
    storage.put_new(f"{plan.folder}/costs/begun-{_name_call(flow_run_id, began_at)}.json", b"{}")


def save_call_cost(storage: Storage, plan: Plan, cost: CallCost) -> None:
    """Keep the record of a call beside the plan; each call of a flow run has its own."""
    name = _name_call(cost.flow_run_id, cost.began_at)
    storage.put_new(f"{plan.folder}/costs/call-{name}.json", cost.model_dump_json().encode())


def _name_call(flow_run_id: str, began_at: datetime) -> str:
    return f"{flow_run_id}-{began_at.timestamp() * 1000:.0f}"


def save_night_cost(storage: Storage, run: str, cost: NightCost) -> None:
    """Keep the record of a night beside the plan of its run; the first one of a flow run stands."""
    storage.put_new(f"{ROOT}/{run}/costs/night-{cost.flow_run_id}.json", cost.model_dump_json().encode())


class RunCost(Frozen):
    """What one published run cost, as far as it is known; the notes say what is not, and why."""

    run: str
    model: str
    planned_at: datetime
    rows: int
    machine_seconds: float | None = Field(description="Seconds of machines that its records tell of.")
    spent: float | None
    on_demand: float | None = Field(description="Price of the same seconds on on-demand machines alone.")
    always_on: float | None = Field(
        description="Price of as many on-demand machines as an endpoint, from the run before until this one."
    )
    is_lower_bound: bool = Field(default=False, description="Whether calls were killed that no record tells of.")
    notes: tuple[str, ...] = ()

    @property
    def spent_per_million_rows(self) -> float | None:
        """What a million rows cost."""
        return None if self.spent is None or not self.rows else self.spent * 1e6 / self.rows


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecords:
    """What a destination keeps of one run: its calls and nights, and how many calls have begun."""

    calls: Sequence[CallCost] = ()
    nights: Sequence[NightCost] = ()
    begun: int = 0

    @property
    def killed(self) -> int:
        """How many calls left no record of what they cost; a night tells of all of its own."""
        return 0 if self.nights else max(0, self.begun - len(self.calls))


def read_run_costs(storage: Storage) -> list[RunCost]:
    """Return what each published run of a destination cost, the oldest first.

    Commits of a stream's table are left out: a stream is no call with an end.
    """
    entries = [entry.path for entry in storage.entries(ROOT)]
    manifests = [manifest for manifest in read_manifests(storage, entries) if not manifest.commit]
    manifests.sort(key=lambda manifest: manifest.position)
    calls: dict[str, list[CallCost]] = {}
    nights: dict[str, list[NightCost]] = {}
    found = [match for path in entries if (match := _RECORD.fullmatch(path))]
    begun = Counter(match[1] for match in found if match[2] == "begun")
    matches = [match for match in found if match[2] != "begun"]
    for match, record in zip(matches, map_parallel(storage, lambda match: _read(storage, match), matches), strict=True):
        if isinstance(record, CallCost):
            calls.setdefault(match[1], []).append(record)
        elif record is not None:
            nights.setdefault(match[1], []).append(record)
    records = {
        manifest.run: RunRecords(
            calls=calls.get(manifest.run, ()),
            nights=nights.get(manifest.run, ()),
            begun=begun[manifest.run],
        )
        for manifest in manifests
    }
    return compute_run_costs(manifests, records)


def _read(storage: Storage, match: re.Match[str]) -> CallCost | NightCost | None:
    if match[2] == "call":
        return read_record(storage, match[0], CallCost)
    return read_record(storage, match[0], NightCost)


def compute_run_costs(manifests: Sequence[Manifest], records: Mapping[str, RunRecords]) -> list[RunCost]:
    """Return what runs cost, in the order of their manifests."""
    costs = []
    for before, manifest in itertools.pairwise([None, *manifests]):
        assert manifest is not None  # noqa: S101 - only the first of the pairs has none
        interval = None if before is None else (manifest.planned_at - before.planned_at).total_seconds()
        costs.append(_compute_run_cost(manifest, records.get(manifest.run, RunRecords()), interval))
    return costs


def _compute_run_cost(manifest: Manifest, records: RunRecords, interval: float | None) -> RunCost:
    notes: list[str] = []
    if records.nights:
        seconds: float | None = sum(night.machine_seconds for night in records.nights)
        spent: float | None = sum(night.cost for night in records.nights)
        on_demand: float | None = sum(night.cost_on_demand for night in records.nights)
        hourly: float | None = records.nights[-1].on_demand_price
        machines = max(night.machines for night in records.nights)
    else:
        notes += _explain_unknown(records)
        seconds = sum(call.seconds for call in records.calls) if records.calls else None
        spent = _sum_price(records.calls, [call.price.dollars_per_hour for call in records.calls])
        rates = [call.price.on_demand_dollars_per_hour for call in records.calls]
        on_demand = _sum_price(records.calls, rates)
        hourly = None if on_demand is None else max(rate for rate in rates if rate is not None)
        machines = count_machines(records.calls)
    always_on = None if hourly is None or interval is None else hourly * machines * interval / 3600
    if hourly is not None and interval is None:
        notes.append("the first run has none before it: how long an endpoint would have been on is not known")
    return RunCost(
        run=manifest.run,
        model=manifest.model.uri,
        planned_at=manifest.planned_at,
        rows=manifest.rows,
        machine_seconds=seconds,
        spent=spent,
        on_demand=on_demand,
        always_on=always_on,
        is_lower_bound=records.killed > 0,
        notes=tuple(notes),
    )


def _explain_unknown(records: RunRecords) -> list[str]:
    """Return why the cost of a run without a night is not known, or is only what it was at least."""
    calls = records.calls
    if not calls:
        return ["none of its calls left a record: they were killed, or made by an earlier release"]
    notes = []
    if any(call.on_ray for call in calls):
        notes.append("it was scored on Ray: which machines of the cluster worked is not known")
    elif any(call.price.dollars_per_hour is None for call in calls):
        notes.append(f"the price of its machine is not known: {PRICE_VARIABLE} was not set")
    elif any(call.price.on_demand_dollars_per_hour is None for call in calls):
        notes.append(f"the on-demand price is not known: {ON_DEMAND_VARIABLE} was not set")
    if killed := records.killed:
        plural = "calls were" if killed > 1 else "call was"
        notes.append(f"{killed} {plural} killed and left no record: it cost at least this much")
    return notes


def _sum_price(calls: Sequence[CallCost], rates: Sequence[float | None]) -> float | None:
    """Return the price of calls, None where that of any is not known."""
    if not calls or any(call.on_ray for call in calls):
        return None
    known = [call.seconds * rate / 3600 for call, rate in zip(calls, rates, strict=True) if rate is not None]
    return sum(known) if len(known) == len(calls) else None


def count_machines(calls: Sequence[CallCost]) -> int:
    """Return how many calls were made at a time, at most: each has a machine."""
    return (
        max((sum(each.began_at <= call.began_at < each.ended_at for each in calls) for call in calls), default=1) or 1
    )
