"""What must hold: a table is the model's own answers with each row once, and the newest run is the one that counts."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
from deltalake import DeltaTable

from serving.errors import OvernightError
from tasks.batch.manifest import open_predictions
from tasks.batch.parts import REJECT_REASON
from tests.simulation.data import Answered

_MANIFEST = re.compile(r"_overnight/(.+)/manifest\.json")
_PLAN = re.compile(r"_overnight/(.+)/plan\.json")


@dataclass
class Planned:
    """When a run was planned: the step at which the first such call began, and that of its last written plan."""

    began: float
    written: float


@dataclass
class Oracle:
    """Holds what readers see against what was asked for, by the product's own reader over the copy on the disk."""

    folder: Path
    wanted: dict[str, list[Answered]] = field(default_factory=dict)
    planned: dict[str, Planned] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    damaged_at: int = -1
    # Parts that have a wrong bit: what readers get of their runs is not looked at.
    wrong_parts: set[str] = field(default_factory=set)
    dropped_at: dict[str, int] = field(default_factory=dict)

    def ask(self, key: str, answers: list[Answered]) -> None:
        """Take note of what the table of a run with this key must hold."""
        self.wanted[key] = answers

    def see_put(self, path: str, step: int, began: float) -> None:
        """Look at an object that was put, by a call that began at a step."""
        if match := _PLAN.fullmatch(path):
            known = self.planned.get(match[1])
            self.planned[match[1]] = Planned(began=min(began, known.began) if known else began, written=step)
        elif match := _MANIFEST.fullmatch(path):
            self._check_run(match[1], began)

    def forget_order(self) -> None:
        """Take note that all records were deleted: runs that were planned before have no order any more."""
        self.planned = {run: Planned(began=float("-inf"), written=float("inf")) for run in self.planned}

    def forget_run(self, run: str, step: int) -> None:
        """Take note that the records of a run were deleted on purpose: planned again, it has no order any more."""
        self.dropped_at[run] = step
        if run in self.planned:
            self.planned[run] = Planned(began=float("-inf"), written=float("inf"))

    def check_returned(self, run: str, key: str, allowed: Sequence[str], began: int) -> None:
        """Check what a call that returned has published; `allowed` are the keys that its flow run has asked for."""
        if key not in allowed:
            self.violations.append(f"a call returned run {run} of key {key}, which it did not ask for")
        self._check_run(run, began, key)
        self.check_newest(began)

    def _check_run(self, run: str, began: float, key: str | None = None) -> None:
        """Check the table of one run; where a call returned it, with a key, a reader must not be refused."""
        manifest = self._manifest(run)
        if manifest is None or self._is_wrong(manifest):
            return
        table = self._read(run, began, is_returned=key is not None)
        if table is None:
            return
        if key is not None and manifest["key"] != key:
            self.violations.append(f"run {run} holds key {manifest['key']}, not {key} as the call said")
        difference = compare(table, self.wanted.get(manifest["key"]))
        if difference:
            self.violations.append(f"run {run} is published with {difference}")

    def check_newest(self, began: float) -> None:
        """Check that the table without a run's name is that of a run that no newer one is complete beside."""
        complete = [run for run in self.planned if self._manifest(run) is not None]
        newest = [run for run in complete if not any(self.is_newer(other, run) for other in complete)]
        manifests = [self._manifest(run) for run in newest]
        if not newest or any(manifest and self._is_wrong(manifest) for manifest in manifests):
            return
        table = self._read(None, began)
        if table is None:
            return
        if all(compare(table, self.wanted.get(manifest["key"])) for manifest in manifests if manifest):
            self.violations.append(f"the newest table is none of the newest runs: {newest}")

    def is_newer(self, run: str, other: str) -> bool:
        """Whether a run was called for after another one was planned."""
        known = run in self.planned and other in self.planned
        return known and self.planned[run].began > self.planned[other].written

    def _read(self, run: str | None, began: float, *, is_returned: bool = False) -> pl.DataFrame | None:
        """Return what a reader gets, None where it is refused."""
        # A cleaning that is to drop what is unfinished so long may take the parts of one that is published meanwhile.
        is_dropped = run is not None and self.dropped_at.get(run, -1) >= began
        try:
            return open_predictions(str(self.folder), run).collect()
        except OvernightError as error:
            is_gone = is_dropped or (run is not None and self._is_replaced(run))
            if is_returned and began > self.damaged_at and not is_gone:
                self.violations.append(f"run {run} was published, but opening it is refused: {error}")
        except (OSError, pl.exceptions.PolarsError) as error:
            if began > self.damaged_at and not is_dropped and (run is not None or self.damaged_at < 0):
                self.violations.append(f"run {run} can't be read: {type(error).__name__}: {error}")
        return None

    def _is_replaced(self, run: str) -> bool:
        """Whether another run has taken parts of a run out of their Delta table since, as the log itself says."""
        manifest = self._manifest(run)
        if manifest is None or manifest["output"] != "delta":
            return False
        held = set(DeltaTable(str(self.folder)).file_uris())
        return any(f"{self.folder}/{part['path']}" not in held for part in manifest["parts"])

    def _is_wrong(self, manifest: dict[str, Any]) -> bool:
        return any(part["path"] in self.wrong_parts for part in manifest["parts"])

    def _manifest(self, run: str) -> dict[str, Any] | None:
        path = self.folder / "_overnight" / run / "manifest.json"
        try:
            return dict(json.loads(path.read_text()))
        except (OSError, ValueError):
            return None


def compare(table: pl.DataFrame, wanted: list[Answered] | None) -> str:
    """Return how a table differs from what is wanted, empty where it does not."""
    if wanted is None:
        return "a key that nobody asked for"
    found = answers_of(table)
    if found == wanted:
        return ""
    names = [key for key, _, _ in found]
    missing = {key for key, _, _ in wanted} - set(names)
    strangers = set(names) - {key for key, _, _ in wanted}
    doubled = len(names) - len(set(names))
    return f"{len(missing)} rows missing, {len(strangers)} strange, {doubled} doubled, of {len(wanted)}"


def answers_of(table: pl.DataFrame) -> list[Answered]:
    """Return the rows of a table, in order."""
    keys = table.columns[: table.columns.index("y")]
    names = (tuple(str(value) for value in row) for row in table.select(keys).iter_rows())
    rejects = table[REJECT_REASON].is_not_null().to_list()
    return sorted(zip(names, table["y"].to_list(), rejects, strict=True), key=repr)
