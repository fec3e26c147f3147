"""The runs of a destination: which there are, how far each has come, and how they follow one another."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from pydantic import Field

from serving.errors import DestinationUnusable, FormatTooNew, OvernightError
from serving.model.contract import Frozen
from tasks.batch.dataset import map_parallel
from tasks.batch.delta import TableFiles
from tasks.batch.manifest import Manifest, find_manifest, list_damaged_parts, locate_parts, name_commit
from tasks.batch.parts import list_done
from tasks.batch.run_records import list_recorded_runs, load_plan
from tasks.batch.run_tables import find_table_name, read_table_files
from tasks.storage import Storage

RunState = Literal["complete", "incomplete", "damaged"]

# A commit of a stream's table is called by the table and its number.
_COMMIT = re.compile(r"(.+)-(\d{8})")


class RunSummary(Frozen):
    """One run of a destination, as its records, one listing and the log of its table tell of it; no part is opened."""

    run: str = Field(description="The run's key, or its explicit name; of a stream's table the name and the commit.")
    state: RunState = Field(
        description="complete: published, and all parts are there. incomplete: not published yet. damaged: a record "
        "does not read, or parts are gone or of another size."
    )
    model: str | None = Field(default=None, description="The model version that scores it.")
    source: str | None = Field(default=None, description="What it was scored from.")
    rows: int = Field(default=0, description="Rows of the run.")
    rows_done: int = Field(
        default=0, description="Rows that have their part; of a table, in parts that it has as they were written."
    )
    rows_rejected: int | None = Field(default=None, description="Rows without a prediction; null while incomplete.")
    parts: int = Field(default=0, description="Parts that are there, and in the table as they were written.")
    parts_planned: int = Field(default=0, description="Parts that the complete run has.")
    planned_at: datetime | None = Field(default=None, description="When it was planned.")
    order: int = Field(default=0, description="Its number among the runs planned at the destination.")
    commit: int = Field(default=0, description="The number of the commit, of a stream's table.")
    note: str = Field(default="", description="What is wrong with it, in words.")

    @property
    def position(self) -> tuple[int, int, float]:
        """Its position among the runs of a destination: the highest is the newest."""
        return self.order, self.commit, self.planned_at.timestamp() if self.planned_at else 0.0


def list_runs(storage: Storage) -> list[RunSummary]:
    """Return every run of a destination, the newest first; of a stream's table its newest commit.

    A record that does not read makes its run a damaged one, and is no error.
    """
    planned, published = list_recorded_runs(storage)
    commits = {run: match for run in published - planned if (match := _COMMIT.fullmatch(run)) and match[1] in planned}
    newest = dict(sorted((match[1], int(match[2])) for match in commits.values()))
    names = [run for run in published if run not in commits]
    names += [name_commit(table, number) for table, number in newest.items()]
    unpublished = planned - published - newest.keys()
    found = map_parallel(storage, lambda run: _read_published(storage, run), sorted(names))
    tables = _read_tables(storage, {each.table for each in found if isinstance(each, _Published) and each.table})
    runs = map_parallel(storage, lambda each: _summarize_published(storage, each, tables), found)
    runs += map_parallel(storage, lambda run: _summarize_planned(storage, run), sorted(unpublished))
    return sorted(runs, key=lambda run: run.position, reverse=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Published:
    """The manifest of a run, and the table that the run went into, if any."""

    manifest: Manifest
    table: str | None


def _read_published(storage: Storage, run: str) -> _Published | RunSummary:
    try:
        manifest = find_manifest(storage, run)
        if manifest is None:
            return RunSummary(run=run, state="incomplete", note="It was deleted while the runs were listed.")
        return _Published(manifest=manifest, table=find_table_name(storage, run, manifest.output))
    except (DestinationUnusable, FormatTooNew) as error:
        return RunSummary(run=run, state="damaged", note=str(error))


def _read_tables(storage: Storage, names: Iterable[str]) -> dict[str, TableFiles | OvernightError]:
    """Return what each table has now, or why that can't be said: each is looked at once, however many runs it has."""
    tables: dict[str, TableFiles | OvernightError] = {}
    for name in names:
        try:
            tables[name] = read_table_files(storage, name)
        except OvernightError as error:
            tables[name] = error
    return tables


def _summarize_published(
    storage: Storage, found: _Published | RunSummary, tables: Mapping[str, TableFiles | OvernightError]
) -> RunSummary:
    if isinstance(found, RunSummary):
        return found
    manifest, table = found.manifest, tables[found.table] if found.table else None
    damaged: tuple[str, ...] = ()
    lost = set[str]()
    is_gone = isinstance(table, TableFiles) and not table.is_there
    if isinstance(table, OvernightError):
        note = f"What its table has of it is not known: {table}"
    elif is_gone:
        lost = {part.path for part in manifest.parts}
        note = "Its table is gone. `overnight verify` says how the parts that are there are committed again."
    else:
        damaged = list_damaged_parts(storage, manifest, table)
        lost = set(damaged)
        if table is not None:
            lost |= {part.path for part in manifest.parts} - locate_parts(manifest, table).keys()
        note = _describe_loss(manifest, damaged, lost)
    return RunSummary(
        run=manifest.run,
        state="damaged" if damaged or is_gone or isinstance(table, DestinationUnusable) else "complete",
        model=manifest.model.uri,
        source=manifest.source,
        rows=manifest.rows,
        rows_done=manifest.rows - sum(part.rows for part in manifest.parts if part.path in lost),
        rows_rejected=manifest.rows_rejected,
        parts=len(manifest.parts) - len(lost),
        parts_planned=len(manifest.parts),
        planned_at=manifest.planned_at,
        order=manifest.order,
        commit=manifest.commit,
        note=note,
    )


def _describe_loss(manifest: Manifest, damaged: Sequence[str], lost: Collection[str]) -> str:
    if damaged:
        return f"{len(damaged)} parts are gone or of another size, the first {damaged[0]}."
    if lost:
        return (
            f"{len(lost)} of its {len(manifest.parts)} parts are not in its table any more as they were written: it "
            "has replaced or rewritten them, or rows of them were deleted."
        )
    return ""


def _summarize_planned(storage: Storage, run: str) -> RunSummary:
    try:
        plan = load_plan(storage, run)
    except (DestinationUnusable, FormatTooNew) as error:
        return RunSummary(run=run, state="damaged", note=str(error))
    if plan is None:
        return RunSummary(run=run, state="incomplete", note="It was deleted while the runs were listed.")
    chunks = plan.chunks
    done = [chunk for chunk in list_done(storage, plan) if chunk in chunks]
    return RunSummary(
        run=run,
        state="incomplete",
        model=plan.model.uri,
        source=plan.source.title,
        rows=plan.rows,
        rows_done=sum(chunks[chunk].rows for chunk in done),
        parts=len(done),
        parts_planned=len(chunks),
        planned_at=plan.planned_at,
        order=plan.order,
    )


def choose_newest(runs: Sequence[RunSummary]) -> RunSummary | None:
    """Return the newest run that was published, which is the one that readers open; None where there is none."""
    return next((run for run in runs if run.state != "incomplete" and run.planned_at is not None), None)
