"""What is kept beside a run of its challengers: their parts, the comparison, and whether one was promoted."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import polars as pl

from serving.errors import BadInput, NoCompleteRun, OvernightError, StorageFault
from serving.model.contract import Frozen
from tasks.batch.challenger_rules import Labels, PromoteIf
from tasks.batch.compare import compare_challenger
from tasks.batch.comparison import (
    ChallengerComparison,
    ChallengerParts,
    ChallengersRecord,
    Promotion,
    RunComparison,
    challengers_path,
    comparison_path,
    list_parts_made,
    promotion_path,
)
from tasks.batch.manifest import find_complete_manifest, scan_parts
from tasks.batch.options import BatchOptions
from tasks.batch.parts import ChunkId, give_up_challenger, list_followed, read_given_up
from tasks.batch.plan import Plan
from tasks.batch.promotion import promote
from tasks.batch.publish import Audit, audit_parts
from tasks.batch.run_records import load_plan, read_record
from tasks.storage import Storage, open_storage

_log = logging.getLogger(__name__)


def audit_challengers(storage: Storage, plan: Plan) -> dict[int, Audit]:
    """Read the footer of every part of the challengers that were not given up, by their places.

    One that can't be read is set aside, and its chunk must be scored again.
    """
    return {each.place: audit_parts(storage, each) for each in list_followed(storage, plan)}


def list_missing_chunks(audits: Mapping[int, Audit]) -> set[ChunkId]:
    """Return the chunks that lack the part of a challenger."""
    return {chunk for audit in audits.values() for chunk in audit.missing}


def save_challenger_parts(storage: Storage, plan: Plan, audits: Mapping[int, Audit]) -> None:
    """Write the list of all parts of challengers, just before their run is published; the first one stands.

    A challenger that still lacks parts is given up.

    Raises:
        StorageFault: The list can't be read back.
        DestinationUnusable: What stands there does not read.
    """
    if not plan.challengers:
        return
    found = []
    for each in plan.challenger_plans:
        audit = audits.get(each.place)
        if audit is not None and audit.missing:
            why = f"{len(audit.missing)} of its parts could not be read back after they were written"
            _log.warning("The challenger %s is given up, and the run goes on: %s", each.model.uri, why)
            give_up_challenger(storage, each, why)
        found.append(
            ChallengerParts(
                place=each.place,
                model=each.model.uri,
                model_digest=each.model.digest,
                given_up=read_given_up(storage, each),
                parts=list_parts_made(audit.footers if audit is not None else ()),
            )
        )
    record = ChallengersRecord(run=plan.run, plan_digest=plan.digest, challengers=tuple(found))
    path = challengers_path(plan.run, plan.digest)
    storage.put_new(path, record.model_dump_json().encode())
    if read_record(storage, path, ChallengersRecord) is None:
        message = f"The list of the challengers' parts must be readable once written, but is gone from {path}."
        raise StorageFault(message)


class ComparedRun(Frozen):
    """A run beside its challengers, and whether one took the alias, where that was asked for."""

    comparison: RunComparison
    promotion: Promotion | None = None

    @property
    def challengers(self) -> tuple[ChallengerComparison, ...]:
        """Each challenger beside the model of the run."""
        return self.comparison.challengers


def compare_run(storage: Storage, plan: Plan) -> RunComparison:
    """Compare the challengers of a run, all of whose parts are there, with its model.

    One that can't be compared is told with the reason, and the others are compared.
    """
    return RunComparison(
        run=plan.run,
        plan_digest=plan.digest,
        model=plan.model.uri,
        rows=plan.rows,
        challengers=tuple(_compare(storage, plan, each) for each in plan.challenger_plans),
    )


def _compare(storage: Storage, plan: Plan, other: Plan) -> ChallengerComparison:
    try:
        return compare_challenger(storage, plan, other)
    except OvernightError as error:
        _log.warning("The challenger %s can't be compared: %s", other.model.uri, error)
        pin = other.model
        return ChallengerComparison(model=pin.uri, model_digest=pin.digest, not_compared=str(error))


def compare_published(storage: Storage, plan: Plan, rule: PromoteIf | None) -> ComparedRun:
    """Compare a run that was published, keep that beside it, and move the alias where a rule holds.

    What an earlier attempt has written stands.
    """
    compared, promoted = comparison_path(plan.run, plan.digest), promotion_path(plan.run, plan.digest)
    comparison = read_record(storage, compared, RunComparison) or compare_run(storage, plan)
    storage.put_new(compared, comparison.model_dump_json().encode())
    promotion = read_record(storage, promoted, Promotion)
    if promotion is None and rule is not None:
        promotion = promote(plan, comparison, rule)
        storage.put_new(promoted, promotion.model_dump_json().encode())
    return ComparedRun(comparison=comparison, promotion=promotion)


def find_comparison(storage: Storage, plan: Plan) -> ComparedRun | None:
    """Return what is kept of the comparison of a run, None where nothing is."""
    comparison = read_record(storage, comparison_path(plan.run, plan.digest), RunComparison)
    if comparison is None:
        return None
    promotion = read_record(storage, promotion_path(plan.run, plan.digest), Promotion)
    return ComparedRun(comparison=comparison, promotion=promotion)


def compare_challengers(
    destination: str, run: str | None = None, labels: Labels | None = None, promote_if: PromoteIf | None = None
) -> ComparedRun:
    """Compare the challengers of a published run once more, such as when its labels have become known.

    Nothing is scored, and what is kept beside the run stays as it is.

    Args:
        destination: Where the run is.
        run: Its name; without, the newest complete run.
        labels: A table with labels, which are found by the run's key columns. Without: those of the run.
        promote_if: When a challenger takes the alias, as in the options of a run. The alias must still name the model
            of the run.

    Raises:
        NoCompleteRun: There is no such run.
        BadInput: It has no challengers, or labels are not of another table, or promote_if has none.
        OvernightError: Its other kinds, where parts or labels can't be read.
    """
    storage = open_storage(destination)
    manifest = find_complete_manifest(storage, run, "List its runs.")
    plan = load_plan(storage, manifest.run)
    if plan is None:
        message = f"{storage.url} must hold the plan of run {manifest.run}, got none. List its runs."
        raise NoCompleteRun(message)
    if not plan.challengers:
        message = f"Run {plan.run} must have challengers to be compared, got none. Score it with challengers."
        raise BadInput(message)
    if labels is not None:
        plan = plan.model_copy(update={"options": _replace_labels(plan, labels)})
    if promote_if is not None and plan.options.labels is None:
        message = f"Labels must be given where promote_if is, got none: {promote_if.metric} is measured by them."
        raise BadInput(message)
    found = tuple(compare_challenger(storage, plan, each) for each in plan.challenger_plans)
    comparison = RunComparison(
        run=plan.run, plan_digest=manifest.plan_digest, model=plan.model.uri, rows=plan.rows, challengers=found
    )
    promotion = promote(plan, comparison, promote_if) if promote_if is not None else None
    return ComparedRun(comparison=comparison, promotion=promotion)


def open_challenger(destination: str, model: str, run: str | None = None) -> pl.LazyFrame:
    """Open the predictions of a challenger of the newest complete run of a destination, or of a named one.

    Columns of segments and labels that the run has kept are there as `source.NAME`.

    Args:
        destination: Where the run is.
        model: The pinned version of the challenger, as models:/NAME/VERSION.
        run: The run's name.

    Raises:
        NoCompleteRun: There is no such run.
        BadInput: It has no such challenger, or that was given up.
    """
    storage = open_storage(destination)
    manifest = find_complete_manifest(storage, run, "List its runs.")
    record = read_record(storage, challengers_path(manifest.run, manifest.plan_digest), ChallengersRecord)
    known = {each.model: each for each in (record.challengers if record else ())}
    found = known.get(model)
    if found is None or found.given_up is not None:
        got = f"one that was given up ({found.given_up})" if found else f"none of that version in {list(known)}"
        message = f"Run {manifest.run} must have a challenger {model} that has scored all rows, got {got}."
        raise BadInput(message)
    return scan_parts(storage, [part.path for part in found.parts])


def _replace_labels(plan: Plan, labels: Labels) -> BatchOptions:
    """Return the options of a plan with labels that have become known since. Raises BadInput."""
    if not plan.options.key_columns:
        message = f"Run {plan.run} must have key columns, by which labels are found, got none."
        raise BadInput(message)
    if labels.source is None and labels.column not in plan.columns_kept:
        message = (
            f"Labels must be those of another table, or a column that the run has kept, "
            f"{list(plan.columns_kept)}, got {labels.column!r}. Say labels.source."
        )
        raise BadInput(message)
    return plan.options.model_copy(update={"labels": labels})
