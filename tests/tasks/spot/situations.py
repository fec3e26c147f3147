"""Situations and traces for the tests of spot."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from tasks.spot.policy import Placement, PolicyParameters, Situation
from tasks.spot.replay import Job

HOUR = 3600.0
PARAMETERS = PolicyParameters(changeover_seconds=720, price_ratio=3, interval_seconds=60)


def make_situation(**changed: Any) -> Situation:
    """Return a job of 10 h due in 20 h, nowhere yet, with spot gone just now, but for what is changed."""
    usual: dict[str, Any] = {
        "work_seconds": 10 * HOUR,
        "left_seconds": 20 * HOUR,
        "placement": Placement.IDLE,
        "spot_up": False,
        "spell_seconds": 0.0,
    }
    return Situation(**(usual | changed))


@st.composite
def traces(draw: st.DrawFn, ticks: int) -> NDArray[np.bool_]:
    """Draw a few traces of spells of any length, from spot that is never up to spot that is never gone."""
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        up = draw(st.booleans())
        row: list[bool] = []
        for length in draw(st.lists(st.integers(1, ticks), min_size=1, max_size=ticks)):
            row += [up] * length
            up = not up
        rows.append((row + [up] * ticks)[:ticks])
    return np.array(rows, dtype=bool)


@st.composite
def jobs(draw: st.DrawFn, *, whole: bool = False) -> Job:
    """Draw jobs that on-demand just meets and jobs with slack, with changeovers shorter and longer than a tick."""
    spans = st.integers(0, 4000) if whole else st.floats(0, 4000)
    tick = draw(st.integers(1, 12)) * 100.0
    changeover, work = draw(spans), draw(spans)
    # Near what a move or a tick costs, where a policy that waits too long is late.
    slack_seconds = round(draw(st.floats(0, 4)) * max(changeover, tick))
    return Job(
        work_seconds=float(work),
        deadline_seconds=float(max(work + changeover + slack_seconds, tick)),
        changeover_seconds=float(changeover),
        tick_seconds=tick,
        price_ratio=draw(st.sampled_from([0.5, 1.0, 1.2, 2.0, 3.0, 10.0])),
        spell_seconds=draw(st.sampled_from([0.0, 600.0, 3600.0, 1e6])),
    )
