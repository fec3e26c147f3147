"""Backfills whose pieces are scored in any order, killed and called again, while the files of the pieces change."""

from __future__ import annotations

import logging
import random
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from flows import backfill
from serving.errors import OvernightError
from tasks.batch.backfill import BackfillReport, Piece, look_at_pieces, open_backfill
from tasks.batch.options import BatchOptions
from tasks.batch.run_request import make_request
from tasks.storage import open_storage
from tests.simulation.calls import attempt_apart, publish_run
from tests.simulation.data import CONTRACT, Answered, Source, ToyResolved, expected
from tests.simulation.oracle import Oracle, answers_of
from tests.simulation.scheduler import Process, Scheduler
from tests.simulation.storage import SimulatedStorage

_LOGGER = logging.getLogger(__name__)
# What fails is told by the scheduler.
_LOGGER.disabled = True
_VERSIONS, _LAST_VERSION = (1, 2, 3), 4
_CHANGES, _PAUSE_SECONDS = 0.5, 2.0
_OPTIONS = BatchOptions(
    key_columns=("id",), batch_size=4, rows_per_chunk=8, slots=1, memory_mb=1024, max_reject_fraction=1.0
)


@dataclass(kw_only=True)
class BackfillWorld:
    """The pieces of a backfill by their names, each with its files and its destination."""

    scheduler: Scheduler
    chance: random.Random
    sources: dict[str, Source]
    destinations: dict[str, SimulatedStorage]
    callers: int
    calls: int = 2
    refusals: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    _began: dict[Process, int] = field(default_factory=dict)
    _calls: int = 0

    def __post_init__(self) -> None:
        self._oracles = {
            name: Oracle(storage.root, violations=self.violations) for name, storage in self.destinations.items()
        }

    def run(self) -> None:
        """Let backfills go on while things go wrong; one more on a calm day, by another version, must have it all."""
        for name, storage in self.destinations.items():
            self.sources[name].write_some()
            storage.on_put = lambda path, is_late, name=name: self._see_put(name, path, is_late=is_late)
        weather = next(iter(self.destinations.values())).weather
        self.scheduler.kill_rate = weather.kill
        with (
            patch.object(backfill, "batch_inference", self._score),
            patch.object(backfill, "publish_pieces", lambda *_given: None),
        ):
            names = [f"caller-{at}" for at in range(self.callers)]
            actors = [self.scheduler.spawn(Process(name), name, self._call_often) for name in names]
            for actor in actors:
                self.scheduler.join(actor).value()
            self.scheduler.kill_rate = 0.0
            for storage in self.destinations.values():
                storage.weather = weather.without_faults()
            report = self._attempt_apart(_LAST_VERSION)
        # A store that overwrites is refused, and so is a record that is cut short.
        if report is not None and weather.is_create_only and not weather.torn:
            self._check_table(report)

    def _check_table(self, report: BackfillReport) -> None:
        if report.count("scored") != len(self.sources):
            self._violate(f"on a calm day it ends with {report.summary} {[piece.error for piece in report.pieces]}")
            return
        wanted = [row for name in self.sources for row in self._list_wanted(name, _LAST_VERSION)]
        root = next(iter(self.destinations.values())).root.parent
        found = open_backfill(str(root)).drop("date").collect()
        if answers_of(found) != sorted(wanted, key=repr):
            self._violate(f"the pieces have {len(wanted)} rows, and readers get others: {found.height}")

    def _list_wanted(self, name: str, version: int) -> list[Answered]:
        """Return what the rows of a piece are to be, as its files are now."""
        return expected(self.sources[name].list_rows(), version, _OPTIONS.key_columns)

    def _call_often(self) -> None:
        version = self.chance.choice(_VERSIONS)
        for _ in range(self.calls):
            self._attempt_apart(version)
            if self.chance.random() < _CHANGES:
                self.sources[self.chance.choice(sorted(self.sources))].change()
            self.scheduler.sleep(self.chance.expovariate(1 / _PAUSE_SECONDS))

    def _attempt_apart(self, version: int) -> BackfillReport | None:
        process = Process(f"backfill.{self.scheduler.steps}")
        self._began[process] = self.scheduler.steps
        actor = attempt_apart(self.scheduler, process, lambda: self._backfill(version), self.refusals, self.violations)
        report: BackfillReport | None = actor.result
        for piece in () if report is None else report.pieces:
            if piece.run is not None:
                self._oracles[piece.piece].check_returned(piece.run, piece.run, [piece.run], self._began[process])
        return report

    def _backfill(self, version: int) -> BackfillReport:
        """Score what is left of the pieces, as backfill_inference does it once it owns the destination."""
        resolved: Any = ToyResolved(version)
        names = self.chance.sample(sorted(self.sources), len(self.sources))
        pieces = [
            Piece(name=name, source=self.sources[name].url, destination=self.destinations[name].url, options=_OPTIONS)
            for name in names
        ]
        reports = look_at_pieces(pieces, resolved, CONTRACT)
        ownership: Any = SimpleNamespace(check=lambda: None)
        work = backfill.Backfill(
            resolved=resolved,
            contract=CONTRACT,
            ownership=ownership,
            logger=_LOGGER,
            report=BackfillReport(model=resolved.pin.uri, destination="", pieces=tuple(reports)),
        )
        left = [piece for piece, report in zip(pieces, reports, strict=True) if report.state == "left"]
        backfill.score_here(work, left)
        self.scheduler.tell(work.report.summary)
        return work.report

    def _score(self, model: str, source: str, destination: str, options: BatchOptions) -> None:
        """Score one piece, as batch_inference does it."""
        resolved: Any = ToyResolved(int(model.rpartition("/")[2]))
        name = destination.rpartition("/")[2]
        request = make_request(resolved, CONTRACT, source, destination, options)
        rows = {file.path: self.sources[name].rows_of(file.entry) for file in request.snapshot.files}
        self._oracles[name].ask(request.key, expected(rows, resolved.version, options.key_columns))
        self._calls += 1
        try:
            publish_run(self.scheduler, request, open_storage(destination), f"flow-{self._calls}", options)
        except OvernightError as error:
            self.scheduler.tell(f"{name} is refused: {type(error).__name__}: {error}")
            raise
        except Exception as error:
            self._violate(f"{name} ended in {type(error).__name__}: {error}")
            raise

    def _see_put(self, name: str, path: str, *, is_late: bool) -> None:
        began = float("-inf") if is_late else self._began.get(self.scheduler.process, float("-inf"))
        self._oracles[name].see_put(path, self.scheduler.steps, began)

    def _violate(self, text: str) -> None:
        self.violations.append(f"backfill: {text}")
