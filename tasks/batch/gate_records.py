"""What a gate keeps beside a run: its statistics, what it was refused for, and that somebody approved it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from pydantic import AwareDatetime

from serving.errors import BadInput, NoCompleteRun, PublishRefused, SourceNotFound
from serving.model.contract import Frozen
from serving.option_words import name_option
from tasks.batch.column_statistics import TableStatistics, add_tables, read_statistics, write_statistics
from tasks.batch.dataset import map_parallel
from tasks.batch.gate import Finding, check_findings, judge, list_refusing
from tasks.batch.gate_rules import Baseline, LastRun, NamedRun, RowCountRule, Rule, StatisticsFile, TrainingSet
from tasks.batch.manifest import Manifest, find_manifest, find_newest_run
from tasks.batch.part_footer import read_part_statistics
from tasks.batch.parts import list_parts
from tasks.batch.plan import DIGEST_SHOWN, FORMAT_VERSION, ROOT, Plan, record_path
from tasks.batch.run_records import read_record
from tasks.batch.training_set import find_training_statistics
from tasks.storage import Storage, open_storage

_STATISTICS = "statistics"
_PARTS_AT_ONCE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundBaseline:
    """What a run is held against, and how messages call it.

    `is_run` says that it is a run, or stands for one: then a run of the same data has about as many rows.
    """

    title: str
    statistics: TableStatistics
    is_run: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class NoBaseline:
    """Why there is nothing to hold a run against."""

    reason: str


def save_statistics(storage: Storage, run: str, plan_digest: str, statistics: TableStatistics) -> bool:
    """Write the statistics of a run, before it is published, create-only; return whether they were new."""
    return storage.put_new(record_path(run, plan_digest, _STATISTICS), write_statistics(statistics))


def find_statistics(storage: Storage, run: Manifest) -> TableStatistics | None:
    """Return the statistics of a published run, None where it has none. Raises FormatTooNew and BadInput."""
    path = record_path(run.run, run.plan_digest, _STATISTICS)
    data = storage.read(path)
    return None if data is None else read_statistics(data, storage.address(path))


def sum_statistics(storage: Storage, plan: Plan) -> TableStatistics:
    """Return the statistics of all rows of a run, from the footers of its parts, some hundred at a time.

    Raises BadInput where parts have none: the run was planned without a gate. PublishRefused where parts are gone that
    were there when the run was counted: it is not judged by some of its rows.
    """
    entries = list(list_parts(storage, plan).values())
    summed: list[TableStatistics] = []
    for start in range(0, len(entries), _PARTS_AT_ONCE):
        some = entries[start : start + _PARTS_AT_ONCE]
        found = map_parallel(storage, lambda entry: read_part_statistics(storage, entry), some)
        if None in found:
            message = (
                f"Every part of run {plan.run} must hold statistics for the gate, but {some[found.index(None)].path} "
                f"has none: the run was planned without one. Leave {name_option('gate')} out, or give another "
                f"{name_option('rescore')}."
            )
            raise BadInput(message)
        summed = [add_tables([*summed, *(each for each in found if each is not None)])]
    rows = sum(each.rows for each in summed)
    if not summed or rows != plan.rows:
        message = (
            f"The parts must hold the {plan.rows:,} rows of run {plan.run}, got {rows:,}: some are gone since they "
            "were counted. Nothing was published; call again to score what is missing."
        )
        raise PublishRefused(message)
    return summed[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedRun:
    """What the gate says of a run, beside what, and whether somebody has approved exactly that."""

    baseline: FoundBaseline | NoBaseline
    statistics: TableStatistics
    findings: tuple[Finding, ...]
    approved: bool

    @property
    def title(self) -> str:
        """What it was held against, in words."""
        return self.baseline.title if isinstance(self.baseline, FoundBaseline) else "no baseline"

    @property
    def is_refused(self) -> bool:
        """Whether it breaks a rule that refuses it, and nobody has approved exactly that."""
        return not self.approved and bool(list_refusing(self.findings))


def judge_run(
    storage: Storage,
    run: str,
    plan_digest: str,
    rules: Sequence[Rule],
    baseline: FoundBaseline | NoBaseline,
    statistics: TableStatistics,
) -> JudgedRun:
    """Judge a run before it is published. What it is refused for is written beside it, so that it can be approved.

    Args:
        storage: The destination.
        run: The name of the run.
        plan_digest: The digest of its plan: an approval is of this plan alone.
        rules: Those of its gate.
        baseline: What it is held against.
        statistics: The statistics of all its rows.
    """
    before = baseline.statistics if isinstance(baseline, FoundBaseline) else None
    if isinstance(baseline, FoundBaseline) and not baseline.is_run:
        # A rule of the number of rows judges by its own bound alone.
        bound = {"max_change": None}
        rules = [rule.model_copy(update=bound) if isinstance(rule, RowCountRule) else rule for rule in rules]
    findings = judge(statistics, before, rules)
    approved = is_approved(storage, run, plan_digest, findings)
    judged = JudgedRun(baseline=baseline, statistics=statistics, findings=findings, approved=approved)
    if judged.is_refused:
        record_refusal(storage, run, plan_digest, judged.title, findings)
    return judged


def check_approved(run: str, judged: JudgedRun, approve: str, answer: str | None = None) -> None:
    """Raise ApprovalNeeded where a run is refused.

    Args:
        run: The name of the run.
        judged: What its gate says.
        approve: What a person does so that it is published as it is.
        answer: What came of asking for approval, as a sentence; None where nobody was asked.
    """
    if judged.is_refused:
        check_findings(judged.findings, run, judged.title, approve, answer)


def open_baseline(storage: Storage, baseline: Baseline, plan: Plan) -> Callable[[], FoundBaseline | NoBaseline]:
    """Return what finds the baseline of a planned run once it is scored.

    It is looked for now too, so that one that is not there is told before anything is scored. A training set is read
    now, once: it stays what it is.

    Raises:
        BadInput: The training set can't be found or read, as `find_training_statistics` says.
        OvernightError: Another baseline is not there, as `find_baseline` says.
    """
    if isinstance(baseline, TrainingSet):
        trained = find_training_statistics(storage, plan, baseline.dataset)
        found = FoundBaseline(title=trained.title, statistics=trained.statistics, is_run=False)
        return lambda: found
    find_baseline(storage, baseline, plan.run)
    return lambda: find_baseline(storage, baseline, plan.run)


def find_baseline(
    storage: Storage, baseline: LastRun | NamedRun | StatisticsFile, run: str
) -> FoundBaseline | NoBaseline:
    """Return what a run of a destination is held against, which is never itself.

    Raises:
        NoCompleteRun: The run that is named is not published.
        SourceNotFound: The file that is named is not there.
        BadInput: What is found is no statistics.
        FormatTooNew: A newer Overnight has written it.
    """
    if isinstance(baseline, StatisticsFile):
        return _read_file(baseline.address)
    if isinstance(baseline, LastRun):
        before = find_newest_run(storage, other_than=run, rows_min=1)
        if before is None:
            return NoBaseline(reason=f"no other run of {storage.url} was published before")
    else:
        before = find_manifest(storage, baseline.run)
        if before is None:
            message = (
                f"{storage.url} must hold the run {baseline.run!r}, the gate's baseline, got none. List its runs, or "
                "name none."
            )
            raise NoCompleteRun(message)
    statistics = find_statistics(storage, before)
    if statistics is None:
        return NoBaseline(reason=f"run {before.run} was published without statistics")
    return FoundBaseline(title=f"run {before.run}", statistics=statistics)


def _read_file(address: str) -> FoundBaseline:
    folder, slash, name = address.rpartition("/")
    data = open_storage(folder or slash or ".").read(name)
    if data is None:
        message = (
            f"{address} must hold the statistics of the gate's baseline, got no such file. Write it, or correct it."
        )
        raise SourceNotFound(message)
    return FoundBaseline(title=address, statistics=read_statistics(data, address))


class Refusal(Frozen):
    """What a run was refused for."""

    format_version: int = FORMAT_VERSION
    run: str
    plan_digest: str
    baseline: str
    refused_at: AwareDatetime
    findings: tuple[Finding, ...]


class Approval(Frozen):
    """That somebody wants a run published as it is, whatever it was refused for."""

    format_version: int = FORMAT_VERSION
    run: str
    approved_at: AwareDatetime
    approved_by: str = ""
    reason: str = ""
    findings: tuple[str, ...]


def record_refusal(storage: Storage, run: str, plan_digest: str, baseline: str, findings: Sequence[Finding]) -> None:
    """Write what a run is refused for, so that it can be approved; the same again is written once."""
    refusal = Refusal(
        run=run,
        plan_digest=plan_digest,
        baseline=baseline,
        refused_at=datetime.now(UTC),
        findings=list_refusing(findings),
    )
    path = f"{ROOT}/{run}/refused-{name_refusal(plan_digest, findings)}.json"
    storage.put_new(path, refusal.model_dump_json().encode())


def is_approved(storage: Storage, run: str, plan_digest: str, findings: Sequence[Finding]) -> bool:
    """Return whether somebody has approved a run with exactly what it would be refused for now."""
    return storage.exists(f"{ROOT}/{run}/approved-{name_refusal(plan_digest, findings)}.json")


def list_refusals(storage: Storage, run: str) -> dict[str, Refusal]:
    """Return what a run was refused for, by the digest that an approval is named by, the last one first."""
    folder = f"{ROOT}/{run}/refused-"
    paths = [entry.path for entry in storage.entries(f"{ROOT}/{run}", depth=1) if entry.path.startswith(folder)]
    found = {path.removeprefix(folder).removesuffix(".json"): read_record(storage, path, Refusal) for path in paths}
    known = {digest: refusal for digest, refusal in found.items() if refusal is not None}
    return dict(sorted(known.items(), key=lambda pair: pair[1].refused_at, reverse=True))


def approve_run(
    storage: Storage, run: str, approved_by: str = "", reason: str = "", refusal_name: str | None = None
) -> Refusal:
    """Approve what a run was refused for: the same call then publishes it. Again, it changes nothing.

    Args:
        storage: The destination.
        run: The name of the run.
        approved_by: Who approves it.
        reason: Why.
        refusal_name: The refusal that is approved, by `name_refusal`; the last one where None.

    Returns:
        The refusal that is approved.

    Raises:
        BadInput: The run was not refused, or not for that.
    """
    refusals = list_refusals(storage, run)
    if refusal_name is not None:
        refusals = {name: refusal for name, refusal in refusals.items() if name == refusal_name}
    if not refusals:
        message = (
            f"Run {run!r} of {storage.url} must have been refused by its gate to be approved, got no refusal. List the "
            "runs of the destination to find its name."
        )
        raise BadInput(message)
    digest, refusal = next(iter(refusals.items()))
    approval = Approval(
        run=run,
        approved_at=datetime.now(UTC),
        approved_by=approved_by,
        reason=reason,
        findings=tuple(map(str, refusal.findings)),
    )
    storage.put_new(f"{ROOT}/{run}/approved-{digest}.json", approval.model_dump_json().encode())
    return refusal


def name_refusal(plan_digest: str, findings: Sequence[Finding]) -> str:
    """Return what names a refusal and its approval: other figures, or another plan, are not what was approved."""
    told = json.dumps([plan_digest, sorted(map(str, list_refusing(findings)))])
    return hashlib.sha256(told.encode()).hexdigest()[:DIGEST_SHOWN]
