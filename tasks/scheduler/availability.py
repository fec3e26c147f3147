"""When spot machines are to be had: as a file of traces says, or as often as they are said to be taken."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from serving.errors import BadWorkload
from serving.model.contract import Frozen
from tasks.scheduler.workload import Spot

TICK_SECONDS = 60.0
_BYTES_MAX = 64 << 20
_TRACES, _DAYS = 64, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Availability:
    """Whether spot is up in each tick. Shapes: N traces, T ticks."""

    spot_NT: NDArray[np.bool_]
    tick_seconds: float


class _Line(Frozen):
    zone: str = ""
    start: float = 0
    gap_seconds: float = Field(gt=0, le=86_400)
    available: str = Field(min_length=1, pattern="^[01]+$")


def read_availability(spot: Spot, *, seed: int = 13) -> Availability:
    """Return traces of spot: those of a file, or 64 of four days in which it is taken at random as often as said.

    A file holds JSON lines, each with gap_seconds, the seconds of a tick, and available, a 1 or 0 for each tick. `seed`
    is that of the chance. Raises BadWorkload where the file holds anything else.
    """
    if spot.trace is None:
        return _by_rate(spot, seed)
    path = Path(spot.trace)
    if not path.is_file() or path.stat().st_size > _BYTES_MAX:
        message = f"Traces of spot must be a file of at most {_BYTES_MAX >> 20} MiB, got {spot.trace}."
        raise BadWorkload(message)
    lines = [
        _parse(text, at, path)
        for at, text in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if text.strip()
    ]
    ticks = {line.gap_seconds for line in lines}
    if len(ticks) != 1:
        message = f"Traces of spot must all have the same gap_seconds, got {sorted(ticks)} in {path}."
        raise BadWorkload(message)
    longest = max(len(line.available) for line in lines)
    spot_NT = np.zeros((len(lines), longest), dtype=bool)
    for at, line in enumerate(lines):
        spot_NT[at, : len(line.available)] = np.frombuffer(line.available.encode(), dtype=np.uint8) == ord("1")
    return Availability(spot_NT=spot_NT, tick_seconds=ticks.pop())


def _parse(text: str, at: int, path: Path) -> _Line:
    try:
        return _Line.model_validate_json(text)
    except ValidationError as error:
        message = f"Line {at} of {path} must be a JSON object with gap_seconds and available, got {text[:80]!r}."
        raise BadWorkload(message) from error


def _by_rate(spot: Spot, seed: int) -> Availability:
    """Spells end at random, `interruptions_per_day` of the time in which spot is up; gaps last as long as said."""
    ticks = round(_DAYS * 86_400 / TICK_SECONDS)
    gap = max(1, round(spot.gap_minutes * 60 / TICK_SECONDS))
    spot_NT = np.ones((_TRACES, ticks), dtype=bool)
    if spot.interruptions_per_day == 0:
        return Availability(spot_NT=spot_NT, tick_seconds=TICK_SECONDS)
    random = np.random.default_rng(seed)
    ends = random.random((_TRACES, ticks)) < min(1.0, spot.interruptions_per_day * TICK_SECONDS / 86_400)
    for trace_T, ends_T in zip(spot_NT, ends, strict=True):
        at = 0
        for end in np.flatnonzero(ends_T).tolist():
            if end >= at:
                trace_T[end : end + gap] = False
                at = end + gap
    return Availability(spot_NT=spot_NT, tick_seconds=TICK_SECONDS)
