"""The stream in motion: order, bounds, ends, and what one failing thread does to the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import orjson
import pytest

from serving.errors import StorageFull, TooManyRejects
from serving.model.batching import BatchingConfig
from tasks.stream.batcher import StreamLimits
from tasks.stream.connections import Connections, EmitPolicy
from tasks.stream.message import Message, Poison
from tasks.stream.pipeline import Pipeline
from tasks.stream.report import StreamMetrics
from tasks.stream.score import MicroScorer, ScoredBatch, build_answers
from tests.tasks.stream.messages import CONTRACT, KEYS, Clock, decoder, json_row, message, model


@dataclass
class Memory:
    """A source, a sink and dead letters in memory, which keep what they are told."""

    waiting: list[Message]
    emitted: list[Any] = field(default_factory=list)
    batches: list[list[int]] = field(default_factory=list)
    done: list[int] = field(default_factory=list)
    dead_lettered: list[tuple[int, str]] = field(default_factory=list)
    fetched: int = 0
    slow: Callable[[], Any] = lambda: None

    def fetch(self, messages_max: int, messages_min: int, seconds: float) -> list[Message]:
        until = time.monotonic() + seconds
        while len(self.waiting) < messages_min and time.monotonic() < until:
            time.sleep(0.005)
        got, self.waiting = self.waiting[:messages_max], self.waiting[messages_max:]
        self.fetched += len(got)
        return [replace(each, arrived=time.monotonic()) for each in got]

    def acknowledge(self, done: Sequence[Message], dead_lettered: Sequence[Message]) -> None:
        self.done += [each.position.number for each in (*done, *dead_lettered)]

    def emit(self, scored: Sequence[ScoredBatch]) -> list[Poison]:
        self.slow()
        self.batches.append([each.position.number for batch in scored for each in batch.messages])
        self.emitted += [
            orjson.loads(a.payload)["id"] for batch in scored for a in build_answers(batch, CONTRACT, KEYS)
        ]
        return []

    def send(self, poison: Sequence[Poison]) -> None:
        self.dead_lettered += [(each.message.position.number, each.reason) for each in poison]


def rows(numbers: Iterable[int]) -> list[Message]:
    return [json_row(number) for number in numbers]


def pipeline(
    memory: Memory, *, batching: BatchingConfig | None = None, emit_policy: EmitPolicy | None = None, **limits: Any
) -> Pipeline:
    connections = Connections(
        source=memory,
        acknowledger=memory,
        sink=memory,
        dead_letters=memory,
        lag=lambda: len(memory.waiting),
        emit_policy=emit_policy or EmitPolicy(),
    )
    summing = model()
    return Pipeline(
        connections=connections,
        model=summing,
        scorer=lambda: MicroScorer(summing, CONTRACT, decoder(), 64, Clock()),
        batching=lambda: batching or BatchingConfig(batch_size_max=10, wait_ms_max=20),
        limits=StreamLimits(
            **{"in_flight": 1000, "in_flight_bytes": 32 << 20, "slots": 2, "idle_seconds": 0.3} | limits
        ),
        metrics=StreamMetrics(lag=lambda: None),
        is_stopping=lambda: False,
        give_up=threading.Event(),
    )


def run(made: Pipeline) -> Pipeline:
    made.start()
    assert made.wait(30)
    if made.error is not None:
        raise made.error
    return made


def test_every_message_is_emitted_once_in_order_and_acknowledged_after_it() -> None:
    memory = Memory(rows(range(200)))
    ended = run(pipeline(memory)).ended

    assert "idle" == ended
    assert list(range(200)) == memory.emitted == memory.done
    assert max(len(batch) for batch in memory.batches) <= 10


def test_it_ends_at_its_limit_to_the_message_and_leaves_the_rest() -> None:
    memory = Memory(rows(range(200)))
    ended = run(pipeline(memory, limit=55)).ended

    assert "limit" == ended
    assert list(range(55)) == memory.emitted == memory.done
    assert 55 == memory.fetched


def test_a_batch_is_not_waited_for_beyond_its_time() -> None:
    memory = Memory(rows(range(3)))
    run(pipeline(memory, batching=BatchingConfig(batch_size_max=1000, wait_ms_max=50)))

    assert [[0, 1, 2]] == memory.batches


def test_poison_is_dead_lettered_before_its_batch_is_acknowledged_and_the_rest_is_emitted() -> None:
    memory = Memory([json_row(1), message(b"no", 2), json_row(3, a=666), json_row(4)])
    memory.slow = lambda: memory.batches.append([len(memory.dead_lettered), len(memory.done)])
    made = run(pipeline(memory))

    assert [1, 4] == memory.emitted
    assert [2, 3] == [number for number, _ in memory.dead_lettered]
    assert [2, 0] == memory.batches[0]
    assert {1, 2, 3, 4} == set(memory.done)
    assert (4, 2) == (made.metrics.totals.messages, made.metrics.totals.dead_lettered)


def test_a_batch_whose_scoring_polars_ends_for_a_ctrl_c_is_scored_again() -> None:
    memory = Memory(rows(range(50)))
    made = pipeline(memory)
    interrupts = iter([1, 2, 3])
    summing = model()

    class Interrupted(MicroScorer):
        def score(self, messages: Sequence[Message]) -> ScoredBatch:
            if next(interrupts, None):
                raise KeyboardInterrupt
            return super().score(messages)

    made.scorer = lambda: Interrupted(summing, CONTRACT, decoder(), 64, Clock())
    run(made)

    assert next(interrupts, None) is None
    assert list(range(50)) == memory.emitted == memory.done


def test_a_batch_that_ctrl_c_ends_in_polars_is_left_where_no_time_is_left() -> None:
    memory = Memory(rows(range(50)))
    made = pipeline(memory)

    class Interrupted(MicroScorer):
        def score(self, messages: Sequence[Message]) -> ScoredBatch:
            made.give_up.set()
            raise KeyboardInterrupt

    summing = model()
    made.scorer = lambda: Interrupted(summing, CONTRACT, decoder(), 64, Clock())
    run(made)

    assert [] == memory.emitted == memory.done


def test_a_slow_sink_keeps_the_source_within_the_messages_in_flight() -> None:
    memory = Memory(rows(range(10_000)))
    let_go = threading.Event()
    memory.slow = lambda: let_go.wait(20)
    made = pipeline(memory, in_flight=40)
    made.start()
    time.sleep(0.5)
    held = memory.fetched
    time.sleep(0.3)

    assert held == memory.fetched <= 100
    let_go.set()
    assert made.wait(60)
    assert list(range(10_000)) == memory.emitted


def test_a_table_has_its_rows_by_so_many_or_when_the_first_is_old() -> None:
    memory = Memory(rows(range(35)))
    run(pipeline(memory, emit_policy=EmitPolicy(rows=20, seconds=0.2), idle_seconds=0.6))

    assert [20, 15] == [len(batch) for batch in memory.batches]


def test_a_sink_that_fails_ends_the_stream_with_its_error_and_nothing_is_acknowledged() -> None:
    memory = Memory(rows(range(50)))

    def full() -> None:
        message = "no space"
        raise StorageFull(message)

    memory.slow = full
    with pytest.raises(StorageFull):
        run(pipeline(memory))

    assert [] == memory.done


def test_a_stream_of_poison_alone_ends_with_the_reason_of_the_last() -> None:
    memory = Memory([message(b"no", number) for number in range(1000)])

    with pytest.raises(TooManyRejects, match=r"At least one of 40 messages in a row.*JSON that does not parse"):
        run(pipeline(memory, poison_in_a_row=40))

    assert 40 <= len(memory.dead_lettered) == len(memory.done) < 100


def test_a_message_on_its_last_delivery_is_dead_lettered_unscored_and_a_suspect_is_scored_alone() -> None:
    memory = Memory([json_row(1), json_row(2), json_row(3), json_row(4)])
    memory.waiting[1] = message(memory.waiting[1].payload, 2, deliveries=4)
    memory.waiting[3] = message(b'{"id": 4, "a": 666, "b": 1}', 4, deliveries=5)
    run(pipeline(memory, max_deliver=5))

    assert [1, 2, 3] == sorted(memory.emitted)
    assert [(4, "a message that was never finished")] == memory.dead_lettered
    assert [[1, 3], [2], [4]] == sorted(memory.batches)


def test_a_last_delivery_takes_none_with_it_that_comes_for_the_first_time() -> None:
    memory = Memory([json_row(1, deliveries=3), json_row(2), json_row(3, deliveries=2)])
    run(pipeline(memory, max_deliver=3))

    assert [2, 3] == sorted(memory.emitted)
    assert [1] == [number for number, _ in memory.dead_lettered]


def test_messages_on_their_last_delivery_are_dead_lettered_before_any_suspect_is_scored() -> None:
    memory = Memory([*rows(range(1, 4)), *(json_row(at, deliveries=at) for at in (4, 5, 9))])
    scored_before: list[list[int]] = []

    def send(poison: Sequence[Poison]) -> None:
        scored_before.append([each.message.position.number for each in poison] + memory.emitted)

    memory.send = send  # type: ignore[method-assign]
    run(pipeline(memory, max_deliver=5))

    assert [[5, 9]] == scored_before
    assert [1, 2, 3, 4] == sorted(memory.emitted)


def test_batches_that_wait_for_a_part_have_no_payloads() -> None:
    memory = Memory(rows(range(20)))
    held: list[ScoredBatch] = []
    made = pipeline(memory, emit_policy=EmitPolicy(rows=20, seconds=5.0))
    made.connections = replace(made.connections, compact=lambda scored: scored.compact(()), sink=memory)
    memory.emit = lambda scored: held.extend(scored) or []  # type: ignore[method-assign]
    run(made)

    assert 20 == sum(each.rows for each in held)
    assert {b""} == {message.payload for each in held for message in each.messages}
    assert list(range(20)) == memory.done


def test_an_emitted_message_on_its_last_delivery_is_acknowledged_and_no_dead_letter() -> None:
    memory = Memory([message(b'{"id": 1, "a": 666, "b": 1}', 1, deliveries=5)])
    made = pipeline(memory, max_deliver=5)
    made.connections = replace(made.connections, find_emitted=lambda messages: {each.position for each in messages})
    run(made)

    assert ([], [1], []) == (memory.dead_lettered, memory.done, memory.emitted)


def test_giving_up_ends_every_thread_and_acknowledges_nothing_more() -> None:
    memory = Memory(rows(range(1000)))
    made = pipeline(memory)
    memory.slow = made.give_up.set
    made.start()

    assert made.wait(10)
    assert len(memory.done) <= 10
