"""Streaming inference: a registered model over an unbounded stream, each message once, in micro-batches."""

from __future__ import annotations

from flows.runtime.flow_decorator import adhoc_flow
from flows.runtime.interruption import exit_interrupted
from flows.runtime.names import rename_flow_run
from flows.runtime.steps import find_logger
from flows.runtime.stream_run import StreamRun, handle_early_sigterm
from serving.extras import import_extra
from serving.model.loading import load_model
from serving.model.registry import resolve_model
from tasks.common.blocks import keep_own_variables
from tasks.common.names import describe_model, find_last_folder, shorten_name
from tasks.spot.notice_poller import poll_notices
from tasks.stream.decode import Decoder
from tasks.stream.options import AnySink, AnySource, StreamOptions
from tasks.stream.report import StreamMetrics, StreamReport, publish_report

_DEFAULTS = StreamOptions()


def _name_run(model: str, source: AnySource, sink: AnySink) -> str:
    """Return the name of a stream's flow run: churn v3: EVENTS → PREDICTIONS."""
    ends = f"{find_last_folder(_find_place(source))} → {find_last_folder(_find_place(sink))}"
    return shorten_name(f"{describe_model(model)}: {ends}")


@adhoc_flow(
    "stream-inference",
    run_name=lambda parameters: _name_run(parameters["model"], parameters["source"], parameters["sink"]),
)
def stream_inference(model: str, source: AnySource, sink: AnySink, options: StreamOptions = _DEFAULTS) -> StreamReport:
    """Score every message of a stream with a registered model, and emit each score once.

    It ends at a limit, when it is idle, on Ctrl-C and on notices of an interruption. Messages taken by then are scored
    and acknowledged, and the same call continues after them. After kill -9, messages that were not acknowledged are
    delivered again, and their scores are there once (with ToKafka at least once). Messages that can't be scored go to
    the dead letters with the reason.

    Args:
        model: models:/NAME@ALIAS or models:/NAME/VERSION, resolved once.
        source: FromNats or FromKafka: messages of one row as JSON, or of many as Arrow IPC.
        sink: ToNats, ToKafka or ToParts.
        options: Keys, casts, freshness, and when it ends; by default it never does by itself.

    Returns:
        What was done, and how fast.

    Raises:
        OvernightError: Its kinds, in serving.errors, are named for what to do next.
    """
    logger = find_logger()
    opening = import_extra("tasks.stream.opener", "stream")
    with keep_own_variables(logger):
        resolved = resolve_model(model)
        rename_flow_run(_name_run(resolved.pin.uri, source, sink), _name_run(model, source, sink), logger)
        contract = resolved.contract(options.input_columns, options.policies, options.params)
        opening.check_column_names(contract, options.key_columns, parts=sink.kind == "parts")
        loaded = load_model(resolved, contract, allow_pickle=options.allow_pickle)
    decoder = Decoder(contract, options.key_columns, fix_key_types=sink.kind == "parts")
    run = StreamRun(resolved=resolved, model=loaded, decoder=decoder, options=options)
    opener = opening.ConnectionOpener(
        decoder=decoder, model=resolved.pin, options=options, warn=logger.warning, give_up=run.give_up
    )
    with (
        poll_notices(run.drain, options.notices, logger.warning),
        handle_early_sigterm(run, logger),
        opener.open(source, sink) as connections,
    ):
        run.run(connections, logger)
    done, name = _describe_done(run.metrics), _name_connection(source)
    if run.ended_by_notice:
        exit_interrupted(
            run.drain, done, lambda words: publish_report(name, f"# Stream {name}\n\n{words}\n", logger), logger
        )
    report = _build_report(run, resolved.pin.uri, source, sink)
    publish_report(name, report.markdown(), logger)
    logger.info("The stream has ended (%s): %s.", report.ended, done)
    if run.interrupted:
        message = f"Interrupted: {done}; the same call continues after them."
        raise KeyboardInterrupt(message)
    return report


def _describe_done(metrics: StreamMetrics) -> str:
    totals = metrics.totals
    return f"{totals.messages:,} messages ({totals.rows:,} rows) are done and acknowledged"


def _name_connection(address: AnySource | AnySink) -> str:
    """Return a source or a sink in two words."""
    return f"{address.kind} {place}" if (place := _find_place(address)) else address.kind


def _find_place(address: AnySource | AnySink) -> str:
    """Return the stream, topic or folder of a source or a sink."""
    names = (getattr(address, field, None) for field in ("stream", "subject", "topic", "destination"))
    return next((str(name) for name in names if name), "")


def _build_report(run: StreamRun, model: str, source: AnySource, sink: AnySink) -> StreamReport:
    totals, config, settings = run.metrics.totals, run.batching(), run.settings
    return StreamReport(
        ended=run.ended,
        model=model,
        source=_name_connection(source),
        sink=_name_connection(sink),
        messages=totals.messages,
        rows=totals.rows,
        rejects=totals.rejects,
        dead_letters=totals.dead_lettered,
        events_ahead=totals.events_ahead,
        seconds=run.seconds,
        latency_seconds_p50=run.metrics.latency(0.5),
        latency_seconds_p99=run.metrics.latency(0.99),
        lag=run.lag,
        rows_per_batch=config.batch_size_max,
        wait_seconds=config.wait_seconds_max,
        batch_seconds=run.batching.fit_cost().seconds(config.batch_size_max),
        batch_size=settings.batch_size,
        slots=settings.slots,
        engine=str(settings.tuning.engine if settings.tuning else settings.model.engine),
    )
