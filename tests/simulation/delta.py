"""What must hold of a Delta table: each committed run is in it once, or the newest one alone where runs replace."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import polars as pl
from deltalake import DeltaTable

from tests.simulation.oracle import Oracle, answers_of, compare


@dataclass
class DeltaOracle:
    """Holds the Delta table at a destination against what was asked for."""

    oracle: Oracle
    replaces: bool
    # The keys of the runs that the table may have held, when it was last looked at.
    held: tuple[str, ...] = ()

    def check(self, returned: str | None = None) -> None:
        """Check the table after a call, which has returned a run of a key or ended otherwise."""
        folder = str(self.oracle.folder)
        if not DeltaTable.is_deltatable(folder):
            if returned:
                self._violate(f"a call returned run {returned}, but there is no table")
            return
        delta = DeltaTable(folder)
        table = pl.read_parquet(delta.file_uris(), hive_partitioning=False)
        committed = [key for key in self.oracle.wanted if delta.transaction_version(f"overnight-{key}") is not None]
        if returned is not None and returned not in committed:
            self._violate(f"a call returned run {returned}, but the table has no commit of it")
        if self.replaces:
            self._check_replaced(table, committed, returned)
        else:
            self._check_appended(table, committed)

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
        self.held = now

    def _violate(self, text: str) -> None:
        self.oracle.violations.append(f"Delta: {text}")
