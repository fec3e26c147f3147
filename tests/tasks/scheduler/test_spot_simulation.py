from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from serving.errors import BadWorkload
from tasks.scheduler.spot_simulation import SpotAvailability, cut_windows, read_availability, simulate_spot_run
from tasks.scheduler.workload import Spot
from tests.tasks.scheduler.values import HOUR, availability


def test_traces_are_read_and_the_shorter_ends_with_spot_gone(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    lines = [{"gap_seconds": 600, "available": "1101"}, {"zone": "a", "gap_seconds": 600, "available": "01"}]
    path.write_text("\n".join(map(json.dumps, lines)))

    found = read_availability(Spot(trace=str(path)))

    assert [[True, True, False, True], [False, True, False, False]] == found.spot_NT.tolist()
    assert 600 == found.tick_seconds


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"same gap_seconds, got \[\]"),
        ('{"gap_seconds": 600}', "Line 1 of .* must be a JSON object"),
        ('{"gap_seconds": 0, "available": "1"}', "Line 1 of"),
        ('{"gap_seconds": 60, "available": "102"}', "Line 1 of"),
        ("not json", "Line 1 of"),
        ('{"gap_seconds": 1, "available": "1"}\n{"gap_seconds": 2, "available": "1"}', r"got \[1.0, 2.0\]"),
    ],
)
def test_a_file_without_traces_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_text(content)

    with pytest.raises(BadWorkload, match=message):
        read_availability(Spot(trace=str(path)))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadWorkload, match="must be a file"):
        read_availability(Spot(trace=str(tmp_path / "none")))


@pytest.mark.parametrize(("per_day", "gap"), [(0, 20), (2, 20), (24, 10)])
def test_drawn_spot_is_interrupted_as_often_and_as_long_as_configured(per_day: float, gap: float) -> None:
    found = read_availability(Spot(interruptions_per_day=per_day, gap_minutes=gap))

    expected = per_day * gap / 1440 / (1 + per_day * gap / 1440)
    assert expected == pytest.approx(1 - found.spot_NT.mean(), abs=0.01)


def always(up: bool) -> SpotAvailability:  # noqa: FBT001 - it is all there is to say
    return SpotAvailability(spot_NT=np.full((3, 500), up), tick_seconds=60.0)


def test_spot_that_is_always_available_is_all_that_is_paid_for() -> None:
    found = simulate_spot_run(2 * HOUR, 4 * HOUR, 60.0, 3.0, always(up=True))

    assert found is not None
    assert (2 * HOUR + 60) / 3 == pytest.approx(found.paid_seconds)
    assert 0 == found.late_share
    assert 2 * HOUR <= found.seconds_p50 <= 2 * HOUR + 400


def test_on_demand_is_in_time_where_spot_is_never_available() -> None:
    found = simulate_spot_run(2 * HOUR, 4 * HOUR, 60.0, 3.0, always(up=False))

    assert found is not None
    assert 2 * HOUR + 60 == pytest.approx(found.paid_seconds)
    assert 0 == found.late_share
    assert found.seconds_p99 <= 4 * HOUR


def test_the_cost_lies_between_where_spot_comes_and_goes() -> None:
    found = simulate_spot_run(2 * HOUR, 5 * HOUR, 60.0, 3.0, availability())

    assert found is not None
    assert 2 * HOUR / 3 < found.paid_seconds < 2 * HOUR + 60
    assert 0 == found.late_share


def test_a_deadline_without_slack_for_two_changeovers_is_not_for_spot() -> None:
    assert simulate_spot_run(2 * HOUR, HOUR, 60.0, 3.0, always(up=True)) is None
    assert simulate_spot_run(2 * HOUR, 2 * HOUR + 90, 60.0, 3.0, always(up=True)) is None


@pytest.mark.parametrize(("tick", "ticks"), [(60.0, 10), (150.0, 7), (20.0, 30), (600.0, 200)])
def test_windows_hold_what_the_traces_hold(tick: float, ticks: int) -> None:
    spot_NT = np.zeros((2, 500), dtype=bool)
    spot_NT[0] = True

    found = cut_windows(SpotAvailability(spot_NT=spot_NT, tick_seconds=60.0), tick, ticks)

    assert ticks == found.shape[1]
    assert {(True,), (False,)} == {tuple(set(row.tolist())) for row in found}
