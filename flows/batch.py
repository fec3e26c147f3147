"""Batch inference: a registered model over a dataset, complete, exact, and published in one commit."""

from __future__ import annotations

import contextvars
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Literal

import matplotlib.figure  # noqa: F401 - half a second that would else fall into the first call, for its plot
from mlflow import MlflowException
from prefect import get_run_logger
from prefect.exceptions import TerminationSignal

from flows.runtime.context import flow_run_id
from flows.runtime.flow_decorator import adhoc_flow
from flows.runtime.interruption import InterruptedExit, exit_interrupted, is_resumed_by_prefect, watch_for_interruption
from flows.runtime.joining import check_workers, find_start, is_beside_another, start_workers
from flows.runtime.task_runners import check_runner, score_missing
from serving.errors import SourceFault
from serving.model.interface import Model
from tasks.batch.artifacts import ProgressWatch, publish_artifacts
from tasks.batch.lineage import record_failure, record_lineage
from tasks.batch.options import BatchOptions
from tasks.batch.parts import count_rows_done
from tasks.batch.plan import Plan, RunStart, confirm_plan, load_started_plan, save_start
from tasks.batch.publish import (
    Audit,
    Manifest,
    audit_parts,
    check_rows_add_up,
    count_rejects,
    find_intact_manifest,
    publish,
)
from tasks.batch.report import BatchReport, page_path, plot, report_complete, save_page
from tasks.batch.resolve import (
    Found,
    check_memory,
    choose_slots,
    find_published,
    load_planned_model,
    plan_run,
    resolve_request,
    restage_plan,
)
from tasks.batch.score import Scorer, ScoringResult, check_rejects
from tasks.common.artifacts import Logger
from tasks.storage import Storage, check_create_only, open_storage

_DEFAULTS = BatchOptions()
_PASSES_MAX = 3
_RECORD_SECONDS_MAX = 5.0


@adhoc_flow("batch-inference")
def batch_inference(model: str, source: str, destination: str, options: BatchOptions = _DEFAULTS) -> BatchReport:
    """Score every row of a dataset with a registered model, and publish the predictions in one commit.

    Args:
        model: models:/NAME@ALIAS or models:/NAME/VERSION, resolved once.
        source: A file, folder, glob or s3:// prefix of Parquet, Arrow IPC, CSV or JSON lines.
        destination: A folder or s3:// prefix outside the source.
        options: Keys, casts, sizes and limits; each has a default.

    The same call made again over the same model and files is the same run: it resumes, or finds
    itself complete. Every input row is in the output, with predictions or with the reason why not.
    Raises OvernightError's kinds (serving.errors), each named for what to do next.
    """
    logger = get_run_logger()
    check_runner(options)
    check_workers(source, destination, options)
    seconds: dict[str, float] = {}
    storage = open_storage(destination)
    found = _find_plan(model, source, storage, options, seconds)
    plan = found.plan
    if found.complete:
        logger.info("Run %s is complete: %s rows. Nothing to score.", plan.run, f"{plan.rows:,}")
        report = report_complete(found.complete, plan, storage, seconds)
        if not storage.exists(page_path(plan)):
            # The call that published the run was ended before it could record it.
            _record(plan, storage, report, plot(report, [(0.0, plan.rows)]), options, logger)
        return report
    check_create_only(storage)
    if found.damaged:
        logger.warning(
            "Run %s was published, but %s of its parts are gone or cut short, the first %s; they are scored again.",
            *(plan.run, len(found.damaged), found.damaged[0]),
        )
        plan = restage_plan(plan, storage)
    start_workers(options, logger)
    with _timed(seconds, "load"):
        loaded = load_planned_model(plan, found.resolved, options)
    slots = choose_slots(options, loaded)
    memory = check_memory(plan, slots, options)
    _say(plan, slots, memory, logger)
    watch = ProgressWatch(plan.rows, lambda: count_rows_done(storage, plan), logger)
    with _failure_recorded(plan, storage, options, logger):
        with _timed(seconds, "score"):
            scored, audit = _score(plan, storage, loaded, slots, options, watch, logger)
        with _timed(seconds, "publish"):
            published = publish(storage, confirm_plan(storage, plan), audit)
    report = _report(
        plan, storage, scored, audit, published=published, slots=slots, memory=memory >> 20, seconds=seconds
    )
    with _timed(seconds, "report"):
        png = plot(report, watch.samples)
        _record(plan, storage, report, png, options, logger)
    report = report.model_copy(update={"seconds": seconds})
    watch.show()
    publish_artifacts(report, png, logger)
    logger.info("Run %s is complete: %s rows, %s rejects.", plan.run, f"{report.rows:,}", f"{report.rows_rejected:,}")
    return report


def _find_plan(model: str, source: str, storage: Storage, options: BatchOptions, seconds: dict[str, float]) -> Found:
    """Return the plan of this flow run: its earlier attempt's, that of one it joins, the same call's, or a new one."""
    this = flow_run_id()
    with _timed(seconds, "resolve"):
        start = find_start(storage, this, options.joins)
    if start is None:
        with _timed(seconds, "resolve"):
            call = resolve_request(model, source, storage.url, options)
        with _timed(seconds, "plan"), _caller_threads_kept():
            found = find_published(storage, plan_run(call, storage), call.resolved)
        planned = RunStart(run=found.plan.run, key=found.plan.key)
        # A call that is answered already leaves no trace.
        start = planned if found.complete else save_start(storage, this, planned)
        if start == planned:
            return found
    with _timed(seconds, "plan"):
        return find_published(storage, load_started_plan(storage, start), None)


def _say(plan: Plan, slots: int, memory: int, logger: Logger) -> None:
    logger.info(
        "Run %s: %s rows in %s chunks and %s shards, %s slots, batches of %s %s, %s; its data takes %s MiB at most.",
        *(plan.run, f"{plan.rows:,}", len(plan.chunks), len(plan.shards), slots),
        *(plan.batch_size, plan.batch_unit, plan.engine, memory >> 20),
    )


def _score(
    plan: Plan, storage: Storage, model: Model, slots: int, options: BatchOptions, watch: ProgressWatch, logger: Logger
) -> tuple[ScoringResult, Audit]:
    """Score what is missing until every part holds, or a notice ends it; a part that can't be read is scored again."""
    scorer = Scorer(
        plan=plan,
        destination=storage,
        model=model,
        max_reject_fraction=options.max_reject_fraction,
        joined=is_beside_another(options),
    )
    scored = ScoringResult()
    for _ in range(_PASSES_MAX):
        try:
            with watch.watching(), watch_for_interruption(scorer.drain, options, logger), _caller_threads_kept():
                scored.add(score_missing(scorer, slots, options))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_interrupted(plan, watch.rows_done)) from None
        except TerminationSignal:
            logger.warning(_interrupted(plan, watch.rows_done))
            raise
        if scorer.drain.notice is not None and watch.rows_done < plan.rows:
            watch.show()
            exit_interrupted(plan, watch.rows_done, scored, scorer.drain, logger)
        # Another worker may have published the run meanwhile, and deleted the staged copies that this one read.
        if scored.faults and find_intact_manifest(storage, plan.run) is None:
            raise _faults(scored)
        audit = audit_parts(storage, plan)
        scored.rows_recomputed += audit.rows_set_aside
        if not audit.missing:
            break
    check_rows_add_up(plan, audit)
    check_rejects(sum(count.rows for count in count_rejects(audit)), plan, options.max_reject_fraction)
    return scored, audit


@contextmanager
def _caller_threads_kept() -> Generator[None]:
    """Put torch's thread count back: slots set it to one, and that reaches threads started later."""
    torch = sys.modules.get("torch")  # loaded with the model, if at all
    before = torch.get_num_threads() if torch else None
    try:
        yield
    finally:
        if torch:
            torch.set_num_threads(before)


def _interrupted(plan: Plan, rows_done: int) -> str:
    return (
        f"Interrupted: {rows_done:,} of {plan.rows:,} rows of run {plan.run} are done and stay; the same call resumes."
    )


def _faults(scored: ScoringResult) -> SourceFault:
    faults = list(dict.fromkeys(str(fault) for fault in scored.faults.values()))
    first = next(iter(scored.faults.values()))
    listed = "\n".join(f"  - {fault}" for fault in faults[:10])
    return type(first)(
        f"Every source file must be readable and unchanged; {len(scored.faults)} chunks could not be scored:\n"
        f"{listed}\nThe parts of all other chunks are there, and nothing is published."
    )


def _report(
    plan: Plan,
    storage: Storage,
    scored: ScoringResult,
    audit: Audit,
    *,
    published: Manifest,
    slots: int,
    memory: int,
    seconds: dict[str, float],
) -> BatchReport:
    return BatchReport(
        status="scored",
        run=plan.run,
        plan_digest=published.plan_digest,
        model=plan.model.uri,
        model_digest=plan.model.digest,
        source=plan.source.title,
        destination=storage.url,
        output=plan.options.output,
        rows=plan.rows,
        rejects=count_rejects(audit),
        rows_key_null=audit.rows_key_null,
        rows_scored=scored.rows,
        rows_recomputed=scored.rows_recomputed,
        parts=len(audit.footers),
        slots=slots,
        batch_size=plan.batch_size,
        engine=str(plan.engine),
        tuning=plan.tuning,
        memory_mb=memory,
        seconds=dict(seconds),
        thread_seconds=scored.seconds,
        report=storage.address(page_path(plan)),
    )


def _record(
    plan: Plan, storage: Storage, report: BatchReport, png: bytes, options: BatchOptions, logger: Logger
) -> None:
    """Write the lineage of a published run, then its page: a run that has its page has been recorded."""
    if options.experiment is not None:
        try:
            record_lineage(plan, report, options.experiment, int(time.time() * 1000))
        except MlflowException as error:
            logger.warning("MLflow must take the run's lineage, got: %s. The predictions are published.", error)
    save_page(storage, plan, report, png)


@contextmanager
def _failure_recorded(plan: Plan, storage: Storage, options: BatchOptions, logger: Logger) -> Generator[None]:
    """Let the MLflow run end as the block does where that fails: FAILED, or KILLED where it was told to stop.

    A run of a deployment that goes on elsewhere after a notice has not ended.
    """
    try:
        yield
    except (KeyboardInterrupt, TerminationSignal) as error:
        _record_failure(plan, storage, options, "KILLED", str(error) or type(error).__name__, logger)
        raise
    except InterruptedExit as left:
        if not is_resumed_by_prefect():
            _record_failure(plan, storage, options, "KILLED", str(left), logger)
        raise
    except Exception as error:
        _record_failure(plan, storage, options, "FAILED", str(error) or type(error).__name__, logger)
        raise


def _record_failure(
    plan: Plan,
    storage: Storage,
    options: BatchOptions,
    status: Literal["FAILED", "KILLED"],
    reason: str,
    logger: Logger,
) -> None:
    """Record a failure in MLflow within seconds, or not at all: a server that does not answer holds nothing up."""
    experiment = options.experiment
    if experiment is None:
        return

    def record() -> None:
        try:
            record_failure(plan, storage.url, experiment, status, reason)
        except MlflowException as error:
            logger.warning("MLflow must take how the run ended (%s), got: %s.", status, error)

    # Artifacts and log lines find their flow run in the context, which threads do not inherit.
    run = contextvars.copy_context().run
    thread = threading.Thread(target=run, args=(record,), name="record-failure", daemon=True)
    thread.start()
    thread.join(_RECORD_SECONDS_MAX)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Generator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
