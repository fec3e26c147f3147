"""Verification of a run: every part is opened and read, and held against the manifest, the plan and each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from pydantic import Field

from serving.errors import DestinationUnusable, FormatTooNew, NoCompleteRun
from serving.model.contract import Frozen
from tasks.batch.challenger_check import check_challengers
from tasks.batch.dataset import list_entries_at, map_parallel
from tasks.batch.delta import TableState
from tasks.batch.manifest import Manifest, find_manifest
from tasks.batch.part_check import Damage, DamageKind, ExpectedPart, PartCheck, PartReader, describe_size, expect_part
from tasks.batch.part_footer import PartFooter
from tasks.batch.parts import list_reused_parts, part_path
from tasks.batch.plan import Plan, manifest_path, plan_path
from tasks.batch.publish import make_manifest
from tasks.batch.run_records import OrderNumber, load_plan, order_path, read_record
from tasks.batch.run_tables import explain_missing_run, read_table_state
from tasks.batch.runs import RunState, choose_newest, list_runs
from tasks.storage import Entry, Storage

_RUNS_SHOWN = 10


class RunVerification(Frozen):
    """What the verification of one run came to."""

    run: str
    state: RunState = Field(description="complete: published, and nothing is damaged.")
    model: str | None = Field(default=None, description="The model version that the run was scored by.")
    rows: int = Field(default=0, description="Rows that the run has by its records.")
    rows_read: int = Field(default=0, description="Rows that were read, in parts that are as they must be.")
    parts: int = Field(default=0, description="Parts that the run has by its records.")
    parts_read: int = Field(default=0, description="Parts that were read.")
    challenger_parts_read: int = Field(default=0, description="Parts of challengers that were read.")
    parts_proved: int = Field(default=0, description="Parts of earlier runs that were scored again to the same bytes.")
    damages: tuple[Damage, ...] = ()
    notes: tuple[str, ...] = Field(default=(), description="What is worth knowing, and no damage.")


def choose_runs(storage: Storage, run: str | None, *, every: bool = False) -> list[str]:
    """Return the names of the runs to verify: one that is named, or every one, or the newest that was published.

    Runs whose records do not read are among them: nobody knows which of them is the newest. Raises NoCompleteRun.
    """
    runs = list_runs(storage)
    if run is not None:
        if run in {each.run for each in runs} or storage.exists(manifest_path(run)):
            return [run]
        known = ", ".join(each.run for each in runs[:_RUNS_SHOWN]) or "none"
        message = f"{storage.url} must hold a run {run!r}, got: {known}. Name one of those."
        raise NoCompleteRun(message)
    newest = choose_newest(runs)
    unreadable = [each.run for each in runs if each.planned_at is None]
    chosen = [each.run for each in runs] if every else [*([newest.run] if newest else []), *unreadable]
    if not chosen:
        begun = f"; {runs[0].run} is incomplete. Name that run" if runs else ". Correct the address, or score into it"
        also = " to have its parts verified all the same." if runs else " first."
        message = f"{storage.url} must hold a run that was published, got none{begun}{also}"
        raise NoCompleteRun(message)
    return list(dict.fromkeys(chosen))


def verify_run(storage: Storage, run: str) -> RunVerification:
    """Open every part of a run and hold it against the records; nothing is changed.

    Of each part: that it is there, its size, the digest of its bytes, the digests of its plan and its chunk, its rows,
    and its columns and their types. Of one that bears no digest of its bytes the rows are read: checksums, rejects, and
    without keys of the caller's own the place of each row. Of the whole: the manifest is the one that plan and parts
    make; nothing else lies in the run's folder; the run holds its number in the order of runs; a Delta or Iceberg table
    has the run once, and the files that its log lists. The parts of challengers are read as well, and held against the
    list beside the manifest.
    """
    findings = _Findings(storage)
    manifest = findings.read_manifest(run)
    plan = findings.read_plan(run, manifest)
    if plan is None:
        return _verify_without_plan(findings, run, manifest)
    table = findings.read_table_state(plan, manifest)
    parts = _list_expected(plan, manifest)
    folder = f"run={plan.run}"
    entries = {entry.path: entry for entry in storage.entries(folder)}
    reused = {entry.path: entry for entry in list_reused_parts(storage, plan).values()}
    # No reader of a table opens what it has rewritten or replaced, nor does a call score that again.
    expected = [part for part in parts if table is None or part.path in table.files]
    checks = _check_parts(findings, plan, expected, entries | reused, is_published=manifest is not None)
    findings.check_extra(plan, manifest, entries, {part.path for part in parts})
    if manifest is not None:
        footers = [check.footer for check in checks if check and check.footer and not check.damages]
        findings.check_manifest(manifest, plan, footers if len(footers) == len(parts) else None)
    findings.check_order(plan)
    challengers = check_challengers(storage, plan, is_published=manifest is not None)
    findings.damages += challengers.damages
    findings.notes += challengers.notes
    whole = [check for check in checks if check is not None and not check.damages]
    if old := sum(check.footer is not None and not check.footer.digest for check in whole):
        words = f"{old:,} parts are of a release before parts bore a digest of their bytes"
        findings.notes.append(f"{words}: only a sample that is scored again shows that no bit of them has changed.")
    return RunVerification(
        run=run,
        state="damaged" if findings.damages else "incomplete" if manifest is None else "complete",
        model=plan.model.uri if manifest is None else manifest.model.uri,
        rows=plan.rows if manifest is None else manifest.rows,
        rows_read=sum(check.footer.rows for check in whole if check.footer),
        parts=len(parts),
        parts_read=sum(check is not None for check in checks),
        challenger_parts_read=challengers.parts_read,
        damages=tuple(findings.damages),
        notes=tuple(findings.notes),
    )


def _list_expected(plan: Plan, manifest: Manifest | None) -> list[ExpectedPart]:
    """Return the parts of the plan's chunks, and those that the manifest alone names."""
    chunks = {part_path(plan, at): chunk for at, chunk in plan.chunks.items()}
    listed = {} if manifest is None else {part.path: part for part in manifest.parts}
    paths = [*chunks, *(path for path in listed if path not in chunks)]
    return [expect_part(path, chunks.get(path), listed.get(path)) for path in paths]


def _check_parts(
    findings: _Findings,
    plan: Plan,
    parts: Sequence[ExpectedPart],
    entries: Mapping[str, Entry],
    *,
    is_published: bool,
) -> list[PartCheck | None]:
    """Read every part that is there; None for one that is not, which is a damage of a published run."""
    reader = PartReader(findings.storage, plan)
    checks = map_parallel(
        findings.storage, lambda part: reader.check(part, entries[part.path]) if part.path in entries else None, parts
    )
    missing = [part for part, check in zip(parts, checks, strict=True) if check is None]
    if missing and not is_published:
        findings.notes.append(f"{len(missing)} of {len(parts)} parts are not scored yet.")
    for part in missing if is_published else ():
        findings.add("missing", part.path, "The part must be there, but is gone.")
    for check in checks:
        findings.damages += () if check is None else check.damages
    _check_keys(findings, parts, checks)
    return checks


def _check_keys(findings: _Findings, parts: Sequence[ExpectedPart], checks: Sequence[PartCheck | None]) -> None:
    """Hold the key columns of all parts against those that most of them have: the plan does not name their types."""
    keys = [None if check is None else check.keys for check in checks]
    (common, _), *_ = Counter(each for each in keys if each is not None).most_common(1) or [("", 0)]
    for part, found in zip(parts, keys, strict=True):
        if found is not None and found != common:
            findings.add("schema", part.path, f"Its keys must be those of the other parts, {common}, got {found}.")


def _verify_without_plan(findings: _Findings, run: str, manifest: Manifest | None) -> RunVerification:
    """Return what can be said of a run whose plan does not read: which parts of the manifest are there."""
    if manifest is not None:
        there = list_entries_at(findings.storage, (part.path for part in manifest.parts))
        for part in manifest.parts:
            if part.path not in there:
                findings.add("missing", part.path, "The part must be there, but is gone.")
            elif there[part.path].size != part.bytes:
                findings.add("size", part.path, describe_size(part.bytes, there[part.path].size))
        findings.notes.append("Without its plan the parts of the run were not opened.")
    return RunVerification(
        run=run,
        state="damaged",
        model=None if manifest is None else manifest.model.uri,
        rows=0 if manifest is None else manifest.rows,
        parts=0 if manifest is None else len(manifest.parts),
        damages=tuple(findings.damages),
        notes=tuple(findings.notes),
    )


class _Findings:
    """The damages and notes of one run, and the checks that look at its records."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.damages: list[Damage] = []
        self.notes: list[str] = []

    def add(self, kind: DamageKind, path: str, message: str) -> None:
        """Keep a damage."""
        self.damages.append(Damage(kind=kind, path=path, message=message))

    def read_manifest(self, run: str) -> Manifest | None:
        """Read the manifest of a run, None where there is none; one that does not read is a damage."""
        path = manifest_path(run)
        try:
            return find_manifest(self.storage, run)
        except (DestinationUnusable, FormatTooNew) as error:
            self.add("manifest", path, str(error))
            return None

    def read_plan(self, run: str, manifest: Manifest | None) -> Plan | None:
        """Read the plan of a run, or of the stream's table that it is a commit of; to have none is a damage."""
        name = run.rpartition("-")[0] if manifest is not None and manifest.commit else run
        path = plan_path(name)
        try:
            plan = load_plan(self.storage, name)
        except (DestinationUnusable, FormatTooNew) as error:
            self.add("plan", path, str(error))
            return None
        if plan is None:
            self.add("plan", path, "The plan must be there for as long as the run is, but is gone.")
        elif manifest is not None and not manifest.plan_digest:
            # Of a release before parts bore the digest of their plan, or of a stream.
            return plan.model_copy(update={"digest": ""})
        elif manifest is not None and manifest.plan_digest != plan.digest:
            told = f"digest {manifest.plan_digest[:12]}, got one with digest {plan.digest[:12]}"
            self.add("plan", path, f"The plan must be that by which the run was published, {told}.")
            return None
        return plan

    def check_manifest(self, manifest: Manifest, plan: Plan, footers: Sequence[PartFooter] | None) -> None:
        """Hold a manifest against the one that plan and parts make, field by field.

        Without footers of all parts, those fields are left out that parts alone can tell.
        """
        expected = make_manifest(plan, footers or ())
        told_by_parts = {"parts", "rejects", "rows_key_null"}
        names = (
            set(Manifest.model_fields) - {"format_version", "commit"} - (told_by_parts if footers is None else set())
        )
        if manifest.commit:
            # A commit has the parts of its own moment, and any version of the model may have scored them.
            expected = expected.model_copy(update={"rows": sum(footer.rows for footer in footers or ())})
            names &= {"key", *(() if footers is None else ("rows", "rejects", "rows_key_null"))}
        elif not manifest.plan_digest:
            names &= {"key", "run", "rows", "rejects", "parts"}
        for name in sorted(names):
            must, got = getattr(expected, name), getattr(manifest, name)
            if must != got:
                told = _describe_difference(must, got)
                message = f"Its {name} must be what the plan and the parts say, {told}."
                self.add("manifest", manifest_path(manifest.run), message)

    def check_order(self, plan: Plan) -> None:
        """Hold the run's number in the order of runs against the record of it."""
        if not plan.order:
            return
        path = order_path(plan.order)
        try:
            holder = read_record(self.storage, path, OrderNumber)
        except (DestinationUnusable, FormatTooNew) as error:
            self.add("order", path, str(error))
            return
        if holder is None or holder.run != plan.run:
            got = "is gone" if holder is None else f"names run {holder.run}"
            message = f"The number {plan.order} in the order of runs must be that of run {plan.run}, but {got}."
            self.add("order", path, message)

    def check_extra(
        self, plan: Plan, manifest: Manifest | None, entries: Mapping[str, Entry], expected: set[str]
    ) -> None:
        """Name what lies in the run's folder and is none of its parts: a reader of the folder would read it too."""
        for path in entries:
            name = path.rpartition("/")[2]
            if path in expected:
                continue
            if name.startswith(".") or not plan.shards:
                # Set aside, or of a stream's table: a part that the next commit has.
                kind = "set aside" if name.startswith(".") else "not committed yet"
                self.notes.append(f"{path} is {kind}, and no reader of the run opens it.")
                continue
            whose = "of another plan, or of none" if manifest is None else "not in the manifest"
            self.add("extra", path, f"Nothing but the parts of the run must lie in its folder; this file is {whose}.")

    def read_table_state(self, plan: Plan, manifest: Manifest | None) -> TableState | None:
        """Hold the table that the run went into against its own log and the run; None where none is asked for."""
        if plan.options.output == "parquet" or manifest is None:
            return None
        kind, log = ("Delta", "_delta_log") if plan.options.output == "delta" else ("Iceberg", "snapshots")
        try:
            table = read_table_state(self.storage, plan)
        except DestinationUnusable as error:
            self.add("table", log, str(error))
            return None
        if table is None or not table.holds_run:
            self.add("table", log, explain_missing_run(plan, table))
            return table
        if not table.holds_plan:
            message = f"The {kind} table must hold run {plan.run} by the parts of this plan, got those of another plan."
            self.add("table", log, message)
        self._check_table_files(table, manifest)
        return table

    def _check_table_files(self, table: TableState, manifest: Manifest) -> None:
        listed = {part.path: part for part in manifest.parts}
        if replaced := listed.keys() - table.files.keys():
            words = f"{len(replaced)} of {len(listed)} parts are not in version {table.version} of the table"
            self.notes.append(f"{words}: it has replaced or rewritten them since.")
        entries = list_entries_at(self.storage, table.files)
        for path, (size, rows) in table.files.items():
            part = listed.get(path)
            if part is not None and (part.bytes, part.rows) != (size, rows if rows is not None else part.rows):
                told = f"{part.bytes:,} bytes and {part.rows:,} rows, got {size:,} and {rows}"
                message = f"The table's log must say of the part what the manifest says, {told}. Restore the log."
                self.add("table", path, message)
            found = entries.get(path)
            if part is None and (found is None or found.size != size):
                got = "no such file" if found is None else f"{found.size:,} bytes"
                owner = path.partition("/")[0].removeprefix("run=")
                then = f"Verify run {owner}, which scored it" if path.startswith("run=") else "Put it back"
                message = (
                    f"A file of the table must have the {size:,} bytes of its log, got {got}. {then}, or go back to a "
                    "version of the table that is whole."
                )
                self.add("table", path, message)


def _describe_difference(must: object, got: object) -> str:
    if not isinstance(must, tuple) or not isinstance(got, tuple):
        return f"{must}, got {got}"
    lacks, has = [str(each) for each in must if each not in got], [str(each) for each in got if each not in must]
    if not lacks and not has:
        return "in the same order"
    shown = [f"{len(lacks)} that it lacks, the first {lacks[0]}"] if lacks else []
    return " and ".join(shown + ([f"{len(has)} others in it, the first {has[0]}"] if has else []))
