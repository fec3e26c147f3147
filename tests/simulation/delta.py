"""What must hold of a Delta table: each committed run is in it once, the newest one alone, or each key as put last."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import polars as pl
from deltalake import DeltaTable

from tasks.batch.options import BatchOptions
from tests.simulation.data import Answered
from tests.simulation.oracle import Oracle, answers_of, compare


@dataclass
class DeltaOracle:
    """Holds the Delta table at a destination against what was asked for."""

    oracle: Oracle
    options: BatchOptions
    kind: str = "Delta"
    # The keys of the runs that the table may have held, when it was last looked at.
    held: tuple[str, ...] = ()

    def check(self, returned: str | None = None) -> list[str]:
        """Check the table after a call, which has returned a run of a key or ended otherwise; return what it holds."""
        folder = str(self.oracle.folder)
        if not DeltaTable.is_deltatable(folder):
            if returned:
                self._violate(f"a call returned run {returned}, but there is no table")
            return []
        delta = DeltaTable(folder)
        try:
            table = pl.read_parquet(delta.file_uris(), hive_partitioning=False)
        except (OSError, pl.exceptions.PolarsError) as error:
            self._violate(f"the table can't be read: {type(error).__name__}: {error}")
            return []
        committed = [key for key in self.oracle.wanted if delta.transaction_version(f"overnight-{key}") is not None]
        if returned is not None and returned not in committed:
            self._violate(f"a call returned run {returned}, but the table has no commit of it")
        if self.options.upserts:
            self._check_upserted(delta, table)
        elif self.options.delta_mode == "replace":
            self._check_replaced(table, committed, returned)
        else:
            self._check_appended(table, committed)
        return committed

    def _check_appended(self, table: pl.DataFrame, committed: list[str]) -> None:
        wanted = sum((Counter(self.oracle.wanted[key]) for key in committed), Counter())
        if Counter(answers_of(table)) != wanted:
            self._violate(f"the table holds {table.height} rows, its {len(committed)} runs have {wanted.total()}")

    def _check_replaced(self, table: pl.DataFrame, committed: list[str], returned: str | None) -> None:
        now = tuple(key for key in committed if not compare(table, self.oracle.wanted[key]))
        if not now:
            self._violate(f"the table holds none of the {len(committed)} runs that were committed")
        elif self.held and all(any(self.oracle.is_newer(old, key) for old in self.held) for key in now):
            self._violate(f"the table went back from run {self.held} to {now}")
        elif returned is not None and all(self.oracle.is_newer(returned, key) for key in now):
            self._violate(f"a call returned run {returned}, but the table holds older runs: {now}")
        elif newer := [key for key in committed if all(self.oracle.is_newer(key, each) for each in now)]:
            self._violate(f"the table went back to {now}, after newer runs: {newer}")
        self.held = now

    def _check_upserted(self, delta: DeltaTable, table: pl.DataFrame) -> None:
        """Check the table against its commits in their order: the rows of each take the place of those of their keys.

        No run is committed after one that was planned later, and none that has a key twice.
        """
        commits = [str(each["overnight.run"]) for each in sorted(delta.history(), key=lambda each: each["version"])]
        rows: dict[tuple[str, ...], Answered] = {}
        for at, run in enumerate(commits):
            wanted = {row[0]: row for row in self.oracle.wanted[run]}
            if len(wanted) != len(self.oracle.wanted[run]):
                self._violate(f"run {run} is committed, and has a key twice")
            if self.options.missing_keys == "delete":
                rows = {}
            elif self.options.missing_keys == "mark":
                rows = {key: (key, None, True) for key in rows}
            rows |= wanted
            if older := [run for later in commits[:at] if self.oracle.is_newer(later, run)]:
                self._violate(f"the table went back to run {older[0]}")
        if Counter(answers_of(table)) != Counter(rows.values()):
            self._violate(f"the table holds {table.height} rows that its {len(commits)} runs do not make: {len(rows)}")

    def _violate(self, text: str) -> None:
        self.oracle.violations.append(f"{self.kind}: {text}")
