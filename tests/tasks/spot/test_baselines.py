from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tasks.spot.baselines import UniformProgress, greedy
from tasks.spot.replay import Job, replay
from tasks.spot.situation import Place
from tests.tasks.spot.situations import HOUR, TERMS, jobs, seen, traces

# Ten hours of work in twenty: half an hour's work falls due in each hour.
UNIFORM = UniformProgress(10 * HOUR, 20 * HOUR)


def test_greedy_takes_spot_and_else_waits_until_the_last_moment() -> None:
    assert Place.SPOT == greedy(seen(spot_up=True), TERMS)
    assert Place.IDLE == greedy(seen(), TERMS)
    assert Place.IDLE == greedy(seen(left_seconds=10 * HOUR + 2 * 720 + 60), TERMS)
    assert Place.ON_DEMAND == greedy(seen(left_seconds=10 * HOUR + 2 * 720 + 59), TERMS)


def test_at_the_last_moment_spot_is_kept_but_no_longer_taken() -> None:
    late = {"left_seconds": 10 * HOUR + 720, "spot_up": True}

    assert Place.ON_DEMAND == greedy(seen(**late), TERMS)
    assert Place.SPOT == greedy(seen(place=Place.SPOT, **late), TERMS)
    assert Place.ON_DEMAND == greedy(seen(place=Place.SPOT, **late | {"spot_up": False}), TERMS)


@pytest.mark.parametrize(
    ("situation", "place"),
    [
        # Five hours on, five of the work are due in ten.
        ({"work_seconds": 7.5 * HOUR}, Place.IDLE),
        ({"work_seconds": 7.6 * HOUR}, Place.ON_DEMAND),
        ({"work_seconds": 7.6 * HOUR, "spot_up": True}, Place.SPOT),
        # From on-demand only once work has reached where the line is in two changeovers, 24 min on: 12 min more.
        ({"work_seconds": 7.35 * HOUR, "spot_up": True, "place": Place.ON_DEMAND}, Place.ON_DEMAND),
        ({"work_seconds": 7.35 * HOUR, "place": Place.ON_DEMAND}, Place.ON_DEMAND),
        ({"work_seconds": 7.3 * HOUR, "spot_up": True, "place": Place.ON_DEMAND}, Place.SPOT),
        ({"work_seconds": 7.3 * HOUR, "place": Place.ON_DEMAND}, Place.IDLE),
        ({"work_seconds": 7.6 * HOUR, "spot_up": True, "place": Place.SPOT}, Place.SPOT),
    ],
)
def test_uniform_progress_keeps_to_its_line(situation: dict[str, Any], place: Place) -> None:
    assert place == UNIFORM(seen(left_seconds=15 * HOUR, **situation), TERMS)


def test_both_stop_when_the_work_is_done() -> None:
    done = seen(work_seconds=0.0, spot_up=True, place=Place.SPOT)

    assert [Place.IDLE, Place.IDLE] == [int(greedy(done, TERMS)), int(UNIFORM(done, TERMS))]


@settings(deadline=None, max_examples=150)
@given(st.data(), jobs())
def test_neither_is_late_on_any_trace(data: st.DataObject, job: Job) -> None:
    spot_NT: NDArray[np.bool_] = data.draw(traces(ticks=40))
    uniform = UniformProgress(job.work_seconds, job.deadline_seconds)

    assert not replay(greedy, spot_NT, job).late_N.any()
    assert not replay(uniform, spot_NT, job).late_N.any()
