"""What must hold of challengers: a list beside the manifest names all their parts, with their own answers in order."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.batch.comparison import ChallengerParts, ChallengersRecord, challengers_path
from tasks.batch.manifest import Manifest
from tasks.batch.part_footer import CHUNK_DIGEST
from tests.simulation.data import Answered, may_fail
from tests.simulation.oracle import Oracle, compare
from tests.simulation.storage import SimulatedStorage

_MANIFEST = re.compile(r"_overnight/([^/]+)/manifest\.json")
_PART = re.compile(r"run=[^/]+/part-.*\.parquet")


@dataclass
class ChallengerOracle:
    """Holds the challengers of runs against what they answer to the rows that were asked for.

    In a simulation with challengers it keeps a digest of each part of a model by what the part is made of: that of a
    run with challengers has the bytes of one without.
    """

    storage: SimulatedStorage
    oracle: Oracle
    loses_parts: bool
    _wanted: dict[str, dict[int, list[Answered]]] = field(default_factory=dict)
    _parts: dict[bytes, str] = field(default_factory=dict)

    def ask(self, key: str, answers: dict[int, list[Answered]]) -> None:
        """Take note of what the challengers of a run with this key must answer, by their versions."""
        self._wanted[key] = answers

    def see_put(self, path: str, began: float) -> None:
        """Look at an object that was put, by a call that began at a step."""
        if not any(self._wanted.values()):
            return
        data = self.storage.objects[path][0]
        if _PART.fullmatch(path):
            self._see_part(path, data)
        elif match := _MANIFEST.fullmatch(path):
            try:
                manifest = Manifest.model_validate_json(data)
            except ValueError:
                return
            if self._wanted.get(manifest.key) and began > self.oracle.damaged_at:
                self._read_record(match[1], manifest.plan_digest)

    def check_returned(self, manifest: Manifest, began: float) -> None:
        """Check the challengers of a run that a call returned, unless something was damaged since it began."""
        run, wanted = manifest.run, self._wanted.get(manifest.key)
        is_gone = began <= self.oracle.damaged_at or self.oracle.dropped_at.get(run, -1) >= began
        if not wanted or is_gone or (record := self._read_record(run, manifest.plan_digest)) is None:
            return
        if record.plan_digest != manifest.plan_digest:
            self._violate(f"the list of run {run} is of another plan than its manifest")
        if [each.model for each in record.challengers] != [f"models:/toy/{version}" for version in wanted]:
            self._violate(f"the list of run {run} names {record.challengers}, not versions {list(wanted)}")
            return
        for each, (version, answers) in zip(record.challengers, wanted.items(), strict=True):
            self._check_listed(manifest, each, version, answers)

    def _check_listed(self, manifest: Manifest, listed: ChallengerParts, version: int, answers: list[Answered]) -> None:
        where = f"challenger {version} of run {manifest.run}"
        if lost := [part.path for part in listed.parts if part.path not in self.storage.objects]:
            self._violate(f"{where} is listed with parts that are not there: {lost}")
        elif self.oracle.wrong_parts:
            return
        elif listed.given_up is None:
            if difference := compare(self._open([part.path for part in listed.parts]), answers):
                self._violate(f"{where} is listed with {difference}")
            self._check_order(manifest, listed, where)
        elif not self._may_be_given_up(version, listed.given_up):
            self._violate(f"{where} is given up, and nothing is wrong with it: {listed.given_up}")

    def _check_order(self, manifest: Manifest, listed: ChallengerParts, where: str) -> None:
        """Check that part by part a challenger has the rows of the model in their order."""
        ours = [part.path for part in manifest.parts]
        if all(path in self.storage.objects for path in ours):
            pairs = zip(ours, (part.path for part in listed.parts), strict=False)
            if len(ours) != len(listed.parts) or any(self._read_keys(a) != self._read_keys(b) for a, b in pairs):
                self._violate(f"{where} has other rows than the model, or in another order")

    def _read_keys(self, path: str) -> list[tuple[object, ...]]:
        table = self._open([path])
        return table.select(table.columns[: table.columns.index("y")]).rows()

    def _open(self, paths: Sequence[str]) -> pl.DataFrame:
        return pl.read_parquet([self.storage.root / path for path in paths], hive_partitioning=False)

    def _may_be_given_up(self, version: int, why: str) -> bool:
        """Whether a model that is given up fails by itself, or storage did not keep what it was given."""
        is_damaged = self.loses_parts or self.oracle.damaged_at >= 0
        return may_fail(version) or ("could not be read back" in why and is_damaged)

    def _read_record(self, run: str, plan_digest: str) -> ChallengersRecord | None:
        found = self.storage.objects.get(challengers_path(run, plan_digest))
        try:
            return ChallengersRecord.model_validate_json(found[0] if found else b"")
        except ValueError:
            self._violate(f"run {run} is published, and the list of its challengers {'is torn' if found else 'is not'}")
            return None

    def _see_part(self, path: str, data: bytes) -> None:
        """Check that a part has the bytes of another one that is made of the same."""
        try:
            made_of = (pq.read_metadata(pa.BufferReader(data)).metadata or {}).get(CHUNK_DIGEST.encode())
        except (pa.ArrowException, OSError):
            return
        if made_of and self._parts.setdefault(made_of, digest := hashlib.sha256(data).hexdigest()) != digest:
            self._violate(f"{path} has other bytes than a part that is made of the same")

    def _violate(self, text: str) -> None:
        self.oracle.violations.append(f"challengers: {text}")
