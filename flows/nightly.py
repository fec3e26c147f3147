"""A batch run under a deadline: on machines that may vanish while there is time, on machines that stay where not."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import TerminationSignal

from flows.runtime.context import flow_run, flow_run_id
from flows.runtime.flow_decorator import adhoc_flow
from serving.errors import OvernightError, SourceFormat
from serving.machine import cores
from tasks.batch.artifacts import Logger, server_may_fail
from tasks.batch.dataset import open_dataset
from tasks.batch.options import BatchOptions
from tasks.batch.parts import count_rows_done
from tasks.batch.plan import Plan, load_plan, load_start
from tasks.batch.resolve import Call, find_complete, pin_call
from tasks.common.durations import in_words
from tasks.spot import dispatch
from tasks.spot.capacity import PoolCapacity
from tasks.spot.deadline import workers_needed
from tasks.spot.dispatch import Seen
from tasks.spot.machine import Machine
from tasks.spot.night import KINDS, WORDS, Night
from tasks.spot.night_report import NightProgress, publish_night, report_night
from tasks.spot.purchase import Buying, Kind, NightlyReport, deadline_at
from tasks.storage import Storage, open_storage

_DEFAULTS = BatchOptions()


@adhoc_flow("nightly-inference")
def nightly_inference(
    model: str, source: str, destination: str, deadline: str, buying: Buying, options: BatchOptions = _DEFAULTS
) -> NightlyReport:
    """Have every row of a dataset scored by a deadline, for as little as the machines allow.

    Args:
        model: models:/NAME@ALIAS or models:/NAME/VERSION, resolved once.
        source: Parquet, as batch_inference takes it.
        destination: What batch_inference takes.
        deadline: A time of day in UTC (06:00), or a date and time with its zone.
        buying: The two deployments that the run may go to, their prices, and what is known of their speed.
        options: Those of batch_inference; `workers` are the most machines that the run may be on at a time.

    This flow scores nothing: it sends runs of the two deployments, one for each machine, and moves the work between
    them (tasks.spot.policy). It takes as few machines as leave a fifth of the time to wait for spot in, all that it may
    where nothing is known of their speed. Whatever happens to it or to them, the same call resumes; a retry of the same
    flow run keeps deadline and model, and takes over what it had sent. Raises DeadlineImpossible where even on-demand
    machines would be late, DeploymentMissing by name, NightFailed where the batch run itself fails.
    """
    logger = get_run_logger()
    due = deadline_at(deadline, _first_began())
    storage = open_storage(destination)
    with get_client(sync_client=True) as client:
        earlier = _find_sent(client, flow_run_id())
    pinned = earlier[0][1].parameters["model"] if earlier else model
    call = pin_call(pinned, source, storage.url, options)
    manifest = find_complete(storage, call)
    rows = manifest.rows if manifest else _count_rows(call)
    workers = options.workers if earlier or manifest else _workers(rows, due, buying, options)
    pools = _Pools(buying=buying, call=call, source=source, storage=storage, night=flow_run_id())
    night = Night(
        rows=rows,
        buying=buying,
        capacity=_find_pools(buying),
        dispatcher=pools,
        rows_done=pools.rows_done,
        workers=workers,
    )
    night.finished = manifest is not None
    pools.take_over(earlier, night)
    seconds = _go_through(night, due, logger, lambda: pools.look_at(UUID(pools.night)).stage == "lost")
    report = report_night(night, call.run, due, seconds, pools.rows_in_hand)
    publish_night(report, night, logger)
    logger.info("%s", report.summary)
    return report


def _first_began() -> datetime:
    """Return when the first attempt of this flow run began: a retry is due when that was."""
    run = flow_run()
    return datetime.fromtimestamp(run.start_time.timestamp(), UTC) if run and run.start_time else datetime.now(UTC)


def _find_sent(client: SyncPrefectClient, night: str) -> list[tuple[Kind, FlowRun]]:
    """Return what an earlier attempt of a night has sent, in order."""
    found: list[tuple[Kind, FlowRun]] = []
    while True:
        keys = {_key(night, len(found), kind): kind for kind in KINDS.values()}
        run = dispatch.find(client, list(keys))
        if run is None:
            return found
        found.append((keys[str(run.idempotency_key)], run))


def _find_pools(buying: Buying) -> PoolCapacity:
    """Return the pool of spot machines. Raises DeploymentMissing where that or the other one is."""
    with get_client(sync_client=True) as client:
        dispatch.find_pool(client, buying.on_demand)
        return PoolCapacity(pool=dispatch.find_pool(client, buying.spot))


def _key(night: str, at: int, kind: Kind) -> str:
    return f"{night}-{at}-{kind}"


def _workers(rows: int, due: datetime, buying: Buying, options: BatchOptions) -> int:
    """Return how many machines the run is on at a time. Raises DeadlineImpossible."""
    if buying.rows_per_second is None:
        return options.workers
    work, left = rows / buying.rows_per_second, (due - datetime.now(UTC)).total_seconds()
    return workers_needed(work, left, buying.changeover_seconds, workers_max=options.workers)


def _count_rows(call: Call) -> int:
    """Return the rows of a source by its footers; raises SourceFormat where it has none that tell them."""
    if call.snapshot.format != "parquet":
        message = (
            "A night must know the rows of its source at its start, which Parquet tells, got "
            f"{call.snapshot.format} at {call.snapshot.root}. Write it as Parquet, or call batch_inference."
        )
        raise SourceFormat(message)
    return open_dataset(call.snapshot, (), call.options.key_columns).rows


def _go_through(night: Night, due: datetime, logger: Logger, cancelled: Callable[[], bool]) -> float:
    """Look and decide again and again until the run is published; return the seconds that it took.

    What it has sent is taken back where the night fails or is `cancelled`; on a machine that goes, it goes on elsewhere
    with that.
    """
    start = time.monotonic()
    # The deadline is a time of day, and the night goes by a clock that never jumps: they meet here, once.
    limit = (due - datetime.now(UTC)).total_seconds()
    progress = NightProgress(night.rows, logger)
    try:
        while not night.finished:
            now = time.monotonic() - start
            with server_may_fail(logger, "next move"):
                night.look(now)
                for machine in () if night.finished else night.machines:
                    _move(night, machine, now, limit - now, logger)
            progress.show(night.done)
            if not night.finished:
                time.sleep(night.buying.interval_seconds)
    except (OvernightError, KeyboardInterrupt):
        with server_may_fail(logger, "end"):
            night.abandon("The night was given up.")
        raise
    except TerminationSignal:
        with server_may_fail(logger, "end"):
            if cancelled():
                night.abandon("The night was cancelled.")
        raise
    return time.monotonic() - start


def _move(night: Night, machine: Machine, now: float, left: float, logger: Logger) -> None:
    place, why = night.decide(machine, left)
    if place != machine.place:
        logger.info("After %s machine %s to %s: %s", in_words(now), machine.number, WORDS[place], why)
    night.go(machine, place, now, why)


@dataclass(slots=True, kw_only=True)
class _Pools:
    """The two deployments of a night, and the parts that their runs put out.

    Each question has a client of its own: a signal that comes in the middle of one leaves that client unusable.
    """

    buying: Buying
    call: Call
    source: str
    storage: Storage
    night: str
    _sent: list[UUID] = field(default_factory=list)
    _plan: Plan | None = None

    def take_over(self, earlier: Sequence[tuple[Kind, FlowRun]], night: Night) -> None:
        """Let a night go on with the runs that its earlier attempt has sent, as far as they still are to go on."""
        self._sent += (run.id for _, run in earlier)
        going = [(kind, run.id) for kind, run in earlier if self.look_at(run.id).stage in ("waiting", "running")]
        for machine, (kind, sent) in zip(night.machines, going, strict=False):
            machine.begin(next(place for place, of in KINDS.items() if of == kind), sent, 0.0)

    def send(self, kind: Kind) -> UUID:
        """Start a run of the kind's deployment."""
        name = self.buying.spot if kind == "spot" else self.buying.on_demand
        with get_client(sync_client=True) as client:
            run = dispatch.send(client, name, self._parameters(), _key(self.night, len(self._sent), kind))
        self._sent.append(run.id)
        return run.id

    def look_at(self, flow_run_id: UUID) -> Seen:
        """Return what Prefect says of a run."""
        with get_client(sync_client=True) as client:
            return dispatch.look_at(client, flow_run_id)

    def drain(self, flow_run_id: UUID, why: str, *, lost: bool) -> None:
        """End a run for good."""
        with get_client(sync_client=True) as client:
            dispatch.drain(client, flow_run_id, why, lost=lost)

    def rows_done(self) -> int:
        """Return the rows that have their part."""
        self._plan = self._plan or load_plan(self.storage, self.call.run)
        return count_rows_done(self.storage, self._plan) if self._plan else 0

    @property
    def rows_in_hand(self) -> int:
        """What a machine that is taken was scoring, at most: a chunk for each of its slots."""
        if self._plan is None:
            return 0
        slots = self.call.options.slots or (self._plan.tuning.slots if self._plan.tuning else cores())
        return slots * max(chunk.rows for chunk in self._plan.chunks.values())

    def _parameters(self) -> Mapping[str, Any]:
        # A later run joins one that has begun, whatever the source is by then; one that was lost before has nothing.
        starts = ((sent, load_start(self.storage, str(sent))) for sent in self._sent)
        begun = (sent for sent, start in starts if start is not None and start.run == self.call.run)
        options = self.call.options.model_copy(update={"joins": next(begun, None), "workers": 1})
        return {
            "model": self.call.resolved.pin.uri,
            "source": self.source,
            "destination": self.storage.url,
            "options": options.model_dump(mode="json"),
        }
