"""A stream over a real NATS server: each message once, with the score of a batch run, and every end named."""

from __future__ import annotations

import time
import urllib.request
from collections import Counter
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import orjson
import polars as pl
import pytest

from infra.local.nats import NatsClient, NatsServer, nats_server
from infra.local.prefect_server import PrefectServer
from serving.errors import BrokerDenied, StreamUnfit, TooManyRejects
from tasks.batch.manifest import open_predictions
from tasks.batch.options import BatchOptions
from tasks.stream.decode import read_arrow
from tasks.stream.message import HEADER_COLUMN, HEADER_EVENT_TIME, HEADER_MODEL, HEADER_REASON, HEADER_SOURCE
from tasks.stream.options import FromNats, StreamOptions, ToNats, ToParts
from tasks.stream.report import StreamReport
from tests.eventually import eventually
from tests.flows.streams import OPTIONS, as_arrow, as_json, count_customers, customers, fill_stream, source_and_sink

ROWS = 2_000

pytestmark = pytest.mark.usefixtures("prefect")


def stream(model: str, source: FromNats, sink: Any, options: StreamOptions = OPTIONS) -> StreamReport:
    from flows.stream import stream_inference

    return stream_inference(model, source, sink, options)


@pytest.fixture(scope="module")
def batch_scores(linear: str, prefect: PrefectServer, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """What a batch run over the same customers gives each."""
    from flows.batch import batch_inference

    folder = tmp_path_factory.mktemp("batch")
    customers(ROWS).write_parquet(folder / "customers.parquet")
    batch_inference(
        linear,
        str(folder / "customers.parquet"),
        str(folder / "out"),
        BatchOptions(key_columns=("customer",), batch_size=64, experiment=None),
    )
    table = open_predictions(str(folder / "out")).collect()
    return dict(zip(table["customer"], table["score"], strict=True))


@pytest.mark.whole
def test_one_row_gives_one_score_in_batch_and_stream(
    linear: str, nats: NatsServer, nats_client: NatsClient, fresh: str, batch_scores: dict[int, float]
) -> None:
    table = customers(ROWS)
    fill_stream(nats_client, fresh, [*as_json(table[:1000]), *as_arrow(table[1000:], 150)])
    report = stream(linear, *source_and_sink(nats, fresh))
    stored = nats_client.read(f"{fresh}-scores")
    found: dict[int, float] = {}
    for each in stored:
        rows = read_arrow(each.payload).to_pylist() if each.payload[:1] == b"\xff" else [orjson.loads(each.payload)]
        found |= {row["customer"]: row["score"] for row in rows}

    assert (1007, ROWS, 0, "idle") == (report.messages, report.rows, report.rejects, report.ended)
    assert 1007 == len(stored) == len({each.headers["Nats-Msg-Id"] for each in stored})
    assert {"linear/1"} == {each.headers[HEADER_MODEL] for each in stored}
    # Passes of other rows differ in the last bits.
    assert batch_scores == pytest.approx(found, rel=1e-5, abs=1e-6)


def test_the_same_call_continues_after_what_is_done(
    linear: str, nats: NatsServer, nats_client: NatsClient, fresh: str
) -> None:
    fill_stream(nats_client, fresh, as_json(customers(300)))
    first = stream(linear, *source_and_sink(nats, fresh), OPTIONS.model_copy(update={"limit": 120}))
    second = stream(linear, *source_and_sink(nats, fresh))

    assert ("limit", 120, "idle", 180) == (first.ended, first.messages, second.ended, second.messages)
    assert Counter(range(300)) == count_customers([each.payload for each in nats_client.read(f"{fresh}-scores")])


def test_poison_goes_to_the_dead_letters_with_its_reason_and_does_not_come_again(
    linear: str, nats: NatsServer, nats_client: NatsClient, fresh: str
) -> None:
    events = as_json(customers(50))
    events[10], events[20] = b"not json", b'{"customer": 20, "a": "x", "b": 1, "c": 1}'
    fill_stream(nats_client, fresh, events)
    source, sink = source_and_sink(nats, fresh)
    report = stream(linear, source, sink)
    again = stream(linear, source, sink)
    dead = [each for each in nats_client.read("OVERNIGHT_DEAD") if each.subject == source.dead_letter_subject]

    assert (50, 2, 0) == (report.messages, report.dead_letters, again.messages)
    assert Counter(set(range(50)) - {10, 20}) == count_customers(
        [each.payload for each in nats_client.read(f"{fresh}-scores")]
    )
    assert [b"not json", events[20]] == [each.payload for each in dead]
    assert [f"{fresh}/11", f"{fresh}/21"] == [each.headers[HEADER_SOURCE] for each in dead]
    assert dead[0].headers[HEADER_REASON].startswith("JSON that does not parse: ")
    assert ("a", "text that does not parse as float32") == (
        dead[1].headers[HEADER_COLUMN],
        dead[1].headers[HEADER_REASON],
    )


def test_a_stream_fills_a_table_that_open_predictions_reads_and_resumes_after_it(
    linear: str, nats: NatsServer, nats_client: NatsClient, fresh: str, tmp_path: Path, batch_scores: dict[int, float]
) -> None:
    events = as_json(customers(ROWS))
    events.insert(7, b"not json")
    fill_stream(nats_client, fresh, events)
    table = ToParts(destination=str(tmp_path), rows_per_part=300, seconds_per_part=0.5)
    source, _ = source_and_sink(nats, fresh)
    first = stream(linear, source, table, OPTIONS.model_copy(update={"limit": 1000}))
    # The consumer's own state has no say in it.
    second = stream(linear, source.model_copy(update={"consumer": "another"}), table)
    found = open_predictions(str(tmp_path)).collect()
    scored = found.filter(pl.col("score").is_not_null())

    assert (1000, ROWS + 1 - 1000) == (first.messages, second.messages)
    assert list(range(1, ROWS + 2)) == found["source_number"].to_list()
    assert ["JSON that does not parse"] == found["reject_reason"].drop_nulls().to_list()
    assert batch_scores == pytest.approx(
        dict(zip(scored["customer"].cast(pl.Int64), scored["score"], strict=True)), rel=1e-5, abs=1e-6
    )


def test_an_event_ahead_of_the_clock_is_counted_and_changes_nothing_else(
    linear: str, nats: NatsServer, nats_client: NatsClient, fresh: str
) -> None:
    nats_client.make(fresh, f"{fresh}.in")
    times = [str(time.time() + ahead) for ahead in (-5, 0, 3600, 86_400)] + ["not a time"]
    nats_client.publish(f"{fresh}.in", as_json(customers(5)), [{HEADER_EVENT_TIME: at} for at in times])
    report = stream(linear, *source_and_sink(nats, fresh))

    assert (5, 2) == (report.messages, report.events_ahead)
    assert 4.5 <= report.latency_seconds_p99 < 3600


def test_metrics_and_artifacts_show_a_running_stream(
    linear: str, nats: NatsServer, nats_client: NatsClient, prefect: PrefectServer, fresh: str, held_port: int
) -> None:
    first, last = as_json(customers(201))[:200], as_json(customers(201))[200:]
    fill_stream(nats_client, fresh, first)
    shown = [f"overnight_stream_{name}" for name in ("messages_total 200.0", "rows_total 200.0", "lag_messages 0.0")]
    shown += [f"overnight_stream_{name}" for name in ("dead_letters_total 0.0", "latency_seconds_count 200.0")]
    shown.append('overnight_stream_batch_rows_bucket{le="256"}')

    def read_page() -> str:
        with suppress(OSError):
            return str(urllib.request.urlopen(f"http://127.0.0.1:{held_port}/metrics", timeout=5).read(), "utf-8")
        return ""

    def look_and_end() -> None:
        try:
            eventually(read_page, lambda page: all(line in page for line in shown))
        finally:
            nats_client.publish(f"{fresh}.in.a", last)

    # It goes on until one has looked.
    options = OPTIONS.model_copy(update={"metrics_port": held_port, "limit": 201, "idle_seconds": 240.0})
    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look_and_end)
        report = stream(linear, *source_and_sink(nats, fresh), options)
        looking.result()
    named = {"flows": {"name": {"any_": ["stream-inference"]}}}
    runs = httpx.post(f"{prefect.api_url}/flow_runs/filter", json=named).json()
    (run,) = (each["id"] for each in runs if each["parameters"]["source"]["stream"] == fresh)
    wanted = {"artifacts": {"flow_run_id": {"any_": [run]}}}
    artifacts = httpx.post(f"{prefect.api_url}/artifacts/filter", json=wanted).json()
    data = {artifact["key"]: artifact["data"] for artifact in artifacts}

    assert 100.0 == data["stream-progress"]
    assert "| messages | 201 |" in data["stream-report"]
    assert 0 < report.latency_seconds_p50 <= report.latency_seconds_p99


def test_batching_is_tuned_to_the_freshness_and_the_tuning_kept_with_the_model(
    nats: NatsServer, nats_client: NatsClient, fresh: str, registry: Path
) -> None:
    from serving.model.registry import resolve_model
    from tests.support import register_network

    model = register_network(fresh, seed=3)
    fill_stream(nats_client, fresh, as_json(customers(300)))
    options = StreamOptions(key_columns=("customer",), freshness_seconds=0.4, idle_seconds=0.5, notices="none")
    report = stream(model, *source_and_sink(nats, fresh), options)

    assert 300 == report.messages
    assert 0.1 == report.wait_seconds
    assert 1 <= report.rows_per_batch <= 1 << 16
    assert any(tag.startswith("overnight.tuning.") for tag in resolve_model(model).tags)


def test_a_server_that_is_absent_is_waited_for(
    linear: str, fresh: str, tmp_path: Path, held_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    source = FromNats(url=f"nats://127.0.0.1:{held_port}", stream=fresh)
    sink = ToNats(subject=f"{fresh}.scores", stream=f"{fresh}-scores")
    # The first flow of a process sets the levels of Prefect's loggers.
    caplog.set_level("INFO", logger="prefect.flow_runs")

    with nats_server(tmp_path, port=held_port) as server, NatsClient(server.url) as client:
        fill_stream(client, fresh, as_json(customers(30)))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(stream, linear, source, sink)
        try:
            eventually(lambda: "Waiting for it." in caplog.text)
        finally:
            with nats_server(tmp_path, port=held_port):
                report = running.result()

    assert 30 == report.messages


@contextmanager
def refused(kind: type[Exception], words: str) -> Generator[None]:
    with pytest.raises(kind, match=words):
        yield


def test_a_missing_stream_is_named_with_those_that_there_are(
    linear: str, nats: NatsServer, nats_client: NatsClient, fresh: str
) -> None:
    nats_client.make(fresh, f"{fresh}.in")
    with refused(StreamUnfit, f"The stream 'NOPE' must exist at nats://.*, which has .*'{fresh}'"):
        stream(linear, FromNats(url=nats.url, stream="NOPE"), ToNats(subject="x"))


def test_a_subject_that_is_none_of_the_streams_is_named(
    linear: str, nats: NatsServer, nats_client: NatsClient, fresh: str
) -> None:
    nats_client.make(fresh, f"{fresh}.in")
    source, sink = source_and_sink(nats, fresh, subject="elsewhere")

    with refused(StreamUnfit, f"The subject 'elsewhere' must be one of stream '{fresh}', which takes '{fresh}.in'"):
        stream(linear, source, sink)


def test_a_sink_that_no_stream_takes_is_named_with_the_command_that_makes_one(
    linear: str, nats: NatsServer, nats_client: NatsClient, fresh: str
) -> None:
    nats_client.make(fresh, f"{fresh}.in")
    source, _ = source_and_sink(nats, fresh)

    with refused(StreamUnfit, f"A stream must take the subject 'no.{fresh}' of the sink.*--dupe-window=600s"):
        stream(linear, source, ToNats(subject=f"no.{fresh}"))
    with refused(StreamUnfit, f"'{fresh}.in' of the sink must be one of stream 'other', but '{fresh}' takes it"):
        stream(linear, source, ToNats(subject=f"{fresh}.in", stream="other"))
    with refused(StreamUnfit, "The scores must not go into what the stream is read from"):
        nats_client.make(f"{fresh}-long", f"{fresh}-long.>", duplicate_window=600)
        stream(linear, FromNats(url=nats.url, stream=f"{fresh}-long"), ToNats(subject=f"{fresh}-long.scores"))


def test_a_sink_that_forgets_message_ids_too_early_is_refused(
    linear: str, nats: NatsServer, nats_client: NatsClient, fresh: str
) -> None:
    fill_stream(nats_client, fresh, as_json(customers(3)))
    nats_client.make(f"{fresh}-scores", f"{fresh}.scores", duplicate_window=59)
    source, sink = source_and_sink(nats, fresh, ack_wait_seconds=20, max_deliver=3)

    with refused(
        StreamUnfit, r"must remember the message ids of .* for at least 60 s.*got 59 s. Set --dupe-window=60s"
    ):
        stream(linear, source, sink)
    report = stream(linear, source.model_copy(update={"ack_wait_seconds": 19.0}), sink)

    assert 3 == report.messages


def test_a_consumer_with_other_settings_is_refused_and_the_differences_named(
    linear: str, nats: NatsServer, nats_client: NatsClient, fresh: str
) -> None:
    fill_stream(nats_client, fresh, as_json(customers(3)))
    source, sink = source_and_sink(nats, fresh)
    stream(linear, source, sink)
    changed = source.model_copy(update={"ack_wait_seconds": 10.0, "subject": f"{fresh}.in.*"})

    with refused(StreamUnfit, rf"ack_wait is 30.0, not 10.0; filter_subject is None, not {fresh}\.in\.\*\. Use those"):
        stream(linear, changed, sink)


def test_a_user_who_may_not_publish_gets_broker_denied(linear: str, fresh: str, tmp_path: Path) -> None:
    with nats_server(tmp_path, guarded=True) as server:
        with NatsClient(server.url, server.environment) as admin:
            fill_stream(admin, fresh, as_json(customers(3)))
            admin.make("OVERNIGHT_DEAD", "overnight.dead.>", duplicate_window=600)
            admin.make(f"{fresh}-scores", f"{fresh}.scores", duplicate_window=600)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in server.reader_environment.items():
                patch.setenv(name, value)
            with refused(BrokerDenied, r"must allow this user what the stream needs, got: .*[Pp]ermissions.*resumes\."):
                stream(linear, *source_and_sink(server, fresh))
            patch.setenv("NATS_PASSWORD", "wrong")
            with refused(BrokerDenied, r"must allow this user what the stream needs, got: .*[Aa]uthorization"):
                stream(linear, *source_and_sink(server, fresh))


def test_a_score_or_a_dead_letter_above_the_size_limit_does_not_stop_the_rest(
    linear: str, fresh: str, tmp_path: Path
) -> None:
    limit = 4096
    with nats_server(tmp_path, max_payload=limit) as server, NatsClient(server.url) as client:
        wide = customers(40).with_columns(customer=pl.lit("x" * 90))
        large = as_arrow(wide, 40)[0]
        assert len(large) > limit
        events = [*as_json(customers(2)), b"[" + b"1" * (limit - 2) + b"]", *as_json(customers(3)[2:])]
        fill_stream(client, fresh, events)
        report = stream(linear, *source_and_sink(server, fresh))
        (dead,) = client.read("OVERNIGHT_DEAD")

        assert (4, 1) == (report.messages, report.dead_letters)
        assert b"" == dead.payload
        assert "too large to go along" in dead.headers["Overnight-Original"]
        assert Counter(range(3)) == count_customers([each.payload for each in client.read(f"{fresh}-scores")])


def test_a_score_that_its_stream_does_not_take_goes_to_the_dead_letters(
    linear: str, nats: NatsServer, nats_client: NatsClient, fresh: str
) -> None:
    fill_stream(nats_client, fresh, [*as_json(customers(2)), *as_arrow(customers(102)[2:], 100)])
    nats_client.make(f"{fresh}-scores", f"{fresh}.scores", duplicate_window=600, max_msg_size=500)
    source, sink = source_and_sink(nats, fresh)
    report = stream(linear, source, sink)
    dead = [each for each in nats_client.read("OVERNIGHT_DEAD") if each.subject == source.dead_letter_subject]

    assert (3, 1) == (report.messages, report.dead_letters)
    assert ["a score that is too large"] == [each.headers[HEADER_REASON].split(":")[0] for each in dead]
    assert 2 == nats_client.info(f"{fresh}-scores").state.messages


def test_a_model_that_fails_on_everything_ends_the_stream_and_nothing_is_lost(
    failing: str, nats: NatsServer, nats_client: NatsClient, fresh: str
) -> None:
    fill_stream(nats_client, fresh, as_json(customers(60)))
    source, sink = source_and_sink(nats, fresh)
    options = OPTIONS.model_copy(update={"poison_in_a_row": 50, "rows_per_batch": 20})

    with pytest.raises(TooManyRejects, match=r"50 messages in a row.*no row is good enough"):
        stream(failing, source, sink, options)
    dead = [each for each in nats_client.read("OVERNIGHT_DEAD") if each.subject == source.dead_letter_subject]

    assert 50 <= len(dead) <= 60
