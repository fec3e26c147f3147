from __future__ import annotations

import json
from pathlib import Path

import pytest

from serving.errors import BadWorkload
from tasks.scheduler.availability import read_availability
from tasks.scheduler.workload import Spot


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
def test_what_holds_no_traces_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_text(content)

    with pytest.raises(BadWorkload, match=message):
        read_availability(Spot(trace=str(path)))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadWorkload, match="must be a file"):
        read_availability(Spot(trace=str(tmp_path / "none")))


@pytest.mark.parametrize(("per_day", "gap"), [(0, 20), (2, 20), (24, 10)])
def test_spot_is_gone_as_often_and_as_long_as_it_is_said_to_be(per_day: float, gap: float) -> None:
    found = read_availability(Spot(interruptions_per_day=per_day, gap_minutes=gap))

    expected = per_day * gap / 1440 / (1 + per_day * gap / 1440)
    assert expected == pytest.approx(1 - found.spot_NT.mean(), abs=0.01)
