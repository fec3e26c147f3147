"""The stream in motion: one thread reads micro-batches, slots score them, one thread emits them in the same order.

Everything between them is bounded: a slow sink holds the slots, full slots hold the reader, and a reader that is held
stops asking the source.
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
from serving.model.interface import Model
from tasks.stream.batcher import POLL_SECONDS, Batch, Dial, Intake, Terms, company
from tasks.stream.connections import Ends
from tasks.stream.message import Message, Place, Poison
from tasks.stream.report import Meter
from tasks.stream.score import MicroScorer, Scored

T = TypeVar("T")

# How often it is looked whether what came before a suspect has gone out.
_SUSPECT_SECONDS = 0.01


class _Over(Exception):
    """Another thread has ended the stream."""


@dataclass(slots=True, kw_only=True)
class Pipeline:
    """One stretch of a stream, from `start` until `over`.

    It ends when `rests` says so, which is asked before each micro-batch, at its limit, when it is idle, or with the
    first `error` of any of its threads. What was taken by then is scored, emitted and acknowledged, unless `give_up`
    is set: what is not acknowledged comes again.
    """

    ends: Ends
    model: Model
    scorer: Callable[[], MicroScorer]
    dial: Callable[[], Dial]
    terms: Terms
    meter: Meter
    rests: Callable[[], bool]
    give_up: threading.Event
    taken: int = 0
    ended: str = ""
    error: BaseException | None = None
    _threads: list[threading.Thread] = field(default_factory=list)
    _work: queue.Queue[tuple[Future[Scored], Batch] | None] = field(init=False)
    _order: queue.Queue[Future[Scored] | None] = field(init=False)
    _over: threading.Event = field(default_factory=threading.Event)
    _poison_in_a_row: int = 0
    _suspects: bool = False
    _handed_over: int = 0
    _emitted: int = 0

    def start(self) -> None:
        """Start the threads."""
        self._work, self._order = queue.Queue(1), queue.Queue(self.terms.slots + 2)
        self._start("read", self._read)
        for at in range(self.terms.slots):
            self._start(f"slot-{at}", self._score)
        self._start("emit", self._emit)

    def _start(self, name: str, run: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                run()
            except _Over:
                return
            except BaseException as error:  # noqa: BLE001 - carried over to the thread that waits
                self._fail(error)

        thread = threading.Thread(target=guarded, name=f"stream-{name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _fail(self, error: BaseException) -> None:
        if self.error is None:
            self.error = error
        self._over.set()

    def wait(self, seconds: float) -> bool:
        """Wait until every thread has come to its end, for so many seconds; return whether they have."""
        until = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _put(self, to: queue.Queue[T], item: T) -> None:
        while True:
            self._look()
            try:
                to.put(item, timeout=POLL_SECONDS)
            except queue.Full:
                continue
            return

    def _look(self) -> None:
        if self._over.is_set() or self.give_up.is_set():
            raise _Over

    def _read(self) -> None:
        last = time.monotonic()
        intake = Intake(source=self.ends.source, terms=self.terms, dial=self.dial, rests=self.rests, look=self._look)
        while not self._ends(last):
            messages = self._take(intake)
            if messages:
                for batch in intake.apart(messages):
                    self._hand_over(batch)
                last = time.monotonic()
        for _ in range(self.terms.slots):
            self._put(self._work, None)
        self._put(self._order, None)

    def _take(self, intake: Intake) -> list[Message]:
        """Take a micro-batch; where it has suspects, whatever else is there, at most what is in flight.

        What ends the process would else be in the first micro-batch each time, and those behind it never scored.
        """
        messages: list[Message] = []
        while len(messages) < self.terms.in_flight:
            more = intake.take(None if self.terms.limit is None else self.terms.limit - self.taken)
            self.taken += len(more)
            messages += more
            if not more or not any(map(self._is_suspect, messages)):
                break
        return messages

    def _is_suspect(self, message: Message) -> bool:
        return company(message.deliveries, self.terms.max_deliver) is not None

    def _ends(self, last: float) -> bool:
        self._look()
        if self.terms.limit is not None and self.taken >= self.terms.limit:
            self.ended = "limit"
        elif self.terms.idle_seconds is not None and time.monotonic() - last > self.terms.idle_seconds:
            self.ended = "idle"
        elif self.rests():
            self.ended = "stopped"
        return bool(self.ended)

    def _hand_over(self, batch: Batch) -> None:
        self._suspects = self._is_suspect(batch[0])
        if self._suspects:
            self._wait_until_emitted()
        future: Future[Scored] = Future()
        self._handed_over += 1
        self._put(self._order, future)
        if self.terms.max_deliver is not None and batch[0].deliveries >= self.terms.max_deliver:
            future.set_result(_never_finished(batch, self.ends.already(batch)))
        else:
            self._put(self._work, (future, batch))

    def _wait_until_emitted(self) -> None:
        """Wait until all before has gone out: what may end the process must not take scores of others with it."""
        while self._emitted < self._handed_over:
            self._look()
            time.sleep(_SUSPECT_SECONDS)

    def _score(self) -> None:
        with self.model.slot():
            scorer = self.scorer()
            while (work := self._next(self._work)) is not None:
                future, batch = work
                try:
                    future.set_result(scorer.score(batch))
                except BaseException as error:
                    future.set_exception(error)
                    raise

    def _next(self, source: queue.Queue[T]) -> T:
        while True:
            self._look()
            try:
                return source.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue

    def _emit(self) -> None:
        held: list[Scored] = []
        since = 0.0
        while True:
            future, late = self._next_scored(held, since)
            if late:
                held = self._flush(held)
                continue
            if future is None:
                self._flush(held)
                return
            scored = self._result(future)
            if scored.poison:
                self.ends.dead_letters.bury(scored.poison)
            since = since if held else time.monotonic()
            held.append(self.ends.keep(scored))
            if sum(each.rows for each in held) >= self.ends.cadence.rows or self._is_late(since):
                held = self._flush(held)
            self._count_poison(scored)

    def _next_scored(self, held: Sequence[Scored], since: float) -> tuple[Future[Scored] | None, bool]:
        """Return the next micro-batch, or that those in hand can't wait for it."""
        while True:
            self._look()
            try:
                return self._order.get(timeout=_SUSPECT_SECONDS if self._suspects else POLL_SECONDS), False
            except queue.Empty:
                if held and (self._suspects or self._is_late(since)):
                    return None, True

    def _is_late(self, since: float) -> bool:
        return time.monotonic() - since >= self.ends.cadence.seconds

    def _result(self, future: Future[Scored]) -> Scored:
        while True:
            self._look()
            try:
                return future.result(timeout=POLL_SECONDS)
            except TimeoutError:
                if future.done():
                    raise

    def _flush(self, held: list[Scored]) -> list[Scored]:
        """Emit what is in hand, then acknowledge it; return the empty hand."""
        if not held:
            return held
        start = time.monotonic()
        refused = self.ends.sink.emit(held)
        if refused:
            self.ends.dead_letters.bury(refused)
        now = time.time()
        poison = {each.message.place for scored in held for each in scored.poison} | {
            each.message.place for each in refused
        }
        messages = [message for scored in held for message in scored.messages]
        buried = [message for message in messages if message.place in poison]
        done = [message for message in messages if message.place not in poison] if poison else messages
        self.ends.receipts.acknowledge(done, buried)
        self.meter.emitted(held, len(buried), time.monotonic() - start, now)
        self._emitted += len(held)
        return []

    def _count_poison(self, scored: Scored) -> None:
        """Raise TooManyRejects where nothing has been scored for many messages."""
        if len(scored.poison) < len(scored.messages):
            self._poison_in_a_row = 0
            return
        self._poison_in_a_row += len(scored.messages)
        if self._poison_in_a_row >= self.terms.poison_in_a_row:
            last = scored.poison[-1]
            message = (
                f"At least one of {self.terms.poison_in_a_row:,} messages in a row must get a score, got none; of the "
                f"last: {last.words}. They are among the dead letters. "
                "Check the model, the topic and poison_in_a_row, then call again."
            )
            raise TooManyRejects(message)


def _never_finished(batch: Batch, out: set[Place]) -> Scored:
    """Return messages on their last delivery as poison, without those that have gone out."""
    poison = tuple(
        Poison(
            message=message,
            column="",
            reason="a message that was never finished",
            detail=f"it came {message.deliveries} times: scoring it may end the process",
        )
        for message in batch
        if message.place not in out
    )
    return Scored(messages=batch, unread=poison, poison=poison)
