from __future__ import annotations

import numpy as np
import pytest

from tasks.scheduler.availability import Availability
from tasks.scheduler.simulate_spot import spot_run, windows
from tests.tasks.scheduler.values import HOUR, availability


def always(up: bool) -> Availability:  # noqa: FBT001 - it is all there is to say
    return Availability(spot_NT=np.full((3, 500), up), tick_seconds=60.0)


def test_where_spot_is_always_there_it_is_all_that_is_paid_for() -> None:
    found = spot_run(2 * HOUR, 4 * HOUR, 60.0, 3.0, always(up=True))

    assert found is not None
    assert (2 * HOUR + 60) / 3 == pytest.approx(found.paid_seconds)
    assert 0 == found.late
    assert 2 * HOUR <= found.seconds_p50 <= 2 * HOUR + 400


def test_where_spot_is_never_there_on_demand_is_and_in_time() -> None:
    found = spot_run(2 * HOUR, 4 * HOUR, 60.0, 3.0, always(up=False))

    assert found is not None
    assert 2 * HOUR + 60 == pytest.approx(found.paid_seconds)
    assert 0 == found.late
    assert found.seconds_p99 <= 4 * HOUR


def test_where_it_comes_and_goes_it_lies_between() -> None:
    found = spot_run(2 * HOUR, 5 * HOUR, 60.0, 3.0, availability())

    assert found is not None
    assert 2 * HOUR / 3 < found.paid_seconds < 2 * HOUR + 60
    assert 0 == found.late


def test_a_deadline_without_room_for_two_changeovers_is_none_for_spot() -> None:
    assert spot_run(2 * HOUR, HOUR, 60.0, 3.0, always(up=True)) is None
    assert spot_run(2 * HOUR, 2 * HOUR + 90, 60.0, 3.0, always(up=True)) is None


@pytest.mark.parametrize(("tick", "ticks"), [(60.0, 10), (150.0, 7), (20.0, 30), (600.0, 200)])
def test_windows_hold_what_the_traces_hold(tick: float, ticks: int) -> None:
    spot_NT = np.zeros((2, 500), dtype=bool)
    spot_NT[0] = True

    found = windows(Availability(spot_NT=spot_NT, tick_seconds=60.0), tick, ticks)

    assert ticks == found.shape[1]
    assert {(True,), (False,)} == {tuple(set(row.tolist())) for row in found}
