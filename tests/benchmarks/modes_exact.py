"""One request after another: what the choice of a mode comes to on other traffic.

Nothing here is shared with the simulation that decides but the figures of the scenario. A machine has a line of its own
and slots that take passes from it; a request goes to a machine at random. Machines come and go as their policy says.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tasks.scheduler.scenario import Candidate, InstanceType, Scenario

ARRIVALS_MAX = 3_000_000
# Of bursts that come now and then, few windows would tell little. Those of a scaler need half an hour before each.
_WINDOWS, _SCALER_WINDOWS = 60, 12
_WARM_UP = 60.0
_SCALE_SECONDS, _SCALE_DOWN = 15, 300


@dataclass(slots=True)
class Machine:
    """A machine: from when it works, until when it takes requests, and what stands in its line."""

    ready: float
    until: float = math.inf
    line: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """What passes take: slots side by side, begin + each * requests, how many at most, how long others are awaited."""

    slots: int
    begin: float
    each: float
    most: int
    wait: float
    beside: float


def late_share(scenario: Scenario, kind: InstanceType, candidate: Candidate, seed: int) -> float:
    """Return the share of requests that are late under a candidate, on arrivals within the same seconds' counts."""
    random = np.random.default_rng(seed)
    found = _pass(scenario, kind, candidate)
    total = int(scenario.counts_T.sum())
    if not total:
        return 0.0
    if candidate.mode == "batch":
        return _batch_late(scenario, kind, candidate)
    if candidate.policy.startswith("keep-warm") and candidate.machines:
        # All of them, as far as that can be: it wakes now and then, and most often where little comes.
        late_count = count = 0
        for start, stop in _pieces(scenario, total, _WINDOWS):
            warm = max(
                0, start - math.ceil(2 * (candidate.keep_warm_seconds or 0) + scenario.profile.cold_start_seconds)
            )
            at = _moments(scenario, warm, stop, random)
            late = _asleep(at, candidate, scenario, found, random)
            first = bisect.bisect_left(at, float(start))
            late_count, count = late_count + sum(late[first:]), count + len(late) - first
        return late_count / max(count, 1)
    late_count, count = 0, 0
    windows = _SCALER_WINDOWS if candidate.policy == "autoscaled" else _WINDOWS
    for start, stop in _pieces(scenario, total, windows):
        warm = max(0, start - int(_WARM_UP if candidate.policy != "autoscaled" else 1800))
        at = _moments(scenario, warm, stop, random)
        if candidate.policy == "autoscaled":
            late = _scaled(at, scenario, kind, candidate, warm, found, random)
        else:
            late = _line_up(
                at, [Machine(ready=0.0) for _ in range(candidate.machines)], found, scenario.deadline_seconds, random
            )
        first = bisect.bisect_left(at, float(start))
        late_count += sum(late[first:])
        count += len(late) - first
    return late_count / max(count, 1)


def _pass(scenario: Scenario, kind: InstanceType, candidate: Candidate) -> Pass:
    profile, rows = scenario.profile, scenario.rows_per_arrival
    busy = profile.request_ms if profile.request_busy_ms is None else profile.request_busy_ms
    begin = profile.pass_time.fixed_seconds / kind.speed
    most = max(1, int(candidate.batching.batch_size_max / rows + 1e-9))
    if candidate.mode == "streaming":
        measured = profile.stream_rows_per_second or profile.batch_rows_per_second
        each = rows * max(profile.pass_time.row_seconds, profile.slots / measured) / kind.speed
        return Pass(
            slots=profile.slots, begin=begin, each=each, most=most, wait=candidate.batching.wait_seconds_max, beside=0.0
        )
    each = (profile.pass_time.row_seconds * rows + busy / 1000) / kind.speed
    beside = max(0.0, profile.request_ms - busy) / 1000
    return Pass(
        slots=profile.slots, begin=begin, each=each, most=most, wait=candidate.batching.wait_seconds_max, beside=beside
    )


def _pieces(scenario: Scenario, total: int, windows: int) -> list[tuple[int, int]]:
    """Return windows of the horizon, evenly spaced, with about as many arrivals as can be followed."""
    seconds = len(scenario.counts_T)
    if total <= ARRIVALS_MAX:
        return [(0, seconds)]
    length = max(1, int(seconds * ARRIVALS_MAX / total / windows))
    return [(start, start + length) for start in np.linspace(0, seconds - length, windows).astype(int).tolist()]


def _moments(scenario: Scenario, start: int, stop: int, random: np.random.Generator) -> list[float]:
    counts = scenario.counts_T[start:stop]
    at = np.repeat(np.arange(start, stop), counts) + random.random(int(counts.sum()))
    return np.sort(at).tolist()


def _line_up(
    at: Sequence[float], machines: list[Machine], found: Pass, within: float, random: np.random.Generator
) -> list[bool]:
    """Share requests among machines that are there all the time."""
    place = random.integers(len(machines), size=len(at)).tolist()
    late = [False] * len(at)
    for number, machine in enumerate(machines):
        mine = [index for index, each in enumerate(place) if each == number]
        for index, waited in zip(mine, _serve([at[index] for index in mine], machine.ready, found), strict=True):
            late[index] = waited > within
    return late


def _serve(at: Sequence[float], ready: float, found: Pass) -> list[float]:
    """Return what requests wait at one machine."""
    free, waits, first = [ready] * found.slots, [], 0
    while first < len(at):
        slot = min(range(found.slots), key=free.__getitem__)
        last = first + found.most - 1
        begin = max(free[slot], min(at[first] + found.wait, at[last] if last < len(at) else math.inf))
        stop = bisect.bisect_right(at, begin, first, min(last + 1, len(at)))
        end = begin + found.begin + found.each * (stop - first)
        free[slot] = end
        waits += [end - each + found.beside for each in at[first:stop]]
        first = stop
    return waits


def _scaled(
    at: Sequence[float],
    scenario: Scenario,
    kind: InstanceType,
    candidate: Candidate,
    start: int,
    found: Pass,
    random: np.random.Generator,
) -> list[bool]:
    """Share requests among machines that a scaler starts and stops; those that stop finish their line."""
    rate = found.slots * found.most / (found.begin + found.each * found.most)
    floor, target = candidate.machines_min or 1, candidate.target_utilisation or 1.0
    boot = scenario.profile.cold_start_seconds
    stop = math.ceil(at[-1]) + 1 if at else start
    wanted: list[int] = []
    lines: list[Machine] = []
    # What it was before the first interval is what that one asks for.
    for tick in range(start, stop, _SCALE_SECONDS):
        seen_from = tick if not wanted else tick - _SCALE_SECONDS
        seen = bisect.bisect_left(at, seen_from + _SCALE_SECONDS) - bisect.bisect_left(at, seen_from)
        want = math.ceil(seen / _SCALE_SECONDS / (target * rate) - 1e-12)
        wanted.append(min(max(want, floor), scenario.machines_max))
        now = max(wanted[-(_SCALE_DOWN // _SCALE_SECONDS + 1) :])
        here = [machine for machine in lines if machine.until == math.inf]
        ready = float(tick) if len(wanted) == 1 else tick + boot
        lines += [Machine(ready=ready) for _ in range(now - len(here))]
        for machine in here[now:]:
            machine.until = float(tick)
    late = [False] * len(at)
    mine: list[list[int]] = [[] for _ in lines]
    choices = random.random(len(at))
    marks = sorted({machine.ready for machine in lines} | {machine.until for machine in lines})
    for index, moment in enumerate(at):
        if index == 0 or bisect.bisect_right(marks, moment) != bisect.bisect_right(marks, at[index - 1]):
            there = [n for n, machine in enumerate(lines) if machine.ready <= moment < machine.until]
        mine[there[int(choices[index] * len(there))]].append(index)
    for machine, own in zip(lines, mine, strict=True):
        for index, waited in zip(own, _serve([at[index] for index in own], machine.ready, found), strict=True):
            late[index] = waited > scenario.deadline_seconds
    return late


def _asleep(
    at: Sequence[float], candidate: Candidate, scenario: Scenario, found: Pass, random: np.random.Generator
) -> list[bool]:
    """Follow an endpoint that goes to zero a fixed time after its last answer."""
    if candidate.keep_warm_seconds is None:
        message = "Only a fixed time can be followed."
        raise ValueError(message)
    boot, keep = scenario.profile.cold_start_seconds, candidate.keep_warm_seconds
    late: list[bool] = []
    first = 0
    while first < len(at):
        ready = at[first] + boot
        stop, until = first, ready
        # It sleeps once nothing has come for so long after what came before was answered.
        while stop < len(at) and at[stop] <= max(until, ready) + keep:
            until = max(until, at[stop])
            stop += 1
        spell = at[first:stop]
        machines = [Machine(ready=ready) for _ in range(candidate.machines)]
        late += _line_up(spell, machines, found, scenario.deadline_seconds, random)
        first = stop
    return late


def _batch_late(scenario: Scenario, kind: InstanceType, candidate: Candidate) -> float:
    """Follow runs, one after another; on spot each is done by the deadline that it is given."""
    if candidate.policy == "spot":
        return 0.0 if candidate.age_p99 <= scenario.deadline_seconds else 1.0
    every, counts = int(candidate.period_seconds or 1), scenario.counts_T
    rate = scenario.profile.batch_rows_per_second * kind.speed * candidate.machines
    late, free = 0, 0.0
    sums = np.concatenate([[0], np.cumsum(counts)])
    for start in range(0, len(counts), every):
        stop = min(start + every, len(counts))
        rows = (sums[stop] - sums[start]) * scenario.rows_per_arrival
        free = max(float(start + every), free) + scenario.profile.start_seconds + rows / rate
        last = min(max(math.ceil(free - scenario.deadline_seconds), start), stop)
        late += int(sums[last] - sums[start])
    return late / max(int(sums[-1]), 1)
