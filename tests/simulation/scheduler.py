"""Threads of which one runs at a time, by a seed: they hand over where they touch storage or wait for time.

An actor is one such thread, a process a group of them that is killed as a whole. Everything that the simulation draws
comes from one generator, which only the running actor uses: a seed gives the same steps every time.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

_EPOCH = datetime(2030, 1, 1, tzinfo=UTC)
# An actor goes on at a step with this probability: runs of steps by one alone are as likely as quick changes.
_GOES_ON = 0.4
_THREAD_BYTES = 1 << 20
_LOCK_SECONDS = 0.05


class Killed(BaseException):
    """The process of the actor is dead: it does nothing any more."""


class Stuck(BaseException):
    """The simulation does not come to an end."""


@dataclass(eq=False)
class Process:
    """What a kill ends: its actors raise Killed at their next step. Its wall clock may be wrong."""

    name: str
    alive: bool = True
    clock_error: timedelta = timedelta()


@dataclass(eq=False)
class Actor:
    """One thread of a process."""

    name: str
    process: Process
    run: Callable[[], Any]
    resumes_at: float = 0.0
    waits_for: Actor | None = None
    done: bool = False
    result: Any = None
    error: BaseException | None = None
    gate: threading.Lock = field(default_factory=threading.Lock)

    def value(self) -> Any:
        """Return what it returned, or raise what it raised."""
        if self.error is not None:
            raise self.error
        return self.result


class Scheduler:
    """Runs actors one at a time. `now` is in seconds, and moves a little at each step."""

    def __init__(self, chance: random.Random, *, steps_max: int, on_step: Callable[[], None]) -> None:
        self.chance = chance
        self.now = 0.0
        self.steps = 0
        self.kill_rate = 0.0
        self.trace: list[str] = []
        self._steps_max = steps_max
        self._on_step = on_step
        self._actors: list[Actor] = []
        self._current: Actor | None = None
        self._over = threading.Lock()
        self._stuck = False

    def run(self, run: Callable[[], Any]) -> Any:
        """Run the first actor, and with it all that it spawns, to their ends; return what it returned."""
        self._over.acquire()
        first = self.spawn(Process("director"), "director", run)
        self._resume(first)
        self._over.acquire()
        if self._stuck:
            raise Stuck
        return first.value()

    def tell(self, text: str) -> None:
        """Add a line to the trace, which is one line whatever the text."""
        name = self._current.name if self._current else "-"
        self.trace.append(f"{self.steps:6d} {self.now:9.3f} {name}: {text}")

    @property
    def process(self) -> Process:
        """The process that runs now."""
        assert self._current is not None
        return self._current.process

    def wall_clock(self) -> datetime:
        """Return the time as the running process's clock has it."""
        return _EPOCH + timedelta(seconds=self.now) + self.process.clock_error

    def spawn(self, process: Process, name: str, run: Callable[[], Any]) -> Actor:
        """Add an actor, which begins when it is chosen."""
        actor = Actor(name=name, process=process, run=run, resumes_at=self.now)
        actor.gate.acquire()
        self._actors.append(actor)
        threading.Thread(target=self._live, args=(actor,), name=name, daemon=True).start()
        return actor

    def step(self, told: str, *, may_die: bool = True) -> None:
        """Let any actor go next; raises Killed where this process is dead by then."""
        self.steps += 1
        self.now += self.chance.random() * 0.1
        self.tell(told)
        if self.steps > self._steps_max:
            self._stop()
        self._on_step()
        if may_die and self.chance.random() < self.kill_rate:
            self.tell("killed")
            self.process.alive = False
            raise Killed
        if self.chance.random() >= _GOES_ON:
            self._hand_over()
        self._look()

    def sleep(self, seconds: float) -> None:
        """Let time pass for this actor."""
        me = self._me()
        me.resumes_at = self.now + seconds
        self._hand_over()
        self._look()

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Wait for an event at most so many seconds, as threading.Event does."""
        if not event.is_set():
            self.sleep(seconds)
        return event.is_set()

    def join(self, actor: Actor) -> Actor:
        """Wait until an actor is done; return it."""
        me = self._me()
        if not actor.done:
            me.waits_for = actor
            self._hand_over()
            me.waits_for = None
        self._look()
        return actor

    def _me(self) -> Actor:
        assert self._current is not None
        return self._current

    def _look(self) -> None:
        if self._stuck:
            raise Stuck
        if not self._me().process.alive:
            raise Killed

    def _live(self, actor: Actor) -> None:
        actor.gate.acquire()
        try:
            self._look()
            actor.result = actor.run()
        except BaseException as error:  # noqa: BLE001 - told to whoever joins
            actor.error = error
        actor.done = True
        self._actors.remove(actor)
        chosen = self._choose()
        if chosen is None and self._actors:
            self._stuck, chosen = True, self._actors[0]
        if chosen is None:
            self._over.release()
        else:
            self._resume(chosen)

    def _hand_over(self) -> None:
        me = self._me()
        chosen = self._choose()
        if chosen is None:
            self._stop()
        elif chosen is not me:
            self._resume(chosen)
            me.gate.acquire()

    def _stop(self) -> None:
        self._stuck = True
        raise Stuck

    def _resume(self, actor: Actor) -> None:
        self._current = actor
        actor.gate.release()

    def _choose(self) -> Actor | None:
        ready = [actor for actor in self._actors if self._is_ready(actor)]
        if not ready:
            sleeping = [a for a in self._actors if a.waits_for is None]
            if not sleeping:
                return None
            chosen = min(sleeping, key=lambda actor: actor.resumes_at)
            self.now = max(self.now, chosen.resumes_at)
            return chosen
        return ready[int(self.chance.random() * len(ready))]

    def _is_ready(self, actor: Actor) -> bool:
        if self._stuck or not actor.process.alive:
            return True
        if actor.waits_for is not None:
            return actor.waits_for.done
        return actor.resumes_at <= self.now


class ActorLock:
    """A lock for the actors of one process, who wait by the scheduler."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._is_held = False

    def __enter__(self) -> None:
        while self._is_held:
            self._scheduler.sleep(_LOCK_SECONDS)
        self._is_held = True

    def __exit__(self, *_error: object) -> None:
        self._is_held = False


class ActorCondition(ActorLock):
    """A condition that actors of several processes wait for, by the scheduler."""

    def wait_for(self, predicate: Callable[[], bool]) -> None:
        """Wait until something holds; others have the lock meanwhile."""
        while not predicate():
            self._scheduler.tell("waits for a condition")
            self.__exit__()
            self._scheduler.sleep(_LOCK_SECONDS)
            self.__enter__()

    def notify_all(self) -> None:
        """Nothing to do: those who wait look again."""


class ActorExecutor(Executor):
    """An executor that runs what is submitted as an actor of the process that submits it, one after the other."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._last: Actor | None = None

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Spawn an actor; its future waits by the scheduler."""
        before = self._last

        def run() -> Any:
            if before is not None:
                self._scheduler.join(before)
            return fn(*args, **kwargs)

        process = self._scheduler.process
        self._last = self._scheduler.spawn(process, f"{process.name}/writer", run)
        return _ActorFuture(self._scheduler, self._last)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: FBT001, FBT002 - as Executor has it
        """Wait for what was submitted."""
        if self._last is not None:
            self._scheduler.join(self._last)


class _ActorFuture(Future[Any]):
    def __init__(self, scheduler: Scheduler, actor: Actor) -> None:
        super().__init__()
        self._scheduler, self._actor = scheduler, actor

    def result(self, timeout: float | None = None) -> Any:
        return self._scheduler.join(self._actor).value()
