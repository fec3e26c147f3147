"""The killer strikes who works when a kill is due, and aims as it was told."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.kills.killer import Killer, Seen, Strike, Usual
from tests.benchmarks.kills.schedule import Schedule, TimedKill

USUAL = Usual(startup=10.0, write=0.1, publish=2.0)


def a_killer(*timed: TimedKill, startups: Any = None, publishes: Any = None) -> Killer:
    return Killer(Schedule(timed=timed, startups=startups or {}, publishes=publishes or {}), USUAL)


def at_random(due: float, draw: float) -> TimedKill:
    return TimedKill(due_seconds=due, draw=draw, aimed=False)


def seen(number: int = 0, **given: Any) -> Seen:
    usual = {"since_start": 12.0, "since_begun": 2.0, "since_publishing": None, "writes": None}
    return Seen(number=number, **(usual | given))


def test_a_kill_that_is_due_strikes_one_worker_by_the_draw() -> None:
    killer = a_killer(at_random(5.0, 0.4), at_random(5.0, 0.6))
    both = {0: seen(), 1: seen(1)}

    assert killer.strike(0.0, 4.9, both) is None
    assert Strike(worker=0, aim="time") == killer.strike(0.0, 5.0, both)
    assert Strike(worker=1, aim="time") == killer.strike(0.0, 5.0, both)
    assert killer.strike(0.0, 99.0, both) is None


def test_a_kill_waits_for_a_worker_that_scores() -> None:
    killer = a_killer(at_random(5.0, 0.9))
    idle = {0: seen(since_begun=None), 1: seen(1, since_publishing=0.5)}

    assert killer.strike(0.0, 6.0, idle) is None
    assert Strike(worker=0, aim="time") == killer.strike(0.0, 6.0, {**idle, 0: seen()})


def test_an_aimed_kill_strikes_as_far_into_a_write_as_drawn_or_into_the_next() -> None:
    killer = a_killer(TimedKill(due_seconds=1.0, draw=0.5, aimed=True))

    assert killer.strike(10.00, 0.9, {0: seen(writes=3)}) is None
    assert killer.strike(10.00, 1.0, {0: seen(writes=None)}) is None
    assert killer.strike(10.01, 1.0, {0: seen(writes=3)}) is None
    assert killer.strike(10.04, 1.0, {0: seen(writes=3)}) is None
    assert killer.strike(10.07, 1.0, {0: seen(writes=None)}) is None
    assert killer.strike(10.20, 1.0, {0: seen(writes=4)}) is None
    assert Strike(worker=0, aim="write") == killer.strike(10.26, 1.0, {0: seen(writes=4)})
    assert killer.strike(10.40, 1.0, {0: seen(writes=5)}) is None


def test_an_attempt_is_struck_while_it_starts_where_the_schedule_names_it() -> None:
    killer = a_killer(startups={3: 0.5})

    assert killer.strike(0.0, 0.0, {0: seen(2, since_start=9.0), 1: seen(3, since_start=4.9)}) is None
    assert Strike(worker=1, aim="startup") == killer.strike(0.0, 0.0, {1: seen(3, since_start=5.0)})
    assert killer.strike(0.0, 0.0, {1: seen(3, since_start=6.0)}) is None


def test_a_worker_is_struck_while_it_publishes_as_often_as_the_schedule_says() -> None:
    killer = a_killer(publishes={0: (0.5, 0.0), 1: ()})

    assert killer.strike(0.0, 0.0, {0: seen(since_publishing=0.9), 1: seen(1, since_publishing=9.0)}) is None
    assert Strike(worker=0, aim="publish") == killer.strike(0.0, 0.0, {0: seen(since_publishing=1.0)})
    assert Strike(worker=0, aim="publish") == killer.strike(0.0, 0.0, {0: seen(2, since_publishing=0.0)})
    assert killer.strike(0.0, 0.0, {0: seen(3, since_publishing=9.0)}) is None
