"""Batch inference: a registered model over a dataset, complete, exact, and published in one commit."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import NoReturn

from prefect.exceptions import TerminationSignal

from flows.runtime.flow_decorator import adhoc_flow
from flows.runtime.interruption import exit_interrupted, report_failure
from flows.runtime.joining import check_workers, find_start, is_beside_another, start_workers
from flows.runtime.names import rename_flow_run
from flows.runtime.run_gate import open_gate
from flows.runtime.run_record import CallRecord, record_call
from flows.runtime.run_span import describe_run_span
from flows.runtime.steps import Steps, find_logger, flow_run_id
from flows.runtime.task_runners import check_runner, score_missing
from flows.runtime.tracing import describe_span
from serving.errors import StorageFault
from serving.option_words import give_option
from tasks.batch.artifacts import (
    ProgressWatch,
    find_sample,
    publish_artifacts,
    publish_comparison,
    publish_complete,
    publish_interrupted,
)
from tasks.batch.comparison_plot import draw_comparison
from tasks.batch.comparison_records import (
    audit_challengers,
    compare_published,
    find_comparison,
    list_missing_chunks,
    save_challenger_parts,
)
from tasks.batch.destination_source import claim_source
from tasks.batch.disclosure import shorten_counts, withhold_values
from tasks.batch.events import RunCall, emit_promotion, emit_published, emit_refusal
from tasks.batch.feature_pins import describe_features
from tasks.batch.key_check import KeyCheck, check_run_keys, describe_doubled
from tasks.batch.lineage import record_failure, record_lineage, record_start
from tasks.batch.manifest import Manifest, find_intact_manifest, find_newer_run, list_foreign_files
from tasks.batch.memory import check_memory
from tasks.batch.options import BatchOptions
from tasks.batch.parts import count_done, part_path, put_empty_part
from tasks.batch.plan import Plan
from tasks.batch.planned_models import choose_slots, load_planned_challengers, load_planned_model
from tasks.batch.prediction_sample import draw_distributions
from tasks.batch.publish import Audit, audit_parts, check_rows_add_up, count_rejects, publish, wait_for_publisher
from tasks.batch.report import BatchReport, draw_progress, page_path, report_complete, report_scored, save_page
from tasks.batch.resolve import CompleteRun, NewRun, ResumedRun, find_run, restage_plan
from tasks.batch.run_records import confirm_plan
from tasks.batch.run_request import resolve_request
from tasks.batch.run_tables import check_table_has_run, check_table_takes_run
from tasks.batch.score import Scorer
from tasks.batch.scoring_result import ScoringResult, check_rejects
from tasks.batch.tuning import forget_slow_tuning
from tasks.common.artifacts import Logger
from tasks.common.blocks import Addresses, open_addresses
from tasks.common.names import name_batch_run
from tasks.common.server_checks import check_servers, list_checks
from tasks.spot.notice_poller import poll_notices
from tasks.storage import Address, SourceAddress, Storage, as_texts, check_create_only, open_storage

_DEFAULTS = BatchOptions()
_PASSES_MAX, _FOREIGN_SHOWN = 3, 3


@adhoc_flow(
    "batch-inference", run_name=lambda parameters: name_batch_run(parameters["model"], parameters["destination"])
)
def batch_inference(
    model: str, source: SourceAddress, destination: Address, options: BatchOptions = _DEFAULTS
) -> BatchReport:
    """Score every row of a dataset with a registered model, and publish the predictions in one commit.

    The same call made again over the same model and files is the same run: it resumes, or finds itself complete.
    Every input row is in the output, with predictions or with the reason why not.

    Args:
        model: models:/NAME@ALIAS or models:/NAME/VERSION, resolved once; block:REGISTRY/NAME@ALIAS for one of a block.
        source: A file, folder, glob or prefix (s3://, gs://, az://) of Parquet, Arrow IPC, CSV or JSON lines; a Delta
            table; an Iceberg table as iceberg:CATALOG.NAMESPACE.TABLE; an Overnight destination; or block:NAME. Text
            may be compressed. From Python also a list of files, folders and globs.
        destination: A folder or prefix outside the source, or block:NAME.
        options: Keys, casts, sizes and limits; each has a default.

    Returns:
        What this call scored, and what the run came to.

    Raises:
        OvernightError: One of its kinds (serving.errors), each named for what to do next.
    """
    sources, to = as_texts(source), str(destination)
    first_worker = options.joins or (flow_run_id() if options.workers > 1 else None)
    call = RunCall(
        model=model,
        source=sources if isinstance(sources, str) else ", ".join(sources),
        destination=to,
        first_worker=str(first_worker) if first_worker else None,
    )
    logger = find_logger()
    with (
        emit_refusal(call),
        record_call(call, options, logger) as record,
        withhold_values(options.disclose),
        open_addresses(model, sources, to, logger) as addresses,
    ):
        if addresses != Addresses(model=model, source=sources, destination=to):
            # What blocks name was not asked for an answer before, as the rest was.
            check_servers(list_checks(asdict(addresses), uses_registry=True))
        return _infer(addresses, options, call, record, logger)


def _infer(
    addresses: Addresses, options: BatchOptions, call: RunCall, record: CallRecord, logger: Logger
) -> BatchReport:
    """Go through the steps of a run, from its addresses to its report.

    `call` gets what becomes known of the run, and `record` what is done.
    """
    steps = Steps(observe=record.metrics.note_step, guard=partial(withhold_values, options.disclose))
    check_runner(options)
    check_workers(addresses.source, addresses.destination, options)
    storage, this = open_storage(addresses.destination), flow_run_id()

    request = steps.run(
        "resolve",
        lambda: (
            find_start(storage, this, options.joins)
            or resolve_request(addresses.model, addresses.source, storage.url, options)
        ),
    )
    run = steps.run("plan", lambda: find_run(request, storage, this, measure=steps.measure_apart))
    _name_run(run.plan, storage, call, logger)
    record.begin(run.plan, storage, logger, is_complete=isinstance(run, CompleteRun))
    if isinstance(run, CompleteRun):
        return _report_complete(run, storage, options, steps, logger)
    plan = _prepare(run, storage, logger)
    gate = open_gate(plan, storage, options, steps, logger)
    start_workers(options, logger)

    loaded, challengers = steps.run(
        "load",
        lambda: (
            load_planned_model(plan, run.resolved, options),
            load_planned_challengers(plan, options, storage),
        ),
    )
    slots = choose_slots(options, loaded)
    memory = check_memory(plan, slots, options, [loaded, *challengers])
    _log_plan(plan, slots, memory, logger)

    scorer = Scorer(
        plan=plan,
        destination=storage,
        model=loaded,
        challengers=challengers,
        max_reject_fraction=options.max_reject_fraction,
        joined=is_beside_another(options),
        disclose=options.disclose,
        observe=record.note_scored,
    )
    watch = ProgressWatch(plan.rows, lambda: record.note_progress(count_done(storage, plan)), logger)
    record_start(plan, storage.url, logger)
    with report_failure(lambda end, why: record_failure(plan, storage.url, options.experiment, end, why, logger)):
        scoring = steps.run("score", lambda: _score(scorer, slots, options, watch, logger))
        if isinstance(scoring, _Interrupted):
            record.note_interruption(scorer.drain)
            _exit_interrupted(scorer, scoring, watch, logger)
        parts = scoring.parts
        keys = _check_keys(plan, storage, parts, options, steps, logger)
        findings = gate.pass_run(parts) if gate else ()
        manifest = steps.run(
            "publish",
            lambda: (
                parts if isinstance(parts, Manifest) else _publish(plan, storage, parts, scoring.challengers, options)
            ),
        )

    if slower := forget_slow_tuning(plan, scoring.result):
        logger.info("This run made %s: the next one measures again.", slower)
    report = report_scored(
        *(plan, storage, scoring.result, manifest),
        slots=slots,
        memory=memory,
        seconds=steps.seconds,
    )
    report = _withhold(report, options)
    report = report.model_copy(update={"findings": findings, "keys_doubled": keys.doubled if keys else None})
    watch.show()
    report = _compare(plan, storage, report, options, steps, logger)
    report = steps.run("report", lambda: _record(plan, storage, manifest, report, watch.samples, options, logger))
    describe_span({"overnight.rows_scored": report.rows_scored, "overnight.rows_rejected": report.rows_rejected})
    logger.info("Run %s is complete: %s rows, %s rejects.", plan.run, f"{report.rows:,}", f"{report.rows_rejected:,}")
    return report.model_copy(update={"seconds": steps.seconds})


def _name_run(plan: Plan, storage: Storage, call: RunCall, logger: Logger) -> None:
    """Name flow run and events after the resolved run: the model's version, and where the predictions go."""
    provisional = name_batch_run(call.model, call.destination)
    rename_flow_run(name_batch_run(plan.model.uri, storage.url), provisional, logger)
    describe_run_span(plan, storage)
    call.key, call.model, call.source, call.destination = plan.key, plan.model.uri, plan.source.title, storage.url


@dataclass(frozen=True, slots=True, kw_only=True)
class _AllScored:
    """Every part of the run is there: this worker has read all footers, or another has published the run."""

    result: ScoringResult
    parts: Audit | Manifest
    challengers: dict[int, Audit] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Interrupted:
    """A notice has ended scoring before every part was there."""

    result: ScoringResult


def _score(
    scorer: Scorer, slots: int, options: BatchOptions, watch: ProgressWatch, logger: Logger
) -> _AllScored | _Interrupted:
    """Score what is missing until every part is whole, or a notice ends it; an unreadable part is scored again."""
    plan, storage, result = scorer.plan, scorer.destination, ScoringResult()
    for _ in range(_PASSES_MAX):
        try:
            with watch.watching(), poll_notices(scorer.drain, options.notices, logger.warning):
                result.add(score_missing(scorer, slots, options))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_describe_interrupt(plan, watch)) from None
        except TerminationSignal:
            logger.warning(_describe_interrupt(plan, watch))
            raise
        if scorer.drain.notice is not None and watch.rows_done < plan.rows:
            return _Interrupted(result=result)
        # Another worker may have published the run meanwhile, and deleted the staged copies that this one read.
        if result.faults and find_intact_manifest(storage, plan.run) is None:
            raise result.faults_error()
        if options.workers > 1 or options.joins is not None:
            published = wait_for_publisher(storage, plan, may_wait=lambda: scorer.drain.notice is None)
            if published is not None:
                return _AllScored(result=result, parts=published)
        audit, others = audit_parts(storage, plan), audit_challengers(storage, plan)
        result.rows_recomputed += audit.rows_set_aside
        if lost := [part_path(plan, chunk) for chunk in audit.missing if chunk in plan.reused_parts]:
            logger.warning(
                "%s parts that earlier runs had made are gone or damaged by now, the first %s; they are scored again.",
                *(len(lost), lost[0]),
            )
        if not audit.missing and not list_missing_chunks(others):
            break
    check_rows_add_up(plan, audit)
    rejects = Counter({(count.column, count.reason): count.rows for count in count_rejects(audit)})
    check_rejects(rejects, plan, options.max_reject_fraction, scorer.samples, options.disclose)
    return _AllScored(result=result, parts=audit, challengers=others)


def _publish(
    plan: Plan, storage: Storage, parts: Audit, challengers: dict[int, Audit], options: BatchOptions
) -> Manifest:
    """Commit a run. The list of its challengers' parts is there before the manifest is."""
    claim_source(storage, plan, options)
    # Little lies between this and the manifest: a cleaning may be taking the run for one that was given up.
    confirmed = confirm_plan(storage, plan)
    save_challenger_parts(storage, plan, challengers)
    return publish(storage, confirmed, parts)


def _compare(
    plan: Plan,
    storage: Storage,
    report: BatchReport,
    options: BatchOptions,
    steps: Steps,
    logger: Logger,
) -> BatchReport:
    """Return the report of a published run with its challengers beside its model; promote one where a rule holds."""
    if not plan.challengers:
        return report
    found = steps.run("compare", lambda: compare_published(storage, plan, options.promote_if))
    if found.promotion is not None:
        emit_promotion(plan, storage.url, found.promotion)
        say = logger.info if found.promotion.outcome == "promoted" else logger.warning
        say("%s, %s: %s", found.promotion.alias, found.promotion.outcome, found.promotion.why)
    return report.model_copy(update={"challengers": found.challengers, "promotion": found.promotion})


def _check_keys(
    plan: Plan, storage: Storage, parts: Audit | Manifest, options: BatchOptions, steps: Steps, logger: Logger
) -> KeyCheck | None:
    """Check the keys of a run that names key columns, unless another worker has published it. Raises KeysUnfit."""
    if isinstance(parts, Manifest) or not plan.options.key_columns or not options.check_keys:
        return None
    check = steps.run("check keys", lambda: check_run_keys(storage, plan, parts.footers))
    if check.doubled:
        check = check if options.disclose == "values" else replace(check, examples=())
        logger.warning("The keys of run %s do not name one row each: %s", plan.run, describe_doubled(check))
    return check


def _prepare(run: NewRun | ResumedRun, storage: Storage, logger: Logger) -> Plan:
    """Return the plan to score by, with its staged copies in place where parts of a published run were lost."""
    check_create_only(storage)
    if isinstance(run, ResumedRun):
        check_table_takes_run(storage, run.plan)
    if not run.plan.rows:
        put_empty_part(storage, run.plan)
    is_folder = isinstance(run, NewRun) and run.plan.options.output == "parquet"
    if is_folder and (foreign := list_foreign_files(storage)):
        logger.warning(
            "%s has files that are not Overnight's, such as %s: readers of the whole folder take them for predictions. "
            "open_predictions reads the run alone. A destination of its own is safer.",
            *(storage.url, ", ".join(foreign[:_FOREIGN_SHOWN])),
        )
    if isinstance(run, NewRun) or not run.damaged:
        return run.plan
    logger.warning(
        "Run %s was published, but %s of its parts are gone or cut short, the first %s; they are scored again.",
        *(run.plan.run, len(run.damaged), run.damaged[0]),
    )
    return restage_plan(run.plan, storage)


def _log_plan(plan: Plan, slots: int, memory: int, logger: Logger) -> None:
    logger.info(
        "Run %s: %s rows in %s chunks and %s shards, %s slots, batches of %s %s, %s; its data takes %s MiB at most.",
        *(plan.run, f"{plan.rows:,}", len(plan.chunks), len(plan.shards), slots),
        *(plan.batch_size, plan.batch_unit, plan.engine, memory >> 20),
    )
    for pin in plan.features:
        logger.info("%s", describe_features(pin))
    if plan.reused:
        logger.info(
            "%s of its rows are in parts that earlier runs have made of the same. %s",
            *(f"{plan.rows_reused:,}", f"The rest is scored: {plan.reuse_note}" if plan.reuse_note else ""),
        )


def _report_complete(
    run: CompleteRun, storage: Storage, options: BatchOptions, steps: Steps, logger: Logger
) -> BatchReport:
    plan = run.plan
    check_table_has_run(storage, plan)
    logger.info("Run %s is complete: %s rows. Nothing to score.", plan.run, f"{plan.rows:,}")
    newer = find_newer_run(storage, run.manifest) if plan.options.table_mode in (None, "replace") else None
    if newer is not None:
        logger.warning(
            "Readers of %s get run %s, which was planned after this one. If they are to get this model and source "
            "again, call with %s.",
            *(storage.url, newer, give_option("rescore", "a text of your own")),
        )
    report = _withhold(report_complete(run.manifest, plan, storage, steps.seconds), options)
    if storage.exists(page_path(plan)):
        if plan.challengers and (found := find_comparison(storage, plan)) is not None:
            report = report.model_copy(update={"challengers": found.challengers, "promotion": found.promotion})
        publish_complete(report, logger)
        return report
    # The call that published the run was ended before it could record it.
    report = _compare(plan, storage, report, options, steps, logger)
    return _record(plan, storage, run.manifest, report, [(0.0, plan.rows)], options, logger)


def _withhold(report: BatchReport, options: BatchOptions) -> BatchReport:
    """Return a report as it may leave the destination."""
    if options.disclose == "values":
        return report
    return report.model_copy(update={"rejects": shorten_counts(report.rejects)})


def _record(
    plan: Plan,
    storage: Storage,
    manifest: Manifest,
    report: BatchReport,
    samples: list[tuple[float, int]],
    options: BatchOptions,
    logger: Logger,
) -> BatchReport:
    """Write the lineage of a published run, then its page: a run that has its page is recorded. Then show it."""
    progress = draw_progress(report, samples)
    sample = find_sample(storage, manifest, plan, logger) if options.rows_shown else None
    distributions = draw_distributions(sample) if sample else None
    comparison = draw_comparison(report.model, report.challengers) if report.challengers else None
    pictures = {"how the predictions are distributed": distributions, "the model and its challengers": comparison}
    mlflow_run = record_lineage(plan, report, options.experiment, logger)
    report = report.model_copy(update={"mlflow_run": mlflow_run})
    try:
        save_page(storage, plan, report, progress, {what: picture for what, picture in pictures.items() if picture})
    except StorageFault as error:
        # The predictions are published, and stay so. A run without its page is recorded by the next call.
        logger.warning("Run %s is published, but its page could not be written: %s", plan.run, error)
    emit_published(plan, report)
    publish_artifacts(report, sample.list_rows(options.rows_shown) if sample else [], distributions, logger)
    if report.challengers:
        publish_comparison(report, comparison, logger)
    return report


def _describe_interrupt(plan: Plan, watch: ProgressWatch) -> str:
    done = f"{watch.rows_done:,} of {plan.rows:,} rows of run {plan.run}"
    return f"Interrupted: {done} are done and stay; the same call resumes."


def _exit_interrupted(scorer: Scorer, scoring: _Interrupted, watch: ProgressWatch, logger: Logger) -> NoReturn:
    """End the flow run as interrupted by a notice, with what is done and what is left."""
    watch.show()
    plan, rows_done, dropped = scorer.plan, watch.rows_done, scoring.result.chunks_dropped
    done = f"{rows_done:,} of {plan.rows:,} rows of run {plan.run} are done and stay"
    left = f"{plan.rows - rows_done:,} are left" + (f"; unfinished chunks dropped: {dropped}" if dropped else "")
    exit_interrupted(
        *(scorer.drain, f"{done}, {left}"),
        publish=lambda message: publish_interrupted(plan.run, rows_done, plan.rows, message, logger),
        logger=logger,
    )
