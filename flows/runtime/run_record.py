"""What calls of batch runs and nights leave for operators: metrics as they go on, and records of what they cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

from prefect.exceptions import Pause, TerminationSignal

from flows.runtime.interruption import InterruptedExit
from flows.runtime.steps import flow_run_id
from serving.errors import OvernightError
from serving.model.pin import ModelPin
from tasks.batch.costs import (
    CallCost,
    MachinePrice,
    NightCost,
    read_machine_price,
    save_call_begin,
    save_call_cost,
    save_night_cost,
)
from tasks.batch.events import RunCall
from tasks.batch.options import BatchOptions, Ray
from tasks.batch.plan import Plan
from tasks.batch.scoring_result import ScoringResult
from tasks.common.artifacts import Logger
from tasks.common.metrics import RunEnd, RunRecorder, expose_run_metrics
from tasks.common.names import find_model_name
from tasks.spot.drain import Drain
from tasks.spot.purchase import NightlyReport, PurchaseOptions
from tasks.storage import Storage


@dataclass(slots=True, kw_only=True)
class CallRecord:
    """One call of a batch run, as metrics and a record of its cost tell of it."""

    metrics: RunRecorder
    write_file: Callable[[], None]
    price: MachinePrice
    on_ray: bool
    joins: bool
    complete_before: bool = False
    _plan: Plan | None = None
    _storage: Storage | None = None
    _began: float = field(default_factory=time.time)

    @property
    def _began_at(self) -> datetime:
        return datetime.fromtimestamp(self._began, UTC)

    @property
    def _is_kept(self) -> bool:
        """Whether a record of the call is kept: it scores, or it joins others and may find that they are done."""
        return self.joins or not self.complete_before

    def begin(self, plan: Plan, storage: Storage, logger: Logger, *, is_complete: bool) -> None:
        """Note which run it is and whether it was complete before, and keep beside its plan that a call has begun."""
        self._plan, self._storage, self.complete_before = plan, storage, is_complete
        if self._is_kept:
            _save(lambda: save_call_begin(storage, plan, flow_run_id(), self._began_at), logger)
        model = plan.model
        self.metrics.begin(
            model=model.name, version=model.version, destination=storage.url, rows=plan.rows, chunks=len(plan.chunks)
        )
        # Prometheus sees a counter grow only from what it has read before, and one that is killed writes no more.
        self.write_file()

    def note_progress(self, done: tuple[int, int]) -> int:
        """Note how many rows and chunks have their part; return the rows."""
        rows, chunks = done
        self.metrics.note_progress(rows, len(self._plan.chunks) - chunks if self._plan else 0)
        return rows

    def note_scored(self, result: ScoringResult) -> None:
        """Add what was scored since the last time."""
        self.metrics.note_scored(
            rows=result.rows,
            rejects=result.rejects.total(),
            chunks=result.chunks,
            chunks_dropped=result.chunks_dropped,
            parts=result.parts_put,
            bytes_read=result.bytes_read,
            bytes_written=result.bytes_written,
            seconds=result.seconds,
        )

    def note_interruption(self, drain: Drain) -> None:
        """Count the notice that has ended scoring."""
        if drain.notice is not None:
            self.metrics.note_interruption(drain.notice.source, drain.notice.seconds_left - drain.seconds_left)

    def finish(self, state: RunEnd, logger: Logger) -> None:
        """Count how the call has ended; keep what it cost beside the plan, where it scored."""
        if state == "complete" and self.complete_before:
            state = "already complete"
        if self._plan is not None and state in ("complete", "already complete"):
            self.metrics.note_progress(self._plan.rows, 0)
        self.metrics.finish(state, self.price.dollars_per_hour)
        if self._plan is None or self._storage is None or not self._is_kept:
            return
        cost = CallCost(
            flow_run_id=flow_run_id(),
            began_at=self._began_at,
            seconds=time.time() - self._began,
            state=state,
            on_ray=self.on_ray,
            price=self.price,
        )
        storage, plan = self._storage, self._plan
        _save(lambda: save_call_cost(storage, plan, cost), logger)


@contextmanager
def record_call(call: RunCall, options: BatchOptions, logger: Logger) -> Generator[CallRecord]:
    """Record what the block does of a call; it tells the record of its plan, its progress and its notices."""
    price = read_machine_price()
    with expose_run_metrics(logger) as write_file:
        record = CallRecord(
            metrics=RunRecorder(find_model_name(call.model), call.destination),
            write_file=write_file,
            price=price,
            on_ray=isinstance(options.runner, Ray),
            joins=options.joins is not None,
        )
        state: RunEnd = "failed"
        try:
            yield record
            state = "complete"
        except (InterruptedExit, TerminationSignal, KeyboardInterrupt):
            state = "interrupted"
            raise
        except Pause:
            state = "paused"
            raise
        except OvernightError:
            state = "failed" if call.key else "refused"
            raise
        finally:
            record.finish(state, logger)


def record_deadline(pin: ModelPin, storage: Storage, due: datetime) -> RunRecorder:
    """Have metrics say when a night must be done; return what records it."""
    recorder = RunRecorder(pin.name, storage.url, version=pin.version)
    recorder.note_deadline(due.timestamp())
    return recorder


def record_night(
    recorder: RunRecorder, report: NightlyReport, buying: PurchaseOptions, storage: Storage, logger: Logger
) -> None:
    """Add a night that has ended to the metrics, and keep what it cost beside the plan of its run."""
    recorder.note_night(
        margin_seconds=report.slack_seconds,
        machine_seconds={"spot": report.spot_seconds, "on-demand": report.on_demand_seconds},
        cost=report.cost,
        cost_on_demand=report.cost_on_demand,
        moves=[move.to for move in report.moves],
    )
    if not report.spot_seconds and not report.on_demand_seconds:
        # It found the run complete, and had no machine.
        return
    cost = NightCost(
        flow_run_id=flow_run_id(),
        machines=report.workers,
        machine_seconds=report.spot_seconds + report.on_demand_seconds,
        cost=report.cost,
        cost_on_demand=report.cost_on_demand,
        on_demand_price=buying.on_demand_price,
    )
    _save(lambda: save_night_cost(storage, report.run, cost), logger)


def _save(save: Callable[[], None], logger: Logger) -> None:
    try:
        save()
    except OvernightError as error:
        logger.warning("What it cost must be kept beside the plan, got: %s", error)
