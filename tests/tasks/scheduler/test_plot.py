from __future__ import annotations

import numpy as np
import pytest

from tasks.scheduler.decision import Decision
from tasks.scheduler.plot import plot
from tests.tasks.scheduler.decisions import BACKFILL, FRAUD, NIGHTLY, decision, way

WAYS = [way("batch", "spot", 0.5), way("streaming", "micro-batches", 70, stands=False), way("online", "always-on", 64)]


@pytest.mark.parametrize(
    ("decided", "seconds"),
    [
        (decision(NIGHTLY, *WAYS), 0),
        (decision(BACKFILL, *WAYS), 0),
        (decision(FRAUD, *WAYS), 1),
        (decision(FRAUD, *WAYS), 90_000),
        (decision(FRAUD, way("online", "keep-warm", 0.0)), 3600),
    ],
)
def test_a_decision_is_drawn_whatever_it_is_of(decided: Decision, seconds: int) -> None:
    png = plot(decided, np.ones(seconds, dtype=np.int64) if seconds else None, {"online": [(0.1, 3.0), (1.0, 64.0)]})

    assert png.startswith(b"\x89PNG")
