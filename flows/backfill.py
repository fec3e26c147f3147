"""A backfill: partitions or versions of a source, each scored by a run of its own, until all of them are complete."""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.exceptions import TerminationSignal

from flows.batch import batch_inference
from flows.runtime.flow_decorator import adhoc_flow
from flows.runtime.joining import check_workers
from flows.runtime.names import rename_flow_run
from flows.runtime.steps import find_logger, flow_run, flow_run_id
from serving.errors import BackfillFailed, DeviceLost, Interrupted, shorten_error
from serving.model.contract import Contract
from serving.model.registry import Resolved, resolve_model
from tasks.batch.backfill import (
    BackfillOptions,
    BackfillReport,
    Piece,
    PieceReport,
    Pieces,
    describe_failures,
    describe_replaced,
    find_complete_piece,
    list_pieces,
    look_at_pieces,
    order_pieces,
    publish_pieces,
    replace_piece,
    report_piece,
)
from tasks.batch.challengers import list_columns_beside, pin_challengers, resolve_challengers
from tasks.batch.options import BatchOptions
from tasks.batch.ownership import Owner, Ownership, find_owner, name_machine, own_destination
from tasks.common.artifacts import Logger, server_may_fail
from tasks.common.blocks import keep_own_variables
from tasks.common.names import name_batch_run
from tasks.common.prefect_server import require_prefect_server
from tasks.spot import work_pools
from tasks.spot.work_pools import FlowRunStatus
from tasks.storage import Address, open_storage

_DEFAULTS, _BACKFILL_DEFAULTS = BatchOptions(), BackfillOptions()
_PURPOSE = "backfill"


@adhoc_flow("backfill-inference", run_name=lambda parameters: _name_run(parameters["model"], parameters["destination"]))
def backfill_inference(
    model: str,
    source: Address,
    destination: Address,
    pieces: Pieces,
    backfilling: BackfillOptions = _BACKFILL_DEFAULTS,
    options: BatchOptions = _DEFAULTS,
) -> BackfillReport:
    """Score a range of partitions, or of versions of a table, each as a run of its own.

    Each piece goes to a destination of its own below the given one, such as scores/date=2026-11-01, whose newest run is
    that piece's: `open_predictions` opens it. A piece whose run is complete is passed over, by its manifest. The same
    call goes on after any interruption; a retry of the same flow run keeps the model version. A piece that fails does
    not stop the others. One backfill at a time goes on at a destination.

    Args:
        model: models:/NAME@ALIAS or models:/NAME/VERSION, resolved once for all pieces.
        source: A folder of hive partitions, or a Delta or Iceberg table, as batch_inference takes it.
        destination: A folder or prefix outside the source.
        pieces: Which partitions, versions or times are scored.
        backfilling: The order, and how many runs go on at a time.
        options: Those of every run.

    Returns:
        What became of every piece.

    Raises:
        BackfillFailed: Some pieces failed; the message lists them.
        AlreadyRunning: Another backfill goes on at the destination.
        OvernightError: Its other kinds, where no piece can be scored.
    """
    if backfilling.deployment is not None:
        require_prefect_server("A backfill by a deployment")
    logger = find_logger()
    with keep_own_variables(logger):
        return _backfill(model, source, destination, pieces, backfilling, options, logger)


def _backfill(
    model: str,
    source: Address,
    destination: Address,
    pieces: Pieces,
    backfilling: BackfillOptions,
    options: BatchOptions,
    logger: Logger,
) -> BackfillReport:
    """Score what is left of the pieces, as backfill_inference says."""
    to, this = str(destination), flow_run_id()
    check_workers(str(source), to, _DEFAULTS)
    storage = open_storage(to)
    earlier = find_owner(storage, _PURPOSE)
    resolved = resolve_model(earlier.model if earlier and earlier.owner == this else model)
    pinned = resolved.pin.uri
    rename_flow_run(_name_run(pinned, to), _name_run(model, to), logger)
    contract = resolved.contract(options.input_columns, options.column_policies, options.params)
    if challengers := resolve_challengers(resolved, contract, options):
        options = pin_challengers(options, challengers)
    used = {*(column.name for column in contract.columns), *options.key_columns}
    used |= {*list_columns_beside(contract, challengers, options)}
    listed = order_pieces(list_pieces(str(source), storage.url, pieces, options, used), backfilling)
    owner = Owner(owner=this, machine=name_machine(), process=os.getpid(), model=pinned)
    with own_destination(storage, _PURPOSE, owner) as ownership:
        reports = look_at_pieces(listed, resolved, contract)
        work = Backfill(
            resolved=resolved,
            contract=contract,
            ownership=ownership,
            logger=logger,
            report=BackfillReport(model=pinned, destination=storage.url, pieces=tuple(reports)),
        )
        left = [piece for piece, report in zip(listed, reports, strict=True) if report.state == "left"]
        publish_pieces(work.report, logger)
        logger.info("%s", work.report.summary)
        if replaced := describe_replaced(work.report):
            logger.warning("%s", replaced)
        try:
            if backfilling.deployment is None:
                score_here(work, left)
            else:
                client = Deployment(name=backfilling.deployment, model=pinned, backfill=this)
                score_by_deployment(work, left, backfilling, client)
        finally:
            publish_pieces(work.report, logger)
    logger.info("%s", work.report.summary)
    if work.report.count("failed"):
        raise BackfillFailed(describe_failures(work.report))
    return work.report


def _name_run(model: str, destination: str) -> str:
    """Return the name of a backfill: backfill churn v3 → scores."""
    return f"backfill {name_batch_run(model, destination)}"


@dataclass(slots=True, kw_only=True)
class Backfill:
    """What a backfill goes by, and how far it has come."""

    resolved: Resolved
    contract: Contract
    ownership: Ownership
    logger: Logger
    report: BackfillReport

    def note(self, piece: PieceReport) -> None:
        """Keep what became of a piece, and show it."""
        self.report = replace_piece(self.report, piece)
        publish_pieces(self.report, self.logger)

    def note_failure(self, piece: Piece, why: str) -> None:
        """Keep that a piece failed."""
        self.logger.error("Piece %s failed, and the others go on: %s", piece.name, why)
        self.note(report_piece(piece, "failed", error=why))


def score_here(work: Backfill, left: Sequence[Piece]) -> None:
    """Score pieces one after another in this process, each as a flow run of its own below this one.

    Raises what ends the process: Interrupted, DeviceLost, and Prefect's TerminationSignal.
    """
    for piece in left:
        work.ownership.check()
        try:
            batch_inference(work.resolved.pin.uri, piece.source, piece.destination, piece.options)
            manifest = find_complete_piece(piece, work.resolved, work.contract)
        except DeviceLost:
            raise
        except Interrupted:
            run = flow_run()
            if run is not None and run.deployment_id is not None:
                # Its automations resume a run that has crashed, and none that has failed.
                raise TerminationSignal(signal.SIGTERM) from None
            raise
        except Exception as error:  # noqa: BLE001 - whatever ends one piece is kept, and the others go on
            work.note_failure(piece, shorten_error(error))
        else:
            work.note(report_piece(piece, "scored", manifest))


@dataclass(slots=True, kw_only=True)
class Deployment:
    """The deployment that runs of a backfill go to; each call has a client of its own, since a signal may end it."""

    name: str
    model: str
    backfill: str

    def submit(self, piece: Piece) -> UUID:
        """Start the flow run of a piece, or return the one that an earlier attempt of this backfill has started.

        One that has failed or was lost since is started once more.
        """
        parameters = {
            "model": self.model,
            "source": piece.source,
            "destination": piece.destination,
            "options": piece.options.model_dump(mode="json"),
        }
        name = name_batch_run(self.model, piece.destination)
        attempt = 1
        with get_client(sync_client=True) as client:
            while True:
                key = f"{self.backfill}/{piece.name}/{attempt}"
                earlier = work_pools.find_flow_run(client, [key])
                if earlier is None:
                    return work_pools.submit_flow_run(client, self.name, parameters, key, name).id
                if work_pools.read_status(client, earlier.id).stage in ("waiting", "running"):
                    return earlier.id
                attempt += 1

    def read_status(self, flow_run_id: UUID) -> FlowRunStatus:
        """Return the status of a flow run."""
        with get_client(sync_client=True) as client:
            return work_pools.read_status(client, flow_run_id)


@dataclass(slots=True, kw_only=True)
class _Sent:
    piece: Piece
    lost_since: float | None = field(default=None)


def score_by_deployment(
    work: Backfill,
    left: Sequence[Piece],
    backfilling: BackfillOptions,
    deployment: Deployment,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Send pieces to a deployment, as many at a time as are allowed, and wait until each of them has ended.

    Where this backfill ends early, the runs that it has sent go on.
    """
    waiting, sent = deque(left), dict[UUID, _Sent]()
    while waiting or sent:
        work.ownership.check()
        with server_may_fail(work.logger, "next move"):
            for each in list(sent):
                status = deployment.read_status(each)
                if _has_ended(sent[each], status, backfilling.lost_seconds, clock()):
                    _note_end(work, sent.pop(each).piece, status)
            while waiting and len(sent) < backfilling.runs_at_a_time:
                submitted = deployment.submit(waiting[0])
                sent[submitted] = _Sent(piece=waiting.popleft())
        if waiting or sent:
            sleep(backfilling.interval_seconds)


def _has_ended(run: _Sent, status: FlowRunStatus, lost_seconds: float, now: float) -> bool:
    """Return whether a run has ended for good: one that has crashed may be resumed by Prefect's automations."""
    if status.stage != "lost":
        run.lost_since = None
        return status.stage in ("done", "failed")
    run.lost_since = now if run.lost_since is None else run.lost_since
    return now - run.lost_since >= lost_seconds


def _note_end(work: Backfill, piece: Piece, status: FlowRunStatus) -> None:
    """Keep what became of a piece: what its manifest says, whatever Prefect does."""
    try:
        manifest = find_complete_piece(piece, work.resolved, work.contract)
    except Exception as error:  # noqa: BLE001 - as a run of this process that fails
        work.note_failure(piece, shorten_error(error))
        return
    if manifest is not None:
        work.note(report_piece(piece, "scored", manifest))
    else:
        work.note_failure(piece, " ".join(status.message.split()) or f"its flow run is {status.stage}")
