"""What a destination holds, as far as cleaning it goes: files in folders of runs, records, and what they name.

Objects are listed before the records that may name them: whatever is found without a record has none, also beside runs
that go on meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from serving.errors import DestinationUnusable, FormatTooNew
from tasks.batch.dataset import map_parallel
from tasks.batch.manifest import Manifest, find_manifest
from tasks.batch.plan import ROOT, Plan
from tasks.batch.run_records import RunStart, list_recorded_runs, load_plan, read_record
from tasks.storage import Entry, Storage

_STARTS = f"{ROOT}/starts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """The records of the runs of a destination by their runs: manifests, and the plans of runs without one.

    `planned` are all runs that have a plan.
    """

    manifests: Mapping[str, Manifest]
    plans: Mapping[str, Plan]
    planned: frozenset[str]

    @property
    def streams(self) -> frozenset[str]:
        """The tables of streams: their plans have no shards, and their manifests are commits."""
        tables = {run.rpartition("-")[0] for run, manifest in self.manifests.items() if manifest.commit}
        return frozenset(tables | {run for run, plan in self.plans.items() if not plan.shards})

    @property
    def unfinished(self) -> dict[str, Plan]:
        """The plans of the runs that are not published."""
        return {run: plan for run, plan in self.plans.items() if run not in self.streams}

    def list_needed(self) -> set[str]:
        """Return every part that a manifest names or that an unfinished run has from an earlier one."""
        needed = {part.path for manifest in self.manifests.values() for part in manifest.parts}
        return needed | {part.path for plan in self.plans.values() for part in plan.reused}

    def leave_out(self, runs: Collection[str]) -> Records:
        """Return the records that are left without those of some runs."""
        return Records(
            manifests={run: manifest for run, manifest in self.manifests.items() if run not in runs},
            plans={run: plan for run, plan in self.plans.items() if run not in runs},
            planned=self.planned - set(runs),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What a destination holds: files in the folders of runs, everything below _overnight, and the records."""

    files: tuple[Entry, ...]
    torn: tuple[Entry, ...]
    beside: tuple[Entry, ...]
    starts: Mapping[Entry, str]
    records: Records
    has_log: bool

    @property
    def has_table(self) -> bool:
        """Whether rows went into a Delta or Iceberg table here, whose log alone says which files it has."""
        outputs = {manifest.output for manifest in self.records.manifests.values()}
        outputs |= {plan.options.output for plan in self.records.plans.values()}
        return self.has_log or bool(outputs - {"parquet"})

    @property
    def damaged(self) -> frozenset[str]:
        """The published runs that have lost parts: the same call may be scoring them again."""
        sizes = {entry.path: entry.size for entry in self.files}
        return frozenset(
            run
            for run, manifest in self.records.manifests.items()
            if manifest.output == "parquet" and any(sizes.get(part.path) != part.bytes for part in manifest.parts)
        )


def survey_destination(storage: Storage) -> Survey:
    """List a destination and read its records. Raises DestinationUnusable, FormatTooNew."""
    # A flow run is tied to a run after the plan is written, and a part is put after that.
    starts = storage.entries(_STARTS, depth=1)
    files = tuple(entry for entry in storage.entries(depth=2) if entry.path.startswith("run=") and "/" in entry.path)
    beside = tuple(entry for entry in storage.entries(ROOT) if not entry.path.startswith(f"{_STARTS}/"))
    folders = sorted({entry.path.partition("/")[0] for entry in files})
    torn = [torn for folder in (*folders, ROOT) for torn in storage.torn_writes(folder)]
    found = map_parallel(storage, lambda entry: _read_start(storage, entry.path), starts)
    return Survey(
        files=files,
        torn=tuple(torn),
        beside=beside,
        starts={entry: run for entry, run in zip(starts, found, strict=True) if run is not None},
        has_log=bool(storage.entries_after("_delta_log", "", 1)),
        records=read_records(storage),
    )


def _read_start(storage: Storage, path: str) -> str | None:
    """Return the run that a flow run is tied to; None where the record is gone or does not read, and stays."""
    try:
        start = read_record(storage, path, RunStart)
    except (DestinationUnusable, FormatTooNew):
        return None
    return None if start is None else start.run


def read_records(storage: Storage, known: Records | None = None) -> Records:
    """Read the manifests of all runs, and the plans of those without one; those that are known are not read again.

    Raises DestinationUnusable or FormatTooNew where one does not read.
    """
    planned, complete = list_recorded_runs(storage)
    published, unpublished = sorted(complete), sorted(planned - complete)
    before = known or Records(manifests={}, plans={}, planned=frozenset())

    def read_manifest(run: str) -> Manifest | None:
        return before.manifests.get(run) or find_manifest(storage, run)

    def read_plan(run: str) -> Plan | None:
        return before.plans.get(run) or load_plan(storage, run)

    try:
        manifests = map_parallel(storage, read_manifest, published)
        plans = map_parallel(storage, read_plan, unpublished)
    except (DestinationUnusable, FormatTooNew) as error:
        message = f"{error} Until every record reads, nobody knows which parts it names, and none is deleted."
        raise type(error)(message) from error
    return Records(
        manifests={run: each for run, each in zip(published, manifests, strict=True) if each is not None},
        plans={run: each for run, each in zip(unpublished, plans, strict=True) if each is not None},
        planned=frozenset(planned),
    )
