"""Streaming inference: a registered model over an unbounded stream, each message once, in micro-batches."""

from __future__ import annotations

from prefect import get_run_logger

from flows.runtime.flow_decorator import adhoc_flow
from flows.runtime.interruption import leave_with
from flows.runtime.stream_run import StreamRun, hearing
from serving.model.loading import load_model
from serving.model.registry import resolve_model
from tasks.spot.watch import watching
from tasks.stream.decode import Decoder
from tasks.stream.opener import ConnectionOpener, check_column_names
from tasks.stream.options import AnySink, AnySource, StreamOptions
from tasks.stream.report import StreamMetrics, StreamReport, publish_interruption, publish_report

_DEFAULTS = StreamOptions()


@adhoc_flow("stream-inference")
def stream_inference(model: str, source: AnySource, sink: AnySink, options: StreamOptions = _DEFAULTS) -> StreamReport:
    """Score every message of a stream with a registered model, and put each score out once.

    Args:
        model: models:/NAME@ALIAS or models:/NAME/VERSION, resolved once.
        source: FromNats or FromKafka: messages of one row as JSON, or of many as Arrow IPC.
        sink: ToNats, ToKafka or ToParts.
        options: Keys, casts, freshness, and when it ends; without any it never does by itself.

    It ends at a limit, when it is idle, on Ctrl-C and on notices; what was taken by then is scored and acknowledged,
    and the same call goes on behind it. kill -9 at any time: what was not acknowledged comes again, and is in the
    output once (with ToKafka at least once). What can't be scored goes to the dead letters with the reason. Raises
    OvernightError's kinds (serving.errors), each named for what to do next.
    """
    logger = get_run_logger()
    resolved = resolve_model(model)
    contract = resolved.contract(options.input_columns, options.policies)
    check_column_names(contract, options.key_columns, parts=sink.kind == "parts")
    loaded = load_model(resolved, contract, allow_pickle=options.allow_pickle)
    decoder = Decoder(contract, options.key_columns, fix_key_types=sink.kind == "parts")
    run = StreamRun(resolved=resolved, model=loaded, decoder=decoder, options=options)
    opener = ConnectionOpener(
        decoder=run.decoder, model=resolved.pin, options=options, say=logger.warning, give_up=run.give_up
    )
    with (
        watching(run.drain, options.notices, logger.warning),
        hearing(run, logger),
        opener.opened(source, sink) as ends,
    ):
        run.go(ends, logger)
    if run.left:
        leave_with(
            run.drain, _in_words(run.metrics), lambda words: publish_interruption(_name(source), words, logger), logger
        )
    report = _report(run, resolved.pin.uri, source, sink)
    publish_report(report, logger)
    logger.info("The stream has ended (%s): %s.", report.ended, _in_words(run.metrics))
    if run.interrupted:
        message = f"Interrupted: {_in_words(run.metrics)}; the same call goes on behind them."
        raise KeyboardInterrupt(message)
    return report


def _in_words(metrics: StreamMetrics) -> str:
    totals = metrics.totals
    return f"{totals.messages:,} messages ({totals.rows:,} rows) are done and acknowledged"


def _name(address: AnySource | AnySink) -> str:
    """Return an end in a word or two."""
    for field in ("stream", "subject", "topic", "destination"):
        if name := getattr(address, field, None):
            return f"{address.kind} {name}"
    return address.kind


def _report(run: StreamRun, model: str, source: AnySource, sink: AnySink) -> StreamReport:
    totals, dial = run.metrics.totals, run.dial()
    return StreamReport(
        ended=run.ended,
        model=model,
        source=_name(source),
        sink=_name(sink),
        messages=totals.messages,
        rows=totals.rows,
        rejects=totals.rejects,
        dead_letters=totals.dead_lettered,
        events_ahead=totals.events_ahead,
        seconds=run.seconds,
        latency_seconds_p50=run.metrics.latency(0.5),
        latency_seconds_p99=run.metrics.latency(0.99),
        lag=run.lag,
        rows_per_batch=dial.rows,
        wait_seconds=dial.wait_seconds,
        batch_seconds=run.dial.service().seconds(dial.rows),
        batch_size=run.setting.batch_size,
        slots=run.setting.slots,
        engine=str(run.setting.tuning.engine if run.setting.tuning else run.setting.model.engine),
    )
