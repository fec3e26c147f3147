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

from tasks.spot.replay import synthetic_traces

ROOT = Path(__file__).parents[2]
TICK_SECONDS = 600


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
