"""The pipeline: one thread reads micro-batches, slots score them, and one thread emits them in the same order.

All queues are bounded: a slow sink blocks the slots, busy slots block the reader, and a blocked reader stops fetching.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

from serving.errors import TooManyRejects
from serving.model.batching import BatchingConfig
from serving.model.interface import Model
from tasks.stream.batcher import POLL_SECONDS, Batch, Batcher, StreamLimits
from tasks.stream.connections import Connections
from tasks.stream.message import Poison, Position
from tasks.stream.report import StreamMetrics
from tasks.stream.score import MicroScorer, ScoredBatch

T = TypeVar("T")

# While a suspect is scored, the emitter looks so often whether all before it is emitted.
_SUSPECT_POLL_SECONDS = 0.01


class _PipelineEnded(Exception):
    """Another thread has ended the pipeline."""


@dataclass(slots=True, kw_only=True)
class Pipeline:
    """Reads, scores and emits a stream in threads, from `start` until all of them have ended.

    It ends at a limit of messages, when it is idle, when `is_stopping` says so, which is asked before each micro-batch,
    or at the first `error` in any thread. Messages taken by then are scored, emitted and acknowledged, unless `give_up`
    is set: then those that are not acknowledged are delivered again.
    """

    connections: Connections
    model: Model
    scorer: Callable[[], MicroScorer]
    batching: Callable[[], BatchingConfig]
    limits: StreamLimits
    metrics: StreamMetrics
    is_stopping: Callable[[], bool]
    give_up: threading.Event
    taken: int = 0
    ended: str = ""
    error: BaseException | None = None
    _threads: list[threading.Thread] = field(default_factory=list)
    _work: queue.Queue[tuple[Future[ScoredBatch], Batch] | None] = field(init=False)
    _order: queue.Queue[Future[ScoredBatch] | None] = field(init=False)
    _over: threading.Event = field(default_factory=threading.Event)
    _poison_in_a_row: int = 0
    _has_suspects: bool = False
    _dispatched: int = 0
    _emitted: int = 0

    def start(self) -> None:
        """Start the threads."""
        self._work, self._order = queue.Queue(1), queue.Queue(self.limits.slots + 2)
        self._start_thread("read", self._read)
        for slot in range(self.limits.slots):
            self._start_thread(f"slot-{slot}", self._score)
        self._start_thread("emit", self._emit)

    def wait(self, seconds: float) -> bool:
        """Wait for so many seconds until every thread has ended; return whether they have."""
        until = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _start_thread(self, name: str, run: Callable[[], None]) -> None:
        def run_guarded() -> None:
            try:
                run()
            except _PipelineEnded:
                return
            except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
                if self.error is None:
                    self.error = error
                self._over.set()

        thread = threading.Thread(target=run_guarded, name=f"stream-{name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _read(self) -> None:
        last = time.monotonic()
        batcher = Batcher(
            source=self.connections.source,
            limits=self.limits,
            batching=self.batching,
            is_stopping=self.is_stopping,
            check_running=self._check_running,
        )
        while not self._is_over(last):
            messages = batcher.next_batch(None if self.limits.limit is None else self.limits.limit - self.taken)
            self.taken += len(messages)
            if messages:
                for batch in batcher.split_suspects(messages):
                    self._dispatch(batch)
                last = time.monotonic()
        for _ in range(self.limits.slots):
            self._put(self._work, None)
        self._put(self._order, None)

    def _is_over(self, last: float) -> bool:
        self._check_running()
        if self.limits.limit is not None and self.taken >= self.limits.limit:
            self.ended = "limit"
        elif self.limits.idle_seconds is not None and time.monotonic() - last > self.limits.idle_seconds:
            self.ended = "idle"
        elif self.is_stopping():
            self.ended = "stopped"
        return bool(self.ended)

    def _dispatch(self, batch: Batch) -> None:
        self._has_suspects = self.limits.is_suspect(batch[0])
        if self._has_suspects:
            # The scores of all earlier messages must not be lost if a suspect ends the process.
            while self._emitted < self._dispatched:
                self._check_running()
                time.sleep(_SUSPECT_POLL_SECONDS)
        future: Future[ScoredBatch] = Future()
        self._dispatched += 1
        self._put(self._order, future)
        if self.limits.max_deliver is not None and batch[0].deliveries >= self.limits.max_deliver:
            future.set_result(_reject_unfinished(batch, self.connections.find_emitted(batch)))
        else:
            self._put(self._work, (future, batch))

    def _score(self) -> None:
        with self.model.slot():
            scorer = self.scorer()
            while (work := self._get(self._work)) is not None:
                future, batch = work
                try:
                    future.set_result(self._score_batch(scorer, batch))
                except BaseException as error:
                    future.set_exception(error)
                    raise

    def _score_batch(self, scorer: MicroScorer, batch: Batch) -> ScoredBatch:
        """Score a micro-batch, and again each time that Ctrl-C has ended a call of Polars in it.

        Polars raises KeyboardInterrupt in every thread that computes then. Python raises it in the main thread too,
        which decides how the stream ends.
        """
        while True:
            try:
                return scorer.score(batch)
            except KeyboardInterrupt:
                self._check_running()

    def _emit(self) -> None:
        pending: list[ScoredBatch] = []
        since = 0.0
        while True:
            future, is_due = self._next_scored(pending, since)
            if is_due:
                pending = self._flush(pending)
                continue
            if future is None:
                self._flush(pending)
                return
            scored = self._wait_for_result(future)
            if scored.poison:
                self.connections.dead_letters.send(scored.poison)
            since = since if pending else time.monotonic()
            pending.append(self.connections.compact(scored))
            if sum(each.rows for each in pending) >= self.connections.emit_policy.rows or self._is_due(since):
                pending = self._flush(pending)
            self._count_poison(scored)

    def _next_scored(self, pending: Sequence[ScoredBatch], since: float) -> tuple[Future[ScoredBatch] | None, bool]:
        """Return the next micro-batch, or that the pending ones are due before it is there."""
        while True:
            self._check_running()
            try:
                return self._order.get(timeout=_SUSPECT_POLL_SECONDS if self._has_suspects else POLL_SECONDS), False
            except queue.Empty:
                if pending and (self._has_suspects or self._is_due(since)):
                    return None, True

    def _is_due(self, since: float) -> bool:
        return time.monotonic() - since >= self.connections.emit_policy.seconds

    def _wait_for_result(self, future: Future[ScoredBatch]) -> ScoredBatch:
        while True:
            self._check_running()
            try:
                return future.result(timeout=POLL_SECONDS)
            except TimeoutError:
                if future.done():
                    raise

    def _flush(self, pending: list[ScoredBatch]) -> list[ScoredBatch]:
        """Emit the pending micro-batches, then acknowledge them; return those that are pending now: none."""
        if not pending:
            return pending
        start = time.monotonic()
        refused = self.connections.sink.emit(pending)
        if refused:
            self.connections.dead_letters.send(refused)
        now = time.time()
        poison = {each.message.position for scored in pending for each in scored.poison} | {
            each.message.position for each in refused
        }
        messages = [message for scored in pending for message in scored.messages]
        dead_lettered = [message for message in messages if message.position in poison]
        done = [message for message in messages if message.position not in poison] if poison else messages
        self.connections.acknowledger.acknowledge(done, dead_lettered)
        self.metrics.count_emitted(pending, len(dead_lettered), time.monotonic() - start, now)
        self._emitted += len(pending)
        return []

    def _count_poison(self, scored: ScoredBatch) -> None:
        """Raise TooManyRejects where none of many messages in a row got a score."""
        if len(scored.poison) < len(scored.messages):
            self._poison_in_a_row = 0
            return
        self._poison_in_a_row += len(scored.messages)
        if self._poison_in_a_row >= self.limits.poison_in_a_row:
            last = scored.poison[-1]
            message = (
                f"At least one of {self.limits.poison_in_a_row:,} messages in a row must get a score, got none; the "
                f"last one: {last.description}. They are among the dead letters. Check the model, the topic and "
                "poison_in_a_row, then call again."
            )
            raise TooManyRejects(message)

    def _put(self, target: queue.Queue[T], item: T) -> None:
        while True:
            self._check_running()
            try:
                target.put(item, timeout=POLL_SECONDS)
            except queue.Full:
                continue
            return

    def _get(self, source: queue.Queue[T]) -> T:
        while True:
            self._check_running()
            try:
                return source.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue

    def _check_running(self) -> None:
        if self._over.is_set() or self.give_up.is_set():
            raise _PipelineEnded


def _reject_unfinished(batch: Batch, emitted: set[Position]) -> ScoredBatch:
    """Return messages on their last delivery as poison, except those that are emitted already."""
    poison = tuple(
        Poison(
            message=message,
            column="",
            reason="a message that was never finished",
            detail=f"it came {message.deliveries} times: scoring it may end the process",
        )
        for message in batch
        if message.position not in emitted
    )
    return ScoredBatch(messages=batch, unreadable=poison, poison=poison)
