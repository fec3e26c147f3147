"""When spot machines are available, and what a batch run under a deadline costs on them.

Availability is read from a file of traces, or drawn at a rate of interruptions. Machines are bought by the policy of
nightly runs.

Shapes: N traces, T ticks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from serving.errors import BadWorkload, DeadlineImpossible
from serving.model.contract import Frozen
from tasks.scheduler.workload import Spot
from tasks.spot.policy import PolicyParameters, Situation, decide_placements
from tasks.spot.replay import Job, replay

TICK_SECONDS = 60.0
_BYTES_MAX = 64 << 20
_TRACES, _DAYS = 64, 4
_TICKS_MAX = 96
_TICK_SECONDS_MIN = 20.0
_REPLAYS_MAX = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class SpotAvailability:
    """Whether spot is available in each tick."""

    spot_NT: NDArray[np.bool_]
    tick_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SpotRun:
    """A run on one machine, replayed over the traces.

    paid_seconds: on average; those of spot count for as many on-demand seconds as they cost. seconds_p99: until 99 of
    100 are done.
    """

    paid_seconds: float
    seconds_p50: float
    seconds_p99: float
    late_share: float


class _Line(Frozen):
    zone: str = ""
    start: float = 0
    gap_seconds: float = Field(gt=0, le=86_400)
    available: str = Field(min_length=1, pattern="^[01]+$")


def read_availability(spot: Spot, *, seed: int = 13) -> SpotAvailability:
    """Return the traces of a file, or 64 drawn ones of four days.

    A file holds JSON lines, each with gap_seconds, the seconds of a tick, and available, a 1 or 0 for each tick. `seed`
    is that of drawn traces. Raises BadWorkload where the file holds anything else.
    """
    if spot.trace is None:
        return _draw_availability(spot, seed)
    path = Path(spot.trace)
    if not path.is_file() or path.stat().st_size > _BYTES_MAX:
        message = f"Traces of spot must be a file of at most {_BYTES_MAX >> 20} MiB, got {spot.trace}."
        raise BadWorkload(message)
    lines = [
        _parse_line(text, number, path)
        for number, text in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if text.strip()
    ]
    ticks = {line.gap_seconds for line in lines}
    if len(ticks) != 1:
        message = f"Traces of spot must all have the same gap_seconds, got {sorted(ticks)} in {path}."
        raise BadWorkload(message)
    longest = max(len(line.available) for line in lines)
    spot_NT = np.zeros((len(lines), longest), dtype=bool)
    for row, line in enumerate(lines):
        spot_NT[row, : len(line.available)] = np.frombuffer(line.available.encode(), dtype=np.uint8) == ord("1")
    return SpotAvailability(spot_NT=spot_NT, tick_seconds=ticks.pop())


def _parse_line(text: str, number: int, path: Path) -> _Line:
    try:
        return _Line.model_validate_json(text)
    except ValidationError as error:
        message = f"Line {number} of {path} must be a JSON object with gap_seconds and available, got {text[:80]!r}."
        raise BadWorkload(message) from error


def _draw_availability(spot: Spot, seed: int) -> SpotAvailability:
    """Draw interruptions, `interruptions_per_day` while spot is available, each with a gap of `gap_minutes`."""
    ticks = round(_DAYS * 86_400 / TICK_SECONDS)
    gap = max(1, round(spot.gap_minutes * 60 / TICK_SECONDS))
    spot_NT = np.ones((_TRACES, ticks), dtype=bool)
    if spot.interruptions_per_day == 0:
        return SpotAvailability(spot_NT=spot_NT, tick_seconds=TICK_SECONDS)
    random = np.random.default_rng(seed)
    ends = random.random((_TRACES, ticks)) < min(1.0, spot.interruptions_per_day * TICK_SECONDS / 86_400)
    for trace_T, ends_T in zip(spot_NT, ends, strict=True):
        available_from = 0
        for end in np.flatnonzero(ends_T).tolist():
            if end >= available_from:
                trace_T[end : end + gap] = False
                available_from = end + gap
    return SpotAvailability(spot_NT=spot_NT, tick_seconds=TICK_SECONDS)


def simulate_spot_run(
    work_seconds: float,
    deadline_seconds: float,
    changeover_seconds: float,
    price_ratio: float,
    availability: SpotAvailability,
    *,
    is_coarse: bool = False,
) -> SpotRun | None:
    """Return what a run costs on a machine; None where not even on-demand alone is sure to be in time."""
    tick = max(_TICK_SECONDS_MIN, deadline_seconds / (_TICKS_MAX // 2 if is_coarse else _TICKS_MAX))
    try:
        job = Job(
            work_seconds=work_seconds,
            deadline_seconds=deadline_seconds,
            changeover_seconds=changeover_seconds,
            price_ratio=price_ratio,
            tick_seconds=tick,
        )
    except DeadlineImpossible:
        return None
    # With less than two changeovers and a tick of slack, the policy has no time to wait and may be late.
    if deadline_seconds - work_seconds < 2 * changeover_seconds + tick:
        return None
    spot_NT = cut_windows(availability, tick, math.ceil(deadline_seconds / tick))
    # A run is done by the end of the last tick in which it was seen at work.
    done_N = np.zeros(len(spot_NT))

    def place_and_record(seen: Situation, parameters: PolicyParameters) -> NDArray[np.int64]:
        now = deadline_seconds - float(np.max(seen.left_seconds))
        done_N[np.greater(seen.work_seconds, 0)] = min(now + tick, deadline_seconds)
        return decide_placements(seen, parameters)

    outcome = replay(place_and_record, spot_NT, job)
    p50, p99 = np.quantile(done_N, (0.5, 0.99))
    return SpotRun(
        paid_seconds=float(outcome.cost_N.mean()) * work_seconds,
        seconds_p50=float(p50),
        seconds_p99=float(p99),
        late_share=float(outcome.late_N.mean()),
    )


def cut_windows(availability: SpotAvailability, tick_seconds: float, ticks: int) -> NDArray[np.bool_]:
    """Return windows of the traces, so many ticks long. Spot is available in a tick where it is all through it."""
    spot_NT = availability.spot_NT
    step = tick_seconds / availability.tick_seconds
    length = max(1, int(spot_NT.shape[1] / step))
    starts = np.floor(np.arange(length) * step).astype(np.int64)
    resampled_NT = np.logical_and.reduceat(spot_NT, starts, axis=1) if step > 1 else spot_NT[:, starts]
    pieces = [resampled_NT[:, at : at + ticks] for at in range(0, max(length - ticks, 0) + 1, ticks)]
    # A trace that is shorter than a run is repeated.
    full = [np.tile(piece, (1, math.ceil(ticks / piece.shape[1])))[:, :ticks] for piece in pieces]
    all_NT = np.concatenate(full)
    return all_NT[:: max(1, len(all_NT) // _REPLAYS_MAX)][:_REPLAYS_MAX]
