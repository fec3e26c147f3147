"""Scorers and servers that are killed in the middle: each message is in the output once; ends that drain."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections import Counter
from pathlib import Path

import orjson
import pytest

from infra.local.nats import NatsClient, NatsServer, Stored, nats_server
from tasks.batch.manifest import open_predictions
from tasks.stream.options import FromNats, ToParts
from tests.eventually import eventually
from tests.flows.streams import (
    OPTIONS,
    as_json,
    count_customers,
    customers,
    fill_stream,
    kill,
    kill_server,
    source_and_sink,
    start,
)
from tests.support import register_script

ROWS = 6_000
# A message that a kill leaves behind comes again after a second.
AGAIN = {"ack_wait_seconds": 1.0, "max_deliver": 60}
SLOW = OPTIONS.model_copy(update={"rows_per_batch": 40, "in_flight": 400, "idle_seconds": 2.5})

pytestmark = pytest.mark.usefixtures("prefect")


def test_scorers_and_the_server_are_killed_and_each_message_is_scored_once(
    sleepy: str, fresh: str, tmp_path: Path
) -> None:
    random.seed(5)
    server = nats_server(tmp_path / "nats")
    with NatsClient(server.url) as client:
        events = as_json(customers(ROWS))
        events[::500] = [b"not json"] * len(events[::500])
        fill_stream(client, fresh, events)
        source, sink = source_and_sink(server, fresh, **AGAIN)
        done = 0
        for at in range(2):
            scorer = start(sleepy, source, sink, SLOW, tmp_path / "log")
            eventually(lambda: scores(client, fresh), lambda seen, before=done: seen > before, process=scorer)
            if at == 1:
                kill_server(server)
                time.sleep(random.uniform(0, 0.3))
                server.stop()
                server = nats_server(tmp_path / "nats", port=server.port)
                eventually(lambda: scores(client, fresh), lambda seen, before=done: seen > before + 200, process=scorer)
            kill(scorer)
            done = scores(client, fresh)
        assert done < ROWS
        last = start(sleepy, source, sink, SLOW, tmp_path / "log")
        assert last.wait(200) == 0, (tmp_path / "log").read_text()[-3000:]

        assert Counter(set(range(ROWS)) - set(range(0, ROWS, 500))) == count_customers(
            [each.payload for each in client.read(f"{fresh}-scores")]
        )
        assert ROWS // 500 == client.info("OVERNIGHT_DEAD").state.messages
    server.stop()


def scores(client: NatsClient, name: str) -> int:
    """How many scores there are; none where the stream of them is not made yet."""
    from nats.js.errors import Error

    try:
        return client.info(f"{name}-scores").state.messages
    except Error:
        return 0


@pytest.mark.machines
def test_a_scorer_that_comes_back_after_the_window_of_its_output_doubles_nothing(
    sleepy: str, nats: NatsServer, nats_client: NatsClient, fresh: str, tmp_path: Path
) -> None:
    fill_stream(nats_client, fresh, as_json(customers(2_000)))
    source, sink = source_and_sink(nats, fresh, ack_wait_seconds=1.0, max_deliver=3)
    nats_client.make(f"{fresh}-scores", f"{fresh}.scores", duplicate_window=3)
    scorer = start(sleepy, source, sink, SLOW, tmp_path / "log")
    eventually(lambda: scores(nats_client, fresh), lambda seen: seen > 200, process=scorer)
    kill(scorer)
    # Scores that went out, and of which no acknowledgement came back.
    state = nats_client.call(nats_client.js.consumer_info(fresh, "overnight"))
    done = scores(nats_client, fresh)
    lost = state.ack_floor.stream_seq + 1
    if done < lost:
        payload = as_json(customers(lost))[-1]
        origin = nats_client.read(f"{fresh}-scores")[0].headers["Nats-Msg-Id"].rpartition(".")[0]
        nats_client.publish(f"{fresh}.scores", [payload], [{"Nats-Msg-Id": f"{origin}.{lost}"}])
    time.sleep(4)
    last = start(sleepy, source, sink, SLOW, tmp_path / "log")
    assert last.wait(200) == 0, (tmp_path / "log").read_text()[-3000:]

    assert state.num_ack_pending
    scored = count_customers([each.payload for each in nats_client.read(f"{fresh}-scores")])
    # A machine that leaves a scorer no time to say what it works on may use up three deliveries of a second each.
    dead_lettered = count_customers([each.payload for each in dead_letters(nats_client, source)])
    assert Counter(range(2_000)) == scored + dead_lettered
    assert scored.total() > 1_500


def dead_letters(client: NatsClient, source: FromNats) -> list[Stored]:
    return [each for each in client.read("OVERNIGHT_DEAD") if each.subject == source.dead_letter_subject]


@pytest.mark.machines
def test_a_table_is_exact_over_kills_of_its_scorers(
    doubling: str, nats: NatsServer, nats_client: NatsClient, fresh: str, tmp_path: Path
) -> None:
    fill_stream(nats_client, fresh, as_json(customers(ROWS)))
    source = FromNats(url=nats.url, stream=fresh)
    table = ToParts(destination=str(tmp_path / "table"), rows_per_part=97, seconds_per_part=0.2)
    for parts in (5, 20):
        scorer = start(doubling, source, table, SLOW, tmp_path / "log")
        eventually(
            lambda: len(list(tmp_path.glob("table/run=*/*.parquet"))),
            lambda seen, parts=parts: seen >= parts,
            process=scorer,
        )
        kill(scorer)
    before = open_predictions(str(tmp_path / "table")).collect().height
    both = [start(doubling, source, table, SLOW, tmp_path / "log") for _ in range(2)]
    codes = [scorer.wait(200) for scorer in both]
    found = open_predictions(str(tmp_path / "table")).collect()

    assert [0, 0] == codes, (tmp_path / "log").read_text()[-3000:]
    assert 97 * 4 <= before < ROWS
    assert list(range(1, ROWS + 1)) == found["source_number"].to_list()
    assert [str(at) for at in range(ROWS)] == found["customer"].to_list()


def test_sigterm_drains_the_taken_messages_and_the_same_call_continues(
    sleepy: str, nats: NatsServer, nats_client: NatsClient, fresh: str, tmp_path: Path
) -> None:
    fill_stream(nats_client, fresh, as_json(customers(3_000)))
    source, sink = source_and_sink(nats, fresh)
    scorer = start(sleepy, source, sink, OPTIONS.model_copy(update={"rows_per_batch": 50}), tmp_path / "log")
    eventually(lambda: scores(nats_client, fresh), lambda seen: seen > 100, process=scorer)
    scorer.send_signal(signal.SIGTERM)
    code = scorer.wait(200)
    left = scores(nats_client, fresh)
    state = nats_client.call(nats_client.js.consumer_info(fresh, "overnight"))
    log = (tmp_path / "log").read_text()

    assert code != 0
    assert 100 < left < 3_000
    assert f"Interrupted by SIGTERM: {left:,} messages ({left:,} rows) are done and acknowledged" in log
    # Whatever was taken and not scored was given back: nobody waits for it.
    assert left == state.ack_floor.stream_seq
    assert count_customers([each.payload for each in nats_client.read(f"{fresh}-scores")]) == Counter(range(left))


@pytest.mark.machines
def test_ctrl_c_drains_too_and_reports_what_is_done(
    sleepy: str, nats: NatsServer, nats_client: NatsClient, fresh: str, tmp_path: Path
) -> None:
    fill_stream(nats_client, fresh, as_json(customers(3_000)))
    source, sink = source_and_sink(nats, fresh)
    scorer = start(sleepy, source, sink, OPTIONS.model_copy(update={"rows_per_batch": 50}), tmp_path / "log")
    eventually(lambda: scores(nats_client, fresh), lambda seen: seen > 100, process=scorer)
    os.kill(scorer.pid, signal.SIGINT)
    scorer.wait(200)
    left = scores(nats_client, fresh)

    assert f"KeyboardInterrupt: Interrupted: {left:,} messages" in (tmp_path / "log").read_text()
    assert left == nats_client.call(nats_client.js.consumer_info(fresh, "overnight")).ack_floor.stream_seq


@pytest.mark.machines
def test_a_message_that_ends_the_scorer_is_among_the_dead_letters_in_the_end_and_its_neighbours_are_scored(
    deadly: str, nats: NatsServer, nats_client: NatsClient, fresh: str, tmp_path: Path
) -> None:
    events = as_json(customers(30))
    events[7] = b'{"customer": 7, "a": 666}'
    fill_stream(nats_client, fresh, events)
    source, sink = source_and_sink(nats, fresh, ack_wait_seconds=5.0, max_deliver=5)
    codes = []
    while not codes or codes[-1] != 0:
        assert len(codes) < 15
        codes.append(
            start(deadly, source, sink, OPTIONS.model_copy(update={"idle_seconds": 8}), tmp_path / "log").wait(200)
        )
    dead = dead_letters(nats_client, source)

    scored = count_customers([each.payload for each in nats_client.read(f"{fresh}-scores")])
    dead_lettered = count_customers([each.payload for each in dead])

    assert 1 == dead_lettered[7]
    (reason,) = [each.headers["Overnight-Reason"] for each in dead if orjson.loads(each.payload)["customer"] == 7]
    came = re.fullmatch(r"a message that was never finished: it came (\d+) times: .*", reason)
    assert came is not None, reason
    # Each scorer that it ended was one of its deliveries; a busy machine may use up more of them.
    assert 1 <= len(codes) - 1 < 5 <= int(came[1])
    assert Counter([7]) == dead_lettered
    assert Counter(range(30)) == scored + dead_lettered


@pytest.mark.machines
def test_an_outage_of_what_the_model_calls_uses_up_no_deliveries_of_good_messages(
    registry: Path, nats: NatsServer, nats_client: NatsClient, fresh: str, tmp_path: Path
) -> None:
    answers = tmp_path / "answers"
    line = f"if not __import__('os').path.exists({str(answers)!r}): raise ConnectionRefusedError('nobody listens')"
    model = register_script("calling", line)
    fill_stream(nats_client, fresh, as_json(customers(200)))
    source, sink = source_and_sink(nats, fresh, ack_wait_seconds=1.0, max_deliver=3)
    both = [start(model, source, sink, SLOW, tmp_path / "log") for _ in range(2)]
    eventually(lambda: count_in_flight(nats_client, fresh), lambda seen: seen == 200, process=both[0])
    # Twice as long as all deliveries would take.
    time.sleep(6)
    during = scores(nats_client, fresh), count_in_flight(nats_client, fresh)
    answers.touch()
    codes = [each.wait(200) for each in both]

    assert (0, 200) == during
    assert [0, 0] == codes, (tmp_path / "log").read_text()[-3000:]
    assert Counter(range(200)) == count_customers([each.payload for each in nats_client.read(f"{fresh}-scores")])
    assert [] == dead_letters(nats_client, source)
    assert 0 == count_in_flight(nats_client, fresh)


def count_in_flight(client: NatsClient, name: str) -> int:
    """Return how many messages are in flight; none where there is no consumer yet."""
    from nats.js.errors import Error

    try:
        return client.call(client.js.consumer_info(name, "overnight")).num_ack_pending or 0
    except Error:
        return 0
