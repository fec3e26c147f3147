"""The records of a run at its destination: its plan, which flow run began it, and its number in the order of runs."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import TypeVar

from pydantic import ValidationError

from serving.errors import DestinationUnusable, FormatTooNew, OvernightError, PublishRefused, RunNameTaken
from serving.model.contract import Frozen
from serving.option_words import name_option
from tasks.batch.plan import FORMAT_VERSION, ROOT, Plan, digest_plan, plan_path
from tasks.storage import Storage

# The numbers in the order of runs of a destination, and those of an Iceberg table, where the table lies. The sources
# that either has had the predictions of, one after another.
ORDER, TABLE_ORDER, SOURCES = f"{ROOT}/order", f"{ROOT}/order/table", f"{ROOT}/order/source"
_PLAN_OR_MANIFEST = re.compile(rf"{ROOT}/([^/]+)/(plan|manifest)\.json")
_NUMBERED = re.compile(rf"(?:{ORDER}|{TABLE_ORDER}|{SOURCES})/(\d{{8,}})\.json")


def list_recorded_runs(storage: Storage) -> tuple[set[str], set[str]]:
    """Return the runs of a destination that have a plan, and those that have a manifest."""
    matches = (_PLAN_OR_MANIFEST.fullmatch(entry.path) for entry in storage.entries(ROOT, depth=2))
    found = {(match[1], match[2]) for match in matches if match}
    return {run for run, kind in found if kind == "plan"}, {run for run, kind in found if kind == "manifest"}


def save_plan(storage: Storage, plan: Plan) -> Plan:
    """Write the plan, or return the one that was written first.

    Raises RunNameTaken where the explicit name holds a run of another plan.
    """
    storage.put_new(plan_path(plan.run), plan.model_dump_json().encode())
    standing = load_plan(storage, plan.run)
    if standing is None:
        message = f"The plan of run {plan.run} must be readable once written, but is gone from {storage.url}."
        raise OvernightError(message)
    return check_plan_key(standing, plan.key)


def load_plan(storage: Storage, run: str) -> Plan | None:
    """Read the plan of a run, None where there is none.

    One of an earlier release has no digest and gets it here; its parts of then bear none, and are scored again.
    Raises DestinationUnusable where the plan is not what its digest says.
    """
    plan = read_record(storage, plan_path(run), Plan)
    if plan is None or not plan.shards:
        return plan
    digest = digest_plan(plan)
    if plan.digest and plan.digest != digest:
        message = (
            f"{storage.address(plan_path(plan.run))} must be as it was written, with the digest "
            f"{plan.digest[:12]}, but its content has {digest[:12]}. Put it back, or delete {plan.folder} below the "
            "destination, and call again for all of the run."
        )
        raise DestinationUnusable(message)
    return plan.model_copy(update={"digest": digest})


R = TypeVar("R", bound=Frozen)


def read_record(storage: Storage, path: str, kind: type[R]) -> R | None:
    """Read a plan, start or manifest; None where there is none.

    Raises:
        FormatTooNew: A newer Overnight has written it.
        DestinationUnusable: It does not read as such a record.
    """
    data = storage.read(path)
    if data is None:
        return None
    try:
        record = kind.model_validate_json(data)
    except ValidationError as error:
        with suppress(ValueError, AttributeError):
            check_format_version(json.loads(data).get("format_version"), storage.address(path))
        record_name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", kind.__name__).lower()
        problem = error.errors()[0]
        where = f" at {'.'.join(map(str, problem['loc']))}" if problem["loc"] else ""
        message = (
            f"{storage.address(path)} must be a {record_name} that this version of Overnight reads, got: "
            f"{problem['msg']}{where}. Put it back as it was written, or use the version that wrote it, or another "
            "name or destination."
        )
        raise DestinationUnusable(message) from error
    check_format_version(getattr(record, "format_version", None), storage.address(path))
    return record


def check_format_version(version: object, address: str) -> None:
    """Raise FormatTooNew where the format version that a file states is newer than the one that is read here."""
    if isinstance(version, int) and version > FORMAT_VERSION:
        message = (
            f"{address} must be of format version {FORMAT_VERSION} or lower to be read by this version of Overnight, "
            f"got version {version}: a newer Overnight has written it. Update Overnight, then call again."
        )
        raise FormatTooNew(message)


def check_plan_key(plan: Plan, key: str) -> Plan:
    """Return the plan if it has this key; raises RunNameTaken otherwise."""
    if plan.key != key:
        message = (
            f"The run name {plan.run!r} already holds a run of another plan, that of {plan.model.uri} over "
            f"{plan.source.title}, made {plan.planned_at:%Y-%m-%d %H:%M} UTC: this call has another model, source or "
            f"options. Choose another {name_option('name')}, or none."
        )
        raise RunNameTaken(message)
    return plan


class RunStart(Frozen):
    """What ties the attempts of one flow run to one run: its name, and the key that it was planned with.

    `release` is that of the Overnight which began the run, and which workers that join it must be. Those of earlier
    releases have no key and no release.
    """

    run: str
    key: str = ""
    release: str = ""


def save_start(storage: Storage, flow_run_id: str, start: RunStart) -> RunStart:
    """Tie a flow run to a run, create-only; return what it is tied to."""
    path = f"{ROOT}/starts/{flow_run_id}.json"
    storage.put_new(path, start.model_dump_json().encode())
    return load_start(storage, flow_run_id) or start


def load_start(storage: Storage, flow_run_id: str) -> RunStart | None:
    """Return what an earlier attempt of this flow run was tied to, None for a first attempt."""
    return read_record(storage, f"{ROOT}/starts/{flow_run_id}.json", RunStart)


def load_started_plan(storage: Storage, start: RunStart) -> Plan:
    """Return the plan that an earlier attempt of a flow run has begun.

    Raises OvernightError where it is gone, RunNameTaken where another call was planned in its place since.
    """
    plan = load_plan(storage, start.run)
    if plan is None:
        message = (
            f"The plan of run {start.run} must be there, since this flow run began it, but is gone from {storage.url}."
        )
        raise OvernightError(message)
    return check_plan_key(plan, start.key) if start.key else plan


class OrderNumber(Frozen):
    """The run that holds a number in the order of runs."""

    run: str


def list_order_numbers(storage: Storage, folder: str = ORDER) -> list[str]:
    """Return where the numbers lie that are taken, from the lowest: in the order of runs, or in that of SOURCES."""
    paths = [entry.path for entry in storage.entries(folder, depth=1) if _NUMBERED.fullmatch(entry.path)]
    return sorted(paths, key=parse_order_number)


def parse_order_number(path: str) -> int:
    """Return the number in the order of runs, or of SOURCES, that lies at a path, 0 where none does."""
    match = _NUMBERED.fullmatch(path)
    return int(match[1]) if match else 0


def order_path(number: int, folder: str = ORDER) -> str:
    """Return where a number in the order of runs, or of SOURCES, lies below a destination or the folder of a table."""
    return f"{folder}/{number:08d}.json"


def confirm_plan(storage: Storage, plan: Plan) -> Plan:
    """Return the plan with the number in the order of runs that its record has now, just before it is published.

    Raises PublishRefused where the record was deleted while the run went on, or is that of another plan by now, and
    where the number is another run's or nobody's: runs that were planned since could not be told from this one.
    """
    stored = load_plan(storage, plan.run)
    if stored is not None and stored.order:
        holder = read_record(storage, order_path(stored.order), OrderNumber)
        if holder is None or holder.run != plan.run:
            message = (
                f"{storage.address(order_path(stored.order))} must hold run {plan.run}, which was planned under that "
                f"number, but {'is gone' if holder is None else f'holds run {holder.run}'}: records were deleted. "
                f"Nothing was published. Delete {plan.folder} below the destination and call again: the run is planned "
                "once more, and parts that are there are taken where that plan comes out the same."
            )
            raise PublishRefused(message)
    if stored is None or (stored.key, stored.digest) != (plan.key, plan.digest):
        message = (
            f"{storage.address(plan_path(plan.run))} must stand until run {plan.run} is published, but "
            f"{'is gone' if stored is None else 'is another by now'}. Nothing was published; call again: the run is "
            "planned once more, and parts that are there are taken where that plan comes out the same."
        )
        raise PublishRefused(message)
    return plan.model_copy(update={"order": stored.order})
