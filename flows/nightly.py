"""A batch run under a deadline: on machines that may vanish while there is time, on machines that stay after that."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import TerminationSignal

from flows.runtime.flow_decorator import adhoc_flow
from flows.runtime.names import rename_flow_run
from flows.runtime.run_record import record_deadline, record_night
from flows.runtime.steps import find_logger, flow_run, flow_run_id
from flows.runtime.tracing import make_trace_labels
from serving.errors import BadInput, OvernightError, SourceFormat
from serving.machine import count_cores, utc_now
from serving.option_words import give_option
from tasks.batch.dataset import open_dataset
from tasks.batch.options import BatchOptions
from tasks.batch.parts import count_rows_done
from tasks.batch.plan import Plan
from tasks.batch.resolve import find_complete_run
from tasks.batch.run_records import load_plan, load_start
from tasks.batch.run_request import RunRequest, resolve_request
from tasks.common.artifacts import Logger, server_may_fail
from tasks.common.formatting import in_words
from tasks.common.metrics import expose_run_metrics
from tasks.common.names import name_batch_run
from tasks.common.prefect_server import require_prefect_server
from tasks.spot import work_pools
from tasks.spot.capacity import Buyer, open_capacity
from tasks.spot.night import MACHINE_KINDS, PLACEMENT_NAMES, Machine, Night
from tasks.spot.night_report import NightProgress, publish_night, report_night
from tasks.spot.policy import count_workers_needed
from tasks.spot.purchase import MachineKind, NightlyReport, PurchaseOptions, parse_deadline
from tasks.spot.work_pools import FlowRunStatus, PrefectWorkerPool
from tasks.storage import Address, Storage, open_storage

_DEFAULTS = BatchOptions()


def _name_run(model: str, destination: str, deadline: str) -> str:
    """Return the name of a night: churn v3 → scores by 06:00."""
    return f"{name_batch_run(model, destination)} by {deadline}"


@adhoc_flow(
    "nightly-inference",
    run_name=lambda parameters: _name_run(parameters["model"], parameters["destination"], parameters["deadline"]),
)
def nightly_inference(
    model: str,
    source: Address,
    destination: Address,
    deadline: str,
    buying: PurchaseOptions,
    options: BatchOptions = _DEFAULTS,
) -> NightlyReport:
    """Have every row of a dataset scored by a deadline, for as little as the machines allow.

    This flow scores nothing: it sends runs of the two deployments, one for each machine, and moves the work between
    them (tasks.spot.policy). It uses as few machines as leave a fifth of the time to wait for spot, and all that are
    allowed where their speed is unknown. Whatever happens to it or to them, the same call resumes. A retry of the same
    flow run keeps deadline and model, and takes over the runs that it has sent.

    Where it starts the machines itself (`buying.machines`), it asks for spot machines as long as the deadline allows
    them, for on-demand machines when it must, and gives all of them back at its end, also where it fails.

    Args:
        model: models:/NAME@ALIAS or models:/NAME/VERSION, resolved once.
        source: Parquet, as batch_inference takes it.
        destination: A folder or prefix outside the source.
        deadline: A time of day in UTC (06:00), or a date and time with its zone.
        buying: The two deployments that the run may go to, their prices, and what is known of their speed.
        options: Those of batch_inference; `workers` is the most machines that the run may use at a time.

    Raises:
        DeadlineImpossible: Even on-demand machines would be late.
        BadInput: A gate is to wait for a person.
        DeploymentMissing: One of the deployments or its work pool does not exist.
        CapacityUnusable: The machines that the night is to start can't be had.
        NightFailed: The batch run itself fails.
    """
    require_prefect_server("A night, which sends runs to work pools,")
    logger = find_logger()
    with expose_run_metrics(logger):
        return _score_by_deadline(model, str(source), open_storage(str(destination)), deadline, buying, options, logger)


def _score_by_deadline(
    model: str,
    source: str,
    storage: Storage,
    deadline: str,
    buying: PurchaseOptions,
    options: BatchOptions,
    logger: Logger,
) -> NightlyReport:
    """Go through a night, from its deadline to its report."""
    due = parse_deadline(deadline, _first_start())
    _check_gate(options)
    with get_client(sync_client=True) as client:
        earlier = find_sent_runs(client, flow_run_id())
    pinned = earlier[0][1].parameters["model"] if earlier else model
    if earlier and options.challengers:
        versions = earlier[0][1].parameters["options"]["challengers"]
        options = options.model_copy(update={"challengers": tuple(versions)})
    call = resolve_request(pinned, source, storage.url, options)
    rename_flow_run(
        *(
            _name_run(call.resolved.pin.uri, storage.url, deadline),
            _name_run(model, storage.url, deadline),
            logger,
        )
    )
    recorder = record_deadline(call.resolved.pin, storage, due)
    manifest = find_complete_run(storage, call)
    rows = manifest.rows if manifest else _count_rows(call)
    workers = options.workers if earlier or manifest else _choose_workers(rows, due, buying, options)
    deployments = _Deployments(buying=buying, call=call, source=source, storage=storage, night=flow_run_id())
    pools = _find_pools(buying)
    night = Night(
        rows=rows,
        buying=buying,
        spot_pool=PrefectWorkerPool(pool=pools["spot"]),
        dispatcher=deployments,
        count_rows_done=deployments.count_rows_done,
        workers=workers,
        spot_wait_seconds=buying.spot_wait_seconds,
    )
    night.finished = manifest is not None
    deployments.take_over(earlier, night)
    capacity = open_capacity(buying, owner=flow_run_id(), pools=pools, workers=workers) if not night.finished else None
    buyer = Buyer(capacity=capacity, logger=logger) if capacity else None
    progress = NightProgress(night.rows, logger)
    seconds = run_night(night, due, logger, progress.show, is_cancelled=deployments.is_night_lost, buyer=buyer)
    report = report_night(night, call.run, due, seconds, deployments.rows_in_flight_max, buyer)
    publish_night(report, night, logger)
    record_night(recorder, report, buying, storage, logger)
    logger.info("%s", report.summary)
    return report


def _check_gate(options: BatchOptions) -> None:
    """Raise BadInput where a gate would have the night wait for a person."""
    if options.gate is not None and options.gate.on_refusal == "pause":
        message = (
            "The gate of a night must fail a run that it refuses, since a night has a deadline and machines to give "
            f"back, got {give_option('gate', {'on_refusal': 'pause'})}. Leave it out, and approve a run by "
            "`overnight approve`."
        )
        raise BadInput(message)


def _first_start() -> datetime:
    """Return when the first attempt of this flow run began: its retries keep the deadline."""
    run = flow_run()
    return datetime.fromtimestamp(run.start_time.timestamp(), UTC) if run and run.start_time else utc_now()


def find_sent_runs(client: SyncPrefectClient, night: str) -> list[tuple[MachineKind, FlowRun]]:
    """Return the flow runs that an earlier attempt of a night has sent, in order."""
    found: list[tuple[MachineKind, FlowRun]] = []
    while True:
        keys = {make_idempotency_key(night, len(found), kind): kind for kind in MACHINE_KINDS.values()}
        run = work_pools.find_flow_run(client, list(keys))
        if run is None:
            return found
        found.append((keys[str(run.idempotency_key)], run))


def _find_pools(buying: PurchaseOptions) -> dict[MachineKind, str]:
    """Return the work pools of both deployments. Raises DeploymentMissing where one of them does not exist."""
    with get_client(sync_client=True) as client:
        on_demand = work_pools.find_pool(client, buying.on_demand)
        return {"spot": work_pools.find_pool(client, buying.spot), "on-demand": on_demand}


def make_idempotency_key(night: str, index: int, kind: MachineKind) -> str:
    """Return the key by which Prefect starts the flow run of this index of a night only once."""
    return f"{night}-{index}-{kind}"


def _choose_workers(rows: int, due: datetime, buying: PurchaseOptions, options: BatchOptions) -> int:
    """Return how many machines the run uses at a time. Raises DeadlineImpossible."""
    if buying.rows_per_second is None:
        return options.workers
    work, left = rows / buying.rows_per_second, (due - utc_now()).total_seconds()
    return count_workers_needed(work, left, buying.changeover_seconds, workers_max=options.workers)


def _count_rows(call: RunRequest) -> int:
    """Return the rows of a source by its footers. Raises SourceFormat where its files have none."""
    if call.snapshot.format != "parquet":
        message = (
            "A night must know the rows of its source at its start, which Parquet files state, got "
            f"{call.snapshot.format} at {call.snapshot.root}. Write it as Parquet, or call batch_inference."
        )
        raise SourceFormat(message)
    return open_dataset(call.snapshot, (), call.options.key_columns, call.nullable).rows


def run_night(
    night: Night,
    due: datetime,
    logger: Logger,
    show_progress: Callable[[int], None],
    *,
    is_cancelled: Callable[[], bool],
    buyer: Buyer | None = None,
    now: Callable[[], datetime] = utc_now,
    sleep: Callable[[float], None] = time.sleep,
) -> float:
    """Observe and decide, once an interval, until the run is published; return the seconds that it took.

    The flow runs that it has sent end where the night fails or is cancelled, and the machines that it has started are
    given back. Where its own machine goes, they go on, and a later attempt takes them over.
    """
    start = time.monotonic()
    goes_on = False
    # The deadline is a time of day, and the night uses a monotonic clock: the wall clock is read once, here.
    limit = (due - now()).total_seconds()
    try:
        while not night.finished:
            elapsed = time.monotonic() - start
            with server_may_fail(logger, "next move"):
                lost_before = len(night.losses)
                night.observe(elapsed)
                for number, when, why in night.losses[lost_before:]:
                    logger.warning("After %s machine %s was lost: %s.", in_words(when), number, why)
                for machine in () if night.finished else night.machines:
                    _move_machine(night, machine, elapsed, limit - elapsed, logger)
                if buyer and not night.finished:
                    buyer.buy(night, elapsed, limit - elapsed)
            show_progress(night.rows_done)
            if not night.finished:
                sleep(night.buying.interval_seconds)
    except (OvernightError, KeyboardInterrupt):
        with server_may_fail(logger, "end"):
            night.end_runs("The night was given up.")
        raise
    except TerminationSignal:
        goes_on = True
        with server_may_fail(logger, "end"):
            if is_cancelled():
                goes_on = False
                night.end_runs("The night was cancelled.")
        raise
    finally:
        if buyer and not goes_on:
            buyer.close(time.monotonic() - start)
    return time.monotonic() - start


def _move_machine(night: Night, machine: Machine, elapsed: float, left: float, logger: Logger) -> None:
    placement, why = night.decide(machine, left)
    if placement != machine.placement:
        name = PLACEMENT_NAMES[placement]
        logger.info("After %s machine %s to %s: %s", in_words(elapsed), machine.number, name, why)
    night.move(machine, placement, elapsed, why)


@dataclass(slots=True, kw_only=True)
class _Deployments:
    """The two deployments of a night, the flow runs sent to them, and the parts that these write.

    Each call has a client of its own: a signal that arrives during one leaves that client unusable.
    """

    buying: PurchaseOptions
    call: RunRequest
    source: str
    storage: Storage
    night: str
    _sent: list[UUID] = field(default_factory=list)
    _plan: Plan | None = None

    def take_over(self, earlier: Sequence[tuple[MachineKind, FlowRun]], night: Night) -> None:
        """Give the machines of a night the flow runs of its earlier attempt that have not ended."""
        self._sent += (run.id for _, run in earlier)
        going = [(kind, run.id) for kind, run in earlier if self.read_status(run.id).stage in ("waiting", "running")]
        for machine, (kind, sent) in zip(night.machines, going, strict=False):
            machine.begin(next(placement for placement, each in MACHINE_KINDS.items() if each == kind), sent, 0.0)

    def submit(self, kind: MachineKind) -> UUID:
        """Start a run of the kind's deployment."""
        name = self.buying.spot if kind == "spot" else self.buying.on_demand
        key = make_idempotency_key(self.night, len(self._sent), kind)
        run_name = f"{name_batch_run(self.call.resolved.pin.uri, self.storage.url)} ({kind} {len(self._sent) + 1})"
        with get_client(sync_client=True) as client:
            run = work_pools.submit_flow_run(client, name, self._parameters(), key, run_name, make_trace_labels())
        self._sent.append(run.id)
        return run.id

    def read_status(self, flow_run_id: UUID) -> FlowRunStatus:
        """Return the status of a flow run."""
        with get_client(sync_client=True) as client:
            return work_pools.read_status(client, flow_run_id)

    def end(self, flow_run_id: UUID, why: str, *, lost: bool) -> None:
        """End a flow run for good."""
        with get_client(sync_client=True) as client:
            work_pools.end_flow_run(client, flow_run_id, why, lost=lost)

    def is_night_lost(self) -> bool:
        """Return whether Prefect has the night itself as cancelled or crashed."""
        return self.read_status(UUID(self.night)).stage == "lost"

    def count_rows_done(self) -> int:
        """Return the rows that have their part."""
        self._plan = self._plan or load_plan(self.storage, self.call.run)
        return count_rows_done(self.storage, self._plan) if self._plan else 0

    @property
    def rows_in_flight_max(self) -> int:
        """The most rows that a machine scores again after it was taken: a chunk for each of its slots."""
        if self._plan is None:
            return 0
        slots = self.call.options.slots or (self._plan.tuning.slots if self._plan.tuning else count_cores())
        return slots * max(chunk.rows for chunk in self._plan.chunks.values())

    def _parameters(self) -> Mapping[str, Any]:
        # A later flow run joins one that has begun, even if the source has changed since; one that was lost before
        # it began has nothing to join.
        starts = ((sent, load_start(self.storage, str(sent))) for sent in self._sent)
        begun = (sent for sent, start in starts if start is not None and start.run == self.call.run)
        options = self.call.options.model_copy(update={"joins": next(begun, None), "workers": 1})
        return {
            "model": self.call.resolved.pin.uri,
            "source": self.source,
            "destination": self.storage.url,
            "options": options.model_dump(mode="json"),
        }
