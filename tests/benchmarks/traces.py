"""Traces of spot availability: real ones where TRACES names them, else generated.

Shapes: N traces, T ticks of ten minutes.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).parents[2]
TICK_SECONDS = 600
# The mean length of a short spell, the share of short spells, and the mean length of a long spell.
_SHORT_TICKS = 1.5
_SHORT_SHARE_UP, _SHORT_SHARE_DOWN = 0.4, 0.65
_LONG_TICKS_UP, _LONG_TICKS_DOWN = 20.0, 15.0
# The ratio between the long spells of two traces that are one standard deviation apart.
_TRACE_SPREAD = 2.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Traces:
    """Traces of spot, their source, and the zone that each was recorded in."""

    source: str
    zones: tuple[str, ...]
    spot_NT: NDArray[np.bool_]


def read_traces() -> Traces:
    """Return the traces of TRACES, a folder with spot_availability.jsonl or such a file; without it generated ones."""
    named = os.environ.get("TRACES")
    if not named:
        return generated_traces()
    path = Path(named) / "spot_availability.jsonl" if Path(named).is_dir() else Path(named)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    other = {row["gap_seconds"] for row in rows} - {TICK_SECONDS}
    if other:
        sys.exit(f"The traces must be of ticks of {TICK_SECONDS} s, got {other}.")
    return Traces(
        source=f"{len(rows)} traces of {path.name}",
        zones=tuple(row["zone"] for row in rows),
        spot_NT=np.array([[tick == "1" for tick in row["available"]] for row in rows]),
    )


def generated_traces() -> Traces:
    """Return as many generated traces as there are real ones, and as long."""
    return Traces(source="240 generated traces", zones=("generated",) * 240, spot_NT=synthetic_traces(240, 554, seed=0))


def synthetic_traces(count: int, ticks: int, *, seed: int) -> NDArray[np.bool_]:
    """Return `count` traces of whether spot is up in each tick; the same for the same seed.

    They resemble those of "Can't Be Late" (Wu et al., NSDI 2024): the traces differ from spot that is hardly ever up to
    spot that is hardly ever gone; most gaps are over after a tick or two and a few last for hours; a spell that has
    lasted a while is likely to last. Spells are of two kinds, short and long, with geometric lengths.
    """
    random = np.random.default_rng(seed)
    return np.array([_synthesise_trace(ticks, random) for _ in range(count)]).reshape(count, ticks)


def _synthesise_trace(ticks: int, random: np.random.Generator) -> NDArray[np.bool_]:
    factor = _TRACE_SPREAD ** random.standard_normal()
    means = {True: _LONG_TICKS_UP * factor, False: _LONG_TICKS_DOWN / factor}
    shares = {True: _SHORT_SHARE_UP, False: _SHORT_SHARE_DOWN}
    # The trace begins somewhere within its course.
    skip = int(random.integers(ticks + 1))
    up, spells, length = bool(random.integers(2)), [], 0
    while length < skip + ticks:
        mean = _SHORT_TICKS if random.random() < shares[up] else max(means[up], 1.0)
        spells.append(np.full(int(random.geometric(1 / mean)), up))
        length += len(spells[-1])
        up = not up
    return np.concatenate(spells)[skip : skip + ticks]
