"""Bits that turn over: in parts, where a verification must find each, and in footers of source files, for a while."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from serving.errors import (
    BadInput,
    DestinationUnusable,
    OvernightError,
    RunNameTaken,
    SchemaMismatch,
    SourceEmpty,
    SourceFault,
    SourceFormat,
)
from tasks.batch.dataset import Snapshot
from tasks.batch.manifest import Manifest
from tasks.batch.verify import RunVerification, verify_run
from tasks.storage import Entry, open_storage
from tests.simulation.data import Source
from tests.simulation.oracle import Oracle
from tests.simulation.scheduler import Scheduler
from tests.simulation.storage import SimulatedStorage

_PART = re.compile(r"(run=[^/]+|_overnight/[^/]+/challengers/\d+)/part-.*\.parquet")
_MANIFEST = re.compile(r"_overnight/[^/]+/manifest\.json")
# How a call may end whose source has a wrong bit: by that, or by what else goes wrong. Of the general kind is one that
# joins a run which is not there, or that has its model as a challenger.
_NAMED = (SchemaMismatch, SourceEmpty, SourceFormat, RunNameTaken, DestinationUnusable, BadInput)
_LAST_BITS = 3


@dataclass(kw_only=True)
class BitWorld:
    """Turns bits over, and holds what calls and verifications make of them against what is known to be wrong.

    The oracle knows the parts that are wrong at a moment: what readers get of them is not looked at.
    """

    scheduler: Scheduler
    source: Source
    source_storage: SimulatedStorage
    destination: SimulatedStorage
    oracle: Oracle
    turns_parts: bool
    _footer: tuple[Entry, bytes] | None = None
    _asked: dict[str, bool] = field(default_factory=dict)

    def flip_part(self) -> None:
        """Turn over a bit of a part that is right, of a published run or of one that goes on."""
        paths = (path for path in self.destination.objects if _PART.fullmatch(path))
        if parts := sorted(path for path in paths if path not in self.oracle.wrong_parts):
            path = self.scheduler.chance.choice(parts)
            data = self.destination.objects[path][0]
            self.destination.write(path, self._flip(path, data, len(data)))
            self.oracle.wrong_parts.add(path)
            self.oracle.damaged_at = self.scheduler.steps

    def flip_source(self) -> None:
        """Turn over a bit in the footer of a source file, or put that right which was turned over before."""
        if self._footer is not None:
            self.restore_source()
        elif paths := sorted(path for path in self.source_storage.objects if path.endswith(".parquet")):
            data, entry = self.source_storage.objects[self.scheduler.chance.choice(paths)]
            length = int.from_bytes(data[-8:-4], "little") + 8
            wrong = self.source.replace(entry, self._flip(entry.path, data, length))
            self._footer = wrong, data

    def restore_source(self) -> None:
        """Put right what was turned over in a source file, unless that was replaced since."""
        if self._footer is None:
            return
        (wrong, data), self._footer = self._footer, None
        if self.source_storage.objects.get(wrong.path, (b"", None))[1] == wrong:
            self.source.replace(wrong, data)
            self.scheduler.tell(f"{wrong.path} is put right")

    def see_put(self, path: str) -> None:
        """Take note of a part that was written again."""
        self.oracle.wrong_parts.discard(path)

    def ask(self, key: str, snapshot: Snapshot) -> None:
        """Take note of whether a source has a wrong bit, as a call has listed it."""
        self._asked[key] = self._footer is not None and any(file.entry == self._footer[0] for file in snapshot.files)

    def check_refusal(self, keys: list[str], error: OvernightError) -> None:
        """Check that a call over a source with a wrong bit ends in an error that is named for the source."""
        is_wrong = bool(keys) and self._asked.get(keys[-1], False)
        if is_wrong and isinstance(error, BadInput) and type(error) not in _NAMED:
            self._violate(f"a source has a wrong bit, and a call ends in {type(error).__name__}: {error}")

    def check_restored(self, errors: Iterable[OvernightError | None]) -> None:
        """Check that calls which began after all sources were put right did not end by one of them."""
        for error in errors if any(self._asked.values()) else ():
            if isinstance(error, SourceFault | SchemaMismatch | SourceEmpty | SourceFormat):
                self._violate(f"sources were put right, and a call ends in {type(error).__name__}: {error}")

    def check_verified(self) -> None:
        """Turn over some bits more, and check that a verification finds each wrong one of a published run."""
        storage = open_storage(self.destination.url)
        for _ in range(_LAST_BITS if self.turns_parts else 0):
            self.flip_part()
        for path in sorted(path for path in self.destination.objects if _MANIFEST.fullmatch(path)):
            try:
                manifest = Manifest.model_validate_json(self.destination.objects[path][0])
            except ValueError:
                continue
            if wrong := {part.path for part in manifest.parts} & self.oracle.wrong_parts:
                self._check_found(manifest.run, wrong, verify_run(storage, manifest.run))

    def _check_found(self, run: str, wrong: set[str], found: RunVerification) -> None:
        """Check what a verification says of the wrong bits of a run; without the run's plan it opens no part."""
        missed = wrong - {each.path for each in found.damages}
        if missed and not any(each.kind == "plan" for each in found.damages):
            self._violate(f"a verification of run {run} does not find the wrong bits of {sorted(missed)}")
        if found_bits := sorted(wrong - missed):
            self.scheduler.tell(f"a verification finds the wrong bits of {found_bits}")

    def _flip(self, path: str, data: bytes, length: int) -> bytes:
        """Return bytes of which one bit of the last so many is another."""
        at = self.scheduler.chance.randrange(8 * length)
        self.scheduler.tell(f"bit {at} of the last {length:,} bytes of {path} is turned over")
        flipped = bytearray(data)
        flipped[len(data) - length + at // 8] ^= 1 << at % 8
        return bytes(flipped)

    def _violate(self, text: str) -> None:
        self.oracle.violations.append(f"bits: {text}")
